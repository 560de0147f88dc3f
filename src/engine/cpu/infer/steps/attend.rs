//! What a head computes: for a few queries at a time the scores of all keys, their softmax, and the sums of values, all in
//! the cache.
//!
//! ```text
//! keys of a head   -> panels [channel][32 keys]        (once per head)      both lie as the microkernel reads
//! values           -> panels [key][32 channels]                             its weights
//! 14 queries       -> scores [key / 16][14][16] -> exp(scores - largest) -> products with values -> / sum
//! ```
//! A matrix of all queries by all keys is nowhere. There may be fewer queries than keys, and both may be turned by position
//! ([`Turn`]) as they are read.

use super::Turn;
use super::bytes::{Made, Narrow, Plain, Sink};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::activate::{Activate, power_of_two};
use crate::engine::cpu::common::kernels::bytes::Range;
use crate::engine::cpu::common::kernels::dot::{self, Dot, DotKernel};
use crate::engine::cpu::common::kernels::lanes::{Kernel, LANES, Lanes, dispatch};
use crate::engine::cpu::common::kernels::tile::{Tile, tile};
use crate::engine::cpu::infer::memory::Geometry;

/// The sizes of a head.
pub struct Attend {
    isa: Isa,
    queries: usize,
    /// Keys and values.
    tokens: usize,
    /// Where the blocks of a head's queries begin, and those of the scores.
    channels: Vec<usize>,
    keys: Vec<usize>,
    /// Queries lie anywhere, or are turned.
    gathers: bool,
}

/// Where the tokens of a head are.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    pub start: *mut f32,
    /// Between two blocks of channels.
    pub plane: usize,
    /// How far each token is from the start, if they do not lie side by side: [`NOWHERE`] for those that do not lie there.
    pub places: Option<&'a [usize]>,
    /// The blocks that such tokens have, one after the other.
    pub fill: *const f32,
}

pub const NOWHERE: usize = usize::MAX;

/// One head of one image, or of one of its windows.
pub struct Head<'a> {
    pub attend: &'a Attend,
    /// Queries, keys and values.
    pub inputs: [Side<'a>; 3],
    pub output: Side<'a>,
    pub bytes: Option<AsBytes<'a>>,
    /// This worker's memory.
    pub own: *mut f32,
    /// Of scores, which are powers of two: the scale times log2(e).
    pub factor: f32,
    /// Tables `[query][key / 16][16]` that are added then, times log2(e), or null; the mask is zero beyond the last key, the
    /// bias minus infinity.
    pub bias: *const f32,
    pub mask: *const f32,
    /// Queries and keys are made unit vectors first.
    pub cosine: bool,
    /// Of queries and keys that lie side by side, and its table.
    pub turn: Option<(Turn, *const f32)>,
}

/// Of an output that becomes bytes: its start is that of all heads.
pub struct AsBytes<'a> {
    pub made: Made,
    pub geometry: &'a Geometry,
    /// The head's first block of channels.
    pub first: usize,
}

/// Most queries at a time, on any instruction set.
const ROWS: usize = 14;
/// `F.normalize`'s.
const SHORTEST: f32 = 1e-12;

impl Attend {
    /// `queries`, and the tokens that are keys; `blocks`: of channels, whole ones; `plane`: between those of the queries, None
    /// where they lie anywhere or are turned.
    pub fn new(isa: Isa, [queries, tokens]: [usize; 2], blocks: usize, plane: Option<usize>) -> Self {
        let channels = (0..blocks).map(|block| block * plane.unwrap_or(queries * LANES)).collect();
        let keys = (0..tokens.div_ceil(LANES)).map(|block| block * isa.rows() * LANES).collect();
        Self { isa, queries, tokens, channels, keys, gathers: plane.is_none() }
    }

    pub fn blocks(&self) -> usize {
        self.channels.len()
    }

    /// Floats of a row of a table that is added to scores.
    pub fn row(tokens: usize) -> usize {
        tokens.next_multiple_of(LANES)
    }

    /// Keys of a panel, and how many panels there are.
    fn panels(&self) -> [usize; 2] {
        let wide = self.isa.columns() * LANES;
        [wide, self.tokens.div_ceil(wide)]
    }

    /// Floats of keys, values, scores, results of a few queries, and queries.
    fn sizes(&self) -> [usize; 5] {
        let [wide, panels] = self.panels();
        let depth = self.blocks() * LANES;
        let queries = if self.gathers { self.queries * depth } else { 0 };
        [panels * wide * depth, self.tokens * depth, panels * wide * self.isa.rows(), wide * self.isa.rows(), queries]
    }

    /// Floats that a worker needs.
    pub fn own(&self) -> usize {
        self.sizes().iter().sum()
    }
}

impl Side<'_> {
    #[inline(always)]
    fn place(&self, token: usize) -> usize {
        self.places.map_or(token * LANES, |places| places[token])
    }

    /// A block of a token that is read.
    #[inline(always)]
    fn at(&self, token: usize, block: usize) -> *const f32 {
        match self.place(token) {
            NOWHERE => self.fill.wrapping_add(block * LANES),
            place => self.start.wrapping_add(block * self.plane + place),
        }
    }
}

impl Kernel for Head<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        self.each::<V, Plain>();
    }
}

impl DotKernel for Head<'_> {
    #[inline(always)]
    fn run<D: Dot>(self) {
        self.each::<D::Floats, Narrow<D>>();
    }
}

impl Head<'_> {
    /// On the instructions of the step.
    pub fn compute(self) {
        match self.bytes.as_ref().map(|bytes| bytes.made.dots) {
            Some(dots) => dot::dispatch(dots, self),
            None => dispatch(self.attend.isa, self),
        }
    }

    #[inline(always)]
    fn each<V: Lanes, S: Sink<V>>(self) {
        let s = self.attend;
        let mut places = [self.own; 5];
        let mut next = 0;
        for (place, size) in places.iter_mut().zip(s.sizes()) {
            *place = self.own.wrapping_add(next);
            next += size;
        }
        let [keys, values, scores, results, queries] = places;
        let queries = if s.gathers { queries } else { self.inputs[0].start };
        let own = Own { keys, values, scores, results, queries };
        // As many queries each time, up to one.
        let parts = s.queries.div_ceil(s.isa.rows());
        // SAFETY: the values of a step, and memory of the size that it asks for.
        unsafe {
            if s.gathers {
                self.gather_queries::<V>(own.queries);
            }
            self.pack_keys::<V>(own.keys);
            self.pack_values::<V>(own.values);
            for part in 0..parts {
                let (first, end) = (s.queries * part / parts, s.queries * (part + 1) / parts);
                self.queries::<V, S>(&own, first, end - first);
            }
        }
    }
}

/// Memory of a worker, and where the queries are.
struct Own {
    keys: *mut f32,
    values: *mut f32,
    scores: *mut f32,
    results: *mut f32,
    queries: *const f32,
}

impl Head<'_> {
    /// Sixteen channels of a query or key.
    ///
    /// # Safety
    /// It is there, with a turn also in its table.
    #[inline(always)]
    unsafe fn row<V: Lanes>(&self, from: &Side<'_>, token: usize, block: usize) -> V {
        // SAFETY: the caller's promise.
        unsafe {
            match &self.turn {
                None => V::load(from.at(token, block)),
                Some((turn, table)) => {
                    turn.turned(from.start, from.plane, [block, self.attend.blocks()], token, *table)
                }
            }
        }
    }

    /// # Safety
    /// The addresses are those of a head; there is room at `to` for all its queries.
    #[inline(always)]
    unsafe fn gather_queries<V: Lanes>(&self, to: *const f32) {
        let (s, from, to) = (self.attend, &self.inputs[0], to.cast_mut());
        for token in 0..s.queries {
            let mut factor = V::splat(1.0);
            if self.cosine {
                let mut squares = V::splat(0.0);
                for block in 0..s.blocks() {
                    // SAFETY: a query.
                    let value: V = unsafe { self.row(from, token, block) };
                    squares = value.mul_add(value, squares);
                }
                factor = V::splat(1.0 / squares.sum().sqrt().max(SHORTEST));
            }
            for (block, at) in s.channels.iter().enumerate() {
                // SAFETY: a query, and its place among them.
                unsafe { self.row::<V>(from, token, block).mul(factor).store(to.add(at + token * LANES)) };
            }
        }
    }

    /// Sixteen channels of sixteen keys at a time; zeros beyond the last key.
    ///
    /// # Safety
    /// The addresses are those of a head; there is room at `to` for all panels.
    #[inline(always)]
    unsafe fn pack_keys<V: Lanes>(&self, to: *mut f32) {
        let (s, from) = (self.attend, &self.inputs[1]);
        let ([wide, panels], depth) = (s.panels(), s.blocks() * LANES);
        for first in (0..panels * wide).step_by(LANES) {
            let to = to.wrapping_add(first / wide * wide * depth + first % wide);
            let mut squares = V::splat(0.0);
            for block in 0..s.blocks() {
                let mut rows = [V::splat(0.0); LANES];
                for (row, key) in rows.iter_mut().zip(first..s.tokens) {
                    // SAFETY: a key.
                    *row = unsafe { self.row(from, key, block) };
                }
                for (channel, keys) in V::transpose(rows).into_iter().enumerate() {
                    // SAFETY: a line of a panel.
                    unsafe { keys.store(to.add((block * LANES + channel) * wide)) };
                    squares = keys.mul_add(keys, squares);
                }
            }
            if self.cosine {
                let factors = V::from_array(squares.to_array().map(|square| 1.0 / square.sqrt().max(SHORTEST)));
                for channel in 0..depth {
                    let at = to.wrapping_add(channel * wide);
                    // SAFETY: a line of a panel.
                    unsafe { V::load(at).mul(factors).store(at) };
                }
            }
        }
    }

    /// # Safety
    /// The addresses are those of a head; there is room at `to` for all values.
    #[inline(always)]
    unsafe fn pack_values<V: Lanes>(&self, to: *mut f32) {
        let (s, from) = (self.attend, &self.inputs[2]);
        let (columns, tokens) = (s.isa.columns(), s.tokens);
        for block in 0..s.blocks() {
            let (first, column) = (block / columns * columns, block % columns);
            let wide = columns.min(s.blocks() - first) * LANES;
            let to = to.wrapping_add(first * tokens * LANES + column * LANES);
            for key in 0..tokens {
                // SAFETY: a key's value, and its place in a panel.
                unsafe { V::load(from.at(key, block)).store(to.add(key * wide)) };
            }
        }
    }

    /// The result of `count` queries from `first` on.
    ///
    /// # Safety
    /// The addresses are those of a head; there are so many queries, at most what a microkernel takes.
    #[inline(always)]
    unsafe fn queries<V: Lanes, S: Sink<V>>(&self, own: &Own, first: usize, count: usize) {
        let (s, o) = (self.attend, &self.output);
        let ([wide, panels], columns, tokens) = (s.panels(), s.isa.columns(), s.tokens);
        let (blocks, row) = (s.blocks(), s.isa.rows() * LANES);
        let depth = blocks * LANES;
        let job = Tile {
            input: own.queries.wrapping_add(first * LANES),
            stride: LANES,
            offsets: &s.channels,
            len: LANES,
            short: 0,
            short_len: 0,
            weights: own.keys,
            later: std::ptr::null(),
            later_lines: 0,
            output: own.scores,
            output_stride: LANES,
            output_block: row,
            bias: std::ptr::null(),
            residual: std::ptr::null(),
            residual_stride: 0,
            residual_block: 0,
            activation: Activate::Nothing,
        };
        let range = self.bytes.as_ref().map_or(Range { scale: 1.0, zero: 0 }, |bytes| bytes.made.range);
        let rest = tokens % LANES;
        // SAFETY: the caller's promise: panels, scores and a line of the output.
        unsafe {
            for panel in 0..panels {
                let weights = own.keys.wrapping_add(panel * wide * depth);
                let output = own.scores.wrapping_add(panel * columns * row);
                tile::<V, false>(count, columns, &Tile { weights, output, ..job });
            }
            let sums = self.softmax::<V>(own.scores, first, count);
            for block in (0..blocks).step_by(columns) {
                let product = Tile {
                    input: own.scores,
                    offsets: &s.keys,
                    short: usize::from(rest > 0),
                    short_len: rest,
                    weights: own.values.wrapping_add(block * tokens * LANES),
                    output: own.results,
                    ..job
                };
                let columns = columns.min(blocks - block);
                tile::<V, false>(count, columns, &product);
                for (query, &sum) in sums.iter().enumerate().take(count) {
                    let place = o.place(first + query);
                    if place == NOWHERE {
                        continue;
                    }
                    for column in 0..columns {
                        let from = own.results.wrapping_add(column * row + query * LANES);
                        let to = match &self.bytes {
                            Some(AsBytes { made, geometry, first }) => {
                                let at = made.at(geometry, first + block + column);
                                o.start.wrapping_add(place).cast::<u8>().wrapping_add(at)
                            }
                            None => o.start.wrapping_add((block + column) * o.plane + place).cast(),
                        };
                        S::put(V::load(from).mul(V::splat(1.0 / sum)), range, to);
                    }
                }
            }
        }
    }

    /// Powers of the scores of `count` queries from `first` on in their place, and their sums.
    ///
    /// # Safety
    /// The scores of all keys begin at `scores`.
    #[inline(always)]
    unsafe fn softmax<V: Lanes>(&self, scores: *mut f32, first: usize, count: usize) -> [f32; LANES] {
        let (s, tokens) = (self.attend, self.attend.tokens);
        let row = s.isa.rows() * LANES;
        let last = s.keys.len() - 1;
        let factor = V::splat(self.factor);
        // Beyond the last key there are zeros, which may be larger than all scores.
        let limit = V::from_array(std::array::from_fn(|lane| match last * LANES + lane < tokens {
            true => f32::INFINITY,
            false => f32::NEG_INFINITY,
        }));
        let mut largest = [V::splat(0.0); LANES];
        // SAFETY: the caller's promise; the tables have a row for each query.
        unsafe {
            for (query, largest) in largest.iter_mut().enumerate().take(count) {
                let at = scores.wrapping_add(query * LANES);
                *largest = V::splat(f32::NEG_INFINITY);
                for block in 0..=last {
                    let to = at.wrapping_add(block * row);
                    let in_table = (first + query) * Attend::row(tokens) + block * LANES;
                    let mut score = V::load(to).mul(factor);
                    if !self.bias.is_null() {
                        score = score.add(V::load(self.bias.add(in_table)));
                    } else if block == last {
                        score = score.min(limit);
                    }
                    if !self.mask.is_null() {
                        score = score.add(V::load(self.mask.add(in_table)));
                    }
                    score.store(to);
                    *largest = score.max(*largest);
                }
            }
            // Of each query the largest of its lanes.
            let largest = V::transpose(largest).into_iter().reduce(V::max).map_or([0.0; LANES], V::to_array);
            let mut sums = [V::splat(0.0); LANES];
            for (query, sum) in sums.iter_mut().enumerate().take(count) {
                let (at, largest) = (scores.wrapping_add(query * LANES), V::splat(largest[query]));
                for block in 0..=last {
                    let to = at.wrapping_add(block * row);
                    let power = power_of_two(V::load(to).sub(largest).max(V::splat(-126.0)));
                    power.store(to);
                    *sum = sum.add(power);
                }
            }
            V::transpose(sums).into_iter().reduce(V::add).map_or([0.0; LANES], V::to_array)
        }
    }
}

const _: () = assert!(ROWS <= LANES, "a sum for each query");
