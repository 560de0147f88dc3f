//! Files that somebody put into a folder of images: only regular ones are read.

use std::fs::{File, FileType};
use std::io;
use std::path::Path;

use crate::error::{Error, Result};
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
