//! Frozen networks on the CPU without libtorch.
//!
//! ```text
//! graph -> canonical -> fuse -> method -> build -> plan -> features
//!          (N, C, H, W)  layers  kernels  steps    segments, memory, workers
//! ```
//! Values are `[channels / 16][height + border][width + border][16]` with zeros around each image, so that kernels need not
//! ask where the image ends. 3 x 3 convolutions of stride 1 run as Winograd's algorithm unless `exact`.

mod build;
mod canonical;
mod digest;
mod fuse;
mod memory;
mod method;
mod places;
mod plan;
#[cfg(test)]
mod reference;
mod steps;
#[cfg(test)]
mod tests;

use build::Network;
use canonical::{Canonical, canonical};
use digest::Digest;
use method::Method;
use plan::Plan;

pub use crate::engine::cpu::common::isa::Isa;
use std::path::Path;

use crate::engine::cpu::common::team::Team;
use crate::error::{Error, Result};
use crate::model::{self, Graph, Shape};

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
    /// "winograd 6", "winograd 4", "direct", "depthwise", "direct + depthwise" or "".
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
        Ok(Self { graph, parameters, options, team, plan: None })
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
        let network = network(&canonical, &tensors, self.options)?;
        let plan = Plan::compile(&network, images, &mut self.team)?;
        self.plan = Some(Compiled { image: image.to_vec(), weights: self.digest(), plan });
        Ok(())
    }

    /// What each step took since the plan was compiled. Empty before the first batch.
    pub fn timings(&self) -> Result<Vec<Timing>> {
        let Some(Compiled { image, plan, .. }) = &self.plan else { return Ok(Vec::new()) };
        let shapes = model::shapes(&self.graph, &[&[1], image.as_slice()].concat())?;
        let costs = model::costs(&self.graph, &shapes);
        let Canonical { graph, shapes } = canonical(&self.graph, shapes)?;
        let method = |node: usize| Method::of(&graph, &shapes, node, self.options.exact);
        let timing = |(nodes, seconds): (&[usize], f64)| Timing {
            name: nodes.iter().map(|&node| self.graph.nodes[node].name.as_str()).collect::<Vec<_>>().join(" + "),
            kind: self.graph.nodes[nodes[0]].op.kind(),
            method: match (nodes, method(nodes[0])) {
                ([_, _], _) => "direct + depthwise",
                (_, Method::Winograd(size)) if size.outputs() == 6 => "winograd 6",
                (_, Method::Winograd(_)) => "winograd 4",
                (_, Method::Depthwise) => "depthwise",
                (_, Method::Direct) => "direct",
                (_, Method::Grouped) => "grouped",
                (_, Method::None) => "",
            },
            flops: nodes.iter().map(|&node| costs[node].flops).sum(),
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

fn network<'a>(
    Canonical { graph, shapes }: &'a Canonical,
    tensors: &'a fuse::Tensors<'a>,
    options: Options,
) -> Result<Network<'a>> {
    let (layers, output) = fuse::fuse(graph, shapes, tensors, options.exact)?;
    let Options { workers, exact, isa } = options;
    Ok(Network { graph, shapes, tensors, layers, output, isa, exact, workers })
}

/// Why this engine cannot run a graph on inputs of this shape.
pub fn obstacle(graph: &Graph, parameters: &impl Parameters, input: &[usize]) -> Option<String> {
    let tensors: Vec<_> = (0..graph.tensors.len()).map(|t| parameters.floats(t)).collect();
    let options = Options { workers: 1, exact: false, isa: Isa::Portable };
    let checked = model::shapes(graph, input)
        .and_then(|shapes| canonical(graph, shapes))
        .and_then(|canonical| network(&canonical, &tensors, options).and_then(|n| n.check()));
    checked.err().map(|error| error.to_string())
}
