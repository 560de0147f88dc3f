//! One image: how the bytes of one file become a `3 x H x W` slice.
//!
//! ```text
//! bytes -> decode -> op (resize | crop | rotate | affine | color | flip) -> normalize -> erase -> slice of the batch
//! ```
//! Everything equals what Pillow and torchvision compute, bit for bit; the exceptions are listed in [`decode()`].

mod affine;
mod avx2;
mod color;
mod crop;
mod decode;
mod draw;
mod erase;
mod flip;
mod normalize;
mod op;
mod pixels;
mod resize;
mod rotate;
mod scratch;
mod transform;

pub use affine::{Affine, AffineForm, AffineRange, affine};
pub use color::{
    autocontrast, brightness, contrast, equalize, grayscale, hue, invert, posterize, saturation, sharpness, solarize,
};
pub use crop::{PadMode, Window, center_crop, crop, pad};
pub use decode::{
    Entropy, Format, Left, Limits, ReadOptions, Seen, Truncated, Verdict, decode, decode_jpeg, decode_with,
    own_jpeg_decoder,
};
pub use draw::Key;
pub use erase::Erasing;
pub use flip::{flip_horizontal, flip_vertical};
pub(crate) use normalize::look_up;
pub use normalize::{Finish, Normalizer};
pub use op::{Op, Property};
pub use pixels::{Image, Layout};
pub use resize::{Filter, PillowOrder, ResizePath, Size, resize, resize_on};
pub use rotate::rotate;
pub use scratch::Scratch;
pub use transform::Transform;
