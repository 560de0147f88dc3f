//! What the targets of all image formats share.

use cnnrs::image::{Format, Image, Limits, ReadOptions, Size, Truncated, decode, decode_with};
use libfuzzer_sys::Corpus;

/// Small enough that a run stays fast and a forged header is refused; large enough for every code path.
const LIMITS: Limits = Limits { pixels: 1 << 20, bytes: 1 << 20 };

/// Panics, sanitizer reports and memory over libFuzzer's limit are the findings. libFuzzer's hook aborts on a panic
/// before `decode` can catch it.
pub fn decode_one(bytes: &[u8], format: Format) -> Corpus {
    if Format::of(bytes) != Some(format) {
        return Corpus::Reject;
    }
    let mut image = Image::default();
    let plain = decode(bytes, &LIMITS, &mut image).is_ok();
    if plain {
        assert_eq!(image.data.len(), 4 * image.width * image.height);
        assert!(image.width * image.height > 0);
    }
    let scaled = Some(Size::Exact { height: 5, width: 9 });
    let options = ReadOptions { limits: LIMITS, exif: true, truncated: Truncated::Accept, scaled, ..ReadOptions::default() };
    let seen = decode_with(bytes, &options, &mut image);
    match &seen {
        Ok(seen) => assert!((1..=8).contains(&seen.orientation)),
        // Accepting more never refuses what was read.
        Err(error) => assert!(!plain, "{error}"),
    }
    Corpus::Keep
}
