//! Which image files a folder of class folders holds, in torchvision's order.
//!
//! torchvision sorts Python strings: by code point, with bytes that are not UTF-8 as lone surrogates
//! (`surrogateescape`). Byte order differs from that as soon as one name is not UTF-8, hence [`python_order`].

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering as Atomic};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::os;
use crate::threads;

/// Which files count.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rules<'a> {
    /// Only files whose lower-cased path ends with one of these.
    pub extensions: Option<&'a [String]>,
    /// Not what begins with a dot, folders included.
    pub skip_hidden: bool,
}

/// The file names of one folder, sorted, behind each other in one allocation.
#[derive(Clone, Debug, Default)]
pub struct Names {
    bytes: Vec<u8>,
    spans: Vec<(usize, u32)>,
}

impl Names {
    fn push(&mut self, name: &OsStr) {
        // No name is longer than 2^32 bytes.
        self.spans.push((self.bytes.len(), name.len() as u32));
        self.bytes.extend_from_slice(name.as_encoded_bytes());
    }

    fn get(&self, (start, length): (usize, u32)) -> &[u8] {
        self.bytes.get(start..start + length as usize).unwrap_or_default()
    }

    fn sort(&mut self) {
        let mut spans = std::mem::take(&mut self.spans);
        if self.bytes.is_ascii() || spans.iter().all(|&span| std::str::from_utf8(self.get(span)).is_ok()) {
            // The bytes of UTF-8 are in the order of the code points.
            spans.sort_unstable_by(|&a, &b| self.get(a).cmp(self.get(b)));
        } else {
            spans.sort_unstable_by(|&a, &b| python_order(self.get(a), self.get(b)));
        }
        self.spans = spans;
    }

    pub fn len(&self) -> usize {
        self.spans.len()
    }

    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.spans.iter().map(|&span| self.get(span))
    }
}

/// What lies below one folder.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    /// Every folder and its files.
    pub folders: Vec<(PathBuf, Names)>,
    /// Links to a folder that they lie in; they were not followed.
    pub loops: Vec<PathBuf>,
}

/// The files below each of `folders`, links followed, those of one folder sorted as
/// `sorted(os.walk(folder, followlinks=True))` with sorted file names. `found` gets them in the order of `folders`, while
/// others are still being listed; `None` for a folder that is not a directory.
///
/// `interrupted` is asked a few times per second; its error ends the scan, as that of `found`. Folders that cannot be read
/// count as empty, as in `os.walk`, but not for want of file handles or memory. A link that leads back to a folder above it is not followed: `os.walk` goes round until
/// the system refuses after 40 links, with two such links in one folder that takes 2^40 rounds.
///
/// # Errors
/// Those of `found` and `interrupted`, and when the process is out of file handles or memory.
pub fn scan(
    folders: &[PathBuf],
    rules: Rules<'_>,
    mut found: impl FnMut(Option<Tree>) -> Result<()>,
    mut interrupted: impl FnMut() -> Result<()>,
) -> Result<()> {
    let (cursor, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (sender, trees) = mpsc::channel::<(usize, Result<Option<Tree>>)>();
    let work = |sender: mpsc::Sender<(usize, Result<Option<Tree>>)>| {
        while !stop.load(Atomic::Relaxed) {
            let i = cursor.fetch_add(1, Atomic::Relaxed);
            let Some(folder) = folders.get(i) else { break };
            let tree = folder.is_dir().then(|| files_below(folder, rules, &stop)).transpose();
            // Nobody listens any more after an error.
            let _ = sender.send((i, tree));
        }
    };
    std::thread::scope(|scope| {
        for i in 0..threads::available().min(folders.len()) {
            let sender = sender.clone();
            let work = &work;
            threads::spawn(scope, i == 0, move || work(sender))?;
        }
        drop(sender);
        let mut early = BTreeMap::new();
        let mut next = 0;
        let mut deliver = || {
            while next < folders.len() {
                match trees.recv_timeout(Duration::from_millis(20)) {
                    Ok((i, tree)) => drop(early.insert(i, tree)),
                    Err(RecvTimeoutError::Timeout) => {}
                    // A thread is gone without its tree; the scope passes its panic on.
                    Err(RecvTimeoutError::Disconnected) => break,
                }
                interrupted()?;
                while let Some(tree) = early.remove(&next) {
                    found(tree?)?;
                    next += 1;
                }
            }
            Ok(())
        };
        let outcome = deliver();
        stop.store(true, Atomic::Relaxed);
        outcome
    })
}

fn files_below(root: &Path, rules: Rules<'_>, stop: &AtomicBool) -> Result<Tree> {
    let mut tree = Tree::default();
    let mut todo = vec![root.to_path_buf()];
    while let Some(folder) = todo.pop() {
        if stop.load(Atomic::Relaxed) {
            break;
        }
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(source) if os::is_exhausted(&source) => return Err(Error::Io { path: folder, source }),
            Err(_) => continue,
        };
        let mut names = Names::default();
        for entry in entries.flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            let name = entry.file_name();
            if rules.skip_hidden && name.as_encoded_bytes().starts_with(b".") {
                continue;
            }
            if kind.is_dir() {
                todo.push(entry.path());
                continue;
            }
            if kind.is_symlink()
                && let target = entry.path()
                && target.is_dir()
            {
                let place = if lies_in(&folder, root, &target) { &mut tree.loops } else { &mut todo };
                place.push(target);
                continue;
            }
            // A link that cannot be followed is a file, as for `os.walk`.
            if rules.extensions.is_none_or(|extensions| ends_with_one_of(&name, extensions)) {
                names.push(&name);
            }
        }
        names.sort();
        tree.folders.push((folder, names));
    }
    tree.folders.sort_unstable_by(|(a, _), (b, _)| {
        python_order(a.as_os_str().as_encoded_bytes(), b.as_os_str().as_encoded_bytes())
    });
    Ok(tree)
}

/// Whether `target` is `folder` or one of the folders that led to it from `root`.
fn lies_in(folder: &Path, root: &Path, target: &Path) -> bool {
    let Ok(target) = os::identity(target) else { return false };
    let deeper = folder.components().count() - root.components().count();
    let same = |above: &Path| os::identity(above).is_ok_and(|above| above == target);
    folder.ancestors().take(deeper + 1).any(same)
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

/// The order of two names, given as encoded bytes, as Python strings.
fn python_order(a: &[u8], b: &[u8]) -> Ordering {
    if cfg!(windows) {
        // The encoding there extends UTF-8 to surrogates: its bytes are always in the order of the code points.
        return a.cmp(b);
    }
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

    #[cfg(not(windows))]
    #[test]
    fn an_escaped_byte_sorts_below_the_private_use_area() {
        // U+DCFF < U+E000, although the byte 0xFF is larger than every byte of UTF-8.
        assert_eq!(python_order(b"\xff", "\u{e000}".as_bytes()), Ordering::Less);
        assert_eq!(python_order(b"\xff", "é".as_bytes()), Ordering::Greater);
        assert_eq!(python_order(b"a", b"ab"), Ordering::Less);
        // A sequence that one name cuts short is a character in the other.
        assert_eq!(python_order(b"\xf0\x9f\x90", "🐱".as_bytes()), Ordering::Less);
        assert_eq!(python_order(b"\xc3", b"\xc3\xa9"), Ordering::Greater);
    }

    #[cfg(not(windows))]
    proptest! {
        #[test]
        fn the_order_is_that_of_the_code_points(a in prop::collection::vec(any::<u8>(), 0..6),
                                                b in prop::collection::vec(any::<u8>(), 0..6)) {
            let whole: Ordering = code_points(&a).collect::<Vec<_>>().cmp(&code_points(&b).collect::<Vec<_>>());
            prop_assert_eq!(python_order(&a, &b), whole);
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
        os::link_folder(root.path().join("sub"), root.path().join("link")).unwrap();
        let extensions = [".jpg", ".jpeg", ".png"].map(String::from);
        let folders = [root.path().to_path_buf(), root.path().join("missing")];
        let rules = Rules { extensions: Some(&extensions), skip_hidden: false };
        let found = trees(&folders, rules);
        assert!(found[1].is_none());
        let names = files(found[0].as_ref().unwrap(), root.path());
        // "sub-1" < "sub/" because '-' < '/', and a folder comes before the ones inside it.
        let expected = ["a.png", "b.JPG", "é.jpg", "link/z.jpeg", "link/deep/x.jpg", "sub/z.jpeg"];
        let expected = expected.iter().chain(&["sub-1/y.jpg", "sub/deep/x.jpg"]).map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(names, expected);
    }

    fn trees(folders: &[PathBuf], rules: Rules<'_>) -> Vec<Option<Tree>> {
        let mut all = Vec::new();
        let found = |tree| {
            all.push(tree);
            Ok(())
        };
        scan(folders, rules, found, || Ok(())).unwrap();
        all
    }

    #[test]
    fn folders_come_in_their_order_and_an_error_ends_the_scan() {
        let root = tempfile::tempdir().unwrap();
        let folders: Vec<_> = (0..40).map(|i| root.path().join(format!("{i:02}"))).collect();
        for (i, folder) in folders.iter().enumerate() {
            fs::create_dir(folder).unwrap();
            // The first one takes longest.
            for j in 0..if i == 0 { 2000 } else { 1 } {
                fs::write(folder.join(format!("{j}.jpg")), b"").unwrap();
            }
        }
        let found = trees(&folders, Rules::default());
        assert!(found.iter().zip(&folders).all(|(tree, folder)| tree.as_ref().unwrap().folders[0].0 == *folder));
        let mut seen = 0;
        let fails = |_| {
            seen += 1;
            if seen == 3 { Err(Error::Interrupted) } else { Ok(()) }
        };
        assert!(scan(&folders, Rules::default(), fails, || Ok(())).is_err());
        assert_eq!(seen, 3);
    }

    fn files(tree: &Tree, root: &Path) -> Vec<PathBuf> {
        let all = tree.folders.iter().flat_map(|(folder, names)| names.iter().map(|file| folder.join(os::name(file))));
        all.map(|path| path.strip_prefix(root).unwrap().to_path_buf()).collect()
    }

    #[test]
    fn links_that_lead_back_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let class = root.path().join("class");
        fs::create_dir_all(class.join("deep")).unwrap();
        fs::write(class.join("deep").join("x.jpg"), b"").unwrap();
        // Two to the folder itself, one to a folder above, one beside: not a loop.
        for (link, target) in [("a", "class"), ("deep/b", "class"), ("deep/c", "."), ("d", "class/deep")] {
            os::link_folder(root.path().join(target), class.join(link)).unwrap();
        }
        let found = trees(std::slice::from_ref(&class), Rules::default());
        let tree = found[0].as_ref().unwrap();
        // "c" leads to the root, where the class is met as a folder above: nothing is listed without end.
        let files = files(tree, &class);
        assert!(files.contains(&PathBuf::from("d/x.jpg")) && files.contains(&PathBuf::from("deep/x.jpg")));
        assert!(files.len() < 30, "{files:?}");
        assert!(tree.loops.contains(&class.join("a")) && tree.loops.contains(&class.join("deep/b")));
        assert!(!tree.loops.contains(&class.join("d")));
    }

    #[test]
    fn hidden_names_are_skipped_when_asked_to() {
        let root = tempfile::tempdir().unwrap();
        for path in ["a.jpg", "._a.jpg", ".cache/b.jpg"] {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, b"").unwrap();
        }
        for (skip_hidden, count) in [(true, 1), (false, 3)] {
            let rules = Rules { skip_hidden, ..Rules::default() };
            let found = trees(&[root.path().to_path_buf()], rules);
            assert_eq!(files(found[0].as_ref().unwrap(), root.path()).len(), count);
        }
    }

    #[test]
    fn an_interruption_ends_the_scan() {
        // Twelve folders, each with links to all others: 12! ways through them, so only the interruption ends it.
        let root = tempfile::tempdir().unwrap();
        let folders: Vec<_> = (0..12).map(|i| root.path().join(format!("{i}"))).collect();
        for folder in &folders {
            fs::create_dir(folder).unwrap();
            for (i, other) in folders.iter().enumerate().filter(|(_, other)| *other != folder) {
                os::link_folder(other, folder.join(format!("to-{i}"))).unwrap();
            }
        }
        let outcome = scan(&folders[..1], Rules::default(), |_| Ok(()), || Err(Error::Interrupted));
        assert!(matches!(outcome, Err(Error::Interrupted)));
    }
}
