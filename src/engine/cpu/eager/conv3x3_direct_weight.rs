//! The gradient of a 3 x 3 convolution's filters summed directly: for each tap, over the pairs of an input pixel and an output
//! pixel that it connects, and over the images.
//!
//! ```text
//! X = [in / 16][pixel][image][16]      D = [panel of outputs][pixel][image][columns * 16]
//! ```

use super::conv3x3::Conv3x3;
use super::conv3x3_direct::{ALONE, Span};
use super::conv3x3_weight::store_taps;
use super::{Address, Shape, Workspace};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::common::kernels::tile::outer_rows;
use crate::engine::cpu::common::winograd::odd;
use crate::error::Result;

/// Products that are added up before they join the sum so far, which keeps its rounding error small.
const CHUNK: usize = 64;
/// Pixels that a worker copies before it asks for more.
const GROUP: usize = 16;

impl Conv3x3 {
    /// [`Self::weight_gradient`] by direct sums.
    pub(super) fn weight_gradient_direct(
        &self,
        input: &[f32],
        derivative: &[f32],
        gradient: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.check_gradient(input, derivative, gradient);
        let (isa, workers) = (workspace.isa, workspace.threads.workers());
        let plan = Plan::new(*self, isa);
        let (x_len, d_len) = (plan.x_plane() * self.input.blocks(), plan.d_plane() * plan.panels());
        let memory = Address(workspace.memory(x_len + d_len + workers * plan.own())?);
        let job = Job {
            plan: &plan,
            input: input.as_ptr(),
            derivative: derivative.as_ptr(),
            gradient: Address(gradient.as_mut_ptr()),
            x: memory,
            d: Address(memory.at(x_len)),
        };
        let groups = [self.input, self.output()].map(|shape| pixels(shape).div_ceil(GROUP));
        let all = groups[0] + groups[1];
        let tasks = if input.len() + derivative.len() <= ALONE { 1 } else { all };
        workspace.threads.run(tasks, &|task, _| {
            for group in (task..all).step_by(tasks) {
                let is_input = group < groups[0];
                let group = if is_input { group } else { group - groups[0] };
                dispatch(isa, Gather { job: &job, is_input, group });
            }
        })?;
        workspace.threads.run(plan.panels() * self.input.blocks(), &|task, worker| {
            let (panel, q) = (task / self.input.blocks(), task % self.input.blocks());
            let room = memory.at(x_len + d_len + worker * plan.own());
            dispatch(isa, Sum { job: &job, panel, q, room });
        })
    }
}

/// Of all images.
fn pixels(shape: Shape) -> usize {
    shape.images * shape.size[0] * shape.size[1]
}

struct Plan {
    conv: Conv3x3,
    isa: Isa,
    /// Of each tap the pixels of the input and of the output that it connects.
    pairs: [Vec<[usize; 2]>; 9],
}

impl Plan {
    fn new(conv: Conv3x3, isa: Isa) -> Self {
        let (size, padding, across) = (conv.input.size, conv.padding, conv.output().size[1]);
        let [rows, columns] = size.map(|side| Span::all(side, padding));
        let mut pairs: [Vec<[usize; 2]>; 9] = Default::default();
        for (down, right) in rows.iter().flat_map(|down| columns.iter().map(move |right| (down, right))) {
            for (ky, kx) in down.taps.clone().flat_map(|ky| right.taps.clone().map(move |kx| (ky, kx))) {
                for (y, x) in down.outputs.clone().flat_map(|y| right.outputs.clone().map(move |x| (y, x))) {
                    let from = (y + ky - padding) * size[1] + x + kx - padding;
                    pairs[ky * 3 + kx].push([from, y * across + x]);
                }
            }
        }
        Self { conv, isa, pairs }
    }

    fn wide(&self) -> usize {
        self.isa.columns() * LANES
    }

    fn panels(&self) -> usize {
        self.conv.outputs.div_ceil(self.wide())
    }

    fn x_plane(&self) -> usize {
        odd(pixels(self.conv.input) * LANES)
    }

    fn d_plane(&self) -> usize {
        odd(pixels(self.conv.output()) * self.wide())
    }

    /// Floats of a worker's own: all taps of sixteen input channels and a panel of output channels.
    fn own(&self) -> usize {
        9 * LANES * self.wide()
    }
}

struct Job<'a> {
    plan: &'a Plan,
    input: *const f32,
    derivative: *const f32,
    gradient: Address,
    x: Address,
    d: Address,
}

// SAFETY: input and derivative are only read, and workers write to places of their own.
unsafe impl Sync for Job<'_> {}

/// X or D of some pixels.
struct Gather<'a> {
    job: &'a Job<'a>,
    is_input: bool,
    group: usize,
}

impl Kernel for Gather<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Job { plan, input, derivative, x, d, .. } = self.job;
        let (shape, from, to, wide, plane) = match self.is_input {
            true => (plan.conv.input, *input, *x, LANES, plan.x_plane()),
            false => (plan.conv.output(), *derivative, *d, plan.wide(), plan.d_plane()),
        };
        let of_image = shape.size[0] * shape.size[1];
        for number in self.group * GROUP..pixels(shape).min((self.group + 1) * GROUP) {
            let (image, pixel) = (number / of_image, number % of_image);
            for q in (0..shape.channels).step_by(LANES) {
                let (panel, column) = (q / wide, q % wide);
                let width = wide.min(shape.channels - panel * wide);
                let at = panel * plane + (pixel * shape.images + image) * width + column;
                // SAFETY: `check_gradient` has compared the lengths; the planes have room for all pixels.
                unsafe { V::load(from.wrapping_add(number * shape.channels + q)).store(to.at(at)) };
            }
        }
    }
}

/// The gradient for sixteen input channels and a panel of output channels.
struct Sum<'a> {
    job: &'a Job<'a>,
    panel: usize,
    q: usize,
    room: *mut f32,
}

impl Kernel for Sum<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Job { plan, gradient, x, d, .. } = self.job;
        let width = plan.wide().min(plan.conv.outputs - self.panel * plan.wide());
        for (tap, pairs) in plan.pairs.iter().enumerate() {
            for row in (0..LANES).step_by(outer_rows::<V>()) {
                let products = Products {
                    x: x.at(self.q * plan.x_plane() + row),
                    d: d.at(self.panel * plan.d_plane()),
                    pairs,
                    images: plan.conv.input.images,
                    to: self.room.wrapping_add((tap * LANES + row) * width),
                };
                // SAFETY: X and D are there, and the room is this worker's.
                unsafe {
                    match (V::WIDE, width / LANES) {
                        (true, 2) => products.sum::<V, 8, 2>(),
                        (true, _) => products.sum::<V, 8, 1>(),
                        (false, _) => products.sum::<V, 4, 1>(),
                    }
                }
            }
        }
        let mut taps = [V::splat(0.0); 9 * LANES];
        for column in (0..width).step_by(LANES) {
            for (i, taps) in taps.as_chunks_mut::<9>().0.iter_mut().enumerate() {
                for (tap, sum) in taps.iter_mut().enumerate() {
                    // SAFETY: the room was just filled.
                    *sum = unsafe { V::load(self.room.wrapping_add((tap * LANES + i) * width + column)) };
                }
            }
            let block = (self.panel * plan.wide() + column) / LANES;
            // SAFETY: `check_gradient` has compared the gradient's length; these are this task's filters.
            unsafe { store_taps(&taps, *gradient, plan.conv.input.channels, [self.q, block]) };
        }
    }
}

/// Sums over the images and pairs of pixels of one tap.
struct Products<'a> {
    /// Sixteen floats from one image to the next.
    x: *const f32,
    /// A panel.
    d: *const f32,
    pairs: &'a [[usize; 2]],
    images: usize,
    /// One row per float of x, as wide as the panel.
    to: *mut f32,
}

impl Products<'_> {
    /// `R` floats of x times `C` blocks of d.
    ///
    /// # Safety
    /// The addresses are valid for so many.
    #[inline(always)]
    unsafe fn sum<V: Lanes, const R: usize, const C: usize>(&self) {
        let Self { x, d, pairs, images, .. } = *self;
        let mut is_first = true;
        for start in (0..images).step_by(CHUNK) {
            let count = CHUNK.min(images - start);
            for pairs in pairs.chunks(CHUNK / count) {
                let mut sums = [[V::splat(0.0); C]; R];
                for &[from, at] in pairs {
                    let mut x = x.wrapping_add((from * images + start) * LANES);
                    let mut d = d.wrapping_add((at * images + start) * C * LANES);
                    for _ in 0..count {
                        let mut row = [V::splat(0.0); C];
                        // SAFETY: the caller's promise.
                        unsafe {
                            for (c, d_block) in row.iter_mut().enumerate() {
                                *d_block = V::load(d.wrapping_add(c * LANES));
                            }
                            for (r, sums) in sums.iter_mut().enumerate() {
                                let x = V::splat(*x.wrapping_add(r));
                                for (sum, d) in sums.iter_mut().zip(row) {
                                    *sum = x.mul_add(d, *sum);
                                }
                            }
                        }
                        (x, d) = (x.wrapping_add(LANES), d.wrapping_add(C * LANES));
                    }
                }
                // SAFETY: the caller's promise.
                unsafe { self.add(&sums, is_first) };
                is_first = false;
            }
        }
        if is_first {
            // No output sees an input through this tap.
            // SAFETY: the caller's promise.
            unsafe { self.add(&[[V::splat(0.0); C]; R], true) };
        }
    }

    /// # Safety
    /// As for [`Self::sum`].
    #[inline(always)]
    unsafe fn add<V: Lanes, const R: usize, const C: usize>(&self, sums: &[[V; C]; R], is_first: bool) {
        for (r, sums) in sums.iter().enumerate() {
            for (c, &sum) in sums.iter().enumerate() {
                let to = self.to.wrapping_add((r * C + c) * LANES);
                // SAFETY: the caller's promise.
                unsafe {
                    let sum = if is_first { sum } else { sum.add(V::load(to)) };
                    sum.store(to);
                }
            }
        }
    }
}
