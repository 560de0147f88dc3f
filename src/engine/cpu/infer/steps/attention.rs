//! Attention: for a few queries at a time the scores of all keys, their softmax, and the sums of values, all in the cache.
//!
//! ```text
//! keys of a head   -> panels [channel][32 keys]        (once per head)      both lie as the microkernel reads
//! values           -> panels [key][32 channels]                             its weights
//! 14 queries       -> scores [key / 16][14][16] -> exp(scores - largest) -> products with values -> / sum
//! ```
//! A matrix of all queries by all keys is nowhere. There may be fewer queries than keys, the same for every image, and both
//! may be turned by position ([`Turn`]) as they are read.

use super::{Step, Turn};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::activate::{Activate, power_of_two};
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::common::kernels::tile::{Tile, tile};
use crate::engine::cpu::infer::memory::{Context, Value};

pub struct Attention {
    isa: Isa,
    /// Queries, keys and values, one pixel high, each with the first block of channels of the first head.
    inputs: [(Value, usize); 3],
    /// The queries of every image, `[blocks][queries][16]` in the weights, instead of the first input.
    constant: Option<usize>,
    turn: Option<Turn>,
    output: Value,
    heads: usize,
    scale: f32,
    /// Where the blocks of a head's queries begin, and those of the scores.
    channels: Vec<usize>,
    keys: Vec<usize>,
}

/// Most queries at a time, on any instruction set.
const ROWS: usize = 14;

impl Attention {
    /// The channels of a head are whole blocks.
    pub fn new(isa: Isa, inputs: [(Value, usize); 3], output: Value, heads: usize, scale: f32) -> Self {
        let channels = 0..output.geometry.blocks() / heads;
        let channels = channels.map(|block| block * inputs[0].0.geometry.plane()).collect();
        let tokens = inputs[1].0.geometry.width;
        let keys = (0..tokens.div_ceil(LANES)).map(|block| block * isa.rows() * LANES).collect();
        Self { isa, inputs, constant: None, turn: None, output, heads, scale, channels, keys }
    }

    /// Queries in the weights instead of those of a value, and a turn of queries and keys.
    pub fn with(mut self, constant: Option<usize>, turn: Option<Turn>) -> Self {
        (self.constant, self.turn) = (constant, turn);
        let distance = match (constant, turn) {
            (Some(_), _) => self.output.geometry.width * LANES,
            // Turned queries lie in a worker's memory.
            (None, Some(_)) => self.isa.rows() * LANES,
            (None, None) => return self,
        };
        self.channels.iter_mut().enumerate().for_each(|(block, at)| *at = block * distance);
        self
    }

    /// Keys.
    fn tokens(&self) -> usize {
        self.inputs[1].0.geometry.width
    }

    /// Keys of a panel, and how many panels there are.
    fn panels(&self) -> [usize; 2] {
        let wide = self.isa.columns() * LANES;
        [wide, self.tokens().div_ceil(wide)]
    }

    /// Floats of keys, values, scores and turned queries.
    fn sizes(&self) -> [usize; 4] {
        let [wide, panels] = self.panels();
        let (depth, rows) = (self.channels.len() * LANES, self.isa.rows());
        let turned = if self.turn.is_some() { rows * depth } else { 0 };
        [panels * wide * depth, self.tokens() * depth, panels * wide * rows, turned]
    }
}

impl Step for Attention {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.heads
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let [keys, values, scores, _] = self.sizes();
        let (image, head) = (task / self.heads, task % self.heads);
        let first = |part: usize| {
            let (value, block) = &self.inputs[part];
            let g = &value.geometry;
            cx.image(value, image).wrapping_add((block + head * self.channels.len()) * g.plane() + g.at(0, 0))
        };
        let o = &self.output.geometry;
        let output = cx.image_mut(&self.output, image);
        let output = output.wrapping_add(head * self.channels.len() * o.plane() + o.at(0, 0));
        let own = |from: usize| cx.own.wrapping_add(from);
        let blocks = self.channels.len();
        let constant = self.constant.map(|table| {
            let len = blocks * o.width * LANES;
            cx.weights(table + head * len, len)
        });
        dispatch(
            self.isa,
            Head {
                step: self,
                queries: constant.unwrap_or_else(|| first(0)),
                from_keys: first(1),
                from_values: first(2),
                table: self.turn.map_or(std::ptr::null(), |turn| cx.weights(turn.table, turn.len)),
                keys: cx.own,
                values: own(keys),
                scores: own(keys + values),
                turned: own(keys + values + scores),
                output,
            },
        );
    }

    fn own(&self) -> usize {
        self.sizes().iter().sum()
    }
}

/// One head of one image.
struct Head<'a> {
    step: &'a Attention,
    queries: *const f32,
    from_keys: *const f32,
    from_values: *const f32,
    /// That of the turn.
    table: *const f32,
    /// This worker's memory.
    keys: *mut f32,
    values: *mut f32,
    scores: *mut f32,
    turned: *mut f32,
    output: *mut f32,
}

impl Kernel for Head<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let queries = self.step.output.geometry.width;
        // As many queries each time, up to one.
        let parts = queries.div_ceil(self.step.isa.rows());
        // SAFETY: the values of this step, and memory of the size that it asks for.
        unsafe {
            self.pack_keys::<V>();
            self.pack_values::<V>();
            for part in 0..parts {
                let (first, end) = (queries * part / parts, queries * (part + 1) / parts);
                self.queries::<V>(first, end - first);
            }
        }
    }
}

impl Head<'_> {
    /// Sixteen channels of sixteen keys at a time; zeros beyond the last key.
    ///
    /// # Safety
    /// The addresses are those of a head.
    #[inline(always)]
    unsafe fn pack_keys<V: Lanes>(&self) {
        let (s, tokens) = (self.step, self.step.tokens());
        let ([wide, panels], plane) = (s.panels(), s.inputs[1].0.geometry.plane());
        let depth = s.channels.len() * LANES;
        for first in (0..panels * wide).step_by(LANES) {
            let to = self.keys.wrapping_add(first / wide * wide * depth + first % wide);
            for block in 0..s.channels.len() {
                let mut rows = [V::splat(0.0); LANES];
                for (row, key) in rows.iter_mut().zip(first..tokens) {
                    // SAFETY: a key of the value, and the table that was made for as many.
                    *row = unsafe {
                        match &s.turn {
                            None => V::load(self.from_keys.add(block * plane + key * LANES)),
                            Some(turn) => {
                                turn.turned(self.from_keys, plane, [block, s.channels.len()], key, self.table)
                            }
                        }
                    };
                }
                for (channel, keys) in V::transpose(rows).into_iter().enumerate() {
                    // SAFETY: a line of a panel.
                    unsafe { keys.store(to.add((block * LANES + channel) * wide)) };
                }
            }
        }
    }

    /// # Safety
    /// As for [`Self::pack_keys`].
    #[inline(always)]
    unsafe fn pack_values<V: Lanes>(&self) {
        let (s, plane, tokens) = (self.step, self.step.inputs[2].0.geometry.plane(), self.step.tokens());
        let columns = s.isa.columns();
        for block in 0..s.channels.len() {
            let (first, column) = (block / columns * columns, block % columns);
            let wide = columns.min(s.channels.len() - first) * LANES;
            let to = self.values.wrapping_add(first * tokens * LANES + column * LANES);
            for key in 0..tokens {
                // SAFETY: a key's value, and its place in a panel.
                unsafe { V::load(self.from_values.add(block * plane + key * LANES)).store(to.add(key * wide)) };
            }
        }
    }

    /// The result of `count` queries from `first` on.
    ///
    /// # Safety
    /// As for [`Self::pack_keys`]; there are so many queries, at most what a microkernel takes.
    #[inline(always)]
    unsafe fn queries<V: Lanes>(&self, first: usize, count: usize) {
        let s = self.step;
        let mut input = self.queries.wrapping_add(first * LANES);
        if let Some(turn) = &s.turn {
            let (plane, blocks) = (s.inputs[0].0.geometry.plane(), s.channels.len());
            for (block, &to) in s.channels.iter().enumerate() {
                for query in 0..count {
                    // SAFETY: a query of the value, the table that was made for as many, and its place.
                    unsafe {
                        let row: V = turn.turned(self.queries, plane, [block, blocks], first + query, self.table);
                        row.store(self.turned.add(to + query * LANES));
                    }
                }
            }
            input = self.turned;
        }
        let ([wide, panels], columns, tokens) = (s.panels(), s.isa.columns(), s.tokens());
        let (depth, row) = (s.channels.len() * LANES, s.isa.rows() * LANES);
        let job = Tile {
            input,
            stride: LANES,
            offsets: &s.channels,
            len: LANES,
            short: 0,
            short_len: 0,
            weights: self.keys,
            later: std::ptr::null(),
            later_lines: 0,
            output: self.scores,
            output_stride: LANES,
            output_block: row,
            bias: std::ptr::null(),
            residual: std::ptr::null(),
            residual_stride: 0,
            residual_block: 0,
            activation: Activate::Nothing,
        };
        let (o, blocks) = (&s.output.geometry, s.channels.len());
        let rest = tokens % LANES;
        let mut sums = [0.0; ROWS];
        // SAFETY: the caller's promise: panels, scores and a line of the output.
        unsafe {
            for panel in 0..panels {
                let weights = self.keys.wrapping_add(panel * wide * depth);
                let output = self.scores.wrapping_add(panel * columns * row);
                tile::<V, false>(count, columns, &Tile { weights, output, ..job });
            }
            for (query, sum) in sums.iter_mut().enumerate().take(count) {
                *sum = self.softmax::<V>(self.scores.wrapping_add(query * LANES));
            }
            for block in (0..blocks).step_by(columns) {
                let output = self.output.wrapping_add(block * o.plane() + first * LANES);
                let product = Tile {
                    input: self.scores,
                    offsets: &s.keys,
                    short: usize::from(rest > 0),
                    short_len: rest,
                    weights: self.values.wrapping_add(block * tokens * LANES),
                    output,
                    output_block: o.plane(),
                    ..job
                };
                let columns = columns.min(blocks - block);
                tile::<V, false>(count, columns, &product);
                for column in 0..columns {
                    for (query, &sum) in sums.iter().enumerate().take(count) {
                        let at = output.wrapping_add(column * o.plane() + query * LANES);
                        V::load(at).mul(V::splat(1.0 / sum)).store(at);
                    }
                }
            }
        }
    }

    /// `exp(scale * (score - largest))` in place of the scores of one query, and their sum.
    ///
    /// # Safety
    /// A query's scores of all keys begin at `scores`.
    #[inline(always)]
    unsafe fn softmax<V: Lanes>(&self, scores: *mut f32) -> f32 {
        let (s, tokens) = (self.step, self.step.tokens());
        let row = s.isa.rows() * LANES;
        let last = s.keys.len() - 1;
        // Beyond the last key there are zeros, which may be larger than all scores.
        let limit = V::from_array(std::array::from_fn(|lane| match last * LANES + lane < tokens {
            true => f32::INFINITY,
            false => f32::NEG_INFINITY,
        }));
        // SAFETY: the caller's promise.
        unsafe {
            let end = scores.wrapping_add(last * row);
            V::load(end).min(limit).store(end);
            let mut largest = V::load(scores);
            for block in 1..=last {
                largest = largest.max(V::load(scores.add(block * row)));
            }
            let largest = V::splat(largest.to_array().into_iter().fold(f32::NEG_INFINITY, f32::max));
            let factor = V::splat(s.scale * std::f32::consts::LOG2_E);
            let mut sum = V::splat(0.0);
            for block in 0..=last {
                let at = scores.add(block * row);
                let power = power_of_two(V::load(at).sub(largest).mul(factor).max(V::splat(-126.0)));
                power.store(at);
                sum = sum.add(power);
            }
            sum.sum()
        }
    }
}
