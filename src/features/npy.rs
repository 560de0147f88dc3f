//! The header of a `.npy` file that any NumPy opens (format: NEP 1).

use crate::engine::Dtype;

/// Bytes before the first row: room enough to write the number of rows when it is known.
pub const HEADER: u64 = 256;

/// The header of rows of shape `row`.
pub(super) fn header(dtype: Dtype, count: u64, row: &[usize]) -> Vec<u8> {
    let mut shape = format!("{count},");
    for size in row {
        shape.push_str(&format!(" {size},"));
    }
    if !row.is_empty() {
        // Python writes a comma behind the last size only when it is the only one.
        shape.pop();
    }
    let text = format!("{{'descr': '{}', 'fortran_order': False, 'shape': ({shape}), }}", dtype.descr());
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend((HEADER as u16 - 10).to_le_bytes());
    header.extend(text.as_bytes());
    header.resize(HEADER as usize - 1, b' ');
    header.push(b'\n');
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_256_bytes_and_ends_in_a_newline() {
        let header = header(Dtype::Float32, 10, &[512, 7, 7]);
        assert_eq!(header.len() as u64, HEADER);
        assert!(header.starts_with(
            b"\x93NUMPY\x01\x00\xf6\x00{'descr': '<f4', 'fortran_order': False, 'shape': (10, 512, 7, 7), }"
        ));
        assert_eq!(header.last(), Some(&b'\n'));
    }

    #[test]
    fn one_dimension_has_pythons_comma() {
        let header = header(Dtype::Float16, 3, &[]);
        assert!(String::from_utf8_lossy(&header).contains("'shape': (3,), }"));
    }
}
