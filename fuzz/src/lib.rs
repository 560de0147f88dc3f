//! What the targets of all image formats share.

use cnnrs::image::{Format, Image, Limits, decode};
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
    if decode(bytes, &LIMITS, &mut image).is_ok() {
        assert_eq!(image.data.len(), 4 * image.width * image.height);
        assert!(image.width * image.height > 0);
    }
    Corpus::Keep
}
