//! Which image files a folder of class folders holds, in torchvision's order.
//!
//! torchvision sorts Python strings: by code point, with bytes that are not UTF-8 as lone surrogates
//! (`surrogateescape`). Byte order differs from that as soon as one name is not UTF-8, hence [`python_order`].

use std::cmp::Ordering;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering as Atomic};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::error::Result;
use crate::threads;

/// The files below each of `folders`, links followed, those of one folder sorted as
/// `sorted(os.walk(folder, followlinks=True))` with sorted file names. `None` for a folder that is not a directory.
///
/// With `extensions` only files whose lower-cased path ends with one of them. `interrupted` is asked a few times per
/// second; its error ends the scan. Folders that cannot be read count as empty, as in `os.walk`.
///
/// # Errors
/// Only those of `interrupted`.
pub fn scan(
    folders: &[PathBuf],
    extensions: Option<&[String]>,
    mut interrupted: impl FnMut() -> Result<()>,
) -> Result<Vec<Option<Vec<PathBuf>>>> {
    let results: Vec<Mutex<Option<Vec<PathBuf>>>> = folders.iter().map(|_| Mutex::default()).collect();
    let (cursor, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (alive, done) = mpsc::channel::<()>();
    let work = |alive: mpsc::Sender<()>| {
        let next = || Some(cursor.fetch_add(1, Atomic::Relaxed)).and_then(|i| folders.get(i).zip(results.get(i)));
        while let Some((folder, result)) = next() {
            let files = folder.is_dir().then(|| files_below(folder, extensions, &stop));
            *result.lock().unwrap_or_else(PoisonError::into_inner) = files;
        }
        drop(alive);
    };
    let outcome = std::thread::scope(|scope| {
        for _ in 0..threads::available().min(folders.len()) {
            let alive = alive.clone();
            let work = &work;
            scope.spawn(move || work(alive));
        }
        drop(alive);
        // The channel closes when the last thread ends.
        while done.recv_timeout(Duration::from_millis(20)) == Err(RecvTimeoutError::Timeout) {
            if let Err(error) = interrupted() {
                stop.store(true, Atomic::Relaxed);
                return Err(error);
            }
        }
        Ok(())
    });
    outcome?;
    Ok(results.into_iter().map(|files| files.into_inner().unwrap_or_else(PoisonError::into_inner)).collect())
}

fn files_below(folder: &Path, extensions: Option<&[String]>, stop: &AtomicBool) -> Vec<PathBuf> {
    let mut folders: Vec<(PathBuf, Vec<OsString>)> = Vec::new();
    let mut todo = vec![folder.to_path_buf()];
    while let Some(folder) = todo.pop() {
        if stop.load(Atomic::Relaxed) {
            return Vec::new();
        }
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        let mut names = Vec::new();
        for entry in entries.flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            let name = entry.file_name();
            // A link that cannot be followed is a file, as for `os.walk`.
            if kind.is_dir() || kind.is_symlink() && fs::metadata(entry.path()).is_ok_and(|target| target.is_dir()) {
                todo.push(folder.join(name));
            } else if extensions.is_none_or(|extensions| ends_with_one_of(&name, extensions)) {
                names.push(name);
            }
        }
        names.sort_unstable_by(|a, b| python_order(a, b));
        folders.push((folder, names));
    }
    folders.sort_unstable_by(|(a, _), (b, _)| python_order(a.as_os_str(), b.as_os_str()));
    let files = folders.iter().map(|(_, names)| names.len()).sum();
    let mut paths = Vec::with_capacity(files);
    for (folder, names) in folders {
        paths.extend(names.into_iter().map(|name| folder.join(name)));
    }
    paths
}

/// `name.lower().endswith(extensions)` of Python.
fn ends_with_one_of(name: &OsStr, extensions: &[String]) -> bool {
    let bytes = name.as_encoded_bytes();
    if bytes.is_ascii() {
        return extensions.iter().any(|extension| {
            let start = bytes.len().checked_sub(extension.len());
            // The name is lower-cased, the extension is not.
            start
                .and_then(|start| bytes.get(start..))
                .is_some_and(|end| end.iter().map(u8::to_ascii_lowercase).eq(extension.bytes()))
        });
    }
    let lower = name.to_string_lossy().to_lowercase();
    extensions.iter().any(|extension| lower.ends_with(extension.as_str()))
}

/// The order of two names as Python strings.
pub fn python_order(a: &OsStr, b: &OsStr) -> Ordering {
    let (a, b) = (a.as_encoded_bytes(), b.as_encoded_bytes());
    let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    if let (Some(x), Some(y)) = (a.get(same), b.get(same))
        && x.is_ascii()
        && y.is_ascii()
    {
        return x.cmp(y);
    }
    code_points(a).cmp(code_points(b))
}

fn code_points(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.utf8_chunks().flat_map(|chunk| {
        let escaped = chunk.invalid().iter().map(|&byte| 0xDC00 + u32::from(byte));
        chunk.valid().chars().map(u32::from).chain(escaped)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStrExt;

    fn name(bytes: &[u8]) -> &OsStr {
        OsStr::from_bytes(bytes)
    }

    #[test]
    fn an_escaped_byte_sorts_below_the_private_use_area() {
        // U+DCFF < U+E000, although the byte 0xFF is larger than every byte of UTF-8.
        assert_eq!(python_order(name(b"\xff"), name("\u{e000}".as_bytes())), Ordering::Less);
        assert_eq!(python_order(name(b"\xff"), name("é".as_bytes())), Ordering::Greater);
        assert_eq!(python_order(name(b"a"), name(b"ab")), Ordering::Less);
        // A sequence that one name cuts short is a character in the other.
        assert_eq!(python_order(name(b"\xf0\x9f\x90"), name("🐱".as_bytes())), Ordering::Less);
        assert_eq!(python_order(name(b"\xc3"), name(b"\xc3\xa9")), Ordering::Greater);
    }

    proptest! {
        #[test]
        fn the_order_is_that_of_the_code_points(a in prop::collection::vec(any::<u8>(), 0..6),
                                                b in prop::collection::vec(any::<u8>(), 0..6)) {
            let whole: Ordering = code_points(&a).collect::<Vec<_>>().cmp(&code_points(&b).collect::<Vec<_>>());
            prop_assert_eq!(python_order(name(&a), name(&b)), whole);
        }
    }

    #[test]
    fn files_come_in_the_order_of_os_walk() {
        let root = tempfile::tempdir().unwrap();
        for path in ["b.JPG", "a.png", "sub/z.jpeg", "sub-1/y.jpg", "sub/deep/x.jpg", "notes.txt", "é.jpg"] {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, b"").unwrap();
        }
        std::os::unix::fs::symlink(root.path().join("sub"), root.path().join("link")).unwrap();
        let extensions = [".jpg", ".jpeg", ".png"].map(String::from);
        let folders = [root.path().to_path_buf(), root.path().join("missing")];
        let found = scan(&folders, Some(&extensions), || Ok(())).unwrap();
        assert!(found[1].is_none());
        let names: Vec<_> = found[0].as_ref().unwrap().iter().map(|p| p.strip_prefix(root.path()).unwrap()).collect();
        // "sub-1" < "sub/" because '-' < '/', and a folder comes before the ones inside it.
        let expected = ["a.png", "b.JPG", "é.jpg", "link/z.jpeg", "link/deep/x.jpg", "sub/z.jpeg"];
        let expected = expected.iter().chain(&["sub-1/y.jpg", "sub/deep/x.jpg"]).map(Path::new).collect::<Vec<_>>();
        assert_eq!(names, expected);
    }

    #[test]
    fn an_interruption_ends_the_scan() {
        // Two links to the folder they are in: 2^40 folders until the system refuses, so only the interruption ends it.
        let root = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            std::os::unix::fs::symlink(root.path(), root.path().join(name)).unwrap();
        }
        let outcome = scan(&[root.path().to_path_buf()], None, || Err(Error::Interrupted));
        assert!(matches!(outcome, Err(Error::Interrupted)));
    }
}
