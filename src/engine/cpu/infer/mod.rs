//! Frozen networks on the CPU without libtorch.
//!
//! ```text
//! graph -> canonical -> fuse -> method -> build -> plan -> features
//!          (N, C, H, W)  layers  kernels  steps    segments, memory, workers
//! ```
//! Values are `[channels / 16][height + border][width + border][16]` with zeros around each image, so that kernels need not
//! ask where the image ends. Tokens (N, T, C) are images one pixel high. 3 x 3 convolutions of stride 1 run as Winograd's
//! algorithm unless `exact`.

mod balance;
mod build;
mod build_bytes;
mod canonical;
mod digest;
mod fuse;
mod memory;
mod method;
mod places;
mod plan;
mod quantization;
#[cfg(test)]
mod reference;
mod steps;
#[cfg(test)]
mod tests;
mod tokens;
mod windows;

use std::path::Path;

use build::{Network, QUANTIZE, ROUND};
use canonical::{Canonical, canonical};
use digest::Digest;
use method::Exact;
use plan::Plan;
use quantization::{Form, Quantization};

pub use crate::engine::cpu::common::isa::Isa;
use crate::engine::cpu::common::kernels::dot::Dots;
use crate::engine::cpu::common::team::Team;
use crate::error::{Error, Result};
use crate::model::{self, Graph, Op, Shape};

/// The network's parameters and buffers in the caller's memory.
pub trait Parameters {
    /// Contiguous float32; `None` for any other type or place.
    fn floats(&self, index: usize) -> Option<&[f32]>;
}

impl Parameters for Vec<Vec<f32>> {
    fn floats(&self, index: usize) -> Option<&[f32]> {
        self.get(index).map(Vec::as_slice)
    }
}

/// How a network is computed.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub workers: usize,
    /// Direct convolution everywhere: no rounding by Winograd's transforms.
    pub exact: bool,
    pub isa: Isa,
}

/// Most images that one plan takes through the network together: what memory the boundaries between segments need does
/// not grow with the caller's batch.
const MOST_IMAGES: usize = 32;

/// A frozen graph. Compiled for the first batch's shape, again when it changes.
pub struct Frozen<P> {
    graph: Graph,
    parameters: P,
    options: Options,
    team: Team,
    plan: Option<Compiled>,
    bytes: Bytes,
}

/// Whether convolutions read bytes.
enum Bytes {
    No,
    /// Not yet: it looks at what they would read.
    Looking(Quantization),
    Yes(Quantization),
}

/// A plan, the shape of its images, and the weights that it was made of.
struct Compiled {
    image: Vec<usize>,
    weights: Digest,
    plan: Plan,
}

/// What one step of the plan is, and what it took.
#[derive(Debug, Clone)]
pub struct Timing {
    /// Qualified name of the first operation, of both convolutions where two are one step.
    pub name: String,
    pub kind: &'static str,
    /// "winograd 6", "winograd 4", "direct", "depthwise", "direct + depthwise", the same with "int8" or "bf16", or "".
    pub method: &'static str,
    /// Floating-point operations per image by the definition of the operation, whatever the method saves.
    pub flops: u64,
    pub seconds: f64,
}

impl<P: Parameters> Frozen<P> {
    /// `torch`: the library between whose operations it computes, with the same threads; None for threads of its own.
    ///
    /// # Errors
    /// `Threads` when the threads cannot be started.
    pub fn new(graph: Graph, parameters: P, options: Options, torch: Option<&Path>) -> Result<Self> {
        if !Isa::available().contains(&options.isa) {
            return Err(Error::Unsupported(format!("this processor does not have {:?}", options.isa)));
        }
        let team = Team::beside(options.workers, "infer", torch)?;
        Ok(Self { graph, parameters, options, team, plan: None, bytes: Bytes::No })
    }

    /// The shape of the features of a batch of this shape.
    ///
    /// # Errors
    /// `Shape`, naming the layer, what it expects and what reaches it.
    pub fn output(&self, shape: &[usize]) -> Result<Shape> {
        Ok(model::shapes(&self.graph, shape)?.swap_remove(self.graph.output))
    }

    /// Features of one batch of images (N, C, H, W) or of vectors (N, F), both row-major.
    ///
    /// # Errors
    /// `Shape`; `Unsupported` naming an operation that this engine does not compute; `Argument` for memory of the wrong size.
    pub fn run(&mut self, shape: &[usize], input: &[f32], output: &mut [f32]) -> Result<()> {
        if !matches!(shape.len(), 2 | 4) || shape.contains(&0) || input.len() != shape.iter().product::<usize>() {
            return Err(Error::Argument(format!(
                "expected images (N, C, H, W) or vectors (N, F), got shape {shape:?}"
            )));
        }
        self.compile(shape)?;
        if let Bytes::Yes(Quantization { form: Form::Bytes, .. }) = self.bytes
            && input.iter().any(|x| !x.is_finite())
        {
            return Err(Error::Argument("an image holds infinite or NaN values, which bytes cannot".into()));
        }
        let Some(compiled) = &mut self.plan else { return Err(Error::internal("no plan")) };
        compiled.plan.run(&mut self.team, input, output)
    }

    /// Whether the weights are, bit for bit, those that the plan was made of. Not so before the first batch.
    pub fn is_current(&self) -> bool {
        self.plan.as_ref().is_some_and(|compiled| compiled.weights == self.digest())
    }

    fn digest(&self) -> Digest {
        Digest::of((0..self.graph.tensors.len()).map(|t| self.parameters.floats(t)))
    }

    fn compile(&mut self, shape: &[usize]) -> Result<()> {
        let (images, image) = (shape[0].min(MOST_IMAGES), &shape[1..]);
        if self.plan.as_ref().is_some_and(|known| known.image == image && known.plan.images() >= images) {
            return Ok(());
        }
        // The old plan's memory first: two plans may not fit.
        self.plan = None;
        let canonical = canonical(&self.graph, model::shapes(&self.graph, shape)?)?;
        let tensors: Vec<_> = (0..self.graph.tensors.len()).map(|t| self.parameters.floats(t)).collect();
        // Which layers compute in bfloat16 depends on the sizes of the images, which must not be those of the first ones.
        let bf16 = matches!(self.bytes, Bytes::Yes(Quantization { form: Form::Bf16, .. }))
            .then(|| Quantization::bf16(&canonical.graph, &canonical.shapes));
        let quantization = bf16.as_ref().map_or_else(|| self.bytes.quantization(), Option::as_ref);
        let network = network(&canonical, &tensors, self.options, quantization)?;
        let plan = Plan::compile(&network, images, &mut self.team)?;
        self.plan = Some(Compiled { image: image.to_vec(), weights: self.digest(), plan });
        Ok(())
    }

    /// Looks at the values that will be bytes: what one batch has of them. It computes in float32.
    ///
    /// # Errors
    /// As for [`Frozen::run`]; `Unsupported` where no layer would read bytes.
    pub fn look(&mut self, shape: &[usize], input: &[f32]) -> Result<()> {
        if !matches!(self.bytes, Bytes::Looking(_)) {
            self.bytes = Bytes::Looking(self.quantization(shape)?);
            self.plan = None;
        }
        let mut output = vec![0.0; self.output(shape)?.iter().product()];
        self.run(shape, input, &mut output)
    }

    /// (node, lowest, highest) of what was seen but for 0.01 % of the numbers; NaN where some were not finite.
    pub fn ranges(&self) -> Vec<(usize, f32, f32)> {
        self.bytes.quantization().map(Quantization::found).unwrap_or_default()
    }

    /// From now on layers that gain by it read bytes, in these ranges of [`Frozen::ranges`].
    ///
    /// # Errors
    /// `Shape`; `Unsupported` where no layer does; `Argument` for ranges that are none.
    pub fn quantize(&mut self, shape: &[usize], ranges: &[(usize, f32, f32)]) -> Result<()> {
        let is_range = |low: f32, high: f32| low.is_finite() && high.is_finite() && low <= 0.0 && high >= 0.0;
        if let Some((node, ..)) = ranges.iter().find(|(_, low, high)| !is_range(*low, *high)) {
            let name = self.graph.nodes.get(*node).map_or("a layer", |node| &node.name);
            return Err(Error::Argument(format!("{name} makes infinite or NaN values, which int8 cannot hold")));
        }
        let mut quantization = self.quantization(shape)?;
        quantization.settle(ranges);
        (self.bytes, self.plan) = (Bytes::Yes(quantization), None);
        Ok(())
    }

    /// From now on layers that gain by it read bfloat16.
    ///
    /// # Errors
    /// `Shape`; `Unsupported` where no layer does.
    pub fn in_bf16(&mut self, shape: &[usize]) -> Result<()> {
        let Canonical { graph, shapes, .. } = canonical(&self.graph, model::shapes(&self.graph, shape)?)?;
        let quantization = Quantization::bf16(&graph, &shapes).ok_or_else(|| {
            Error::Unsupported(
                "no layer would compute in bfloat16: that takes linear layers, or convolutions other than Winograd's, of \
                 an even number of 16 and more input channels in one group, behind the first layer"
                    .into(),
            )
        })?;
        (self.bytes, self.plan) = (Bytes::Yes(quantization), None);
        Ok(())
    }

    /// What another network has learned of the same graph, which that loses.
    pub fn inherit(&mut self, other: &mut Self) {
        (self.bytes, self.plan) = (std::mem::replace(&mut other.bytes, Bytes::No), None);
    }

    fn quantization(&self, shape: &[usize]) -> Result<Quantization> {
        let Canonical { graph, shapes, .. } = canonical(&self.graph, model::shapes(&self.graph, shape)?)?;
        Quantization::of(&graph, &shapes).ok_or_else(|| {
            Error::Unsupported(
                "no layer would compute in int8: that takes convolutions or linear layers of 16 and more input channels \
                 in one group, behind the first layer"
                    .into(),
            )
        })
    }

    /// What each step took since the plan was compiled. Empty before the first batch.
    pub fn timings(&self) -> Result<Vec<Timing>> {
        let Some(Compiled { image, plan, .. }) = &self.plan else { return Ok(Vec::new()) };
        let shapes = model::shapes(&self.graph, &[&[1], image.as_slice()].concat())?;
        let costs = model::costs(&self.graph, &shapes);
        let is_copy = |method| [QUANTIZE, ROUND].contains(&method);
        let timing = |(nodes, method, seconds): (&[usize], &'static str, f64)| Timing {
            name: nodes.iter().map(|&node| self.graph.nodes[node].name.as_str()).collect::<Vec<_>>().join(" + "),
            kind: if is_copy(method) { "Quantize" } else { self.graph.nodes[nodes[0]].op.kind() },
            method,
            flops: if is_copy(method) { 0 } else { nodes.iter().map(|&node| costs[node].flops).sum() },
            seconds,
        };
        let mut timings: Vec<Timing> = plan.seconds().map(timing).collect();
        if let Some(last) = timings.last_mut() {
            *last = Timing { name: "result".into(), kind: "Store", method: "", flops: 0, seconds: last.seconds };
        }
        Ok(timings)
    }

    /// Bytes of activations, weights and the workers' memory. Zero before the first batch.
    pub fn bytes(&self) -> [usize; 3] {
        self.plan.as_ref().map_or([0; 3], |compiled| compiled.plan.bytes())
    }
}

impl Bytes {
    fn quantization(&self) -> Option<&Quantization> {
        match self {
            Self::No => None,
            Self::Looking(quantization) | Self::Yes(quantization) => Some(quantization),
        }
    }
}

fn network<'a>(
    Canonical { graph, shapes, channels_last }: &'a Canonical,
    tensors: &'a fuse::Tensors<'a>,
    options: Options,
    quantization: Option<&'a Quantization>,
) -> Result<Network<'a>> {
    let Options { workers, exact, isa } = options;
    let channels_last = *channels_last;
    let exact = match quantization {
        Some(quantization) => Exact::At(quantization.chosen()),
        None if exact => Exact::Everywhere,
        None => Exact::Nowhere,
    };
    let (mut layers, output) = fuse::fuse(graph, shapes, tensors, exact)?;
    let mut balance = vec![None; graph.nodes.len()];
    if let Some(quantization) = quantization {
        let norms;
        (layers, norms) = quantization.apply(layers, output);
        if quantization.form == Form::Bytes {
            balance = balance::balance(graph, tensors, &layers, &norms);
        }
    }
    Ok(Network { graph, shapes, tensors, layers, output, channels_last, isa, exact, quantization, balance, workers })
}

/// Whether products of bytes have instructions of their own here; without them int8 is not faster than float32.
pub fn bytes_are_fast() -> bool {
    Dots::of(Isa::best()).is_fast()
}

/// Whether products of bfloat16 have an instruction of their own here.
pub fn bf16_is_fast() -> bool {
    Dots::bf16(Isa::best()).is_fast()
}

/// The names of the layers that would read bytes, or bfloat16, and how many convolutions and linear layers there are.
///
/// # Errors
/// Those of [`Frozen::quantize`].
pub fn byte_layers(
    graph: &Graph,
    parameters: &impl Parameters,
    input: &[usize],
    bf16: bool,
) -> Result<(Vec<String>, usize)> {
    let tensors: Vec<_> = (0..graph.tensors.len()).map(|t| parameters.floats(t)).collect();
    let Canonical { graph, shapes, .. } = canonical(graph, model::shapes(graph, input)?)?;
    let sums = graph.nodes.iter().filter(|n| matches!(n.op, Op::Conv2d { .. } | Op::Linear { .. })).count();
    let quantization = if bf16 { Quantization::bf16(&graph, &shapes) } else { Quantization::of(&graph, &shapes) };
    let Some(quantization) = quantization else { return Ok((Vec::new(), sums)) };
    let (layers, _) = fuse::fuse(&graph, &shapes, &tensors, Exact::At(quantization.chosen()))?;
    let nodes = layers.iter().filter_map(|layer| quantization.reads_bytes(layer));
    Ok((nodes.map(|node| graph.nodes[node].name.clone()).collect(), sums))
}

/// Why this engine cannot run a graph on inputs of this shape.
pub fn obstacle(graph: &Graph, parameters: &impl Parameters, input: &[usize]) -> Option<String> {
    let tensors: Vec<_> = (0..graph.tensors.len()).map(|t| parameters.floats(t)).collect();
    let options = Options { workers: 1, exact: false, isa: Isa::Portable };
    let checked = model::shapes(graph, input)
        .and_then(|shapes| canonical(graph, shapes))
        .and_then(|canonical| network(&canonical, &tensors, options, None).and_then(|n| n.check()));
    checked.err().map(|error| error.to_string())
}
