//! Memory whose size a file, a transform or a batch decides: where there is not enough, that is an error and not the end
//! of the process.

use std::alloc::{Layout, alloc_zeroed};

use crate::error::{Error, Result};

/// `len` zeros. The system counts pages when they are written to: what a file merely announces costs nothing.
pub fn zeroed(len: usize) -> Result<Vec<u8>> {
    if len == 0 {
        return Ok(Vec::new());
    }
    let layout = Layout::array::<u8>(len).map_err(|_| Error::memory(len))?;
    // SAFETY: the layout is not empty.
    let data = unsafe { alloc_zeroed(layout) };
    if data.is_null() {
        return Err(Error::memory(len));
    }
    // SAFETY: the global allocator gave `data` for this layout, which is a vector's of this capacity; zeros are bytes.
    Ok(unsafe { Vec::from_raw_parts(data, len, len) })
}

/// `buffer` with `len` bytes, contents unspecified: what is there is not cleared again.
pub fn resize(buffer: &mut Vec<u8>, len: usize) -> Result<()> {
    if len > buffer.capacity() {
        // First the old pages go: the two need not fit side by side.
        *buffer = Vec::new();
        *buffer = zeroed(len)?;
    }
    buffer.resize(len, 0);
    Ok(())
}

/// Whether `bytes` could be had just now, for those who take them without asking.
pub fn probe(bytes: usize) -> Result<()> {
    Vec::<u8>::new().try_reserve_exact(bytes).map_err(|_| Error::memory(bytes))
}

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
