//! The layers point one way: a file names only its own folder and those below it.

use std::fs;
use std::path::{Path, PathBuf};

/// (folder or file in `src`, what it may name besides itself), top to bottom.
const LAYERS: &[(&str, &[&str])] = &[
    ("py", &["fit", "preconv", "engine", "model", "data", "image", "os", "error", "threads"]),
    ("fit", &["engine", "error", "threads"]),
    ("preconv", &["engine", "os", "error", "threads"]),
    ("engine", &["model", "os", "error", "threads"]),
    ("model", &["error"]),
    ("data", &["image", "os", "error", "threads"]),
    ("image", &["error"]),
    ("threads", &["error"]),
    ("os", &[]),
    ("error", &[]),
];

fn files(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|entry| files(&entry)).collect()
}

/// Every `crate::x` in `text`, tests and comments included.
fn named(text: &str) -> impl Iterator<Item = &str> {
    let ends = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    text.split("crate::").skip(1).map(move |rest| rest.split(ends).next().unwrap_or_default())
}

#[test]
fn a_lower_layer_never_names_a_higher_one() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut seen = 0;
    for (layer, below) in LAYERS {
        let folder = src.join(layer);
        let path = if folder.is_dir() { folder } else { src.join(format!("{layer}.rs")) };
        for file in files(&path) {
            let text = fs::read_to_string(&file).unwrap();
            for name in named(&text) {
                assert!(name == *layer || below.contains(&name), "{} names crate::{name}", file.display());
            }
            let word = |word: &str| text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).any(|w| w == word);
            assert!(!word("tch") && !word("pyo3_tch"), "{} names libtorch", file.display());
            let border = file.ends_with("py/tensor.rs") || file.ends_with("py/dlpack.rs");
            assert!(border || !text.contains("torch.utils.dlpack"), "{} takes tensors apart itself", file.display());
            assert!(*layer == "py" || !word("pyo3"), "{} names Python", file.display());
            seen += 1;
        }
    }
    assert!(seen > 30, "only {seen} files found");
}
