//! Linear layers small enough that every worker reads all of the weights.

use crate::engine::cpu::kernels::matmul::{View, matmul};
use crate::engine::cpu::layer::{Context, Edge, Grain, Layer, Out, Param};

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
        let (x, y) = (cx.rows(self.input.value), cx.rows_mut(self.out.value));
        let (k, n) = (self.in_features, self.out_features);
        let weights = View::new(cx.tensor(self.weight.tensor), k);
        if let Some(bias) = self.bias {
            y.chunks_exact_mut(n).for_each(|row| row.copy_from_slice(cx.tensor(bias.tensor)));
        }
        matmul([y.len() / n, n, k], y, n, View::new(x, k), weights.transposed(), self.bias.is_some());
    }

    fn backward(&self, cx: &Context<'_>) {
        let Some(grad) = self.out.grad else { return };
        let (x, dy) = (cx.rows(self.input.value), cx.rows(grad));
        let (k, n) = (self.in_features, self.out_features);
        let m = dy.len() / n;
        if let Some(share) = self.bias.and_then(|b| b.grad) {
            let share = cx.own(share);
            dy.chunks_exact(n).for_each(|row| share.iter_mut().zip(row).for_each(|(db, d)| *db += d));
        }
        if let Some(share) = self.weight.grad {
            matmul([n, k, m], cx.own(share), k, View::new(dy, n).transposed(), View::new(x, k), true);
        }
        if let Some(input) = self.input.grad {
            let weights = View::new(cx.tensor(self.weight.tensor), k);
            matmul([m, k, n], cx.rows_mut(input), k, View::new(dy, n), weights, self.input.add);
        }
    }
}
