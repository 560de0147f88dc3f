//! Memory for buffers whose size a file or a transform decides: where the system has none, that is an error and not the
//! end of the process.

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
