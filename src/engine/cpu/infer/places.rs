//! Channels that only change places: divided, joined and shuffled values are names for channels of others.
//!
//! ```text
//! Cat | Split | ChannelShuffle, one behind the other -> nothing, where 1 x 1 convolutions read the result: they pick
//!                                                      channels; otherwise one copy of what is read
//! 1 x 1 convolution whose result is only picked from -> writes its channels in the order in which they will be read
//! ```

use super::fuse::Fused;
use super::method::{Exact, Method, window};
use crate::engine::cpu::common::kernels::lanes::LANES;
use crate::model::{Graph, Op, Shape};

/// A channel of a node's value, as it lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub node: usize,
    pub channel: usize,
}

/// What a layer reads channel by channel.
#[derive(Debug, Clone)]
pub struct Picked {
    pub places: Vec<Place>,
    /// For each place the input channel that it is.
    pub channels: Vec<usize>,
}

impl Picked {
    /// Channels in order.
    pub fn new(places: Vec<Place>) -> Self {
        Self { channels: (0..places.len()).collect(), places }
    }

    /// The nodes, each once.
    pub fn nodes(&self) -> Vec<usize> {
        let mut nodes: Vec<usize> = self.places.iter().map(|place| place.node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    /// Where channel `c` is found, for every `c`.
    pub fn rows(&self) -> Vec<usize> {
        let mut rows = vec![0; self.channels.len()];
        self.channels.iter().enumerate().for_each(|(row, &channel)| rows[channel] = row);
        rows
    }

    /// In the order of memory.
    fn sort(&mut self) {
        let mut both: Vec<(Place, usize)> = self.places.iter().copied().zip(self.channels.iter().copied()).collect();
        both.sort_unstable();
        (self.places, self.channels) = both.into_iter().unzip();
    }
}

/// Where the channels of every node lie that is only a name for them. Nodes come in order.
pub struct Names(Vec<Option<Vec<Place>>>);

impl Names {
    pub fn new(nodes: usize) -> Self {
        Self(vec![None; nodes])
    }

    /// Notes a node that moves channels; false where it has to be computed.
    ///
    /// `source`: the node that holds each node's value; `readers`: those that read each node.
    pub fn note(
        &mut self,
        graph: &Graph,
        shapes: &[Shape],
        index: usize,
        source: &[usize],
        readers: &[Vec<usize>],
    ) -> bool {
        let node = &graph.nodes[index];
        let places = match &node.op {
            Op::Split { sizes, part, .. } => {
                let first: usize = sizes[..*part].iter().sum();
                self.of(shapes, source[node.inputs[0]])[first..first + sizes[*part]].to_vec()
            }
            Op::ChannelShuffle { groups } => {
                let from = self.of(shapes, source[node.inputs[0]]);
                let each = from.len() / groups;
                (0..from.len()).map(|c| from[c % groups * each + c / groups]).collect()
            }
            Op::Cat { .. } => {
                let named = node.inputs.iter().any(|&i| self.0[source[i]].is_some());
                let moved = |&r: &usize| matches!(graph.nodes[r].op, Op::Split { .. } | Op::ChannelShuffle { .. });
                if !named && !readers[index].iter().any(moved) {
                    return false;
                }
                node.inputs.iter().flat_map(|&i| self.of(shapes, source[i])).collect()
            }
            _ => return false,
        };
        self.0[index] = Some(places);
        true
    }

    /// Of what is only a name: the node all of whose channels lie there, and the block with which they begin.
    pub fn blocks(&self, node: usize) -> Option<(usize, usize)> {
        let places = self.0[node].as_ref()?;
        let &Place { node, channel } = places.first()?;
        let follow = places.iter().enumerate().all(|(i, &place)| place == Place { node, channel: channel + i });
        (follow && channel.is_multiple_of(LANES) && places.len().is_multiple_of(LANES))
            .then_some((node, channel / LANES))
    }

    fn of(&self, shapes: &[Shape], node: usize) -> Vec<Place> {
        match &self.0[node] {
            Some(places) => places.clone(),
            None => (0..shapes[node][1]).map(|channel| Place { node, channel }).collect(),
        }
    }

    /// The copies that are needed because somebody reads more than names, or the caller does.
    pub fn copies(&mut self, layers: &[Fused], output: usize) -> Vec<Fused> {
        let read =
            |node: usize| node == output || layers.iter().any(|l| l.inputs.contains(&node) || l.residual == Some(node));
        let named = self.0.iter_mut().enumerate().filter_map(|(node, places)| places.take().map(|p| (node, p)));
        named
            .filter(|&(node, _)| read(node))
            .map(|(node, places)| {
                let picked = Picked::new(places);
                Fused { inputs: picked.nodes(), picked: Some(picked), ..Fused::plain(node, &[]) }
            })
            .collect()
    }
}

/// Lets convolutions pick their channels where they lie, and others write them where they will be picked.
pub fn pick(graph: &Graph, shapes: &[Shape], exact: Exact<'_>, output: usize, layers: &mut Vec<Fused>) {
    let single = |layer: &Fused| {
        let window = window(graph, shapes, layer.node);
        Method::of(graph, shapes, layer.node, exact) == Method::Direct
            && window.is_some_and(|w| w.groups == 1 && w.kernel == [1, 1] && w.padding == [0, 0])
    };
    // The same distances from channel to channel in all values.
    let alike = |nodes: &[usize]| {
        let form = |node: usize| (shapes[node][1].div_ceil(LANES), &shapes[node][2..]);
        nodes.iter().all(|&node| node != 0 && form(node) == form(nodes[0]))
    };
    for at in (0..layers.len()).rev() {
        let Some(picked) = layers[at].picked.clone() else { continue };
        let copy = layers[at].last;
        let picks = |layer: &Fused| layer.residual != Some(copy) && (!layer.inputs.contains(&copy) || single(layer));
        if copy == output || single(&layers[at]) || !alike(&picked.nodes()) || !layers.iter().all(picks) {
            continue;
        }
        for layer in layers.iter_mut().filter(|layer| layer.inputs.contains(&copy)) {
            layer.inputs = picked.nodes();
            layer.picked = Some(picked.clone());
        }
        layers.remove(at);
    }
    for at in 0..layers.len() {
        let node = layers[at].last;
        let whole = |l: &Fused| l.residual == Some(node) || (l.inputs.contains(&node) && l.picked.is_none());
        if node == output || !single(&layers[at]) || layers[at].residual.is_some() || layers.iter().any(whole) {
            continue;
        }
        // Channels that are read together come together.
        let mut order = Vec::new();
        let mut seen = vec![false; shapes[node][1]];
        for place in layers.iter().flat_map(|l| &l.picked).flat_map(|p| &p.places).filter(|p| p.node == node) {
            if !std::mem::replace(&mut seen[place.channel], true) {
                order.push(place.channel);
            }
        }
        order.extend((0..seen.len()).filter(|&c| !seen[c]));
        let mut lies = vec![0; order.len()];
        order.iter().enumerate().for_each(|(place, &channel)| lies[channel] = place);
        for place in layers.iter_mut().flat_map(|l| &mut l.picked).flat_map(|p| &mut p.places) {
            if place.node == node {
                place.channel = lies[place.channel];
            }
        }
        layers[at].order = Some(order);
    }
    for layer in layers.iter_mut() {
        if single(layer)
            && let Some(picked) = &mut layer.picked
        {
            picked.sort();
        }
    }
}
