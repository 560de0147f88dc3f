//! Winograd's F(m x m, 3 x 3) for m = 4 and 6 (Lavin & Gray, "Fast algorithms for convolutional neural networks",
//! arXiv:1509.09308): a tile of m x m outputs takes (m + 2)^2 products instead of 9 m^2.
//!
//! ```text
//! y = A^T [(G g G^T) * (B^T d B)] A        points 0, 1, -1, 2, -2 (and 1/2, -1/2 for m = 6), infinity
//! ```

use super::activate::{Activate, activate};
use super::lanes::{LANES, Lanes};

/// Outputs per side of a tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    Four,
    Six,
}

impl Size {
    pub fn outputs(self) -> usize {
        match self {
            Self::Four => 4,
            Self::Six => 6,
        }
    }

    /// Inputs, and products, per side of a tile.
    pub fn inputs(self) -> usize {
        self.outputs() + 2
    }

    pub fn products(self) -> usize {
        self.inputs() * self.inputs()
    }

    /// G, row by row.
    fn weight_matrix(self) -> &'static [[f64; 3]] {
        match self {
            Self::Four => &[
                [1.0 / 4.0, 0.0, 0.0],
                [-1.0 / 6.0, -1.0 / 6.0, -1.0 / 6.0],
                [-1.0 / 6.0, 1.0 / 6.0, -1.0 / 6.0],
                [1.0 / 24.0, 1.0 / 12.0, 1.0 / 6.0],
                [1.0 / 24.0, -1.0 / 12.0, 1.0 / 6.0],
                [0.0, 0.0, 1.0],
            ],
            Self::Six => &[
                [1.0, 0.0, 0.0],
                [-2.0 / 9.0, -2.0 / 9.0, -2.0 / 9.0],
                [-2.0 / 9.0, 2.0 / 9.0, -2.0 / 9.0],
                [1.0 / 90.0, 1.0 / 45.0, 2.0 / 45.0],
                [1.0 / 90.0, -1.0 / 45.0, 2.0 / 45.0],
                [32.0 / 45.0, 16.0 / 45.0, 8.0 / 45.0],
                [32.0 / 45.0, -16.0 / 45.0, 8.0 / 45.0],
                [0.0, 0.0, 1.0],
            ],
        }
    }

    /// G g G^T for W filters of 3 x 3, in float64; `out` has [`Size::products`] entries.
    #[inline(always)]
    pub fn transform_weights<const W: usize>(self, filter: &[[f64; W]; 9], out: &mut [[f64; W]]) {
        let g = self.weight_matrix();
        for (i, left) in g.iter().enumerate() {
            let mut half = [[0.0; W]; 3];
            for (x, half) in half.iter_mut().enumerate() {
                for (w, half) in half.iter_mut().enumerate() {
                    *half = left[0] * filter[x][w] + left[1] * filter[3 + x][w] + left[2] * filter[6 + x][w];
                }
            }
            for (right, out) in g.iter().zip(&mut out[i * g.len()..]) {
                for (w, out) in out.iter_mut().enumerate() {
                    *out = half[0][w] * right[0] + half[1][w] * right[1] + half[2][w] * right[2];
                }
            }
        }
    }
}

/// One side of a transform: N numbers in, M out.
trait Side<V: Lanes, const N: usize, const M: usize> {
    fn side(x: [V; N]) -> [V; M];
}

struct Input;
struct Output;
struct Derivative;
struct Filter;
struct FilterDerivative;

impl<V: Lanes> Side<V, 4, 6> for Derivative {
    #[inline(always)]
    fn side(y: [V; 4]) -> [V; 6] {
        // The transpose of `Output`.
        let (a, b) = (y[0].add(y[2]), y[1].add(y[3]));
        let c = y[2].mul_add(V::splat(4.0), y[0]);
        let d = y[3].mul_add(V::splat(8.0), y[1].add(y[1]));
        [y[0], a.add(b), a.sub(b), c.add(d), c.sub(d), y[3]]
    }
}

impl<V: Lanes> Side<V, 3, 6> for Filter {
    #[inline(always)]
    fn side(g: [V; 3]) -> [V; 6] {
        let (sixth, twelfth) = (V::splat(1.0 / 6.0), V::splat(1.0 / 12.0));
        let even = g[0].add(g[2]).mul(V::splat(-1.0 / 6.0));
        let odd = g[1].mul(sixth);
        let far = g[0].mul_add(V::splat(1.0 / 24.0), g[2].mul(sixth));
        let near = g[1].mul(twelfth);
        [g[0].mul(V::splat(0.25)), even.sub(odd), even.add(odd), far.add(near), far.sub(near), g[2]]
    }
}

impl<V: Lanes> Side<V, 6, 3> for FilterDerivative {
    #[inline(always)]
    fn side(u: [V; 6]) -> [V; 3] {
        // The transpose of `Filter`.
        let sixth = V::splat(1.0 / 6.0);
        let (even, odd) = (u[1].add(u[2]).mul(sixth), u[2].sub(u[1]).mul(sixth));
        let (far, near) = (u[3].add(u[4]), u[3].sub(u[4]));
        [
            far.mul_add(V::splat(1.0 / 24.0), u[0].mul_add(V::splat(0.25), V::splat(0.0).sub(even))),
            near.mul_add(V::splat(1.0 / 12.0), odd),
            far.mul_add(sixth, u[5].sub(even)),
        ]
    }
}

impl<V: Lanes> Side<V, 6, 6> for Input {
    #[inline(always)]
    fn side(d: [V; 6]) -> [V; 6] {
        // 4 d0 - 5 d2 + d4 and its mirror
        let first = d[0].mul_add(V::splat(4.0), d[2].mul_add(V::splat(-5.0), d[4]));
        let last = d[1].mul_add(V::splat(4.0), d[3].mul_add(V::splat(-5.0), d[5]));
        let (a, b) = (d[2].mul_add(V::splat(-4.0), d[4]), d[1].mul_add(V::splat(-4.0), d[3]));
        let (e, f) = (d[4].sub(d[2]), d[3].sub(d[1]).mul(V::splat(2.0)));
        [first, a.add(b), a.sub(b), e.add(f), e.sub(f), last]
    }
}

impl<V: Lanes> Side<V, 6, 4> for Output {
    #[inline(always)]
    fn side(m: [V; 6]) -> [V; 4] {
        let (s1, d1) = (m[1].add(m[2]), m[1].sub(m[2]));
        let (s2, d2) = (m[3].add(m[4]), m[3].sub(m[4]));
        [
            m[0].add(s1).add(s2),
            d2.mul_add(V::splat(2.0), d1),
            s2.mul_add(V::splat(4.0), s1),
            d2.mul_add(V::splat(8.0), d1.add(m[5])),
        ]
    }
}

impl<V: Lanes> Side<V, 8, 8> for Input {
    #[inline(always)]
    fn side(d: [V; 8]) -> [V; 8] {
        let first = d[4].sub(d[2]).mul_add(V::splat(5.25), d[0].sub(d[6]));
        let last = d[3].sub(d[5]).mul_add(V::splat(5.25), d[7].sub(d[1]));
        let a1 = d[4].mul_add(V::splat(-4.25), d[2].add(d[6]));
        let b1 = d[3].mul_add(V::splat(-4.25), d[1].add(d[5]));
        let a2 = d[2].mul_add(V::splat(0.25), d[4].mul_add(V::splat(-1.25), d[6]));
        let b2 = d[1].mul_add(V::splat(0.5), d[3].mul_add(V::splat(-2.5), d[5].add(d[5])));
        let a3 = d[2].mul_add(V::splat(4.0), d[4].mul_add(V::splat(-5.0), d[6]));
        let b3 = d[5].mul_add(V::splat(0.5), d[3].mul_add(V::splat(-2.5), d[1].add(d[1])));
        [first, a1.add(b1), a1.sub(b1), a2.add(b2), a2.sub(b2), a3.add(b3), a3.sub(b3), last]
    }
}

impl<V: Lanes> Side<V, 8, 6> for Output {
    #[inline(always)]
    fn side(m: [V; 8]) -> [V; 6] {
        let (s1, d1) = (m[1].add(m[2]), m[1].sub(m[2]));
        let (s2, d2) = (m[3].add(m[4]), m[3].sub(m[4]));
        let (s3, d3) = (m[5].add(m[6]), m[5].sub(m[6]));
        [
            m[0].add(s1).add(s2).add(s3),
            d2.mul_add(V::splat(2.0), d3.mul_add(V::splat(0.5), d1)),
            s2.mul_add(V::splat(4.0), s3.mul_add(V::splat(0.25), s1)),
            d2.mul_add(V::splat(8.0), d3.mul_add(V::splat(0.125), d1)),
            s2.mul_add(V::splat(16.0), s3.mul_add(V::splat(0.0625), s1)),
            d2.mul_add(V::splat(32.0), d3.mul_add(V::splat(0.03125), d1.add(m[7]))),
        ]
    }
}

/// Where sixteen channels of the pixels of a tile are.
#[derive(Clone, Copy)]
pub struct Pixels {
    pub from: *const f32,
    /// Floats from one row to the next.
    pub row: usize,
    /// Floats from one pixel to the next.
    pub pixel: usize,
}

/// B^T d B of one tile of 16 channels; product k goes to `to + k * plane`.
///
/// # Safety
/// The tile must be readable and the products writable.
#[inline(always)]
pub unsafe fn transform_input<V: Lanes>(size: Size, from: Pixels, to: *mut f32, plane: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match size {
            Size::Four => square::<V, Input, 6, 6>(from, to, plane),
            Size::Six => square::<V, Input, 8, 8>(from, to, plane),
        }
    }
}

/// A y A^T of the derivatives y of one tile of outputs of 16 channels: what the products' derivatives are.
///
/// # Safety
/// As for [`transform_input`]; there are as many pixels as the tile has outputs.
#[inline(always)]
pub unsafe fn transform_derivative<V: Lanes>(from: Pixels, to: *mut f32, plane: usize) {
    // SAFETY: the caller's promise.
    unsafe { square::<V, Derivative, 4, 6>(from, to, plane) }
}

/// G g G^T of 16 filters; tap t is at `from + t * pixel`.
///
/// # Safety
/// As for [`transform_input`], with 3 x 3 taps as pixels.
#[inline(always)]
pub unsafe fn transform_filter<V: Lanes>(from: Pixels, to: *mut f32, plane: usize) {
    // SAFETY: the caller's promise.
    unsafe { square::<V, Filter, 3, 6>(from, to, plane) }
}

/// G^T u G: the derivative of 16 filters from that of their transform, product k of which is at `from + k * plane`.
///
/// # Safety
/// The products must be readable and the taps writable.
#[inline(always)]
pub unsafe fn filter_derivative<V: Lanes>(from: *const f32, plane: usize, to: *mut f32, tap: usize) {
    // SAFETY: the caller's promise.
    unsafe { square::<V, FilterDerivative, 6, 3>(Pixels { from, row: 6 * plane, pixel: plane }, to, tap) }
}

/// S d S^T.
///
/// # Safety
/// `N` pixels of [`LANES`] floats must be readable in each of `N` rows, `M * M` results of as many writable.
#[inline(always)]
unsafe fn square<V: Lanes, S: Side<V, N, M>, const N: usize, const M: usize>(d: Pixels, to: *mut f32, plane: usize) {
    let mut half = [[V::splat(0.0); M]; N];
    for (y, half) in half.iter_mut().enumerate() {
        let mut row = [V::splat(0.0); N];
        for (x, value) in row.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *value = unsafe { V::load(d.from.add(y * d.row + x * d.pixel)) };
        }
        *half = S::side(row);
    }
    for x in 0..M {
        let mut column = [V::splat(0.0); N];
        for (value, half) in column.iter_mut().zip(&half) {
            *value = half[x];
        }
        for (y, v) in S::side(column).into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { v.store(to.add((y * M + x) * plane)) };
        }
    }
}

/// What happens to the outputs of a tile of 16 channels.
#[derive(Clone, Copy)]
pub struct Finish {
    /// The tile's first pixel, and the distance between rows.
    pub to: *mut f32,
    pub row: usize,
    pub pixel: usize,
    /// Rows and columns (after pooling) that lie inside the image.
    pub inside: [usize; 2],
    /// Largest of each 2 x 2 pixels.
    pub pool: bool,
    /// 16 floats.
    pub bias: *const f32,
    /// Pixels to add, or null.
    pub residual: *const f32,
    pub residual_row: usize,
    pub activation: Activate,
}

/// A^T m A of one tile of 16 channels; product k is at `from + k * plane`.
///
/// # Safety
/// The products must be readable, and everything inside the image readable or writable as its name says.
#[inline(always)]
pub unsafe fn transform_output<V: Lanes>(size: Size, from: *const f32, plane: usize, finish: &Finish) {
    // SAFETY: the caller's promise.
    unsafe {
        match size {
            Size::Four => output::<V, 6, 4>(from, plane, finish),
            Size::Six => output::<V, 8, 6>(from, plane, finish),
        }
    }
}

/// # Safety
/// `N * N` products of [`LANES`] floats must be readable, and everything inside the image readable or writable as its
/// name in [`Finish`] says.
#[inline(always)]
unsafe fn output<V: Lanes, const N: usize, const M: usize>(from: *const f32, plane: usize, f: &Finish)
where
    Output: Side<V, N, M>,
{
    let mut half = [[V::splat(0.0); M]; N];
    for (y, half) in half.iter_mut().enumerate() {
        let mut m = [V::splat(0.0); N];
        for (x, m) in m.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *m = unsafe { V::load(from.add((y * N + x) * plane)) };
        }
        *half = Output::side(m);
    }
    let mut out = [[V::splat(0.0); M]; M];
    for x in 0..M {
        let mut m = [V::splat(0.0); N];
        for (m, half) in m.iter_mut().zip(&half) {
            *m = half[x];
        }
        for (out, y) in out.iter_mut().zip(Output::side(m)) {
            out[x] = y;
        }
    }
    // SAFETY: the caller's promise; nothing outside the image is touched.
    unsafe {
        let bias = V::load(f.bias);
        if f.pool {
            for y in 0..(M / 2).min(f.inside[0]) {
                for x in 0..(M / 2).min(f.inside[1]) {
                    let (a, b) = (&out[2 * y], &out[2 * y + 1]);
                    let largest = a[2 * x].max_or_nan(a[2 * x + 1]).max_or_nan(b[2 * x].max_or_nan(b[2 * x + 1]));
                    activate(f.activation, largest.add(bias)).store(f.to.add(y * f.row + x * f.pixel));
                }
            }
            return;
        }
        for (y, out) in out.iter().enumerate().take(f.inside[0]) {
            for (x, value) in out.iter().enumerate().take(f.inside[1]) {
                let mut value = value.add(bias);
                if !f.residual.is_null() {
                    value = value.add(V::load(f.residual.add(y * f.residual_row + x * LANES)));
                }
                activate(f.activation, value).store(f.to.add(y * f.row + x * f.pixel));
            }
        }
    }
}
