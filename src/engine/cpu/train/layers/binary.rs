//! Sums and products of two values with broadcasting, and concatenation.

use crate::engine::cpu::train::kernels::simd::vectorised;
use crate::engine::cpu::train::layer::{Context, Edge, Grain, Layer, Out};

/// Element `i` of the output reads element `map[i]` of an input; `None`: element `i`.
pub type Map = Option<Vec<usize>>;

pub struct Add {
    pub inputs: [(Edge, Map); 2],
    pub out: Out,
}

impl Layer for Add {
    fn grain(&self) -> Grain {
        Grain::Sample
    }

    fn forward(&self, cx: &Context<'_>) {
        let [(a, ma), (b, mb)] = &self.inputs;
        for sample in cx.samples.clone() {
            // SAFETY: the inputs' slots, which may be one, are not the output's, and the sample is this worker's.
            let (a, b, mut y) =
                unsafe { (cx.one(a.value, sample), cx.one(b.value, sample), cx.one_mut(self.out.value, sample)) };
            match (ma, mb) {
                (None, None) => {
                    let (a, b, y) = (&*a, &*b, &mut *y);
                    vectorised(|| y.iter_mut().zip(a).zip(b).for_each(|((y, a), b)| *y = a + b));
                }
                _ => y.iter_mut().enumerate().for_each(|(i, y)| *y = pick(&a, ma, i) + pick(&b, mb, i)),
            }
        }
    }

    fn backward(&self, cx: &Context<'_>) {
        let Some(grad) = self.out.grad else { return };
        for sample in cx.samples.clone() {
            // SAFETY: nobody writes it: the inputs' derivatives are slots of their own.
            let dy = unsafe { cx.one(grad, sample) };
            for (edge, map) in &self.inputs {
                let Some(input) = edge.grad else { continue };
                // SAFETY: not the output's derivative; given up before the other input takes its own, and the sample is
                // this worker's.
                let mut dx = unsafe { cx.one_mut(input, sample) };
                let (dx, dy) = (&mut *dx, &*dy);
                match map {
                    None if !edge.add => dx.copy_from_slice(dy),
                    None => vectorised(|| dx.iter_mut().zip(dy).for_each(|(d, g)| *d += g)),
                    Some(map) => scatter(dx, map, edge.add, |i| dy[i]),
                }
            }
        }
    }
}

pub struct Mul {
    pub inputs: [(Edge, Map); 2],
    pub out: Out,
}

impl Layer for Mul {
    fn grain(&self) -> Grain {
        Grain::Sample
    }

    fn forward(&self, cx: &Context<'_>) {
        let [(a, ma), (b, mb)] = &self.inputs;
        for sample in cx.samples.clone() {
            // SAFETY: the inputs' slots, which may be one, are not the output's, and the sample is this worker's.
            let (a, b, mut y) =
                unsafe { (cx.one(a.value, sample), cx.one(b.value, sample), cx.one_mut(self.out.value, sample)) };
            y.iter_mut().enumerate().for_each(|(i, y)| *y = pick(&a, ma, i) * pick(&b, mb, i));
        }
    }

    fn backward(&self, cx: &Context<'_>) {
        let Some(grad) = self.out.grad else { return };
        for sample in cx.samples.clone() {
            // SAFETY: nobody writes it: the inputs' derivatives are slots of their own.
            let dy = unsafe { cx.one(grad, sample) };
            for side in 0..2 {
                let ((edge, map), (other, other_map)) = (&self.inputs[side], &self.inputs[1 - side]);
                let Some(input) = edge.grad else { continue };
                // SAFETY: a derivative is not a value's slot; given up before the other input takes its own, and the
                // sample is this worker's.
                let (mut dx, other) = unsafe { (cx.one_mut(input, sample), cx.one(other.value, sample)) };
                let share = |i: usize| dy[i] * pick(&other, other_map, i);
                match map {
                    None if edge.add => dx.iter_mut().enumerate().for_each(|(i, d)| *d += share(i)),
                    None => dx.iter_mut().enumerate().for_each(|(i, d)| *d = share(i)),
                    Some(map) => scatter(&mut dx, map, edge.add, share),
                }
            }
        }
    }
}

#[inline(always)]
fn pick(values: &[f32], map: &Map, i: usize) -> f32 {
    match map {
        None => values[i],
        Some(map) => values[map[i]],
    }
}

fn scatter(dx: &mut [f32], map: &[usize], add: bool, share: impl Fn(usize) -> f32) {
    if !add {
        dx.fill(0.0);
    }
    map.iter().enumerate().for_each(|(i, &to)| dx[to] += share(i));
}

/// Joins values along a dimension: `(outer, length, inner)` each.
pub struct Cat {
    pub outer: usize,
    /// Each input with its length times `inner`.
    pub inputs: Vec<(Edge, usize)>,
    pub out: Out,
}

impl Cat {
    /// (input, start in the output row) of each input.
    fn parts(&self) -> impl Iterator<Item = (&Edge, usize, usize)> {
        self.inputs.iter().scan(0, |start, (edge, len)| {
            let part = (edge, *start, *len);
            *start += len;
            Some(part)
        })
    }

    fn row(&self) -> usize {
        self.inputs.iter().map(|(_, len)| len).sum()
    }
}

impl Layer for Cat {
    fn grain(&self) -> Grain {
        Grain::Sample
    }

    fn forward(&self, cx: &Context<'_>) {
        let row = self.row();
        for sample in cx.samples.clone() {
            // SAFETY: no input has this slot, and the sample is this worker's.
            let mut y = unsafe { cx.one_mut(self.out.value, sample) };
            for (edge, start, len) in self.parts() {
                // SAFETY: an input, which nobody writes meanwhile: the output's slot is another.
                let x = unsafe { cx.one(edge.value, sample) };
                for o in 0..self.outer {
                    y[o * row + start..][..len].copy_from_slice(&x[o * len..][..len]);
                }
            }
        }
    }

    fn backward(&self, cx: &Context<'_>) {
        let Some(grad) = self.out.grad else { return };
        let row = self.row();
        for sample in cx.samples.clone() {
            // SAFETY: nobody writes it: the inputs' derivatives are slots of their own.
            let dy = unsafe { cx.one(grad, sample) };
            for (edge, start, len) in self.parts() {
                let Some(input) = edge.grad else { continue };
                // SAFETY: not the output's derivative; given up before the next input takes its own, and the sample is
                // this worker's.
                let mut dx = unsafe { cx.one_mut(input, sample) };
                for o in 0..self.outer {
                    let (to, from) = (&mut dx[o * len..][..len], &dy[o * row + start..][..len]);
                    match edge.add {
                        true => to.iter_mut().zip(from).for_each(|(t, f)| *t += f),
                        false => to.copy_from_slice(from),
                    }
                }
            }
        }
    }
}
