//! Vector kernels against the scalar reference, and what operations must keep.
#![allow(clippy::unwrap_used)]

use std::collections::HashSet;

use cnnrs::error::Error;
use cnnrs::image::{
    Filter, Finish, Image, Key, Layout, Limits, Normalizer, Op, PadMode, PillowOrder, ReadOptions, ResizePath, Scratch,
    Size, Transform, Truncated, Window, brightness, center_crop, contrast, crop, decode, decode_with, flip_horizontal,
    flip_vertical, grayscale, invert, pad, posterize, resize_on, rotate, saturation, sharpness, solarize,
};
use proptest::prelude::*;

const FILTERS: [Filter; 6] =
    [Filter::Nearest, Filter::Bilinear, Filter::Bicubic, Filter::Box, Filter::Hamming, Filter::Lanczos];

/// Bytes that look random and come back for the same seed.
fn noise(width: usize, height: usize, layout: Layout, seed: u64) -> Image {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Half of them extreme, so that filters overshoot.
        match state % 4 {
            0 => 0,
            1 => 255,
            _ => (state >> 32) as u8,
        }
    };
    let data = (0..width * height * layout.bytes_per_pixel()).map(|_| next()).collect();
    Image { width, height, layout, data }
}

fn layouts() -> impl Strategy<Value = Layout> {
    prop_oneof![Just(Layout::Rgbx), Just(Layout::Gray)]
}

/// Small sides find the edges, large ones long filters.
fn side(top: usize) -> impl Strategy<Value = usize> {
    prop_oneof![1..24usize, 1..=top]
}

/// The mean of each block of `factor` x `factor`, along the rows first, halves rounded up: what `Image.Resampling.BOX` is
/// documented to compute.
fn shrunk(image: &Image, factor: usize) -> Vec<u8> {
    let pixel = image.layout.bytes_per_pixel();
    let (width, height) = (image.width / factor, image.height / factor);
    let mean = |values: &mut dyn Iterator<Item = u8>| {
        let sum: usize = values.map(usize::from).sum();
        ((2 * sum + factor) / (2 * factor)) as u8
    };
    let along = |y: usize, x: usize, c: usize| {
        mean(&mut (0..factor).map(|i| image.data[(y * image.width + x * factor + i) * pixel + c]))
    };
    let mut out = Vec::new();
    for y in 0..height {
        for x in 0..width {
            out.extend((0..pixel).map(|c| mean(&mut (0..factor).map(|i| along(y * factor + i, x, c)))));
        }
    }
    out
}

#[test]
fn every_path_of_this_processor_takes_means_of_blocks() {
    let paths = ResizePath::all();
    assert_eq!(paths.last(), Some(&ResizePath::best()));
    #[cfg(target_arch = "x86_64")]
    assert_eq!(ResizePath::best() == ResizePath::Scalar, !is_x86_feature_detected!("avx2"), "vectors where they are");
    // Powers of two: their weights are exact.
    for (factor, layout) in
        [(2, Layout::Rgbx), (4, Layout::Rgbx), (8, Layout::Rgbx), (2, Layout::Gray), (8, Layout::Gray)]
    {
        let original = noise(37 * factor, 23 * factor, layout, 11);
        for &path in &paths {
            let mut image = original.clone();
            resize_on(path, &mut image, 23, 37, Filter::Box, PillowOrder::HorizontalFirst).unwrap();
            assert!(image.data == shrunk(&original, factor), "{path:?} {factor} {layout:?}");
        }
    }
}

#[test]
fn a_row_that_no_window_reads() {
    // 1796 / 136: rounding errors part some of the box filter's windows by one row.
    for layout in [Layout::Rgbx, Layout::Gray] {
        let original = noise(40, 1796, layout, 1);
        let mut expected = original.clone();
        resize_on(ResizePath::Scalar, &mut expected, 1796, 20, Filter::Box, PillowOrder::HorizontalFirst).unwrap();
        resize_on(ResizePath::Scalar, &mut expected, 136, 20, Filter::Box, PillowOrder::HorizontalFirst).unwrap();
        for path in ResizePath::all() {
            let mut image = original.clone();
            resize_on(path, &mut image, 136, 20, Filter::Box, PillowOrder::HorizontalFirst).unwrap();
            assert!(image.data == expected.data, "{path:?} {layout:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn vector_resize_equals_scalar(
        (width, height) in (side(2000), side(2000)),
        (new_width, new_height) in (side(512), side(512)),
        filter in prop::sample::select(&FILTERS[..]),
        rows_first: bool,
        layout in layouts(),
        seed: u64,
    ) {
        let order = if rows_first { PillowOrder::HorizontalFirst } else { PillowOrder::Pillow13 };
        let mut scalar = noise(width, height, layout, seed);
        let original = scalar.clone();
        resize_on(ResizePath::Scalar, &mut scalar, new_height, new_width, filter, order).unwrap();
        for path in ResizePath::all() {
            let mut vector = original.clone();
            resize_on(path, &mut vector, new_height, new_width, filter, order).unwrap();
            prop_assert_eq!((vector.width, vector.height), (new_width, new_height));
            // The fourth byte of a pixel is nobody's, yet all paths filter it alike.
            prop_assert!(vector.data == scalar.data, "{:?}", path);
        }
    }

    #[test]
    fn resize_straight_into_the_tensor_equals_resize_then_normalize(
        (width, height) in (side(700), side(700)),
        (new_width, new_height) in (side(300), side(300)),
        filter in prop::sample::select(&FILTERS[..]),
        std in 0.05..3.0f32,
        layout in layouts(),
        seed: u64,
    ) {
        let mut image = noise(width, height, layout, seed);
        let op = Op::Resize { size: Size::Exact { height: new_height, width: new_width }, filter };
        let finish = Finish::Normalize { mean: vec![0.4], std: vec![std] };
        let transform = Transform { ops: vec![op], finish: finish.clone(), erase: None, order: PillowOrder::Pillow13 };
        let mut expected = image.clone();
        resize_on(ResizePath::Scalar, &mut expected, new_height, new_width, filter, PillowOrder::Pillow13).unwrap();
        let mut planes = vec![0.0; layout.channels() * new_width * new_height];
        Normalizer::new(&finish, layout.channels())?.planes_scalar(&expected, &mut planes);
        let mut fused = vec![0.0; planes.len()];
        transform.apply_f32(&mut image, Key::default(), &mut Scratch::default(), &mut fused)?;
        prop_assert!(fused.iter().zip(&planes).all(|(a, b)| a.to_bits() == b.to_bits()));
    }

    #[test]
    fn resizing_a_flat_image_keeps_its_color(
        (width, height) in (side(300), side(300)),
        (new_width, new_height) in (side(300), side(300)),
        filter in prop::sample::select(&FILTERS[..]),
        color: u8,
    ) {
        let mut image = Image { width, height, layout: Layout::Gray, data: vec![color; width * height] };
        resize_on(ResizePath::best(), &mut image, new_height, new_width, filter, PillowOrder::Pillow13).unwrap();
        // Weights are rounded to 22 bits: n of them miss 1 by at most n / 2^23, under half a level for n < 16000 / 255.
        prop_assert!(image.data.iter().all(|v| v.abs_diff(color) <= 1));
    }

    #[test]
    fn flipping_twice_changes_nothing((width, height) in (side(90), side(90)), layout in layouts(), seed: u64) {
        let image = noise(width, height, layout, seed);
        for flip in [flip_horizontal, flip_vertical] {
            let mut flipped = image.clone();
            flip(&mut flipped);
            prop_assert!(width.min(height) < 12 || flipped.data != image.data);
            flip(&mut flipped);
            prop_assert!(flipped.data == image.data);
        }
    }

    #[test]
    fn rotation_keeps_the_size_unless_told_to_expand(
        (width, height) in (side(60), side(60)),
        angle in -720.0..720.0f64,
        bilinear: bool,
        layout in layouts(),
    ) {
        let filter = if bilinear { Filter::Bilinear } else { Filter::Nearest };
        let image = noise(width, height, layout, 7);
        let mut out = Image::default();
        rotate(&image, angle, filter, false, None, [0; 3], &mut out)?;
        prop_assert_eq!((out.width, out.height), (width, height));
        rotate(&image, angle, filter, true, None, [0; 3], &mut out)?;
        let diagonal = (width as f64).hypot(height as f64) as usize + 3;
        prop_assert!(out.width <= diagonal && out.height <= diagonal);
    }

    #[test]
    fn four_quarter_turns_are_none((width, height) in (side(40), side(40)), layout in layouts(), seed: u64) {
        let image = noise(width, height, layout, seed);
        let (mut turned, mut next) = (image.clone(), Image::default());
        for _ in 0..4 {
            rotate(&turned, 90.0, Filter::Nearest, true, None, [0; 3], &mut next)?;
            std::mem::swap(&mut turned, &mut next);
        }
        prop_assert!(turned.data == image.data && turned.width == width);
    }

    #[test]
    fn cropping_shows_only_pixels_and_zeros(
        (width, height) in (side(40), side(40)),
        (new_width, new_height) in (side(40), side(40)),
    ) {
        let image = Image { width, height, layout: Layout::Gray, data: vec![9; width * height] };
        let mut out = Image::default();
        center_crop(&image, new_height, new_width, &mut out).unwrap();
        let kept = out.data.iter().filter(|&&v| v == 9).count();
        prop_assert_eq!(kept, width.min(new_width) * height.min(new_height));
        prop_assert_eq!(out.data.iter().filter(|&&v| v == 0).count(), new_width * new_height - kept);
    }

    #[test]
    fn vector_normalize_equals_table(
        (width, height) in (side(70), side(70)),
        mean in prop::collection::vec(-2.0..2.0f32, 3),
        std in prop::collection::vec(0.001..3.0f32, 3),
        seed: u64,
    ) {
        let image = noise(width, height, Layout::Rgbx, seed);
        let transform =
            Transform { ops: vec![], finish: Finish::Normalize { mean, std }, erase: None, order: PillowOrder::Pillow13 };
        let size = 3 * width * height;
        let (mut vector, mut table) = (vec![0f32; size], vec![1f32; size]);
        transform.finish_f32(&image, &mut Scratch::default(), &mut vector)?;
        Normalizer::new(&transform.finish, 3)?.planes_scalar(&image, &mut table);
        prop_assert!(vector.iter().map(|v| v.to_bits()).eq(table.iter().map(|v| v.to_bits())));
    }

    #[test]
    fn any_bytes_decode_or_fail_but_never_panic(magic in 0..9usize, mut bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let magics: [&[u8]; 9] = [
            b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"GIF89a", b"RIFF\x90\x01\0\0WEBPVP8 ", b"BM",
            b"II*\0\x08\0\0\0", b"P6 ", b"P2\n3 3\n255\n",
        ];
        bytes.splice(0..0, magics[magic].iter().copied());
        let result = decode(&bytes, &Limits { pixels: 1 << 20, bytes: 1 << 20 }, &mut Image::default());
        prop_assert!(!matches!(result, Err(cnnrs::error::Error::Panic(_))), "{:?}", result);
    }
}

fn photo_transform() -> Transform {
    Transform {
        ops: vec![
            Op::Resize { size: Size::Exact { height: 32, width: 24 }, filter: Filter::Bilinear },
            Op::HorizontalFlip { p: 0.5 },
            Op::Rotation { low: -30.0, high: 30.0, filter: Filter::Nearest, expand: false, center: None, fill: [0; 3] },
        ],
        finish: Finish::Normalize { mean: vec![0.485, 0.456, 0.406], std: vec![0.229, 0.224, 0.225] },
        erase: None,
        order: PillowOrder::Pillow13,
    }
}

#[test]
fn imagenet_constants_need_no_table() {
    let normalizer = Normalizer::new(&photo_transform().finish, 3).unwrap();
    let gray = Normalizer::new(&Finish::Float, 1).unwrap();
    #[cfg(target_arch = "x86_64")]
    for normalizer in [normalizer, gray] {
        assert_eq!(normalizer.is_vectorized(), is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"));
    }
}

#[test]
fn draws_follow_the_key_and_nothing_else() {
    let transform = photo_transform();
    let run = |key: Key, scratch: &mut Scratch| {
        let mut out = vec![0f32; 3 * 32 * 24];
        transform.apply_f32(&mut noise(50, 60, Layout::Rgbx, 3), key, scratch, &mut out).unwrap();
        out
    };
    let mut used = Scratch::default();
    let keys: Vec<Key> = (0..8).map(|i| Key { seed: 5, sample: i, position: 100 - i }).collect();
    let first: Vec<_> = keys.iter().map(|&key| run(key, &mut used)).collect();
    let again: Vec<_> = keys.iter().rev().map(|&key| run(key, &mut Scratch::default())).collect();
    assert!(first.iter().eq(again.iter().rev()));
    assert!(first.iter().skip(1).all(|other| *other != first[0]), "eight keys, eight angles");
    assert_ne!(run(Key { position: 0, ..keys[0] }, &mut used), first[0]);
}

#[test]
fn flips_and_angles_are_spread_as_they_should() {
    let flip = Transform {
        ops: vec![Op::HorizontalFlip { p: 0.3 }],
        finish: Finish::Uint8,
        erase: None,
        order: PillowOrder::Pillow13,
    };
    let original = Image { width: 2, height: 1, layout: Layout::Gray, data: vec![0, 1] };
    let flipped = (0..20_000)
        .filter(|&sample| {
            let mut image = original.clone();
            flip.pixels(&mut image, Key { sample, ..Key::default() }, &mut Scratch::default()).unwrap();
            image.data == [1, 0]
        })
        .count();
    // Binomial(20000, 0.3): five standard deviations are 324.
    assert!(flipped.abs_diff(6_000) < 324, "{flipped}");
}

#[test]
fn output_shapes_are_known_where_they_can_be() {
    let shape =
        |ops| Transform { ops, finish: Finish::Float, erase: None, order: PillowOrder::Pillow13 }.output_shape();
    let exact = Op::Resize { size: Size::Exact { height: 5, width: 6 }, filter: Filter::Box };
    let shorter = Op::Resize { size: Size::Shorter { edge: 10, max_size: None }, filter: Filter::Box };
    let turned =
        |expand| Op::Rotation { low: 0.0, high: 9.0, filter: Filter::Nearest, expand, center: None, fill: [0; 3] };
    assert_eq!(shape(vec![]), None);
    assert_eq!(shape(vec![exact.clone(), Op::Grayscale { channels: 1 }]), Some((1, 5, 6)));
    assert_eq!(shape(vec![shorter.clone()]), None);
    assert_eq!(shape(vec![shorter.clone(), Op::CenterCrop { height: 8, width: 9 }]), Some((3, 8, 9)));
    assert_eq!(shape(vec![exact.clone(), shorter]), Some((3, 10, 12)));
    assert_eq!(shape(vec![exact.clone(), turned(true)]), None);
    assert_eq!(shape(vec![exact, turned(false)]), Some((3, 5, 6)));
}

#[test]
fn wrong_arguments_are_told_apart() {
    let mut image = noise(4, 4, Layout::Rgbx, 1);
    let mut run = |ops: Vec<Op>, finish: Finish, room: usize| {
        let transform = Transform { ops, finish, erase: None, order: PillowOrder::Pillow13 };
        let result = transform.apply_f32(&mut image, Key::default(), &mut Scratch::default(), &mut vec![0.0; room]);
        result.unwrap_err().to_string()
    };
    assert!(run(vec![], Finish::Float, 5).contains("3 x 4 x 4"));
    let finish = Finish::Normalize { mean: vec![0.5; 2], std: vec![0.5] };
    assert!(run(vec![], finish, 48).contains("2 values in mean"));
    let finish = Finish::Normalize { mean: vec![0.5], std: vec![0.0] };
    assert!(run(vec![], finish, 48).contains("std evaluated to zero"));
    let size = Size::Shorter { edge: 8, max_size: Some(8) };
    assert!(run(vec![Op::Resize { size, filter: Filter::Box }], Finish::Float, 48).contains("strictly greater"));
    let zero = Size::Exact { height: 0, width: 4 };
    assert!(run(vec![Op::Resize { size: zero, filter: Filter::Box }], Finish::Float, 48).contains("must be > 0"));
}

#[test]
fn buffers_are_used_again() {
    let mut image = noise(300, 200, Layout::Rgbx, 1);
    let transform = photo_transform();
    let (mut scratch, mut out) = (Scratch::default(), vec![0f32; 3 * 32 * 24]);
    let source = image.clone();
    let mut round = || {
        image.data.clone_from(&source.data);
        (image.width, image.height) = (source.width, source.height);
        transform.apply_f32(&mut image, Key::default(), &mut scratch, &mut out).unwrap();
        image.data.as_ptr()
    };
    // The image and the buffers of the scratch take turns and grow to the largest size; then nothing is allocated.
    let seen: HashSet<_> = (0..8).map(|_| round()).collect();
    assert!((0..8).map(|_| round()).all(|buffer| seen.contains(&buffer)));
}

#[test]
fn gray_images_become_one_channel() {
    let mut image = Image::from_rgb(2, 1, &[255, 0, 0, 10, 20, 30]).unwrap();
    grayscale(&mut image, 1).unwrap();
    // 0.299, 0.587 and 0.114 in 16 bits: 255 * 19595 / 65536 = 76.2; (10, 20, 30) gives 18.15.
    assert_eq!((image.layout, image.data.as_slice()), (Layout::Gray, &[76, 18][..]));
    grayscale(&mut image, 3).unwrap();
    assert_eq!(image.to_packed(), [76, 76, 76, 18, 18, 18]);
}

/// Bytes that begin like an image and go on like nothing.
fn forged() -> impl Strategy<Value = Vec<u8>> {
    let magic = prop_oneof![
        Just(&b"\xff\xd8\xff\xe1"[..]),
        Just(&b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"[..]),
        Just(&b"RIFF\x40\0\0\0WEBPVP8X\x0a\0\0\0\xff"[..]),
        Just(&b"GIF89a"[..]),
        Just(&b"BM"[..]),
        Just(&b"MM\0*"[..]),
        Just(&b"P5 "[..]),
    ];
    (magic, prop::collection::vec(any::<u8>(), 0..200)).prop_map(|(magic, tail)| [magic, &tail].concat())
}

proptest! {
    #[test]
    fn accepting_more_never_refuses_and_never_panics(bytes in forged()) {
        let limits = Limits { pixels: 1 << 20, bytes: 1 << 20 };
        let mut image = Image::default();
        let plain = decode(&bytes, &limits, &mut image);
        let options = ReadOptions { limits, exif: true, truncated: Truncated::Accept, ..ReadOptions::default() };
        let accepted = decode_with(&bytes, &options, &mut image);
        prop_assert!(!matches!(plain, Err(Error::Panic(_))) && !matches!(accepted, Err(Error::Panic(_))));
        prop_assert!(plain.is_err() || accepted.is_ok());
        if let Ok(seen) = accepted {
            prop_assert_eq!(image.data.len(), 4 * image.width * image.height);
            prop_assert!((1..=8).contains(&seen.orientation));
        }
    }

    #[test]
    fn colours_without_an_effect_change_nothing(
        (width, height) in (1..20usize, 1..20usize), layout in layouts(), seed in any::<u64>(),
    ) {
        let image = noise(width, height, layout, seed);
        let mut same = image.clone();
        brightness(&mut same, 1.0);
        contrast(&mut same, 1.0);
        saturation(&mut same, 1.0);
        sharpness(&mut same, 1.0, &mut Image::default()).unwrap();
        posterize(&mut same, 8);
        solarize(&mut same, 256.0);
        invert(&mut same);
        invert(&mut same);
        prop_assert_eq!(same.to_packed(), image.to_packed());
    }

    #[test]
    fn padding_keeps_the_image_inside(
        (width, height) in (1..9usize, 1..9usize), border in prop::array::uniform4(0..20usize), layout in layouts(),
    ) {
        let image = noise(width, height, layout, 5);
        for mode in [PadMode::Constant, PadMode::Edge, PadMode::Reflect, PadMode::Symmetric] {
            let (mut padded, mut inside) = (Image::default(), Image::default());
            pad(&image, border, [1, 2, 3], mode, &mut padded).unwrap();
            let [left, top, right, bottom] = border;
            prop_assert_eq!((padded.width, padded.height), (left + width + right, top + height + bottom));
            crop(&padded, Window { top, left, height, width }, &mut inside).unwrap();
            prop_assert_eq!(inside.to_packed(), image.to_packed());
        }
    }
}

#[test]
fn groups_know_their_shape() {
    let shape =
        |ops| Transform { ops, finish: Finish::Float, erase: None, order: PillowOrder::Pillow13 }.output_shape();
    let crop = |side| Op::CenterCrop { height: side, width: side };
    let flip = Op::HorizontalFlip { p: 0.5 };
    let apply = |ops| Op::RandomApply { p: 0.5, ops };
    assert_eq!(shape(vec![crop(8), apply(vec![flip.clone(), Op::Invert])]), Some((3, 8, 8)));
    assert_eq!(shape(vec![crop(8), apply(vec![crop(7)])]), None);
    assert_eq!(shape(vec![apply(vec![crop(7)]), crop(8)]), Some((3, 8, 8)));
    let choice = |branches: Vec<Vec<Op>>| Op::RandomChoice { weights: vec![1.0; branches.len()], branches };
    assert_eq!(shape(vec![choice(vec![vec![crop(8)], vec![crop(9), crop(8)]])]), Some((3, 8, 8)));
    assert_eq!(shape(vec![choice(vec![vec![crop(8)], vec![crop(9)]])]), None);
    assert_eq!(shape(vec![crop(8), Op::RandomOrder { parts: vec![vec![flip], vec![Op::Equalize]] }]), Some((3, 8, 8)));
    assert_eq!(shape(vec![crop(8), Op::RandomOrder { parts: vec![vec![crop(7)], vec![crop(6)]] }]), None);
}
