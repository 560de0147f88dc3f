//! Linear layers whose weights do not fit a cache: the workers divide the matrix, not the batch, and the gradient of
//! the weights is applied where it arises, so that it never goes to memory.

use std::ops::Range;

use crate::engine::cpu::kernels::matmul::{View, matmul};
use crate::engine::cpu::kernels::skinny::{Dots, OUTER_ROWS, Outer, PANEL, dots, outer, pack};
use crate::engine::cpu::layer::{Context, Edge, Grain, Layer, Out, Param, share};
use crate::engine::cpu::memory::Slot;

pub struct LargeLinear {
    pub in_features: usize,
    pub out_features: usize,
    pub input: Edge,
    pub out: Out,
    pub weight: Param,
    pub bias: Option<Param>,
    /// Whether the weights are trained: their gradient has no slot.
    pub trained: bool,
    /// `batch x (out_features / workers + 4)` of the output.
    pub sums: Slot,
    /// `batch x columns` of the input, `6 x columns` of the gradient, `batch x 6` of the output's gradient.
    pub packed: Slot,
    pub rows: Slot,
    pub picked: Slot,
    /// Columns of the weights that are updated together.
    pub columns: usize,
}

/// Floats of the input that a core's second-level cache holds beside the weights that stream past.
const RESIDENT: usize = 1 << 16;

impl LargeLinear {
    /// From this many weights on a layer is worth two barriers.
    pub const THRESHOLD: usize = 1 << 18;

    /// Columns updated together for a batch of this size.
    pub fn columns(batch: usize, in_features: usize) -> usize {
        (RESIDENT / batch.max(1)).clamp(512, 4096).min(in_features).next_multiple_of(PANEL)
    }

    /// `dx = dy w` for some columns, with the weights of before the update.
    fn input_grads(&self, cx: &Context<'_>, input: Slot, dy: &[f32], columns: Range<usize>) {
        let (k, n, width) = (self.in_features, self.out_features, columns.len());
        let tile = &mut cx.own(self.packed)[..cx.batch * width];
        let weights = View::new(&cx.tensor(self.weight.tensor)[columns.start..], k);
        matmul([cx.batch, width, n], tile, width, View::new(dy, n), weights, false);
        for (sample, row) in tile.chunks_exact(width).enumerate() {
            let dx = cx.store.part_mut(input, sample, columns.clone());
            match self.input.add {
                true => dx.iter_mut().zip(row).for_each(|(d, t)| *d += t),
                false => dx.copy_from_slice(row),
            }
        }
    }

    fn update_weights(&self, cx: &Context<'_>, x: &[f32], dy: &[f32], columns: Range<usize>) {
        let (k, n) = (self.in_features, self.out_features);
        let (packed, rows, picked) = (cx.own(self.packed), cx.own(self.rows), cx.own(self.picked));
        let panels = columns.len().div_ceil(PANEL);
        pack(x, k, columns.start, columns.len(), packed);
        for row in (0..n).step_by(OUTER_ROWS) {
            let count = OUTER_ROWS.min(n - row);
            for (to, from) in picked.chunks_exact_mut(OUTER_ROWS).zip(dy.chunks_exact(n)) {
                to[..count].copy_from_slice(&from[row..][..count]);
                to[count..].fill(0.0);
            }
            outer(Outer { d: picked, packed, batch: cx.batch, panels, out: rows });
            for (r, grad) in rows.chunks_exact(panels * PANEL).take(count).enumerate() {
                let first = (row + r) * k + columns.start;
                cx.updates.apply(cx, self.weight.tensor, first, &grad[..columns.len()]);
            }
        }
    }
}

impl Layer for LargeLinear {
    fn grain(&self) -> Grain {
        Grain::Batch
    }

    fn forward(&self, cx: &Context<'_>) {
        cx.barrier.wait();
        let (k, n) = (self.in_features, self.out_features);
        let (x, own) = (cx.all(self.input.value), share(n, cx.worker, cx.workers, 4));
        let rows = own.len();
        let sums = &mut cx.own(self.sums)[..cx.batch * rows];
        for row in sums.chunks_exact_mut(rows.max(1)) {
            match self.bias {
                Some(bias) => row.copy_from_slice(&cx.tensor(bias.tensor)[own.clone()]),
                None => row.fill(0.0),
            }
        }
        let w = &cx.tensor(self.weight.tensor)[own.start * k..own.end * k];
        dots(Dots { w, rows, x, batch: cx.batch, k, y: sums, ldy: rows });
        for (sample, row) in sums.chunks_exact(rows.max(1)).enumerate() {
            cx.store.part_mut(self.out.value, sample, own.clone()).copy_from_slice(row);
        }
        cx.barrier.wait();
    }

    fn backward(&self, cx: &Context<'_>) {
        let Some(grad) = self.out.grad else { return };
        cx.barrier.wait();
        let (k, n) = (self.in_features, self.out_features);
        let (x, dy) = (cx.all(self.input.value), cx.all(grad));
        if let (0, Some(share)) = (cx.worker, self.bias.and_then(|b| b.grad)) {
            let share = cx.own(share);
            dy.chunks_exact(n).for_each(|row| share.iter_mut().zip(row).for_each(|(db, d)| *db += d));
        }
        let own = share(k, cx.worker, cx.workers, PANEL);
        for start in own.clone().step_by(self.columns) {
            let columns = start..(start + self.columns).min(own.end);
            if let Some(input) = self.input.grad {
                self.input_grads(cx, input, dy, columns.clone());
            }
            if self.trained {
                self.update_weights(cx, x, dy, columns);
            }
        }
        cx.barrier.wait();
    }
}
