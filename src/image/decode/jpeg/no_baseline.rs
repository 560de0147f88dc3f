//! `baseline` where no processor has its instructions.

#![forbid(unsafe_code)]

use super::huffman::Huffman;

pub fn available() -> bool {
    false
}

pub fn decode(_: &mut Huffman, _: &[u8], _: &[[u16; 64]; 3], _: (usize, usize), _: &mut [u8]) -> Option<()> {
    None
}
