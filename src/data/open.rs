//! Files that somebody put into a folder of images: only regular ones are read.

use std::fs::{File, FileType, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::error::{Error, Result};

// What was opened is looked at afterwards: with these no kind of file makes the opening itself wait.
const FLAGS: OFlags = OFlags::NONBLOCK.union(OFlags::NOCTTY);

/// Opens a regular file, links followed, and tells its size.
///
/// # Errors
/// For anything else: a named pipe would wait for a writer for ever, a device may do so or never end.
pub fn regular(path: &Path) -> Result<(File, u64)> {
    let io = |source| Error::Io { path: path.into(), source };
    let file = OpenOptions::new().read(true).custom_flags(FLAGS.bits().cast_signed()).open(path);
    let file = file.map_err(|source| match std::fs::metadata(path) {
        // Sockets cannot be opened at all.
        Ok(found) if !found.is_file() && !found.is_dir() => io(other_kind(found.file_type())),
        _ => io(source),
    })?;
    let found = file.metadata().map_err(io)?;
    if found.is_file() {
        return Ok((file, found.len()));
    }
    let is_folder = io::Error::from(Errno::ISDIR);
    Err(io(if found.is_dir() { is_folder } else { other_kind(found.file_type()) }))
}

fn other_kind(kind: FileType) -> io::Error {
    let name = if kind.is_fifo() {
        "a named pipe"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_char_device() || kind.is_block_device() {
        "a device"
    } else {
        "something"
    };
    io::Error::other(format!("this is {name}, not a regular file: remove it from the data"))
}

#[cfg(test)]
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
        for (path, reason) in [
            (place("pipe"), "a named pipe"),
            (place("socket"), "a socket"),
            ("/dev/null".into(), "a device"),
            (folder.path().into(), "Is a directory"),
            (place("gone"), "No such file"),
        ] {
            let text = regular(&path).unwrap_err().to_string();
            assert!(text.contains(reason) && text.contains(path.to_str().unwrap()), "{text}");
        }
    }
}
