//! Attention within windows, which are read and written where their pixels lie.

use super::Step;
use super::attend::{Attend, Head, NOWHERE, Side};
use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::lanes::LANES;
use crate::engine::cpu::infer::memory::{Context, Geometry, Value};
use crate::model::Windows;

pub struct WindowAttention {
    /// Queries, keys and values of all heads, one after the other.
    input: Value,
    output: Value,
    attend: Attend,
    tables: Tables,
    /// Of each head.
    scales: Vec<f32>,
    cosine: bool,
    all: Vec<Window>,
}

/// Where tables begin in the weights.
#[derive(Debug, Clone, Copy)]
pub struct Tables {
    /// One of what is added to scores for each head.
    pub bias: usize,
    /// One for each kind of [`Seams`], the first one without any left out.
    pub masks: usize,
    /// Blocks of all channels of the input.
    pub fill: usize,
}

/// A window through which the seam of a roll goes: the lower, the right one, or both.
pub type Seams = [bool; 2];

struct Window {
    seams: Seams,
    /// Of each token, from pixel (0, 0) of an image.
    from: Vec<usize>,
    to: Vec<usize>,
}

impl WindowAttention {
    /// The channels of a head are whole blocks.
    pub fn new(
        isa: Isa,
        windows: &Windows,
        [input, output]: [Value; 2],
        tables: Tables,
        scales: Vec<f32>,
        cosine: bool,
    ) -> Self {
        let tokens = windows.tokens();
        let attend = Attend::new(isa, [tokens, tokens], output.geometry.blocks() / windows.heads, None);
        let size = [output.geometry.height, output.geometry.width];
        let [high, wide] = count(windows, size);
        let window = |number: usize| {
            let at = [number / wide, number % wide];
            let places = |g: &Geometry| {
                let pixel =
                    |[y, x]: [usize; 2]| if y < size[0] && x < size[1] { g.at(y, x) - g.at(0, 0) } else { NOWHERE };
                (0..windows.tokens()).map(|token| pixel(pixel_of(windows, size, at, token))).collect()
            };
            let shift = windows.shifted(size);
            let seams = [0, 1].map(|i| shift[i] > 0 && at[i] + 1 == [high, wide][i]);
            Window { seams, from: places(&input.geometry), to: places(&output.geometry) }
        };
        let all = (0..high * wide).map(window).collect();
        Self { input, output, attend, tables, scales, cosine, all }
    }
}

/// How many windows there are below each other and side by side.
fn count(windows: &Windows, size: [usize; 2]) -> [usize; 2] {
    let padded = windows.padded(size);
    [0, 1].map(|i| padded[i] / windows.window[i])
}

/// The pixel of the padded image that is a token of the window at (row, column).
fn pixel_of(windows: &Windows, size: [usize; 2], at: [usize; 2], token: usize) -> [usize; 2] {
    let (padded, shift, count) = (windows.padded(size), windows.shifted(size), count(windows, size));
    let token = [token / windows.window[1], token % windows.window[1]];
    [0, 1].map(|i| match windows.grid {
        true => token[i] * count[i] + at[i],
        false => (at[i] * windows.window[i] + token[i] + shift[i]) % padded[i],
    })
}

impl Step for WindowAttention {
    fn tasks(&self, _phase: usize, images: usize) -> usize {
        images * self.scales.len() * self.all.len()
    }

    fn run(&self, _phase: usize, task: usize, cx: &Context<'_>) {
        let (heads, count) = (self.scales.len(), self.all.len());
        let (image, head, window) = (task / count / heads, task / count % heads, &self.all[task % count]);
        let (blocks, tokens) = (self.attend.blocks(), window.from.len());
        let table = tokens * Attend::row(tokens);
        let side = |value: &Value, block: usize, places| {
            let g = &value.geometry;
            let start = cx.image_mut(value, image).wrapping_add(block * g.plane() + g.at(0, 0));
            let fill = cx.weights(self.tables.fill, self.input.geometry.blocks() * LANES).wrapping_add(block * LANES);
            Side { start, plane: g.plane(), places: Some(places), fill }
        };
        let first = |part: usize| (part * heads + head) * blocks;
        let mask = match window.seams {
            [false, false] => std::ptr::null(),
            [lower, right] => {
                let kind = usize::from(lower) + 2 * usize::from(right) - 1;
                cx.weights(self.tables.masks + kind * table, table)
            }
        };
        let head = Head {
            attend: &self.attend,
            inputs: [0, 1, 2].map(|part| side(&self.input, first(part), &window.from)),
            output: side(&self.output, head * blocks, &window.to),
            bytes: None,
            own: cx.own,
            factor: self.scales[head] * std::f32::consts::LOG2_E,
            bias: cx.weights(self.tables.bias + head * table, table),
            mask,
            cosine: self.cosine,
            turn: None,
        };
        head.compute();
    }

    fn own(&self) -> usize {
        self.attend.own()
    }
}
