//! Which of two ways a 3 x 3 convolution of stride 1 is computed in, and its gradients.

use super::Workspace;
use super::conv3x3::{Conv3x3, Filters, PRODUCTS};
use super::conv3x3_direct::Span;
use crate::error::Result;

/// Rows below which a microkernel takes no less time.
const LEAST: usize = 6;

/// How the sums are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// By Winograd's algorithm, a quarter of the products where its tiles are full.
    Winograd,
    /// One product after the other, but only those whose pixels are inside.
    Direct,
}

impl Conv3x3 {
    /// The convolution of `input` with `filters`.
    ///
    /// # Arguments
    /// `input`: as its shape says; `bias`: one float per output channel; `output`: all of it is written.
    ///
    /// # Errors
    /// `NoMemory`; `Panic`.
    pub fn run(
        &self,
        input: &[f32],
        filters: Filters<'_>,
        bias: Option<&[f32]>,
        output: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.run_by(self.method(), input, filters, bias, output, workspace)
    }

    pub(super) fn run_by(
        &self,
        method: Method,
        input: &[f32],
        filters: Filters<'_>,
        bias: Option<&[f32]>,
        output: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        let zeros = vec![0.0; self.outputs];
        let bias = bias.unwrap_or(&zeros);
        match method {
            Method::Winograd => self.run_winograd(input, filters, bias, output, workspace),
            Method::Direct => self.run_direct(input, filters, bias, output, workspace),
        }
    }

    /// The gradient of the filters `[out][in][3][3]`.
    ///
    /// # Arguments
    /// `input`: of the convolution; `derivative`: of its output; `gradient`: all of it is written.
    ///
    /// # Errors
    /// `NoMemory`; `Panic`.
    pub fn weight_gradient(
        &self,
        input: &[f32],
        derivative: &[f32],
        gradient: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        self.weight_gradient_by(self.weight_method(), input, derivative, gradient, workspace)
    }

    pub(super) fn weight_gradient_by(
        &self,
        method: Method,
        input: &[f32],
        derivative: &[f32],
        gradient: &mut [f32],
        workspace: &mut Workspace,
    ) -> Result<()> {
        match method {
            Method::Winograd => self.weight_gradient_winograd(input, derivative, gradient, workspace),
            Method::Direct => self.weight_gradient_direct(input, derivative, gradient, workspace),
        }
    }

    /// Whatever takes less time.
    pub(super) fn method(&self) -> Method {
        let tiles = self.all_tiles().max(LEAST);
        self.cheaper(self.products(LEAST), tiles, if self.is_near() { 8 } else { 32 })
    }

    /// For [`Self::weight_gradient`].
    pub(super) fn weight_method(&self) -> Method {
        self.cheaper(self.products(1), self.all_tiles(), if self.is_near() { 32 } else { 48 })
    }

    /// Compares the time that a pair of an input and an output channel takes, in that of one product (four picoseconds by two
    /// threads of a Zen 5, and all figures are measured there); what transforms of tiles take is spread over the channels.
    ///
    /// # Arguments
    /// `transform`: what a number of a transformed filter takes, beside the products.
    fn cheaper(&self, products: usize, tiles: usize, transform: usize) -> Method {
        let [inputs, outputs] = [self.input.channels, self.outputs];
        let tile = 1.0 + 24.0 / inputs as f64 + 24.0 / outputs as f64;
        let winograd = PRODUCTS as f64 * (tiles as f64 * tile + transform as f64);
        // The same for every tap of a filter that is brought into order.
        let direct = (products + 9 * 24) as f64;
        if direct < winograd { Method::Direct } else { Method::Winograd }
    }

    /// Direct products of an input and an output channel, `least` at least of the outputs that the same taps reach: of fewer
    /// rows a microkernel waits for each product.
    fn products(&self, least: usize) -> usize {
        let [down, across] = self.input.size.map(|side| Span::all(side, self.padding));
        let pairs = down.iter().flat_map(|down| across.iter().map(move |across| [down, across]));
        pairs
            .map(|both| {
                let outputs: usize = both.iter().map(|span| span.outputs.len()).product();
                let taps: usize = both.iter().map(|span| span.taps.len()).product();
                taps * (outputs * self.input.images).max(least)
            })
            .sum()
    }

    /// Whether caches of a few megabytes hold what the filters are transformed to.
    fn is_near(&self) -> bool {
        PRODUCTS * self.input.channels * self.outputs <= 1 << 20
    }
}
