//! Sizes as torchvision's `Resize` spells them.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};

/// Target size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    Exact {
        height: usize,
        width: usize,
    },
    /// The shorter edge becomes `edge`, the other keeps the proportion and stays within `max_size`.
    Shorter {
        edge: usize,
        max_size: Option<usize>,
    },
}

impl Size {
    /// `(height, width)` for an image of that size.
    ///
    /// # Errors
    /// When an edge of the result would be zero, or `max_size` is not above `edge`.
    pub fn resolve(self, height: usize, width: usize) -> Result<(usize, usize)> {
        let (new_height, new_width) = match self {
            Self::Exact { height, width } => (height, width),
            Self::Shorter { edge, max_size } => {
                let (short, long) = if width <= height { (width, height) } else { (height, width) };
                // Python's int(a * b / c): the product is exact, the quotient is a float, the result is cut off.
                let scale = |a: usize, b: usize, c: usize| ((a * b) as f64 / c as f64) as usize;
                let (mut new_short, mut new_long) = (edge, scale(edge, long, short));
                if let Some(max_size) = max_size {
                    if max_size <= edge {
                        return Err(Error::Argument(format!(
                            "max_size = {max_size} must be strictly greater than the requested size for the smaller \
                             edge size = {edge}"
                        )));
                    }
                    if new_long > max_size {
                        (new_short, new_long) = (scale(max_size, new_short, new_long), max_size);
                    }
                }
                if width <= height { (new_long, new_short) } else { (new_short, new_long) }
            }
        };
        if new_height == 0 || new_width == 0 {
            return Err(Error::Argument(format!(
                "cannot resize {width} x {height} to {new_width} x {new_height}: height and width must be > 0"
            )));
        }
        Ok((new_height, new_width))
    }
}
