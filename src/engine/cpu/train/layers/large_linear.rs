//! Linear layers whose weights do not fit a cache: the workers divide the matrix, not the batch, and the gradient of
//! the weights is applied where it arises, so that it never goes to memory.

use std::ops::Range;

use crate::engine::cpu::train::kernels::skinny::{Dots, OUTER_ROWS, Outer, PANEL, dots, outer, pack_transposed};
use crate::engine::cpu::train::kernels::sparse::{
    BLOCK, ROWS, RowTerms, SparseOuter, pack_blocks, pack_row, sparse_outer,
};
use crate::engine::cpu::train::layer::{Context, Edge, Grain, Layer, Out, Param, share};
use crate::engine::cpu::train::memory::{Floats, Read, Slot};
use crate::engine::cpu::train::waiting::FEW_SAMPLES;

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
    /// The same turned round, the batch filled up to whole panels.
    pub turned: Slot,
    /// `batch (filled up) x columns` of the input, `16 x columns` of the gradient.
    pub packed: Slot,
    pub rows: Slot,
    /// `batch x columns` of the input's derivative, where that is wanted.
    pub input_grads: Option<Slot>,
    /// `out_features x batch` twice and `out_features`: the terms of the gradient that are not zero, their samples, and
    /// how many there are in each row.
    pub terms: [Slot; 3],
    /// The same of each sample and sixteen columns, where the input's derivative is wanted.
    pub input_terms: [Slot; 3],
    /// Columns of the weights that are updated together.
    pub columns: usize,
    /// Where steps wait for each other.
    pub kept: Option<Kept>,
}

/// Steps that wait.
pub struct Kept {
    pub most: usize,
    /// `most` times `batch x in_features` of the input and `batch x out_features` of the output's derivative.
    pub inputs: Slot,
    pub grads: Slot,
    /// As those of the layer, for `most` steps.
    pub packed: Slot,
    pub terms: [Slot; 3],
    pub columns: usize,
}

/// Floats of the input that a core's second-level cache holds beside the weights that stream past.
const RESIDENT: usize = 1 << 16;

impl LargeLinear {
    /// From this many weights on a layer is worth two barriers.
    pub const THRESHOLD: usize = 1 << 18;

    /// Columns updated together for a batch of this size.
    pub fn columns(batch: usize, in_features: usize) -> usize {
        (RESIDENT / batch.max(1)).clamp(512, 16384).min(in_features).next_multiple_of(BLOCK)
    }

    /// `dx = dy w` with the weights of before the update, and the update: for some columns, a few rows at a time, so that
    /// the weights cross the memory bus once for both.
    fn backward_columns(
        &self,
        cx: &Context<'_>,
        x: &[f32],
        terms: &RowTerms<'_>,
        input_terms: &RowTerms<'_>,
        columns: Range<usize>,
    ) {
        let (k, n) = (self.in_features, self.out_features);
        // SAFETY: different slots, each taken once: `add_input_grads` borrows the rows.
        let (mut packed, mut grads, mut tile) =
            unsafe { (cx.own(self.packed), cx.own(self.rows), self.input_grads.map(|slot| cx.own(slot))) };
        let (weights, state) = (cx.memory.tensor(self.weight.tensor), cx.updates.state(self.weight.tensor));
        if self.trained {
            pack_blocks(x, k, columns.start, columns.len(), &mut packed);
        }
        if let Some(tile) = &mut tile {
            tile.fill(0.0);
        }
        for row in (0..n).step_by(ROWS) {
            let rows = row..(row + ROWS).min(n);
            if let Some(tile) = &mut tile {
                self.add_input_grads(cx, input_terms, rows.clone(), columns.clone(), &mut grads, tile);
            }
            if !self.trained {
                continue;
            }
            let ahead = [weights, state].map(|floats| floats.address(rows.end * k + columns.start));
            self.update(cx, terms, &packed, rows, columns.clone(), ahead, &mut grads);
        }
        let (Some(tile), Some(input)) = (tile, self.input.grad) else { return };
        for (sample, row) in tile.chunks_exact(self.columns).take(cx.batch).enumerate() {
            // SAFETY: every worker has columns of its own until the barrier.
            let mut dx = unsafe { cx.write(cx.memory.part_of_sample(input, sample, columns.clone())) };
            match self.input.add {
                true => dx.iter_mut().zip(row).for_each(|(d, t)| *d += t),
                false => dx.copy_from_slice(&row[..columns.len()]),
            }
        }
    }

    /// One step of some rows and columns of the weights; `packed`: those columns of its inputs.
    #[allow(clippy::too_many_arguments)] // every one of them is another thing
    fn update(
        &self,
        cx: &Context<'_>,
        terms: &RowTerms<'_>,
        packed: &[f32],
        rows: Range<usize>,
        columns: Range<usize>,
        ahead: [*const f32; 2],
        grads: &mut [f32],
    ) {
        let (k, blocks) = (self.in_features, columns.len().div_ceil(BLOCK));
        let (first, x, out) = (rows.start, packed, &mut *grads);
        let (rows_len, out_row) = (rows.len(), blocks * BLOCK);
        sparse_outer(SparseOuter {
            terms,
            first,
            rows: rows_len,
            x,
            blocks,
            out,
            out_row,
            add: false,
            ahead,
            ahead_row: k,
        });
        for (r, grad) in rows.zip(grads.chunks_exact_mut(blocks * BLOCK)) {
            cx.updates.take(cx, self.weight.tensor, r * k + columns.start, &mut grad[..columns.len()]);
        }
    }

    /// `tile += dy w` for some rows and columns of `w`; `packed` holds them meanwhile.
    fn add_input_grads(
        &self,
        cx: &Context<'_>,
        terms: &RowTerms<'_>,
        rows: Range<usize>,
        columns: Range<usize>,
        packed: &mut [f32],
        tile: &mut [f32],
    ) {
        let weights = cx.memory.tensor(self.weight.tensor);
        for (r, row) in rows.clone().enumerate() {
            let start = row * self.in_features + columns.start;
            // SAFETY: nobody else has these columns until the barrier, and this worker writes them when they are
            // packed.
            pack_row(&unsafe { cx.read(weights.part(start..start + columns.len())) }, r, ROWS, packed);
        }
        let (first, blocks) = (rows.start / ROWS * cx.batch, columns.len().div_ceil(BLOCK));
        for sample in (0..cx.batch).step_by(ROWS) {
            sparse_outer(SparseOuter {
                terms,
                first: first + sample,
                rows: ROWS.min(cx.batch - sample),
                x: packed,
                blocks,
                out: &mut tile[sample * self.columns..],
                out_row: self.columns,
                add: true,
                ahead: [std::ptr::null(); 2],
                ahead_row: 0,
            });
        }
    }

    /// Few samples: the matrix streams past the inputs once, row by row. With it its momentum, where steps wait.
    fn forward_few(&self, cx: &Context<'_>, own: Range<usize>, sums: &mut [f32]) {
        let (k, rows) = (self.in_features, own.len());
        let after = cx.updates.combination(self.weight.tensor).filter(|_| self.kept.is_some());
        // SAFETY: between barriers nobody writes the input, nor in a forward pass weights and momentum.
        let (x, of) = unsafe { (cx.all(self.input.value), |m: Floats| cx.read(m.part(own.start * k..own.end * k))) };
        let w = of(cx.memory.tensor(self.weight.tensor));
        let momentum = after.as_ref().filter(|(_, buffer)| !buffer.is_empty()).map(|&(_, buffer)| of(buffer));
        let factors = after.as_ref().map_or([1.0, 0.0], |(after, _)| [after.weight as f32, after.momentum as f32]);
        let other = (factors != [1.0, 0.0]).then(|| (momentum.as_deref().unwrap_or(&w), factors));
        dots(Dots { w: &w, other, rows, x: &x, batch: cx.batch, k, y: sums, ldy: rows });
        if let (Some(kept), Some((after, _))) = (&self.kept, after) {
            self.add_steps(cx, kept, &after.steps, &x, own, sums);
        }
    }

    /// What the steps that wait make of the outputs, each by its factor.
    fn add_steps(
        &self,
        cx: &Context<'_>,
        kept: &Kept,
        factors: &[f64],
        x: &[f32],
        own: Range<usize>,
        sums: &mut [f32],
    ) {
        let (k, n, rows) = (self.in_features, self.out_features, own.len());
        let mut products = [0.0; FEW_SAMPLES * FEW_SAMPLES];
        for (step, &factor) in factors.iter().enumerate() {
            // SAFETY: between barriers nobody writes what is kept.
            let (inputs, grads) = unsafe { (cx.one(kept.inputs, step), cx.one(kept.grads, step)) };
            products.fill(0.0);
            let y = &mut products[..cx.batch * cx.batch];
            dots(Dots { w: &inputs, other: None, rows: cx.batch, x, batch: cx.batch, k, y, ldy: cx.batch });
            for (sums, products) in sums.chunks_exact_mut(rows).zip(y.chunks_exact(cx.batch)) {
                for (grads, &product) in grads.chunks_exact(n).zip(products) {
                    let factor = product * factor as f32;
                    sums.iter_mut().zip(&grads[own.clone()]).for_each(|(s, &g)| *s += g * factor);
                }
            }
        }
    }

    /// This worker's share of what the step under way leaves to wait.
    fn keep(&self, cx: &Context<'_>, kept: &Kept, x: &[f32], dy: &[f32]) {
        for (slot, values) in [(kept.inputs, x), (kept.grads, dy)] {
            let own = share(values.len(), cx.worker, cx.workers, 16);
            let part = cx.memory.part_of_sample(slot, cx.updates.waiting.steps, own.clone());
            // SAFETY: every worker has a part of its own until the barrier.
            unsafe { cx.write(part) }.copy_from_slice(&values[own]);
        }
    }

    /// Takes steps that wait, one after the other for a few rows and columns at a time.
    fn take_steps(&self, cx: &Context<'_>, kept: &Kept, steps: usize) {
        let (k, n, batch) = (self.in_features, self.out_features, cx.batch);
        // SAFETY: behind a barrier nobody writes what is kept.
        let each = |slot| -> Vec<Read<'_>> { (0..steps).map(|step| unsafe { cx.one(slot, step) }).collect() };
        let (inputs, grads) = (each(kept.inputs), each(kept.grads));
        // SAFETY: different slots, each taken once.
        let [mut values, mut samples, mut counts] = kept.terms.map(|slot| unsafe { cx.own(slot) });
        // SAFETY: as before.
        let (mut packed, mut rows_of) = unsafe { (cx.own(kept.packed), cx.own(self.rows)) };
        let parts = values.chunks_exact_mut(n * batch).zip(samples.chunks_exact_mut(n * batch));
        let mut terms: Vec<_> = parts
            .zip(counts.chunks_exact_mut(n))
            .take(steps)
            .map(|((values, samples), counts)| RowTerms { values, samples, counts, batch })
            .collect();
        terms.iter_mut().zip(&grads).for_each(|(terms, dy)| terms.find(dy, n));
        let (weights, state) = (cx.memory.tensor(self.weight.tensor), cx.updates.state(self.weight.tensor));
        let own = share(k, cx.worker, cx.workers, PANEL);
        for start in own.clone().step_by(kept.columns) {
            let columns = start..(start + kept.columns).min(own.end);
            let blocks = columns.len().div_ceil(BLOCK);
            let packed_len = batch * blocks * BLOCK;
            for (x, packed) in inputs.iter().zip(packed.chunks_exact_mut(packed_len)) {
                pack_blocks(x, k, columns.start, columns.len(), packed);
            }
            for row in (0..n).step_by(ROWS) {
                let rows = row..(row + ROWS).min(n);
                for (step, (terms, packed)) in terms.iter().zip(packed.chunks_exact(packed_len)).enumerate() {
                    let next = rows.end * k + columns.start;
                    let ahead =
                        [weights, state].map(|floats| floats.address(if step == 0 { next } else { usize::MAX }));
                    self.update(cx, terms, packed, rows.clone(), columns.clone(), ahead, &mut rows_of);
                }
            }
        }
    }

    /// Many samples: they lie across the lanes, and a block of their features stays in the cache.
    fn forward_many(&self, cx: &Context<'_>, own: Range<usize>, sums: &mut [f32]) {
        let (k, rows, panels) = (self.in_features, own.len(), cx.batch.div_ceil(PANEL));
        // SAFETY: between barriers nobody writes the input, nor in a forward pass the weights; two slots, each taken
        // once.
        let (x, weights, mut packed, mut turned) = unsafe {
            (cx.all(self.input.value), cx.tensor(self.weight.tensor), cx.own(self.packed), cx.own(self.turned))
        };
        let width = panels * PANEL;
        let turned = &mut turned[..rows * width];
        turned.fill(0.0);
        let block = (packed.len() / width).min(self.columns);
        for start in (0..k).step_by(block) {
            let columns = block.min(k - start);
            pack_transposed(&x, k, start, columns, &mut packed);
            for row in (0..rows).step_by(OUTER_ROWS) {
                outer(Outer {
                    d: &weights[(own.start + row) * k + start..],
                    d_row: k,
                    rows: OUTER_ROWS.min(rows - row),
                    x: &packed,
                    steps: columns,
                    panels,
                    out: &mut turned[row * width..],
                    ahead: weights.get((own.start + row + OUTER_ROWS) * k + start..).unwrap_or_default(),
                });
            }
        }
        for (b, sums) in sums.chunks_exact_mut(rows).enumerate() {
            sums.iter_mut().zip(turned[b..].iter().step_by(width)).for_each(|(s, t)| *s += t);
        }
    }
}

impl Layer for LargeLinear {
    fn grain(&self) -> Grain {
        Grain::Batch
    }

    fn forward(&self, cx: &Context<'_>) {
        cx.meet();
        let own = share(self.out_features, cx.worker, cx.workers, 4);
        let rows = own.len();
        // SAFETY: nobody else in this call takes the sums, and nobody writes parameters in a forward pass.
        let (mut sums, bias) = unsafe { (cx.own(self.sums), self.bias.map(|b| cx.tensor(b.tensor))) };
        let sums = &mut sums[..cx.batch * rows];
        sums.fill(0.0);
        if rows > 0 {
            match cx.batch {
                // The matrix is read as rows; above, samples fill the lanes.
                ..=FEW_SAMPLES => self.forward_few(cx, own.clone(), sums),
                _ => self.forward_many(cx, own.clone(), sums),
            }
        }
        if let Some(bias) = &bias {
            sums.chunks_exact_mut(rows.max(1)).for_each(|row| {
                row.iter_mut().zip(&bias[own.clone()]).for_each(|(s, b)| *s += b);
            });
        }
        for (sample, row) in sums.chunks_exact(rows.max(1)).enumerate() {
            let out = cx.memory.part_of_sample(self.out.value, sample, own.clone());
            // SAFETY: every worker has outputs of its own until the barrier.
            unsafe { cx.write(out) }.copy_from_slice(row);
        }
        cx.meet();
    }

    fn backward(&self, cx: &Context<'_>) {
        let Some(grad) = self.out.grad else { return };
        cx.meet();
        let (k, n) = (self.in_features, self.out_features);
        // SAFETY: between barriers nobody writes the input or the output's derivative.
        let (x, dy) = unsafe { (cx.all(self.input.value), cx.all(grad)) };
        if let (0, Some(share)) = (cx.worker, self.bias.and_then(|b| b.grad)) {
            // SAFETY: taken once.
            let mut share = unsafe { cx.own(share) };
            dy.chunks_exact(n).for_each(|row| share.iter_mut().zip(row).for_each(|(db, d)| *db += d));
        }
        if let Some(kept) = self.kept.as_ref().filter(|_| cx.updates.waiting.joins) {
            self.keep(cx, kept, &x, &dy);
            cx.meet();
            let steps = cx.updates.waiting.steps + 1;
            if steps == kept.most {
                self.take_steps(cx, kept, steps);
                cx.meet();
            }
            return;
        }
        // SAFETY: three slots, each taken once.
        let [mut values, mut samples, mut counts] = self.terms.map(|slot| unsafe { cx.own(slot) });
        let mut terms = RowTerms { values: &mut values, samples: &mut samples, counts: &mut counts, batch: cx.batch };
        if self.trained {
            terms.find(&dy, n);
        }
        // SAFETY: three slots more, each taken once.
        let [mut values, mut rows, mut counts] = self.input_terms.map(|slot| unsafe { cx.own(slot) });
        let mut input_terms = RowTerms { values: &mut values, samples: &mut rows, counts: &mut counts, batch: ROWS };
        if self.input.grad.is_some() {
            input_terms.find_columns(&dy, n);
        }
        let own = share(k, cx.worker, cx.workers, PANEL);
        for start in own.clone().step_by(self.columns) {
            let columns = start..(start + self.columns).min(own.end);
            self.backward_columns(cx, &x, &terms, &input_terms, columns);
        }
        cx.meet();
    }

    fn settle(&self, cx: &Context<'_>) {
        if let Some(kept) = &self.kept {
            self.take_steps(cx, kept, cx.updates.waiting.steps);
        }
    }
}
