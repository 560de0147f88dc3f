//! The one place that maps files into memory.

use std::fs::File;
use std::io;

use memmap2::Mmap;

/// The whole of `file` as bytes.
pub(super) fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: the bytes may change under us only if somebody writes below the committed end, which cnnrs never does (it
    // appends under a lock, and replaces a file by renaming another over it), and each use checks a sum of what it read.
    // A foreign process that cuts the file short would still end us with SIGBUS, as it would every program that maps it.
    unsafe { Mmap::map(file) }
}
