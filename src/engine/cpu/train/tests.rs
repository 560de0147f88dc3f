//! Whole steps on several workers: the same numbers as on one, and no slice that another overlaps (`borrows`).

use super::layer::{Context, Grain, Layer};
use super::memory::{Place, Slot};
use super::plan::{Pass, Plan};
use super::update::Updates;
use super::waiting::Waiting;
use super::*;
use crate::engine::cpu::common::team::Team;
use crate::engine::optimizer::{Adam, Sgd};
use crate::engine::{Engine, Phase};
use crate::error::Error;
use crate::model::{Activation, Graph, Node, Op, Pair};

/// Numbers between -1 and 1 that repeat from run to run.
fn numbers(len: usize, seed: u64) -> impl Iterator<Item = f32> {
    let step = |z: &u64| Some(z.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407));
    let draws = std::iter::successors(step(&seed), step).skip(8);
    draws.take(len).map(|z| (z >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
}

struct Network {
    graph: Graph,
    trained: Vec<bool>,
    input: Vec<usize>,
}

impl Network {
    fn new(input: &[usize]) -> Self {
        let nodes = vec![Node { name: "input".into(), op: Op::Input, inputs: vec![] }];
        Self { graph: Graph { nodes, output: 0, tensors: vec![] }, trained: vec![], input: input.to_vec() }
    }

    fn tensor(&mut self, shape: &[usize], trained: bool) -> usize {
        self.graph.tensors.push(shape.to_vec());
        self.trained.push(trained);
        self.trained.len() - 1
    }

    fn op(&mut self, op: Op, inputs: &[usize]) -> usize {
        let name = format!("{}{}", op.kind(), self.graph.nodes.len());
        self.graph.nodes.push(Node { name, op, inputs: inputs.to_vec() });
        self.graph.output = self.graph.nodes.len() - 1;
        self.graph.output
    }

    fn conv(&mut self, from: usize, [inp, out]: Pair, k: usize, stride: usize, groups: usize) -> usize {
        let (weight, bias) = (self.tensor(&[out, inp / groups, k, k], true), Some(self.tensor(&[out], true)));
        let (stride, padding, dilation) = ([stride; 2], [k / 2; 2], [1, 1]);
        self.op(Op::Conv2d { weight, bias, stride, padding, dilation, groups }, &[from])
    }

    fn norm(&mut self, from: usize, channels: usize) -> usize {
        let [weight, bias] = [(); 2].map(|()| Some(self.tensor(&[channels], true)));
        let [running_mean, running_var] = [(); 2].map(|()| Some(self.tensor(&[channels], false)));
        let (momentum, eps, training, num_batches_tracked) = (Some(0.1), 1e-5, true, None);
        let op =
            Op::BatchNorm2d { weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, training };
        self.op(op, &[from])
    }

    fn linear(&mut self, from: usize, [inp, out]: Pair) -> usize {
        let (weight, bias) = (self.tensor(&[out, inp], true), Some(self.tensor(&[out], true)));
        self.op(Op::Linear { weight, bias }, &[from])
    }

    fn act(&mut self, from: usize, function: Activation, inplace: bool) -> usize {
        self.op(Op::Activation { function, inplace }, &[from])
    }

    fn pool(&mut self, from: usize, kernel: usize, stride: usize) -> usize {
        let (padding, dilation, ceil_mode) = ([0, 0], [1, 1], false);
        self.op(Op::MaxPool2d { kernel: [kernel; 2], stride: [stride; 2], padding, dilation, ceil_mode }, &[from])
    }

    fn dropout(&mut self, from: usize, channels: bool) -> usize {
        self.op(Op::Dropout { p: 0.4, training: true, channels, inplace: false }, &[from])
    }

    fn flatten(&mut self, from: usize) -> usize {
        self.op(Op::Flatten { start: 1, end: -1 }, &[from])
    }
}

struct Batch {
    shape: Vec<usize>,
    inputs: Vec<f32>,
    targets: Vec<i64>,
}

impl HostBatch for Batch {
    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn inputs(&self) -> &[f32] {
        &self.inputs
    }

    fn targets(&self) -> Targets<'_> {
        Targets::Classes(&self.targets)
    }
}

/// How the optimizer works.
#[derive(Clone, Copy)]
enum Optimizer {
    Momentum,
    Amsgrad,
}

/// All tensors after three steps of `accumulate` batches and a pass of validation, and the losses.
fn train(network: &Network, optimizer: Optimizer, clip: Option<Clip>, accumulate: usize, workers: usize) -> Vec<f32> {
    let lens: Vec<usize> = network.graph.tensors.iter().map(|shape| shape.iter().product()).collect();
    let mut tensors: Vec<Vec<f32>> = lens
        .iter()
        .zip(&network.graph.tensors)
        .zip(1..)
        .map(|((&len, shape), seed)| {
            let scale = (2.0 / shape.iter().skip(1).product::<usize>() as f32).sqrt();
            // Positive, so that they may be variances, where they are vectors.
            numbers(len, seed).map(|x| if shape.len() == 1 { x.abs() + 0.1 } else { x * scale }).collect()
        })
        .collect();
    let mut state: Vec<Vec<f32>> = lens.iter().flat_map(|&len| [len, len, len, 1].map(|len| vec![0.0; len])).collect();
    // SAFETY: the vectors outlive the engine, and nobody touches them before it is gone.
    let lend = |floats: &mut Vec<f32>| unsafe { Floats::of(floats) };
    let rule = |(state, &trained): (&mut [Vec<f32>], &bool)| {
        let [a, b, c, step] = state else { unreachable!() };
        let sgd = Sgd { lr: 0.05, momentum: 0.9, dampening: 0.0, weight_decay: 0.01, nesterov: false, maximize: false };
        let adam =
            Adam { lr: 0.01, betas: (0.9, 0.99), eps: 1e-4, weight_decay: 0.0, maximize: false, decoupled: false };
        trained.then(|| match optimizer {
            Optimizer::Momentum => Rule::Sgd { options: sgd, momentum: Some((lend(a), false)) },
            Optimizer::Amsgrad => {
                let (step, exp_avg, exp_avg_sq, max_exp_avg_sq) = (lend(step), lend(a), lend(b), lend(c));
                Rule::Adam { options: adam, step, exp_avg, exp_avg_sq, max_exp_avg_sq }
            }
        })
    };
    let rules = state.chunks_exact_mut(4).zip(&network.trained).map(rule).collect();
    let lent = tensors.iter_mut().map(|floats| Tensor::Floats(lend(floats))).collect();
    let loss = Loss::Classes(ClassLoss { cross_entropy: true, weight: None, ignore_index: -100, label_smoothing: 0.0 });
    let mut plans = Plans::default();
    let mut results = Vec::new();
    let mut engine =
        CpuEngine::new(network.graph.clone(), &mut plans, lent, loss, rules, clip, accumulate, 5, workers).unwrap();
    for number in 0..3 * accumulate + 1 {
        let (samples, len) = (network.input[0], network.input.iter().product());
        let targets = (0..samples as i64).map(|i| (i * 7 + number as i64) % 3).collect();
        let batch = Batch { shape: network.input.clone(), inputs: numbers(len, number as u64 + 99).collect(), targets };
        if number == 3 * accumulate {
            results.push(engine.forward(batch, Phase::Validation).unwrap().loss as f32);
            continue;
        }
        results.push(engine.forward(batch, Phase::Training).unwrap().loss as f32);
        if (number + 1) % accumulate == 0 { engine.step().unwrap() } else { engine.backward().unwrap() }
    }
    drop(engine);
    results.extend(tensors.into_iter().flatten());
    results
}

fn check(network: &Network) {
    let ways = [
        (Optimizer::Momentum, None, 1),
        (Optimizer::Amsgrad, Some(Clip::Value(0.05)), 1),
        (Optimizer::Momentum, Some(Clip::Norm(0.5)), 1),
        (Optimizer::Amsgrad, None, 2),
    ];
    for (optimizer, clip, accumulate) in ways {
        let expected = train(network, optimizer, clip, accumulate, 1);
        for workers in [2, 3] {
            let got = train(network, optimizer, clip, accumulate, workers);
            let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let error = norm(&mut got.iter().zip(&expected).map(|(g, e)| g - e)) / norm(&mut expected.iter().copied());
            // Sums in another order: roundings of 2^-24, grown by three steps.
            assert!(error < 1e-4, "{workers} workers: {error:.1e}");
        }
    }
}

#[test]
fn convolutions_of_every_kind() {
    let mut n = Network::new(&[7, 3, 14, 15]);
    // With channels dropped and pooled in one kernel, of one pixel, in groups, strided, too small to go sample by
    // sample.
    let x = n.conv(0, [3, 8], 3, 1, 1);
    let x = n.dropout(x, true);
    let x = n.act(x, Activation::Relu, true);
    let x = n.pool(x, 2, 2);
    let x = n.conv(x, [8, 8], 1, 1, 1);
    let x = n.act(x, Activation::Silu, false);
    let x = n.conv(x, [8, 12], 3, 1, 4);
    let x = n.norm(x, 12);
    let x = n.act(x, Activation::Relu, true);
    let x = n.conv(x, [12, 10], 5, 1, 1);
    let x = n.pool(x, 2, 2);
    let x = n.conv(x, [10, 9], 3, 2, 1);
    let x = n.flatten(x);
    n.linear(x, [36, 3]);
    check(&n);
}

#[test]
fn large_matrices() {
    for batch in [5, 13] {
        let mut n = Network::new(&[batch, 3, 11, 11]);
        let x = n.conv(0, [3, 5], 3, 1, 1);
        let x = n.pool(x, 2, 2);
        let x = n.flatten(x);
        let x = n.linear(x, [125, 700]);
        let x = n.act(x, Activation::Relu, true);
        let x = n.dropout(x, false);
        // From 2^18 weights on the workers divide the matrix; neither side fills whole panels.
        let x = n.linear(x, [700, 389]);
        let x = n.act(x, Activation::Tanh, false);
        let x = n.linear(x, [389, 701]);
        n.linear(x, [701, 3]);
        check(&n);
    }
}

#[test]
fn branches_and_everything_else() {
    let mut n = Network::new(&[6, 4, 9, 8]);
    let x = n.conv(0, [4, 6], 3, 1, 1);
    let x = n.norm(x, 6);
    let a = n.act(x, Activation::Hardswish, false);
    let s = n.op(Op::Mean { dims: vec![2, 3], keepdim: true }, &[a]);
    let s = n.act(s, Activation::Sigmoid, false);
    let a = n.op(Op::Mul, &[a, s]);
    let b = n.op(Op::Add { inplace: false }, &[a, x]);
    let b = n.op(Op::Add { inplace: false }, &[b, b]);
    let x = n.op(Op::Cat { dim: 1 }, &[a, b, a]);
    let x = n.pool(x, 3, 1);
    let (kernel, stride, padding) = ([3, 3], [2, 2], [1, 1]);
    let x =
        n.op(Op::AvgPool2d { kernel, stride, padding, ceil_mode: true, count_include_pad: false, divisor: None }, &[x]);
    let x = n.op(Op::AdaptiveAvgPool2d { output: [Some(2), Some(2)] }, &[x]);
    let x = n.flatten(x);
    let x = n.linear(x, [72, 3]);
    n.op(Op::Softmax { dim: 1, log: true }, &[x]);
    check(&n);
}

/// Weights and momentum after some steps, of which the last batches are smaller.
fn after_steps(batch: usize, steps: usize, momentum: f64, workers: usize, unseen: bool) -> Vec<f32> {
    let mut n = Network::new(&[batch, 701]);
    let x = n.linear(0, [701, 389]);
    let x = n.act(x, Activation::Tanh, false);
    n.linear(x, [389, 3]);
    let lens: Vec<usize> = n.graph.tensors.iter().map(|shape| shape.iter().product()).collect();
    let mut memory: Vec<Vec<f32>> =
        lens.iter().enumerate().map(|(i, &len)| numbers(len, i as u64).map(|x| x * 0.05).collect()).collect();
    // Nobody may read a buffer that has never been used.
    memory.extend(lens.iter().map(|&len| vec![f32::NAN; len]));
    // SAFETY: the vectors outlive the engine, and nobody touches them before it is gone.
    let lent: Vec<Floats> = memory.iter_mut().map(|floats| unsafe { Floats::of(floats) }).collect();
    let (tensors, buffers) = lent.split_at(lens.len());
    let sgd = Sgd { lr: 0.05, momentum, dampening: 0.1, weight_decay: 0.01, nesterov: false, maximize: false };
    let rule = |&buffer| Some(Rule::Sgd { options: sgd, momentum: (momentum > 0.0).then_some((buffer, false)) });
    let rules = buffers.iter().map(rule).collect();
    let tensors = tensors.iter().copied().map(Tensor::Floats).collect();
    let loss = Loss::Classes(ClassLoss { cross_entropy: true, weight: None, ignore_index: -100, label_smoothing: 0.0 });
    let mut plans = Plans::default();
    let mut engine = CpuEngine::new(n.graph, &mut plans, tensors, loss, rules, None, 1, 0, workers).unwrap();
    if unseen {
        engine.is_unseen();
    }
    for number in 0..steps {
        let samples = if number + 2 < steps { batch } else { batch - 1 };
        let inputs = numbers(samples * 701, number as u64 + 99).collect();
        let targets = (0..samples as i64).map(|i| (i * 7 + number as i64) % 3).collect();
        engine.forward(Batch { shape: vec![samples, 701], inputs, targets }, Phase::Training).unwrap();
        engine.step().unwrap();
    }
    // What comes next is undone, the steps before it are not.
    let batch = Batch { shape: vec![1, 701], inputs: vec![0.0; 701], targets: vec![0] };
    engine.forward(batch, Phase::Training).unwrap();
    engine.undo().unwrap();
    drop(engine);
    memory.truncate(if momentum > 0.0 { memory.len() } else { lens.len() });
    memory.into_iter().flatten().collect()
}

#[test]
fn steps_that_wait_are_taken_in_the_end() {
    for (batch, momentum) in [(5, 0.9), (8, 0.0), (2, 0.5)] {
        for steps in [3, 12, 25] {
            let expected = after_steps(batch, steps, momentum, 1, false);
            for workers in [1, 2, 3] {
                let got = after_steps(batch, steps, momentum, workers, true);
                let gap = got.iter().zip(&expected).map(|(g, e)| (g - e).abs()).fold(0.0, f32::max);
                // Weights up to 0.05 and sums of 701 terms: some roundings of 2^-24 a step.
                assert!(gap < 1e-6, "{batch} samples, {steps} steps, {workers} workers: {gap:.1e}");
            }
        }
    }
}

#[test]
fn only_a_step_changes_the_weights() {
    let mut n = Network::new(&[4, 2]);
    n.linear(0, [2, 2]);
    let (mut weights, mut bias, mut plans) = ([0.5; 4], [0.0; 2], Plans::default());
    // SAFETY: the arrays outlive the engine, and nobody writes them before it is gone.
    let lent = unsafe { [Floats::of(&mut weights), Floats::of(&mut bias)] };
    let sgd = Sgd { lr: 1.0, momentum: 0.0, dampening: 0.0, weight_decay: 0.0, nesterov: false, maximize: false };
    let rules = vec![Some(Rule::Sgd { options: sgd, momentum: None }); 2];
    let loss = Loss::Classes(ClassLoss { cross_entropy: true, weight: None, ignore_index: -100, label_smoothing: 0.0 });
    let tensors = lent.map(Tensor::Floats).to_vec();
    let mut engine = CpuEngine::new(n.graph, &mut plans, tensors, loss, rules, None, 1, 0, 2).unwrap();
    let batch = Batch { shape: vec![4, 2], inputs: numbers(8, 1).collect(), targets: vec![0, 1, 1, 1] };
    engine.forward(batch, Phase::Training).unwrap();
    assert!(engine.backward().unwrap_err().to_string().contains("call step()"));
    assert_eq!(engine.steps, 0);
    engine.step().unwrap();
    assert_eq!(engine.steps, 1);
    drop(engine);
    assert!(bias[0] < 0.0 && bias[1] > 0.0, "{bias:?}");
}

/// Every worker writes the first sample.
struct Greedy {
    out: Slot,
    meets: bool,
}

impl Layer for Greedy {
    fn grain(&self) -> Grain {
        Grain::Batch
    }

    fn forward(&self, cx: &Context<'_>) {
        for worker in 0..cx.workers {
            if worker == cx.worker {
                // SAFETY: only where the workers meet is the sample this one's alone; that is what the test is about.
                let mut sample = unsafe { cx.one_mut(self.out, 0) };
                sample[0] = worker as f32;
            }
            if self.meets {
                cx.meet();
            }
        }
    }

    fn backward(&self, _cx: &Context<'_>) {}
}

/// Takes a sample that it still has.
struct Twice(Slot);

impl Layer for Twice {
    fn grain(&self) -> Grain {
        Grain::Sample
    }

    fn forward(&self, cx: &Context<'_>) {
        // SAFETY: it is not safe; debug assertions stop here.
        let (first, second) = unsafe { (cx.rows(self.0), cx.rows_mut(self.0)) };
        drop((first, second));
    }

    fn backward(&self, _cx: &Context<'_>) {}
}

fn fault(layer: impl Fn(Slot) -> Box<dyn Layer>) -> Option<String> {
    let mut n = Network::new(&[4, 2]);
    n.linear(0, [2, 2]);
    let mut plan = Plan::compile(&n.graph, &n.input, &[false, false], false, 2).unwrap();
    let slot = Slot { place: Place::Batch, offset: 0, len: 2 };
    plan.replace_layers(vec![layer(slot)]);
    let mut weights = [[1.0; 4], [1.0; 4]];
    // SAFETY: the array outlives the plan, and nobody touches it meanwhile.
    let lent = weights.iter_mut().map(|w| Tensor::Floats(unsafe { Floats::of(&mut w[..]) })).collect();
    plan.memory_mut().tensors = lent;
    let nowhere = Slot { place: Place::Worker, offset: 0, len: 0 };
    let updates = Updates {
        rules: vec![None, None],
        roots: nowhere,
        clip: None,
        gathered: None,
        unseen: false,
        waiting: Waiting::default(),
    };
    let pass = Pass {
        inputs: &[0.0; 8],
        targets: Targets::Values(&[0.0; 8]),
        loss: &Loss::Mse,
        accumulate: 1,
        seed: 0,
        number: 0,
        updates: &updates,
    };
    match plan.forward_and_tail_backward(&mut Team::new(2, "test").unwrap(), &pass) {
        Err(Error::Panic(message)) => Some(message),
        _ => None,
    }
}

#[cfg(debug_assertions)]
#[test]
fn an_overlap_on_purpose_is_found() {
    assert_eq!(fault(|out| Box::new(Greedy { out, meets: true })), None);
    // The message is the calling thread's own, or says that another worker panicked.
    let found = fault(|out| Box::new(Greedy { out, meets: false })).unwrap();
    assert!(found.contains("no barrier between") || found.contains("worker panicked"), "{found}");
    let found = fault(|out| Box::new(Twice(out))).unwrap();
    assert!(found.contains("still has from src/engine/cpu/train/tests.rs"), "{found}");
}
