//! The usual photo without libjpeg: baseline, 4:2:0, on processors with AVX-512. Sixteen rows at a time go from codes to
//! pixels, and nothing but the pixels leaves the first caches.
//!
//! libjpeg reads the header and checks the tables. Whatever is unsound is given up, as in `huffman`.

use std::cell::RefCell;

use super::huffman::{Huffman, has_bmi2};
use super::idct::{BLOCKS, Group, ZEROS, four_blocks};
use super::ycc::{Row, Sums, pixels};

/// Samples and blocks of an MCU.
const SIDE: usize = 16;
const MCU: usize = 6;

/// What the next file can use again.
#[derive(Default)]
struct Strip {
    /// Coefficients of a row of MCUs: two rows of luma blocks, one of each chroma component.
    groups: Vec<Group>,
    /// Whether a group has more than the first coefficient of each block.
    busy: Vec<bool>,
    /// Samples of a row of MCUs, behind the last row of the MCUs above: luma, then the chroma components.
    planes: [Vec<u8>; 3],
    sums: Sums,
}

thread_local! {
    static STRIP: RefCell<Strip> = RefCell::default();
}

pub fn available() -> bool {
    super::idct::available() && has_bmi2()
}

/// All of `source`, the file from its first code on, to RGBX pixels. `None` when it is not sound.
///
/// `huffman` must be that of three components with sampling factors 2 x 2, 1 x 1 and 1 x 1, else the pixels are wrong.
pub fn decode(
    huffman: &mut Huffman,
    source: &[u8],
    quants: &[[u16; 64]; 3],
    (width, height): (usize, usize),
    out: &mut [u8],
) -> Option<()> {
    if !available() || huffman.blocks() != MCU || out.len() != 4 * width * height {
        return None;
    }
    let mut strip = STRIP.take();
    // SAFETY: the instructions are there; an MCU has six blocks.
    let done = unsafe { strips(&mut strip, huffman, source, quants, (width, height), out) };
    STRIP.set(strip);
    done
}

/// # Safety
/// The instructions of [`available`] must be there; an MCU of `huffman` must have [`MCU`] blocks.
#[target_feature(enable = "bmi1,bmi2,lzcnt,avx512f,avx512bw,avx512vnni,avx512vbmi")]
unsafe fn strips(
    strip: &mut Strip,
    huffman: &mut Huffman,
    source: &[u8],
    quants: &[[u16; 64]; 3],
    (width, height): (usize, usize),
    out: &mut [u8],
) -> Option<()> {
    let (across, down) = (width.div_ceil(SIDE), height.div_ceil(SIDE));
    // Groups of a row of blocks: of luma, of a chroma component.
    let (wide, narrow) = ((2 * across).div_ceil(BLOCKS), across.div_ceil(BLOCKS));
    let strides = [(8 * BLOCKS * wide).next_multiple_of(64), 8 * BLOCKS * narrow];
    strip.reshape(2 * wide + 2 * narrow, strides)?;
    strip.sums.reshape(8 * across);
    let Strip { groups, busy, planes, sums } = strip;
    let rows = [0, wide, 2 * wide, 2 * wide + narrow];
    for s in 0..down {
        busy.fill(false);
        let first = groups.as_mut_ptr().cast::<i16>();
        for m in 0..across {
            // Of each block of the MCU: its group and its place there.
            let places = [
                (rows[0] + m / 2, 2 * m % BLOCKS),
                (rows[0] + m / 2, 2 * m % BLOCKS + 1),
                (rows[1] + m / 2, 2 * m % BLOCKS),
                (rows[1] + m / 2, 2 * m % BLOCKS + 1),
                (rows[2] + m / BLOCKS, m % BLOCKS),
                (rows[3] + m / BLOCKS, m % BLOCKS),
            ];
            let blocks = places.map(|(group, place)| {
                let offset = group * size_of::<Group>() / size_of::<i16>() + 8 * place;
                first.wrapping_add(offset)
            });
            // SAFETY: eight rows, 64 bytes apart, of eight zeros are at each: all groups are there, and zeros again since
            // they were read.
            let more = unsafe { huffman.next::<true>(source, &blocks)? };
            for (i, (group, _)) in places.into_iter().enumerate() {
                busy[group] |= more >> i & 1 != 0;
            }
        }
        let mut sound = true;
        for (i, (row, count)) in rows.into_iter().zip([wide, wide, narrow, narrow]).enumerate() {
            // Luma has two rows of blocks.
            let (component, y, stride) = (i.saturating_sub(1), if i == 1 { 9 } else { 1 }, strides[usize::from(i > 1)]);
            let samples = planes[component][y * stride..][..8 * stride].as_mut_ptr();
            for g in 0..count {
                // SAFETY: the instructions are there; eight rows of `stride` samples, 32 of each group.
                sound &= unsafe {
                    let samples = samples.add(8 * BLOCKS * g);
                    four_blocks(&mut groups[row + g], &quants[component], !busy[row + g], samples, stride)
                };
            }
        }
        if !sound {
            return None;
        }
        // The last row waits for the chroma below it.
        let (first, end) = ((SIDE * s).saturating_sub(1), if s + 1 == down { height } else { SIDE * (s + 1) - 1 });
        for (y, out) in (first..end).zip(out[4 * width * first..].chunks_exact_mut(4 * width)) {
            let near = y / 2;
            let far = if y % 2 == 0 { near.saturating_sub(1) } else { (near + 1).min(height.div_ceil(2) - 1) };
            let luma = &planes[0][(y + 1 - SIDE * s) * strides[0]..][..strides[0]];
            let chroma =
                |y: usize| [1, 2].map(|c: usize| &planes[c][(y + 1 - SIDE / 2 * s) * strides[1]..][..strides[1]]);
            pixels(&Row { luma, near: chroma(near), far: chroma(far) }, sums, out);
        }
        for (plane, (last, stride)) in
            planes.iter_mut().zip([(SIDE, strides[0]), (SIDE / 2, strides[1]), (SIDE / 2, strides[1])])
        {
            plane.copy_within(last * stride..(last + 1) * stride, 0);
        }
    }
    huffman.at_end(source).then_some(())
}

impl Strip {
    fn reshape(&mut self, groups: usize, strides: [usize; 2]) -> Option<()> {
        self.groups.clear();
        self.groups.try_reserve(groups).ok()?;
        self.groups.resize(groups, ZEROS);
        self.busy.resize(groups, false);
        for (plane, (rows, stride)) in
            self.planes.iter_mut().zip([(SIDE + 1, strides[0]), (SIDE / 2 + 1, strides[1]), (SIDE / 2 + 1, strides[1])])
        {
            plane.try_reserve((rows * stride).saturating_sub(plane.len())).ok()?;
            plane.resize(rows * stride, 0);
        }
        Some(())
    }
}
