//! Attention within windows of an image: which pixels belong together, and what is added to their scores.

use super::{Pair, Tensor};

/// Queries, keys and values (N, H, W, 3 C), whose tokens attend to those of the same window (Swin, MaxViT).
///
/// `softmax(scale * q k^T + bias + mask) v` for each head of each window. Images whose sides are no multiples of the window
/// are padded below and to the right first; what is made of the padding is left out of the result.
#[derive(Debug, Clone, PartialEq)]
pub struct Windows {
    pub heads: usize,
    /// Height and width.
    pub window: Pair,
    /// Rows and columns by which the padded image is rolled up and to the left first, and back afterwards.
    pub shift: Pair,
    /// A window is not a rectangle but every (H / window)-th pixel of the image, which no padding or shift goes with.
    pub grid: bool,
    pub scores: Scores,
    pub bias: Bias,
    /// What padding has instead of zeros, (3 C,).
    pub fill: Option<Tensor>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Scores {
    /// Products times this.
    Scaled(f64),
    /// Products of unit vectors, times `exp(min(logit, ln 100))` with a logit (heads, 1, 1) for each head. The part of
    /// `fill` that belongs to the keys is zeros.
    Cosine { logit: Tensor },
}

/// What is added to the score of a query and a key by the distance between them, top left to bottom right.
#[derive(Debug, Clone, PartialEq)]
pub enum Bias {
    /// ((2 height - 1) (2 width - 1), heads).
    Table(Tensor),
    /// `16 sigmoid(output relu(hidden x + bias))` of `distances` (1, 2 height - 1, 2 width - 1, 2).
    Computed { distances: Tensor, hidden: Tensor, hidden_bias: Tensor, output: Tensor },
}

/// What keeps tokens apart that the roll has made neighbours: added to their score.
pub const APART: f64 = -100.0;

impl Windows {
    /// The sides of the padded image.
    pub fn padded(&self, size: Pair) -> Pair {
        [0, 1].map(|i| size[i].next_multiple_of(self.window[i]))
    }

    /// The shift, which there is none of along a side that one window covers.
    pub fn shifted(&self, size: Pair) -> Pair {
        let padded = self.padded(size);
        [0, 1].map(|i| if self.window[i] >= padded[i] { 0 } else { self.shift[i] })
    }

    /// Tokens of a window.
    pub fn tokens(&self) -> usize {
        self.window[0] * self.window[1]
    }

    /// Distances that two tokens of a window may have.
    pub fn distances(&self) -> usize {
        (2 * self.window[0] - 1) * (2 * self.window[1] - 1)
    }

    /// The number of the distance between a query and a key, both tokens of a window.
    pub fn distance(&self, query: usize, key: usize) -> usize {
        let [height, width] = self.window;
        let apart = |i: usize, j: usize, side: usize| i + side - 1 - j;
        apart(query / width, key / width, height) * (2 * width - 1) + apart(query % width, key % width, width)
    }
}
