//! CRC-32 of stored rows, read with plain reads: mapped pages would count as this process's memory.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::os::FileExt;
use crate::threads;

const CHUNK: usize = 1 << 20;

/// The checksum of every (offset, bytes) of a file, None where the file is too short.
///
/// # Errors
/// `Io` when it cannot be opened or read.
pub fn checksums(path: &Path, parts: &[(u64, u64)]) -> Result<Vec<Option<u32>>> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    let size = file.metadata().map_err(io)?.len();
    let next = AtomicUsize::new(0);
    let found = Mutex::new(Ok(vec![None; parts.len()]));
    let work = || {
        let mut buffer = vec![0; CHUNK];
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(&(offset, bytes)) = parts.get(i) else { return };
            if offset.checked_add(bytes).is_none_or(|end| end > size) {
                continue;
            }
            let result = checksum(&file, offset, bytes, &mut buffer);
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            match result {
                Ok(crc) => found.iter_mut().for_each(|all: &mut Vec<Option<u32>>| all[i] = Some(crc)),
                Err(error) => *found = Err(io(error)),
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads::available().min(parts.len()) {
            scope.spawn(work);
        }
        work();
    });
    found.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn checksum(file: &File, mut offset: u64, mut bytes: u64, buffer: &mut [u8]) -> std::io::Result<u32> {
    let mut hasher = crc32fast::Hasher::new();
    while bytes > 0 {
        let now = buffer.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
        file.read_exact_at(&mut buffer[..now], offset)?;
        hasher.update(&buffer[..now]);
        offset += now as u64;
        bytes -= now as u64;
    }
    Ok(hasher.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_those_of_one_pass_and_a_short_file_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        let data: Vec<u8> = (0..3 * CHUNK + 5).map(|i| (i * i >> 7) as u8).collect();
        std::fs::write(&path, &data).unwrap();
        let parts = [(0, data.len() as u64), (7, 20), (data.len() as u64 - 5, 5), (data.len() as u64 - 5, 6)];
        let found = checksums(&path, &parts).unwrap();
        let expected = [&data[..], &data[7..27], &data[data.len() - 5..]].map(|part| Some(crc32fast::hash(part)));
        assert_eq!(found[..3], expected);
        assert_eq!(found[3], None);
    }
}
