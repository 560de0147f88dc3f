//! The one place where operating systems differ.
//!
//! `unix` is what Linux runs and macOS would. `portable` is for everything else: it needs only `std`, and
//! `RUSTFLAGS="--cfg cnnrs_portable" cargo test` runs the tests with it on Linux.

#[cfg(any(not(unix), cnnrs_portable))]
mod portable;
#[cfg(all(unix, not(cnnrs_portable)))]
mod unix;

#[cfg(any(not(unix), cnnrs_portable))]
pub use portable::*;
#[cfg(all(unix, not(cnnrs_portable)))]
pub use unix::*;

#[cfg(all(test, unix))]
pub use std::os::unix::fs::symlink as link_folder;
#[cfg(all(test, windows))]
pub use std::os::windows::fs::symlink_dir as link_folder;

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn bytes_are_read_and_written_at_places() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        std::fs::write(&path, b"0123456789").unwrap();
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        file.write_all_at(b"abcd", 8).unwrap();
        let mut found = [0; 6];
        file.read_exact_at(&mut found, 5).unwrap();
        assert_eq!(&found, b"567abc");
        let error = file.read_exact_at(&mut found, 7).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
        reserve(&file, 20).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"01234567abcd\0\0\0\0\0\0\0\0");
    }

    #[test]
    fn a_folder_is_the_same_by_every_path_to_it() {
        let root = tempfile::tempdir().unwrap();
        let place = |name: &str| root.path().join(name);
        std::fs::create_dir_all(place("a/b")).unwrap();
        std::fs::create_dir(place("c")).unwrap();
        link_folder(place("a"), place("link")).unwrap();
        let same = |a: &Path, b: &Path| identity(a).unwrap() == identity(b).unwrap();
        assert!(same(&place("a/b"), &place("link/b")) && same(&place("a"), &place("a/b/..")));
        assert!(!same(&place("a"), &place("c")));
        assert!(identity(&place("gone")).is_err());
    }

    #[test]
    fn a_name_is_that_of_its_bytes() {
        assert_eq!(name("é🐱.jpg".as_bytes()).to_str(), Some("é🐱.jpg"));
        assert_eq!(
            name(b"\xff").as_encoded_bytes(),
            if cfg!(any(windows, cnnrs_portable)) { "\u{fffd}".as_bytes() } else { b"\xff" }
        );
    }
}
