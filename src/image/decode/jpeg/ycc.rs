//! 4:2:0 to pixels with AVX-512: libjpeg's "fancy" upsampling (a triangle filter) and its fixed-point conversion to RGB in
//! one go.

use std::arch::x86_64::*;

/// Chroma columns per round, half as many as pixels.
const COLUMNS: usize = 32;

/// What rows of chroma need while they are added: two components, a column more at each side.
#[derive(Debug, Default)]
pub struct Sums {
    values: Vec<i16>,
    /// Of one component.
    length: usize,
}

impl Sums {
    pub fn reshape(&mut self, columns: usize) {
        self.length = columns.next_multiple_of(COLUMNS) + 2 * COLUMNS;
        self.values.resize(2 * self.length, 0);
    }
}

/// One row: the luma samples, and of both chroma components the nearest row and the one on the other side.
pub struct Row<'a> {
    pub luma: &'a [u8],
    pub near: [&'a [u8]; 2],
    pub far: [&'a [u8]; 2],
}

/// `row` to the RGBX pixels of `out`.
pub fn pixels(row: &Row, sums: &mut Sums, out: &mut [u8]) {
    let width = out.len() / 4;
    let columns = width.div_ceil(2);
    let padded = columns.next_multiple_of(COLUMNS);
    assert!(super::idct::available() && row.luma.len() >= 2 * padded && out.len() == 4 * width && width > 0);
    assert!(row.near.iter().chain(&row.far).all(|samples| samples.len() >= padded));
    assert!(sums.length >= padded + 2 * COLUMNS && sums.values.len() >= 2 * sums.length);
    // SAFETY: the instructions are there and the lengths suffice (just asserted).
    unsafe { row_of(row, columns, &mut sums.values, sums.length, out) }
}

/// # Safety
/// The instructions of [`super::idct::available`]; all that [`pixels`] asserts.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
unsafe fn row_of(row: &Row, columns: usize, sums: &mut [i16], length: usize, out: &mut [u8]) {
    let mut from = [sums.as_ptr(); 2];
    for (component, sums) in sums.chunks_exact_mut(length).take(2).enumerate() {
        let (near, far) = (row.near[component], row.far[component]);
        for x in (0..columns).step_by(COLUMNS) {
            // SAFETY: the samples and sums have all columns up to the next multiple.
            unsafe {
                let near = _mm512_cvtepu8_epi16(_mm256_loadu_si256(near.as_ptr().add(x).cast()));
                let far = _mm512_cvtepu8_epi16(_mm256_loadu_si256(far.as_ptr().add(x).cast()));
                let sum = _mm512_add_epi16(_mm512_add_epi16(near, far), _mm512_slli_epi16::<1>(near));
                _mm512_storeu_si512(sums.as_mut_ptr().add(COLUMNS + x).cast(), sum);
            }
        }
        // At the edges the column itself stands in for its neighbour.
        sums[COLUMNS - 1] = sums[COLUMNS];
        sums[COLUMNS + columns] = sums[COLUMNS + columns - 1];
        from[component] = sums.as_ptr();
    }
    let width = out.len() / 4;
    let (seven, eight, center) = (_mm512_set1_epi16(7), _mm512_set1_epi16(8), _mm512_set1_epi16(128));
    let low_byte = _mm512_set1_epi16(0xff);
    // So that what is unpacked within lanes at the end lies in order.
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for x in (0..columns).step_by(COLUMNS) {
        // Chroma of the left and of the right pixel of each column, minus 128: blue, then red.
        let mut chroma = [[center; 2]; 2];
        for (sums, chroma) in from.iter().zip(&mut chroma) {
            // SAFETY: a column more at each side.
            let (last, this, next) = unsafe {
                let at = sums.add(COLUMNS + x);
                (
                    _mm512_loadu_si512(at.sub(1).cast()),
                    _mm512_loadu_si512(at.cast()),
                    _mm512_loadu_si512(at.add(1).cast()),
                )
            };
            let three = _mm512_add_epi16(this, _mm512_slli_epi16::<1>(this));
            let left = _mm512_add_epi16(_mm512_add_epi16(three, last), eight);
            let right = _mm512_add_epi16(_mm512_add_epi16(three, next), seven);
            for (chroma, sum) in chroma.iter_mut().zip([left, right]) {
                let value = _mm512_sub_epi16(_mm512_srli_epi16::<4>(sum), center);
                *chroma = _mm512_permutexvar_epi32(order, value);
            }
        }
        let [blue, red] = chroma;
        // SAFETY: the luma has two samples for each column.
        let luma = unsafe { _mm512_loadu_si512(row.luma.as_ptr().add(2 * x).cast()) };
        let luma = _mm512_permutexvar_epi32(order, luma);
        let left = rgb(_mm512_and_si512(luma, low_byte), blue[0], red[0]);
        let right = rgb(_mm512_srli_epi16::<8>(luma), blue[1], red[1]);
        let r = _mm512_packus_epi16(left[0], right[0]);
        let g = _mm512_packus_epi16(left[1], right[1]);
        let b = _mm512_packus_epi16(left[2], right[2]);
        let full = _mm512_set1_epi8(-1);
        let (rg, bx) = (_mm512_unpacklo_epi8(r, g), _mm512_unpacklo_epi8(b, full));
        let left = [_mm512_unpacklo_epi16(rg, bx), _mm512_unpackhi_epi16(rg, bx)];
        let (rg, bx) = (_mm512_unpackhi_epi8(r, g), _mm512_unpackhi_epi8(b, full));
        let right = [_mm512_unpacklo_epi16(rg, bx), _mm512_unpackhi_epi16(rg, bx)];
        for half in 0..2 {
            let quarters =
                [_mm512_unpacklo_epi32(left[half], right[half]), _mm512_unpackhi_epi32(left[half], right[half])];
            for (i, pixels) in quarters.into_iter().enumerate() {
                let at = 2 * x + 32 * half + 16 * i;
                let count = width.saturating_sub(at).min(16);
                // SAFETY: `count` pixels lie before the end of the row.
                unsafe {
                    let to = out.as_mut_ptr().wrapping_add(4 * at);
                    _mm512_mask_storeu_epi32(to.cast(), ((1_u32 << count) - 1) as __mmask16, pixels);
                }
            }
        }
    }
}

/// Red, green and blue before they are clipped, from luma and chroma minus 128.
///
/// With 16 fraction bits, as libjpeg: `y + 91881 cr`, `y - 22554 cb - 46802 cr` and `y + 116130 cb`, rounded; what
/// exceeds 16 bits is taken out as whole multiples of the chroma.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn rgb(y: __m512i, cb: __m512i, cr: __m512i) -> [__m512i; 3] {
    // (26345 cr + 2^15) >> 16 in two steps: the product is odd.
    let part = _mm512_mulhi_epi16(_mm512_slli_epi16::<1>(cr), _mm512_set1_epi16(26345));
    let part = _mm512_srai_epi16::<1>(_mm512_add_epi16(part, _mm512_set1_epi16(1)));
    let red = _mm512_add_epi16(_mm512_add_epi16(y, cr), part);
    let part = _mm512_mulhrs_epi16(cb, _mm512_set1_epi16(-14942 / 2));
    let blue = _mm512_add_epi16(_mm512_add_epi16(y, _mm512_slli_epi16::<1>(cb)), part);
    let weights = _mm512_set1_epi32((65536 - 46802) << 16 | -22554 & 0xffff);
    let half = _mm512_set1_epi32(1 << 15);
    let low = _mm512_dpwssd_epi32(half, _mm512_unpacklo_epi16(cb, cr), weights);
    let high = _mm512_dpwssd_epi32(half, _mm512_unpackhi_epi16(cb, cr), weights);
    let part = _mm512_packs_epi32(_mm512_srai_epi32::<16>(low), _mm512_srai_epi32::<16>(high));
    let green = _mm512_add_epi16(_mm512_sub_epi16(y, cr), part);
    [red, green, blue]
}
