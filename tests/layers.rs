//! The layers point one way: a file names only its own folder and those below it; and so do the files of some folders.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

/// (folder or file in `src`, what it may name besides itself), top to bottom.
const LAYERS: &[(&str, &[&str])] = &[
    ("py", &["training", "features", "engine", "model", "data", "image", "memory", "os", "error", "threads"]),
    ("training", &["engine", "error", "threads"]),
    ("features", &["engine", "os", "error", "threads"]),
    ("engine", &["model", "os", "error", "threads"]),
    ("model", &["error"]),
    ("data", &["image", "memory", "os", "error", "threads"]),
    ("image", &["memory", "error"]),
    ("memory", &["error"]),
    ("threads", &["error"]),
    ("os", &[]),
    ("error", &[]),
];

/// The same within `src/engine/cpu`: training, inference and single operations stand side by side.
const CPU: &[(&str, &[&str])] =
    &[("train", &["common"]), ("infer", &["common"]), ("eager", &["common"]), ("common", &[])];

fn files(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|entry| files(&entry)).filter(|file| file.extension().is_some_and(|kind| kind == "rs")).collect()
}

/// Every `crate::x` in `text`, tests and comments included.
fn named(text: &str) -> impl Iterator<Item = &str> {
    let ends = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    text.split("crate::").skip(1).map(move |rest| rest.split(ends).next().unwrap_or_default())
}

/// The words of `text` that are code.
fn words(text: &str) -> impl Iterator<Item = &str> {
    let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    code.flat_map(|line| line.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')))
}

#[test]
fn training_and_inference_never_name_each_other() {
    let cpu = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/engine/cpu");
    for (part, below) in CPU {
        let found = files(&cpu.join(part));
        assert!(found.len() >= 5, "only {} files in {part}", found.len());
        for file in found {
            let text = fs::read_to_string(&file).unwrap();
            let mut others =
                CPU.iter().map(|(other, _)| *other).filter(|other| other != part && !below.contains(other));
            let named = others.find(|other| words(&text).any(|word| word == *other));
            assert_eq!(named, None, "{}", file.display());
        }
    }
    let entries = fs::read_dir(cpu).unwrap().map(|entry| entry.unwrap().file_name());
    let known = |name: &str| name == "mod.rs" || CPU.iter().any(|(part, _)| *part == name);
    assert!(entries.into_iter().all(|name| known(name.to_str().unwrap())), "a file beside the known rooms");
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

/// Folders whose files point one way among themselves, and in all of which a name means one type.
const ORDERED: &[&str] = &["image", "data"];

/// The text of a file without its tests, which may name anything.
fn untested(text: &str) -> String {
    let tests = |line: &&str| line.starts_with("#[cfg(") && line.contains("test");
    text.lines().take_while(|line| !tests(line)).map(|line| format!("{line}\n")).collect()
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// `crate::`, `super::` and `self::` paths and what stands in braces behind them, flat; and paths that begin with `child`.
fn paths(text: &str, children: &HashSet<String>) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let text = code.collect::<Vec<_>>().join("\n");
    let mut before = ' ';
    for (at, _) in text.char_indices() {
        let rest = &text[at..];
        let word = rest.split(|c| !is_word(c)).next().unwrap_or_default();
        let begins = ["crate", "super", "self"].contains(&word) || children.contains(word);
        if !is_word(before) && before != ':' && begins && rest[word.len()..].starts_with("::") {
            tree(rest, &mut Vec::new(), &mut found);
        }
        before = rest.chars().next().unwrap_or(' ');
    }
    found
}

/// Reads `a::{b, c::d}` as `a::b` and `a::c::d`; returns what follows.
fn tree<'a>(mut text: &'a str, prefix: &mut Vec<String>, found: &mut Vec<Vec<String>>) -> &'a str {
    let depth = prefix.len();
    loop {
        text = text.trim_start();
        if let Some(mut rest) = text.strip_prefix('{') {
            loop {
                rest = rest.trim_start_matches(|c: char| c.is_whitespace() || c == ',');
                if let Some(rest) = rest.strip_prefix('}') {
                    prefix.truncate(depth);
                    return rest;
                }
                let before = rest.len();
                rest = tree(rest, prefix, found);
                if rest.len() == before {
                    prefix.truncate(depth);
                    return rest;
                }
            }
        }
        let word: String = text.chars().take_while(|&c| is_word(c)).collect();
        text = &text[word.len()..];
        if !word.is_empty() && word != "self" || prefix.is_empty() {
            prefix.push(word);
        }
        match text.strip_prefix("::") {
            Some(rest) if !rest.starts_with('<') => text = rest,
            _ => break,
        }
    }
    found.push(prefix.clone());
    prefix.truncate(depth);
    // `a as b` within braces.
    text.trim_start().strip_prefix("as ").map_or(text, |rest| rest.trim_start().trim_start_matches(is_word))
}

/// The paths that `use` brings into a module.
fn uses(text: &str, children: &HashSet<String>) -> Vec<Vec<String>> {
    let begins = |line: &&str| {
        line.split_once("use ").is_some_and(|(before, _)| matches!(before, "" | "pub " | "pub(super) " | "pub(crate) "))
    };
    let statements = text.split(';').filter_map(|statement| {
        let at = statement.lines().find(begins)?;
        statement.find(at).map(|at| &statement[at..])
    });
    statements.flat_map(|statement| paths(statement, children)).collect()
}

/// The modules of a folder: their paths (`["image", "resize", "avx2"]`) and texts.
fn modules(folder: &str) -> HashMap<Vec<String>, String> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut modules = HashMap::new();
    for file in files(&src.join(folder)) {
        if file.ends_with("tests.rs") {
            continue;
        }
        let place = file.strip_prefix(&src).unwrap().with_extension("");
        let mut name: Vec<String> = place.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        if name.last().is_some_and(|last| last == "mod") {
            name.pop();
        }
        modules.insert(name, untested(&fs::read_to_string(&file).unwrap()));
    }
    modules
}

fn children(module: &[String], modules: &HashMap<Vec<String>, String>) -> HashSet<String> {
    let below = modules.keys().filter(|other| other.len() == module.len() + 1 && other.starts_with(module));
    below.map(|other| other[module.len()].clone()).collect()
}

/// The module in which `path`, as written in `module`, is defined: through folders and re-exports.
fn defined(module: &[String], path: &[String], modules: &HashMap<Vec<String>, String>) -> Option<Vec<String>> {
    let mut at = module.to_vec();
    let mut rest = path;
    while let Some((first, behind)) = rest.split_first() {
        match first.as_str() {
            "crate" => at = Vec::new(),
            "super" => _ = at.pop(),
            "self" => {}
            name => {
                let child = [at.as_slice(), &[name.to_owned()]].concat();
                if modules.contains_key(&child) {
                    at = child;
                } else {
                    if at == module {
                        return Some(at);
                    }
                    let uses = uses(modules.get(&at)?, &children(&at, modules));
                    let named = uses.into_iter().find(|path| path.last().is_some_and(|last| last == name));
                    return match named {
                        Some(path) => defined(&at, &path, modules),
                        None => Some(at),
                    };
                }
            }
        }
        rest = behind;
    }
    Some(at)
}

/// Groups of modules that reach each other.
fn circles(edges: &HashMap<Vec<String>, HashSet<Vec<String>>>) -> Vec<BTreeSet<String>> {
    let reached = |from: &Vec<String>| {
        let (mut seen, mut open) = (HashSet::new(), vec![from.clone()]);
        while let Some(module) = open.pop() {
            for next in edges.get(&module).into_iter().flatten() {
                if seen.insert(next.clone()) {
                    open.push(next.clone());
                }
            }
        }
        seen
    };
    let reach: HashMap<_, _> = edges.keys().map(|module| (module.clone(), reached(module))).collect();
    let circles = reach.iter().filter(|(module, reached)| reached.contains(*module)).map(|(module, reached)| {
        let mutual = reached.iter().filter(|&other| reach.get(other).is_some_and(|back| back.contains(module)));
        mutual.map(|other| other.join("::")).collect()
    });
    circles.collect::<BTreeSet<_>>().into_iter().collect()
}

#[test]
fn modules_of_a_folder_form_no_circles() {
    for folder in ORDERED {
        let modules = modules(folder);
        let edges: HashMap<_, HashSet<_>> = modules
            .iter()
            .map(|(module, text)| {
                let paths = paths(text, &children(module, &modules));
                let used = paths.iter().filter_map(|path| defined(module, path, &modules));
                (module.clone(), used.filter(|used| used != module && modules.contains_key(used)).collect())
            })
            .collect();
        let circles = circles(&edges);
        let count: usize = edges.values().map(HashSet::len).sum();
        println!("src/{folder}: {} circles among {} files with {count} uses", circles.len(), edges.len());
        assert!(count > edges.len(), "too few uses found");
        assert!(circles.is_empty(), "src/{folder}: {circles:#?}");
    }
}

#[test]
fn a_name_means_one_type() {
    let mut named: HashMap<String, Vec<String>> = HashMap::new();
    for (module, text) in ORDERED.iter().flat_map(|folder| modules(folder)) {
        for line in text.lines().map(str::trim_start) {
            let line = line.strip_prefix("pub").map_or(line, |rest| rest.split_once(' ').unwrap_or_default().1);
            if let Some((kind, rest)) = line.split_once(' ')
                && ["struct", "enum", "trait", "type", "union"].contains(&kind)
            {
                let name = rest.split(|c| !is_word(c)).next().unwrap_or_default();
                named.entry(name.to_owned()).or_default().push(module.join("::"));
            }
        }
    }
    assert!(named.len() > 50, "only {} types found", named.len());
    named.retain(|_, modules| modules.len() > 1);
    assert!(named.is_empty(), "{named:#?}");
}
