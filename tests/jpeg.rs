//! Our decoders against libjpeg's: same pixels, same verdicts; decoding at a smaller scale.
#![allow(clippy::unwrap_used)]

use cnnrs::image::{Entropy, Image, Limits, ReadOptions, Size, decode, decode_jpeg, decode_with};
use proptest::prelude::*;
use turbojpeg::{Compressor, PixelFormat, Subsamp};

const SUBSAMPLINGS: [Subsamp; 5] = [Subsamp::None, Subsamp::Sub2x1, Subsamp::Sub2x2, Subsamp::Sub1x2, Subsamp::Gray];

/// Smooth, noisy or flat, so that short and long codes, runs and empty blocks all occur.
fn jpeg(
    width: usize,
    height: usize,
    quality: i32,
    subsampling: Subsamp,
    optimize: bool,
    noise: u64,
    seed: u64,
) -> Vec<u8> {
    let mut state = seed | 1;
    let mut pixels = Vec::with_capacity(3 * width * height);
    for i in 0..3 * width * height {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let smooth = (i / 3 % width * 5 + i / (3 * width) * 3) as u64 % 256;
        pixels.push((smooth.wrapping_add(if noise == 0 { 0 } else { state % noise }) % 256) as u8);
    }
    let mut compressor = Compressor::new().unwrap();
    compressor.set_quality(quality).unwrap();
    compressor.set_subsamp(subsampling).unwrap();
    compressor.set_optimize(optimize).unwrap();
    let image =
        turbojpeg::Image { pixels: pixels.as_slice(), width, pitch: 3 * width, height, format: PixelFormat::RGB };
    compressor.compress_to_vec(image).unwrap()
}

/// What libjpeg and ours make of `bytes`, and whether ours decided.
fn both(bytes: &[u8], ours: Entropy) -> (Result<Image, String>, Result<Image, String>, Option<Entropy>) {
    let mut own = Image::default();
    let mut reference = Image::default();
    let limits = Limits { pixels: 1 << 22, ..Limits::default() };
    let outcome = decode_jpeg(ours, bytes, &limits, None, &mut own);
    let decided = outcome.as_ref().ok().copied().filter(|&used| used != Entropy::Libjpeg);
    let expected = decode_jpeg(Entropy::Libjpeg, bytes, &limits, None, &mut reference);
    (outcome.map(|_| own).map_err(|e| e.to_string()), expected.map(|_| reference).map_err(|e| e.to_string()), decided)
}

const OURS: [Entropy; 2] = [Entropy::Own, Entropy::Whole];

/// Same pixels, or the same words why there are none.
fn agree(bytes: &[u8]) {
    for ours in OURS {
        match both(bytes, ours) {
            (Ok(own), Ok(reference), _) => assert!(own.data == reference.data, "{ours:?}"),
            (own, reference, _) => assert_eq!(own.err(), reference.err(), "{ours:?}"),
        }
    }
}

/// Where the quantization tables of 8 bits lie.
fn quantizations(bytes: &[u8]) -> Vec<usize> {
    (0..bytes.len() - 69).filter(|&at| bytes[at..].starts_with(&[0xff, 0xdb, 0, 67])).map(|at| at + 5).collect()
}

prop_compose! {
    fn files()(
        (width, height) in (1..200usize, 1..120usize),
        quality in 1..=100i32,
        subsampling in prop::sample::select(&SUBSAMPLINGS[..]),
        optimize: bool,
        noise in prop::sample::select(&[0, 8, 64, 256][..]),
        seed: u64,
    ) -> Vec<u8> {
        jpeg(width, height, quality, subsampling, optimize, noise, seed)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn sound_files_are_ours_and_equal(bytes in files()) {
        for ours in OURS {
            let (own, reference, decided) = both(&bytes, ours);
            prop_assert!(decided.is_some(), "gave up on a sound file");
            let (own, reference) = (own.unwrap(), reference.unwrap());
            prop_assert_eq!((own.width, own.height), (reference.width, reference.height));
            prop_assert!(own.data == reference.data);
        }
    }

    /// Samples outside of the range, and coefficients outside of 16 bits: libjpeg-turbo's vector code wraps and saturates.
    #[test]
    fn any_quantization_gives_the_same_pixels(
        (width, height) in (5..150usize, 1..70usize),
        noise in prop::sample::select(&[0, 64, 256][..]),
        quality in 50..=100i32,
        values in prop::collection::vec(prop_oneof![1..=255u8, 200..=255u8], 64),
        seed: u64,
    ) {
        let mut bytes = jpeg(width, height, quality, Subsamp::Sub2x2, false, noise, seed);
        let tables = quantizations(&bytes);
        prop_assert_eq!(tables.len(), 2);
        for at in tables {
            bytes[at..at + 64].copy_from_slice(&values);
        }
        agree(&bytes);
    }

    #[test]
    fn damaged_files_get_libjpegs_verdict(
        bytes in files(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        end in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = bytes;
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(end) = end {
            bytes.truncate(end.index(bytes.len()));
        }
        agree(&bytes);
    }

    #[test]
    fn a_scaled_image_is_large_enough_and_no_larger_than_needed(
        (width, height) in (1..400usize, 1..300usize),
        (new_width, new_height) in (1..200usize, 1..200usize),
    ) {
        let bytes = jpeg(width, height, 90, Subsamp::Sub2x2, false, 0, 1);
        let mut image = Image::default();
        let size = Size::Exact { height: new_height, width: new_width };
        decode_with(&bytes, &ReadOptions { scaled: Some(size), ..ReadOptions::default() }, &mut image).unwrap();
        let by = [1, 2, 4, 8].into_iter().find(|d| image.width == width.div_ceil(*d) && image.height == height.div_ceil(*d));
        let by = by.unwrap();
        prop_assert!(by == 1 || image.width >= new_width && image.height >= new_height);
        prop_assert!(by == 8 || width < 2 * by * new_width || height < 2 * by * new_height);
        if by == 1 {
            let mut whole = Image::default();
            decode(&bytes, &Limits::default(), &mut whole).unwrap();
            prop_assert!(whole.data == image.data);
        }
    }
}

/// On a processor with the instructions the usual photo must not fall back to libjpeg unnoticed.
#[test]
#[cfg(target_arch = "x86_64")]
fn who_decodes() {
    let has = is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("bmi2");
    for subsampling in SUBSAMPLINGS {
        let bytes = jpeg(60, 50, 90, subsampling, false, 64, 7);
        let whole = if has && subsampling == Subsamp::Sub2x2 { Entropy::Whole } else { Entropy::Own };
        assert_eq!(both(&bytes, Entropy::Whole).2, Some(whole), "{subsampling:?}");
        assert_eq!(both(&bytes, Entropy::Own).2, Some(Entropy::Own));
    }
}
