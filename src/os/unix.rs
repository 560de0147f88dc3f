//! Linux, and other systems with POSIX's files.

use std::borrow::Cow;
use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::fs::{self, File, FileType, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use memmap2::MmapMut;
use rustix::fs::OFlags;
use rustix::io::Errno;

pub use std::os::unix::fs::FileExt;

// What was opened is looked at afterwards: with these no kind of file makes the opening itself wait.
const FLAGS: OFlags = OFlags::NONBLOCK.union(OFlags::NOCTTY);

/// Opens a file for reading, of whatever kind, and never waits for another process.
pub fn open_at_once(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(FLAGS.bits().cast_signed()).open(path)
}

/// What is no regular file and no folder, in words.
pub fn kind(kind: FileType) -> &'static str {
    if kind.is_fifo() {
        "a named pipe"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_char_device() || kind.is_block_device() {
        "a device"
    } else {
        "something"
    }
}

pub fn is_a_folder() -> io::Error {
    Errno::ISDIR.into()
}

/// Whether an error is about this process, short of file handles or memory, and not about a file.
pub fn is_exhausted(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM))
}

/// Two paths to one folder have the same; links are followed.
pub fn identity(folder: &Path) -> io::Result<impl PartialEq + use<>> {
    fs::metadata(folder).map(|found| (found.dev(), found.ino()))
}

/// The name that has these `as_encoded_bytes`.
pub fn name(bytes: &[u8]) -> Cow<'_, OsStr> {
    OsStr::from_bytes(bytes).into()
}

/// Disk space for the whole file, so that a full disk is an error now and not in the middle of the night.
#[cfg(target_os = "linux")]
pub fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
        // File systems that cannot reserve: the file gets its size, and its space as rows come.
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => file.set_len(bytes),
        other => Ok(other?),
    }
}

#[cfg(not(target_os = "linux"))]
pub fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    file.set_len(bytes)
}

/// Asks for pages of 2 MiB. The system may refuse; then it is only slower.
pub fn ask_for_large_pages(map: &MmapMut) {
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    #[cfg(not(target_os = "linux"))]
    let _ = map;
}

/// The address of a function in a library that is loaded already, or in one that it has loaded.
pub fn symbol(library: &Path, name: &CStr) -> Option<*const c_void> {
    unsafe extern "C" {
        fn dlopen(path: *const c_char, mode: c_int) -> *mut c_void;
        fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    }
    // Of <dlfcn.h>: nothing is loaded that is not.
    const LAZY: c_int = 1;
    const NO_LOAD: c_int = if cfg!(target_os = "macos") { 0x10 } else { 4 };
    let path = CString::new(library.as_os_str().as_bytes()).ok()?;
    // SAFETY: both get strings with a zero at their end, and `dlsym` a library that stays open.
    let address = unsafe {
        let handle = dlopen(path.as_ptr(), LAZY | NO_LOAD);
        if handle.is_null() { handle } else { dlsym(handle, name.as_ptr()) }
    };
    (!address.is_null()).then_some(address.cast_const())
}
