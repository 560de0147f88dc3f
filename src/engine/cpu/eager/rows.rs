//! Rows of channels, one per pixel, and sums over pixels.
//!
//! Sixteen channels are a block. The last one begins sixteen before the end: where channels are no whole blocks, some are in
//! two. Sums over the pixels of a part are `[blocks][16]`, so that these channels do not count twice.
//!
//! Each function is compiled once per instruction set, whoever calls it.

use super::late::{Derivative, Late, Moments, Norm, Sums, Values};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};

/// Rows that are gone through for one block before the next: its factors stay in registers, and memory is still read as it
/// lies.
pub(super) const GROUP: usize = 8;

/// The blocks of so many channels, sixteen at least.
#[derive(Debug, Clone, Copy)]
pub(super) struct Channels(pub usize);

impl Channels {
    #[inline(always)]
    pub fn blocks(self) -> usize {
        self.0.div_ceil(LANES)
    }

    /// The first channel of a block.
    #[inline(always)]
    pub fn start(self, block: usize) -> usize {
        (block * LANES).min(self.0 - LANES)
    }

    /// The first channel of every block.
    pub fn starts(self) -> impl Iterator<Item = usize> {
        (0..self.blocks()).map(move |block| self.start(block))
    }

    /// Floats of all blocks.
    #[inline(always)]
    pub fn padded(self) -> usize {
        self.blocks() * LANES
    }

    /// How many channels of the last block are in the one before as well.
    #[inline(always)]
    pub fn twice(self) -> usize {
        self.padded() - self.0
    }

    /// Where a channel is in `[blocks][16]`.
    pub fn place(self, channel: usize) -> usize {
        if channel < self.padded() - LANES { channel } else { channel + self.twice() }
    }
}

/// Blocks side by side, as many as a microkernel takes: `[panel][row][columns * 16]`, the last panel perhaps narrower.
#[derive(Debug, Clone, Copy)]
pub(super) struct Panels {
    pub channels: Channels,
    pub columns: usize,
    /// Floats from one panel to the next.
    pub plane: usize,
}

impl Panels {
    #[inline(always)]
    pub fn count(&self) -> usize {
        self.channels.blocks().div_ceil(self.columns)
    }

    pub fn floats(&self) -> usize {
        self.count() * self.plane
    }

    /// Blocks of a panel.
    #[inline(always)]
    pub fn blocks(&self, panel: usize) -> usize {
        self.columns.min(self.channels.blocks() - panel * self.columns)
    }

    /// Where a block of the first row is, and floats from one row to the next.
    #[inline(always)]
    pub fn place(&self, block: usize) -> [usize; 2] {
        let panel = block / self.columns;
        [panel * self.plane + block % self.columns * LANES, self.blocks(panel) * LANES]
    }
}

/// Fills panels with the values of `rows` pixels from `first` on, which with a gate are of one image.
///
/// # Safety
/// There are as many pixels, and the panels have room for them.
#[inline(never)]
pub(super) unsafe fn read_values(isa: Isa, from: Values<'_>, first: usize, rows: usize, p: &Panels, to: *mut f32) {
    dispatch(isa, ReadValues { from, first, rows, p, to });
}

struct ReadValues<'a> {
    from: Values<'a>,
    first: usize,
    rows: usize,
    p: &'a Panels,
    to: *mut f32,
}

impl Kernel for ReadValues<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { from, first, rows, p, to } = self;
        let channels = p.channels;
        for group in (0..rows).step_by(GROUP) {
            for block in 0..channels.blocks() {
                let (start, [place, stride]) = (channels.start(block), p.place(block));
                let x = from.x.as_ptr().wrapping_add(first * channels.0 + start);
                let to = to.wrapping_add(place);
                // SAFETY: the promise to `read_values`.
                unsafe {
                    if let (Some(norm), Some(open)) = (from.norm, from.open) {
                        let (lanes, open) = (norm.lanes::<V>(start), open.lanes::<V>(first, channels.0, start));
                        for row in group..rows.min(group + GROUP) {
                            let a = lanes.value(V::load(x.wrapping_add(row * channels.0)));
                            a.mul(open).store(to.wrapping_add(row * stride));
                        }
                    } else if let Some(norm) = from.norm {
                        let lanes = norm.lanes::<V>(start);
                        for row in group..rows.min(group + GROUP) {
                            lanes.value(V::load(x.wrapping_add(row * channels.0))).store(to.wrapping_add(row * stride));
                        }
                    } else {
                        for row in group..rows.min(group + GROUP) {
                            V::load(x.wrapping_add(row * channels.0)).store(to.wrapping_add(row * stride));
                        }
                    }
                }
            }
        }
    }
}

/// Fills panels with the finished derivatives of `rows` pixels from `first` on.
///
/// # Safety
/// There are as many pixels, and the panels have room for them.
#[inline(never)]
pub(super) unsafe fn read_derivative(
    isa: Isa,
    from: Derivative<'_>,
    first: usize,
    rows: usize,
    p: &Panels,
    to: *mut f32,
) {
    let Derivative { d, late } = from;
    match late {
        Some(late) => dispatch(isa, ReadDerivative { d, late, first, rows, p, to }),
        // SAFETY: the caller's promise.
        None => unsafe { read_values(isa, Values { x: d, norm: None, open: None }, first, rows, p, to) },
    }
}

struct ReadDerivative<'a> {
    d: &'a [f32],
    late: &'a Late<'a>,
    first: usize,
    rows: usize,
    p: &'a Panels,
    to: *mut f32,
}

impl Kernel for ReadDerivative<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { d, late, first, rows, p, to } = self;
        let channels = p.channels;
        for group in (0..rows).step_by(GROUP) {
            for block in 0..channels.blocks() {
                let (start, [place, stride]) = (channels.start(block), p.place(block));
                let from = [late.x, d].map(|of| of.as_ptr().wrapping_add(first * channels.0 + start));
                let to = to.wrapping_add(place);
                // SAFETY: the promise to `read_derivative`.
                unsafe {
                    let lanes = late.lanes::<V>(start);
                    for row in group..rows.min(group + GROUP) {
                        let x = V::load(from[0].wrapping_add(row * channels.0));
                        let d = V::load(from[1].wrapping_add(row * channels.0));
                        lanes.value(x, d).store(to.wrapping_add(row * stride));
                    }
                }
            }
        }
    }
}

/// dz of `rows` pixels from `x` on, from the derivatives of act(z) in panels, and their sums: those of dz, then those of
/// dz (x - mean), `[2][blocks][16]`.
///
/// # Arguments
/// `to`: dx, and whether dz goes past the caches; channels are whole blocks then, and dx begins a cache line.
///
/// # Safety
/// There are as many pixels, both to read and to write, and the panels are filled.
#[inline(never)]
pub(super) unsafe fn write_derivative(
    isa: Isa,
    (norm, x): (&Norm, *const f32),
    rows: usize,
    p: &Panels,
    da: *const f32,
    to: (*mut f32, bool),
    sums: *mut f32,
) {
    dispatch(isa, WriteDerivative { norm, x, rows, p, da, to, sums });
}

struct WriteDerivative<'a> {
    norm: &'a Norm,
    x: *const f32,
    rows: usize,
    p: &'a Panels,
    da: *const f32,
    to: (*mut f32, bool),
    sums: *mut f32,
}

impl Kernel for WriteDerivative<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { norm, x, rows, p, da, to: (dx, past), sums } = self;
        let channels = p.channels;
        let padded = channels.padded();
        // SAFETY: the promise to `write_derivative`.
        unsafe {
            fill_zeros::<V>(sums, 2 * padded);
            for group in (0..rows).step_by(GROUP) {
                for block in 0..channels.blocks() {
                    let (start, [place, stride]) = (channels.start(block), p.place(block));
                    let lanes = norm.lanes::<V>(start);
                    let (plain, product) =
                        (sums.wrapping_add(block * LANES), sums.wrapping_add(padded + block * LANES));
                    let [mut s, mut t] = [V::splat(0.0); 2];
                    for row in group..rows.min(group + GROUP) {
                        let at = row * channels.0 + start;
                        let da = V::load(da.wrapping_add(place + row * stride));
                        let [x, dz] = lanes.derivative(V::load(x.wrapping_add(at)), da);
                        if past {
                            dz.stream(dx.wrapping_add(at));
                        } else {
                            dz.store(dx.wrapping_add(at));
                        }
                        (s, t) = (s.add(dz), x.mul_add(dz, t));
                    }
                    join(s, plain);
                    join(t, product);
                }
            }
            if past {
                V::fence();
            }
        }
    }
}

/// The derivatives of what a gate has let through, from those in panels, and the sums of their products with what was in
/// front of it, `[blocks][16]`.
///
/// # Safety
/// As for [`write_derivative`]; without `dx` there are only sums.
#[inline(never)]
pub(super) unsafe fn write_gated(
    isa: Isa,
    (norm, x): (&Norm, *const f32),
    rows: usize,
    p: &Panels,
    dm: *const f32,
    dx: Option<*mut f32>,
    sums: *mut f32,
) {
    dispatch(isa, WriteGated { norm, x, rows, p, dm, dx, sums });
}

struct WriteGated<'a> {
    norm: &'a Norm,
    x: *const f32,
    rows: usize,
    p: &'a Panels,
    dm: *const f32,
    dx: Option<*mut f32>,
    sums: *mut f32,
}

impl Kernel for WriteGated<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { norm, x, rows, p, dm, dx, sums } = self;
        let channels = p.channels;
        // SAFETY: the promise to `write_gated`.
        unsafe {
            fill_zeros::<V>(sums, channels.padded());
            for group in (0..rows).step_by(GROUP) {
                for block in 0..channels.blocks() {
                    let (start, [place, stride]) = (channels.start(block), p.place(block));
                    let (lanes, to) = (norm.lanes::<V>(start), sums.wrapping_add(block * LANES));
                    let mut sum = V::splat(0.0);
                    for row in group..rows.min(group + GROUP) {
                        let at = row * channels.0 + start;
                        let dm = V::load(dm.wrapping_add(place + row * stride));
                        sum = lanes.value(V::load(x.wrapping_add(at))).mul_add(dm, sum);
                        if let Some(dx) = dx {
                            dm.store(dx.wrapping_add(at));
                        }
                    }
                    join(sum, to);
                }
            }
        }
    }
}

/// Mean of every channel over `rows` rows, and sum of squared differences from it: `[2][blocks][16]`.
///
/// # Safety
/// There are as many rows at `x`, and room at `to`.
#[inline(never)]
pub(super) unsafe fn moments(isa: Isa, channels: Channels, x: *const f32, rows: usize, to: *mut f32) {
    dispatch(isa, PartMoments { channels, x, rows, to });
}

/// As [`moments`].
pub(super) struct PartMoments {
    pub channels: Channels,
    pub x: *const f32,
    pub rows: usize,
    pub to: *mut f32,
}

impl Kernel for PartMoments {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { channels, x, rows, to } = self;
        let padded = channels.padded();
        // SAFETY: the promise to `moments`.
        unsafe {
            fill_zeros::<V>(to, 2 * padded);
            for group in (0..rows).step_by(GROUP) {
                for block in 0..channels.blocks() {
                    let (x, to) = (x.wrapping_add(channels.start(block)), to.wrapping_add(block * LANES));
                    let mut sum = V::splat(0.0);
                    for row in group..rows.min(group + GROUP) {
                        sum = sum.add(V::load(x.wrapping_add(row * channels.0)));
                    }
                    join(sum, to);
                }
            }
            let n = V::splat(1.0 / rows as f32);
            for at in (0..padded).step_by(LANES) {
                V::load(to.wrapping_add(at)).mul(n).store(to.wrapping_add(at));
            }
            for group in (0..rows).step_by(GROUP) {
                for block in 0..channels.blocks() {
                    let (x, to) = (x.wrapping_add(channels.start(block)), to.wrapping_add(block * LANES));
                    let mean = V::load(to);
                    let mut square = V::splat(0.0);
                    for row in group..rows.min(group + GROUP) {
                        let d = V::load(x.wrapping_add(row * channels.0)).sub(mean);
                        square = d.mul_add(d, square);
                    }
                    join(square, to.wrapping_add(padded));
                }
            }
        }
    }
}

/// Adds the sum over a group of rows to that of the groups before: a long sum would gather rounding errors, of one sign
/// where all rows have a part in common.
///
/// # Safety
/// Sixteen floats are there.
#[inline(always)]
pub(super) unsafe fn join<V: Lanes>(sum: V, to: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe { V::load(to).add(sum).store(to) };
}

/// Writes floats past the caches.
///
/// # Safety
/// There are as many to read and to write.
#[inline(never)]
pub(super) unsafe fn stream(isa: Isa, from: *const f32, to: *mut f32, floats: usize) {
    dispatch(isa, Stream { from, to, floats });
}

struct Stream {
    from: *const f32,
    to: *mut f32,
    floats: usize,
}

impl Kernel for Stream {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { from, to, floats } = self;
        let head = to.align_offset(4 * LANES).min(floats);
        let lines = (floats - head) / LANES;
        let tail = head + lines * LANES;
        // SAFETY: the promise to `stream`.
        unsafe {
            to.copy_from_nonoverlapping(from, head);
            for at in (head..tail).step_by(LANES) {
                V::load(from.wrapping_add(at)).stream(to.wrapping_add(at));
            }
            to.wrapping_add(tail).copy_from_nonoverlapping(from.wrapping_add(tail), floats - tail);
        }
        V::fence();
    }
}

/// No place of [`Ahead`].
pub(super) const NOTHING: (*const f32, usize) = (std::ptr::null(), 0);

/// What is read or written next, which memory is asked for while there is something to compute.
pub(super) struct Ahead {
    places: [(*const f32, usize); 4],
    lines: usize,
}

impl Ahead {
    /// # Arguments
    /// `places`: address and floats; `steps`: of all that is computed meanwhile.
    pub fn new(places: [(*const f32, usize); 4], steps: usize) -> Self {
        let floats: usize = places.iter().map(|(_, floats)| floats).sum();
        Self { places, lines: (floats / LANES).div_ceil(steps) }
    }

    /// What to ask for in some of the steps: where to begin, and cache lines per step.
    #[inline(always)]
    pub fn take(&mut self, steps: usize) -> (*const f32, usize) {
        for (at, floats) in &mut self.places {
            if *floats > 0 {
                let from = *at;
                let now = (steps * self.lines * LANES).min(*floats);
                (*at, *floats) = (from.wrapping_add(now), *floats - now);
                return (from, self.lines);
            }
        }
        (std::ptr::null(), 0)
    }
}

/// # Safety
/// There are as many floats, whole blocks.
#[inline(always)]
unsafe fn fill_zeros<V: Lanes>(to: *mut f32, floats: usize) {
    for at in (0..floats).step_by(LANES) {
        // SAFETY: the caller's promise.
        unsafe { V::splat(0.0).store(to.wrapping_add(at)) };
    }
}

/// Of all parts, each of `rows(part)` pixels.
pub(super) fn all_moments(channels: Channels, parts: &[f32], rows: impl Fn(usize) -> usize) -> Moments {
    let (padded, rows) = (channels.padded(), &rows);
    let parts = parts.chunks_exact(2 * padded).enumerate().map(|(part, sums)| {
        let (means, squares) = sums.split_at(padded);
        (rows(part), means, squares)
    });
    let Moments { mean, var } = Moments::of_parts(padded, parts);
    let of = |all: &[f32]| (0..channels.0).map(|c| all[channels.place(c)]).collect();
    Moments { mean: of(&mean), var: of(&var) }
}

/// Of all parts.
pub(super) fn all_sums(channels: Channels, parts: &[f32]) -> Sums {
    let mut all = vec![0.0f64; 2 * channels.padded()];
    for part in parts.chunks_exact(all.len()) {
        for (sum, &of_part) in all.iter_mut().zip(part) {
            *sum += f64::from(of_part);
        }
    }
    let (plain, product) = all.split_at(channels.padded());
    let of = |sums: &[f64]| (0..channels.0).map(|c| sums[channels.place(c)]).collect();
    Sums { plain: of(plain), product: of(product) }
}
