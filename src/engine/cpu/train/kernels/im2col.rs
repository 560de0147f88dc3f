//! Convolution as a matrix product: every window becomes a column.

use std::ops::Range;

use crate::engine::cpu::common::geometry::Window;

/// Output positions along `axis` whose input for kernel element `k` lies inside, and the first one's input position.
fn inside(w: &Window, axis: usize, k: usize) -> (Range<usize>, usize) {
    let (stride, padding, offset) = (w.stride[axis], w.padding[axis], k * w.dilation[axis]);
    let first = padding.saturating_sub(offset).div_ceil(stride);
    let end = (w.input[axis] + padding).saturating_sub(offset).div_ceil(stride).min(w.output[axis]);
    (first.min(end)..end, (first * stride + offset).saturating_sub(padding))
}

/// Writes one sample's columns, of one group; rows of `columns` are `ld` apart.
pub fn im2col(w: &Window, image: &[f32], columns: &mut [f32], ld: usize) {
    let ([height, width], [out_h, out_w]) = (w.input, w.output);
    let mut row = 0;
    for plane in image.chunks_exact(height * width).take(w.group_channels()) {
        for ky in 0..w.kernel[0] {
            let (ys, y0) = inside(w, 0, ky);
            for kx in 0..w.kernel[1] {
                let (xs, x0) = inside(w, 1, kx);
                let out = &mut columns[row * ld..row * ld + out_h * out_w];
                out[..ys.start * out_w].fill(0.0);
                out[ys.end * out_w..].fill(0.0);
                for (i, line) in out[ys.start * out_w..ys.end * out_w].chunks_exact_mut(out_w).enumerate() {
                    let source = &plane[(y0 + i * w.stride[0]) * width..][..width];
                    line[..xs.start].fill(0.0);
                    line[xs.end..].fill(0.0);
                    let line = &mut line[xs.clone()];
                    match w.stride[1] {
                        1 => copy(line, &source[x0..]),
                        stride => line
                            .iter_mut()
                            .zip(source[x0.min(width)..].iter().step_by(stride))
                            .for_each(|(l, s)| *l = *s),
                    }
                }
                row += 1;
            }
        }
    }
}

/// A loop, not `memcpy`: the rows are short and a call costs more than they do.
#[inline(always)]
fn copy(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(t, f)| *t = *f);
}

/// The transpose of [`im2col`]: adds every column's elements back to where they came from.
pub fn col2im(w: &Window, columns: &[f32], ld: usize, image: &mut [f32]) {
    let ([height, width], [out_h, out_w]) = (w.input, w.output);
    let mut row = 0;
    for plane in image.chunks_exact_mut(height * width).take(w.group_channels()) {
        for ky in 0..w.kernel[0] {
            let (ys, y0) = inside(w, 0, ky);
            for kx in 0..w.kernel[1] {
                let (xs, x0) = inside(w, 1, kx);
                let from = &columns[row * ld..row * ld + out_h * out_w];
                for (i, line) in from[ys.start * out_w..ys.end * out_w].chunks_exact(out_w).enumerate() {
                    let target = &mut plane[(y0 + i * w.stride[0]) * width..][..width];
                    let line = &line[xs.clone()];
                    match w.stride[1] {
                        1 => target[x0.min(width)..].iter_mut().zip(line).for_each(|(t, l)| *t += *l),
                        stride => {
                            target[x0.min(width)..].iter_mut().step_by(stride).zip(line).for_each(|(t, l)| *t += *l)
                        }
                    }
                }
                row += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Pair;

    /// `image` value under kernel element (ky, kx) of output (y, x), zero outside.
    fn at(w: &Window, image: &[f32], c: usize, k: Pair, o: Pair) -> f32 {
        let pos = |a: usize| (o[a] * w.stride[a] + k[a] * w.dilation[a]).checked_sub(w.padding[a]);
        match (pos(0), pos(1)) {
            (Some(y), Some(x)) if y < w.input[0] && x < w.input[1] => image[(c * w.input[0] + y) * w.input[1] + x],
            _ => 0.0,
        }
    }

    #[test]
    fn columns_hold_the_windows_and_col2im_is_the_transpose() {
        for (kernel, stride, padding, dilation) in [
            ([3, 3], [1, 1], [1, 1], [1, 1]),
            ([5, 3], [2, 3], [2, 0], [1, 2]),
            ([1, 1], [2, 2], [0, 0], [1, 1]),
            ([3, 3], [2, 2], [3, 4], [2, 3]),
            ([7, 7], [2, 2], [3, 3], [1, 1]),
        ] {
            let input = [9, 11];
            let out = |a: usize| (input[a] + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1) / stride[a] + 1;
            let output = [out(0), out(1)];
            let (channels, out_channels, groups) = (2, 1, 1);
            let w = Window { channels, out_channels, groups, kernel, stride, padding, dilation, input, output };
            let image: Vec<f32> = (0..2 * 99).map(|i| (i * 7 % 31) as f32 - 15.0).collect();
            let ld = w.pixels() + 3;
            let mut columns = vec![-1.0; w.depth() * ld];
            im2col(&w, &image, &mut columns, ld);
            let (mut row, mut dot) = (0, 0.0);
            for c in 0..2 {
                for ky in 0..kernel[0] {
                    for kx in 0..kernel[1] {
                        for y in 0..w.output[0] {
                            for x in 0..w.output[1] {
                                let value = columns[row * ld + y * w.output[1] + x];
                                assert_eq!(value, at(&w, &image, c, [ky, kx], [y, x]));
                                dot += value * value;
                            }
                        }
                        row += 1;
                    }
                }
            }
            // <im2col(x), im2col(x)> = <x, col2im(im2col(x))>, exactly: small integers.
            let mut back = vec![0.0; image.len()];
            col2im(&w, &columns, ld, &mut back);
            assert_eq!(image.iter().zip(&back).map(|(a, b)| a * b).sum::<f32>(), dot);
        }
    }
}
