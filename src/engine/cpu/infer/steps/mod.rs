//! What a plan is made of. A step divides its work among tasks that any worker may take, in any order.

mod attend;
mod attention;
mod attention_turn;
mod bytes;
mod conv;
mod depthwise;
mod gate;
mod grouped;
mod image_norm;
mod layer_norm;
mod layout;
mod merging;
mod pointwise;
mod pool;
mod softmax;
mod tokens;
mod upsample;
mod windows;
mod winograd;

pub use attend::Attend;
pub use attention::Attention;
pub use attention_turn::Turn;
pub use bytes::{Bytes, Made, Observe, Quantize};
pub use conv::{Conv, Direct, Packing, Taps, pack};
pub use depthwise::{Depthwise, Source};
pub use gate::Gate;
pub use grouped::{Block, Grouped, Small, pack as pack_grouped, pack_small};
pub use image_norm::{ImageNorm, Over};
pub use layer_norm::LayerNorm;
pub use layout::{Cat, Load, Pad, Pick, Relayout, Store};
pub use merging::PatchMerging;
pub use pointwise::{Binary, Pointwise};
pub use pool::Pool;
pub use softmax::Softmax;
pub use tokens::{Origin, Part, Tokens};
pub use upsample::Upsample;
pub use windows::{Tables, WindowAttention};
pub use winograd::{Filters, Winograd, best_size, tiles};

use super::memory::Context;

pub trait Step: Send + Sync {
    /// Tasks of a phase for a group of images; a barrier follows each phase.
    fn tasks(&self, phase: usize, images: usize) -> usize;

    fn run(&self, phase: usize, task: usize, cx: &Context<'_>);

    fn phases(&self) -> usize {
        1
    }

    /// Floats that each worker needs for itself.
    fn own(&self) -> usize {
        0
    }

    /// Floats that the workers share while they compute a group of so many images.
    fn shared(&self, _images: usize) -> usize {
        0
    }
}
