//! Files that somebody put into a folder of images: only regular ones are read.

use std::fs::{File, FileType};
use std::io::{self, Read};
use std::path::Path;

use crate::error::{DecodeKind, Error, Result};
use crate::image::Limits;
use crate::memory::reserve;
use crate::os;

/// Opens a regular file, links followed, and tells its size.
///
/// # Errors
/// For anything else: a named pipe would wait for a writer for ever, a device may do so or never end.
pub fn regular(path: &Path) -> Result<(File, u64)> {
    let io = |source| Error::Io { path: path.into(), source };
    let file = os::open_at_once(path).map_err(|source| match std::fs::metadata(path) {
        // Sockets cannot be opened at all.
        Ok(found) if !found.is_file() && !found.is_dir() => io(other_kind(found.file_type())),
        _ => io(source),
    })?;
    let found = file.metadata().map_err(io)?;
    if found.is_file() {
        return Ok((file, found.len()));
    }
    Err(io(if found.is_dir() { os::is_a_folder() } else { other_kind(found.file_type()) }))
}

fn other_kind(kind: FileType) -> io::Error {
    io::Error::other(format!("this is {}, not a regular file: remove it from the data", os::kind(kind)))
}

/// The bytes of a file, into memory that is there already.
pub fn read(path: &Path, limits: &Limits, bytes: &mut Vec<u8>) -> Result<()> {
    let io = |source| Error::Io { path: path.into(), source };
    let (file, size) = regular(path)?;
    bytes.clear();
    // One byte more: the end of the file is found without growing the buffer.
    let room = usize::try_from(size.min(limits.bytes)).unwrap_or(usize::MAX).saturating_add(1);
    reserve(bytes, room).map_err(|error| error.at(path))?;
    file.take(limits.bytes + 1).read_to_end(bytes).map_err(io)?;
    if bytes.len() as u64 > limits.bytes {
        let reason = format!("the file is larger than the limit of {} bytes", limits.bytes);
        return Err(Error::undecodable(DecodeKind::TooLarge, reason).at(path));
    }
    Ok(())
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_are_opened() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        std::fs::write(place("file"), b"abc").unwrap();
        std::os::unix::fs::symlink(place("file"), place("link")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(place("socket")).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(place("pipe")).status().unwrap().success());
        assert_eq!(regular(&place("file")).unwrap().1, 3);
        assert_eq!(regular(&place("link")).unwrap().1, 3);
        let named = |name| if cfg!(cnnrs_portable) { "this is something" } else { name };
        for (path, reason) in [
            (place("pipe"), named("a named pipe")),
            (place("socket"), named("a socket")),
            ("/dev/null".into(), named("a device")),
            (folder.path().into(), "s a directory"),
            (place("gone"), "No such file"),
        ] {
            let text = regular(&path).unwrap_err().to_string();
            assert!(text.contains(reason) && text.contains(path.to_str().unwrap()), "{text}");
        }
    }
}
