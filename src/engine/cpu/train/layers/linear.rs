//! Linear layers small enough that every worker reads all of the weights.

use crate::engine::cpu::train::kernels::matmul::{View, matmul};
use crate::engine::cpu::train::layer::{Context, Edge, Grain, Layer, Out, Param};

pub struct Linear {
    pub in_features: usize,
    pub out_features: usize,
    pub input: Edge,
    pub out: Out,
    pub weight: Param,
    pub bias: Option<Param>,
}

impl Layer for Linear {
    fn grain(&self) -> Grain {
        Grain::Chunk
    }

    fn forward(&self, cx: &Context<'_>) {
        // SAFETY: the input's slot is not the output's, and the samples are this worker's; nobody writes parameters
        // before all layers are done.
        let (x, mut y, weights, bias) = unsafe {
            let bias = self.bias.map(|bias| cx.tensor(bias.tensor));
            (cx.rows(self.input.value), cx.rows_mut(self.out.value), cx.tensor(self.weight.tensor), bias)
        };
        let (k, n) = (self.in_features, self.out_features);
        if let Some(bias) = &bias {
            y.chunks_exact_mut(n).for_each(|row| row.copy_from_slice(bias));
        }
        let weights = View::new(&weights, k).transposed();
        matmul([y.len() / n, n, k], &mut y, n, View::new(&x, k), weights, bias.is_some());
    }

    fn backward(&self, cx: &Context<'_>) {
        let Some(grad) = self.out.grad else { return };
        // SAFETY: values, derivatives and shares are different slots, and the samples are this worker's.
        let (x, dy) = unsafe { (cx.rows(self.input.value), cx.rows(grad)) };
        let (k, n) = (self.in_features, self.out_features);
        let m = dy.len() / n;
        if let Some(share) = self.bias.and_then(|b| b.grad) {
            // SAFETY: taken once at a time.
            let mut share = unsafe { cx.own(share) };
            dy.chunks_exact(n).for_each(|row| share.iter_mut().zip(row).for_each(|(db, d)| *db += d));
        }
        if let Some(share) = self.weight.grad {
            // SAFETY: taken once at a time.
            let mut share = unsafe { cx.own(share) };
            matmul([n, k, m], &mut share, k, View::new(&dy, n).transposed(), View::new(&x, k), true);
        }
        if let Some(input) = self.input.grad {
            // SAFETY: nobody writes parameters before all layers are done; this derivative is neither `x` nor `dy`.
            let (weights, mut dx) = unsafe { (cx.tensor(self.weight.tensor), cx.rows_mut(input)) };
            matmul([m, k, n], &mut dx, k, View::new(&dy, n), View::new(&weights, k), self.input.add);
        }
    }
}
