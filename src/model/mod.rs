//! The network as plain data: operations, edges and shapes. Knows no tensor library.

mod cost;
mod graph;
mod shape;

pub use cost::{Cost, costs};
pub use graph::{Activation, Dim, Graph, Node, Op, Pair, Rotation, Tensor};
pub use shape::{Shape, shapes};
