//! Memory whose size a file, a transform or a batch decides: when there is not enough, that is an error and not the end
//! of the process.

use crate::error::{Error, Result};

/// Room for `more` items behind those of `items`.
pub fn reserve<T>(items: &mut Vec<T>, more: usize) -> Result<()> {
    items.try_reserve_exact(more).map_err(|_| Error::memory(more.saturating_mul(size_of::<T>())))
}

/// `length` times `value`.
pub fn filled<T: Clone>(value: T, length: usize) -> Result<Vec<T>> {
    let mut items = Vec::new();
    reserve(&mut items, length)?;
    items.resize(length, value);
    Ok(items)
}

pub fn copied(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut copy = Vec::new();
    reserve(&mut copy, bytes.len())?;
    copy.extend_from_slice(bytes);
    Ok(copy)
}

/// The product, or an error for what no memory can hold.
pub fn product(factors: impl IntoIterator<Item = usize>) -> Result<usize> {
    let product = factors.into_iter().try_fold(1_usize, usize::checked_mul);
    product.ok_or_else(|| Error::memory(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_much_is_an_error() {
        assert!(
            matches!(filled(0_u8, usize::MAX / 2), Err(Error::OutOfMemory { bytes, .. }) if bytes == usize::MAX / 2)
        );
        assert!(matches!(product([1 << 40, 1 << 40]), Err(Error::OutOfMemory { .. })));
        assert_eq!(product([2, 3, 4]).unwrap(), 24);
        assert_eq!(copied(&[1, 2]).unwrap(), [1, 2]);
    }
}
