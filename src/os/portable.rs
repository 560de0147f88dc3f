//! The twins of `unix`, with nothing but `std`.

use std::borrow::Cow;
use std::ffi::{CStr, OsStr, c_void};
use std::fs::{self, File, FileType};
use std::io::{self, ErrorKind};
#[cfg(unix)]
use std::os::unix::fs::FileExt as System;
#[cfg(windows)]
use std::os::windows::fs::FileExt as System;
use std::path::Path;

use memmap2::MmapMut;

/// Reading and writing at a place; on Windows this moves the file's own position, which nothing here uses.
pub trait FileExt {
    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
}

impl FileExt for File {
    fn read_exact_at(&self, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            #[cfg(unix)]
            let done = System::read_at(self, bytes, offset);
            #[cfg(windows)]
            let done = System::seek_read(self, bytes, offset);
            let done = advanced(done, ErrorKind::UnexpectedEof)?;
            bytes = bytes.get_mut(done..).unwrap_or_default();
            offset += done as u64;
        }
        Ok(())
    }

    fn write_all_at(&self, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            #[cfg(unix)]
            let done = System::write_at(self, bytes, offset);
            #[cfg(windows)]
            let done = System::seek_write(self, bytes, offset);
            let done = advanced(done, ErrorKind::WriteZero)?;
            bytes = bytes.get(done..).unwrap_or_default();
            offset += done as u64;
        }
        Ok(())
    }
}

/// How far a call came: not at all when it was interrupted, which is tried again; `end` when it never will.
fn advanced(done: io::Result<usize>, end: ErrorKind) -> io::Result<usize> {
    match done {
        Ok(0) => Err(end.into()),
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(0),
        other => other,
    }
}

/// Opens a regular file for reading. The kind is looked at before: opening a pipe waits, and a folder cannot be opened.
pub fn open_at_once(path: &Path) -> io::Result<File> {
    let found = fs::metadata(path)?;
    if found.is_dir() {
        return Err(is_a_folder());
    }
    if found.is_file() { File::open(path) } else { Err(ErrorKind::Unsupported.into()) }
}

pub fn kind(_: FileType) -> &'static str {
    "something"
}

pub fn is_a_folder() -> io::Error {
    ErrorKind::IsADirectory.into()
}

pub fn is_exhausted(error: &io::Error) -> bool {
    // ERROR_TOO_MANY_OPEN_FILES has no kind.
    error.kind() == ErrorKind::OutOfMemory || cfg!(windows) && error.raw_os_error() == Some(4)
}

pub fn identity(folder: &Path) -> io::Result<impl PartialEq + use<>> {
    fs::canonicalize(folder)
}

/// Half a surrogate pair, which a name on Windows may hold, becomes U+FFFD: an error names a file that is not there.
pub fn name(bytes: &[u8]) -> Cow<'_, OsStr> {
    match String::from_utf8_lossy(bytes) {
        Cow::Borrowed(text) => Cow::Borrowed(text.as_ref()),
        Cow::Owned(text) => Cow::Owned(text.into()),
    }
}

pub fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    file.set_len(bytes)
}

pub fn ask_for_large_pages(_: &MmapMut) {}

/// Libraries are not looked into here.
pub fn symbol(_library: &Path, _name: &CStr) -> Option<*const c_void> {
    None
}
