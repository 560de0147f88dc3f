//! Questions about a graph, and how an operation is refused.

use crate::error::Error;
use crate::model::{Graph, Node, Op};

/// Nodes that read each node.
pub fn readers(graph: &Graph) -> Vec<Vec<usize>> {
    let mut readers = vec![Vec::new(); graph.nodes.len()];
    for (index, node) in graph.nodes.iter().enumerate() {
        for &input in &node.inputs {
            readers[input].push(index);
        }
    }
    readers
}

/// Whether the result is the input's memory under another name.
pub fn is_view(op: &Op) -> bool {
    match op {
        Op::Flatten { .. } | Op::Reshape { .. } => true,
        Op::Dropout { p, training, .. } => !training || *p == 0.0,
        _ => false,
    }
}

/// The dimension that `dim` means, counted from the end where it is negative.
pub fn axis(dim: i64, rank: usize) -> usize {
    usize::try_from(if dim < 0 { dim + rank as i64 } else { dim }).unwrap_or(usize::MAX)
}

pub fn unsupported(node: &Node, reason: &str) -> Error {
    Error::Unsupported(format!("{} ({}): {reason}", node.name, node.op.kind()))
}

/// Reasons of both engines to refuse an operation in place.
pub const OVERWRITES_BATCH: &str = "overwrites the batch itself";
pub const OVERWRITES_READ: &str = "overwrites a value that other layers read";
