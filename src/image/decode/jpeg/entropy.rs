//! Who does how much.

#![forbid(unsafe_code)]

/// Who decodes the Huffman codes, most of the work in a JPEG.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entropy {
    Libjpeg,
    /// We, inside libjpeg.
    Own,
    /// We, and what follows them too: 4:2:0 on processors with AVX-512.
    Whole,
}
