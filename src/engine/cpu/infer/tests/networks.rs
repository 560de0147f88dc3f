//! Networks put together by hand, and the comparison with their definition.

use super::*;

/// Numbers between -1 and 1 that repeat from run to run.
pub struct Numbers(u64);

impl Numbers {
    pub fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn many(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.next() * scale).collect()
    }
}

pub struct Model {
    pub graph: Graph,
    pub tensors: Vec<Vec<f32>>,
    pub numbers: Numbers,
}

impl Model {
    pub fn new() -> Self {
        let nodes = vec![Node { name: "input".into(), op: Op::Input, inputs: vec![] }];
        let graph = Graph { nodes, output: 0, tensors: Vec::new() };
        Self { graph, tensors: Vec::new(), numbers: Numbers(7) }
    }

    pub fn tensor(&mut self, shape: &[usize], scale: f32) -> usize {
        self.tensors.push(self.numbers.many(shape.iter().product(), scale));
        self.graph.tensors.push(shape.to_vec());
        self.tensors.len() - 1
    }

    pub fn op(&mut self, op: Op, inputs: &[usize]) -> usize {
        let name = format!("{}{}", op.kind(), self.graph.nodes.len());
        self.graph.nodes.push(Node { name, op, inputs: inputs.to_vec() });
        self.graph.output = self.graph.nodes.len() - 1;
        self.graph.output
    }

    pub fn conv(&mut self, from: usize, [inp, out]: Pair, kernel: Pair, change: impl Fn(&mut Op)) -> usize {
        let mut op = Op::Conv2d {
            weight: 0,
            bias: None,
            stride: [1, 1],
            padding: [kernel[0] / 2, kernel[1] / 2],
            dilation: [1, 1],
            groups: 1,
        };
        change(&mut op);
        let Op::Conv2d { weight, bias, groups, .. } = &mut op else { unreachable!() };
        let shape = [out, inp / *groups, kernel[0], kernel[1]];
        // Keeps activations of the size of the inputs.
        let scale = (3.0 / shape[1..].iter().product::<usize>() as f32).sqrt();
        (*weight, *bias) = (self.tensor(&shape, scale), Some(self.tensor(&[out], 0.5)));
        self.op(op, &[from])
    }

    pub fn norm(&mut self, from: usize, channels: usize) -> usize {
        let [weight, bias, mean] = [(); 3].map(|()| Some(self.tensor(&[channels], 1.0)));
        let var = self.tensor(&[channels], 1.0);
        self.tensors[var].iter_mut().for_each(|v| *v = v.abs() + 0.5);
        let op = Op::BatchNorm2d {
            weight,
            bias,
            running_mean: mean,
            running_var: Some(var),
            num_batches_tracked: None,
            momentum: Some(0.1),
            eps: 1e-5,
            training: false,
        };
        self.op(op, &[from])
    }

    pub fn act(&mut self, from: usize, function: Activation) -> usize {
        self.op(Op::Activation { function, inplace: true }, &[from])
    }

    pub fn max_pool(&mut self, from: usize, kernel: usize, stride: usize, padding: usize, ceil_mode: bool) -> usize {
        let op = Op::MaxPool2d {
            kernel: [kernel; 2],
            stride: [stride; 2],
            padding: [padding; 2],
            dilation: [1, 1],
            ceil_mode,
        };
        self.op(op, &[from])
    }

    /// Computes one batch after the other with the same plan, on two workers.
    pub fn runner(&self, isa: Isa, shape: &[usize]) -> impl FnMut(&[f32]) -> Vec<f32> {
        let options = Options { workers: 2, exact: false, isa };
        let mut network = Frozen::new(self.graph.clone(), self.tensors.clone(), options, None).unwrap();
        let shape = shape.to_vec();
        move |input| {
            let mut output = vec![0.0; network.output(&shape).unwrap().iter().product()];
            network.run(&shape, input, &mut output).unwrap();
            output
        }
    }

    /// Largest relative error in the L2 norm over all instruction sets, exact and not, one and three workers.
    pub fn check(mut self, shape: &[usize], methods: &[&str]) {
        let input = self.numbers.many(shape.iter().product(), 1.0);
        let expected = reference::run(&self.graph, &self.tensors, &input, shape);
        let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
        assert!(norm > 0.0);
        for isa in Isa::available() {
            for (exact, workers) in [(false, 1), (false, 3), (true, 2)] {
                let options = Options { workers, exact, isa };
                let mut network = Frozen::new(self.graph.clone(), self.tensors.clone(), options, None).unwrap();
                // A smaller last batch runs on the same plan, and the second run meets used memory.
                for images in [shape[0], shape[0].div_ceil(2), shape[0]] {
                    let part = [&[images], &shape[1..]].concat();
                    let len: usize = part.iter().product();
                    let expected = &expected[..expected.len() / shape[0] * images];
                    let mut got = vec![f32::NAN; network.output(&part).unwrap().iter().product()];
                    network.run(&part, &input[..len], &mut got).unwrap();
                    assert_eq!(got.len(), expected.len());
                    let error: f64 = expected.iter().zip(&got).map(|(e, &g)| (e - f64::from(g)).powi(2)).sum();
                    let relative = error.sqrt() / norm;
                    // Sums of up to 4608 products: direct, sqrt(4608) roundings of 2^-24; Winograd's transforms multiply
                    // that by their condition, about 10 for 6 x 6.
                    let tolerance = if exact { 4e-6 } else { 4e-5 };
                    assert!(relative < tolerance, "{isa:?} exact={exact} workers={workers}: {relative:.1e}");
                }
                if !exact {
                    let used: Vec<_> = network.timings().unwrap().iter().map(|t| t.method).collect();
                    for method in methods {
                        assert!(used.contains(method), "{method} is not among {used:?}");
                    }
                }
            }
        }
    }
}

pub fn set(op: &mut Op, s: Pair, p: Pair, d: Pair, g: usize) {
    if let Op::Conv2d { stride, padding, dilation, groups, .. } = op {
        (*stride, *padding, *dilation, *groups) = (s, p, d, g);
    }
}
