//! The network as plain data: operations, edges and shapes. Knows no tensor library.

mod cost;
mod graph;
mod shape;
mod windows;

pub use cost::{Cost, costs};
pub use graph::{Activation, Dim, Graph, Node, Op, Pair, Rotation, Tensor};
pub use shape::{Shape, shapes};
pub use windows::{APART, Bias, Scores, Windows};
