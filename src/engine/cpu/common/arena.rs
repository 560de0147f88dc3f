//! Floats that many threads share.

use std::io;

use memmap2::MmapMut;

use crate::os;

/// Floats per cache line; arenas start at one, so that no vector of an aligned value straddles two.
const LINE: usize = 16;

/// Memory that is handed out as addresses: who reads and writes what, and when, its users have to arrange.
pub struct Arena {
    start: *mut f32,
    len: usize,
    _owner: Owner,
}

enum Owner {
    Heap { _floats: Vec<f32> },
    Pages { _map: MmapMut },
}

// SAFETY: an arena owns its memory and gives away addresses only; using one is unsafe, and its user's promise.
unsafe impl Send for Arena {}
// SAFETY: as for `Send`; no method with `&self` reads or writes a float.
unsafe impl Sync for Arena {}

impl Arena {
    /// Zeroed floats; `None` when there is not that much memory.
    pub fn heap(len: usize) -> Option<Self> {
        let mut floats = Vec::new();
        floats.try_reserve_exact(len.checked_add(LINE)?).ok()?;
        floats.resize(len + LINE, 0.0);
        let skip = floats.as_ptr().align_offset(4 * LINE).min(LINE);
        Some(Self { start: floats[skip..].as_mut_ptr(), len, _owner: Owner::Heap { _floats: floats } })
    }

    /// Floats that are zeroed page by page as they are first used.
    ///
    /// # Errors
    /// When there is not that much memory.
    pub fn pages(len: usize) -> io::Result<Self> {
        let mut map = MmapMut::map_anon(len.max(1) * 4)?;
        // Transformed tiles are written to dozens of distant planes: with 4 KiB pages each is a miss of the TLB.
        os::ask_for_large_pages(&map);
        Ok(Self { start: map.as_mut_ptr().cast(), len, _owner: Owner::Pages { _map: map } })
    }

    /// The address of `len` floats from `offset`.
    #[inline]
    pub fn at(&self, offset: usize, len: usize) -> *mut f32 {
        assert!(offset <= self.len && len <= self.len - offset, "{len} floats at {offset} of {}", self.len);
        self.start.wrapping_add(offset)
    }

    /// The whole arena, while nobody shares it.
    pub fn slice_mut(&mut self) -> &mut [f32] {
        // SAFETY: `start` begins `len` initialised floats that the arena owns, and `&mut self` is the only way to it.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }

    pub fn len(&self) -> usize {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroed_and_from_a_cache_line_on() {
        for mut arena in [Arena::heap(1000).unwrap(), Arena::pages(1000).unwrap()] {
            assert_eq!((arena.at(0, 0).addr() % 64, arena.len()), (0, 1000));
            assert!(arena.slice_mut().iter().all(|&x| x == 0.0));
        }
    }

    #[test]
    #[should_panic(expected = "2 floats at 9 of 10")]
    fn nothing_beyond_the_end() {
        Arena::heap(10).unwrap().at(9, 2);
    }
}
