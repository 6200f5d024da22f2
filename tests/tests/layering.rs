//! Rules that hold over the repository as a whole: who imports whom, how files begin, where `unsafe` may stand.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Which of our packages each package may import; ARCHITECTURE.md shows the same table.
const MAY_IMPORT: [(&str, &[&str]); 7] = [
    ("qbin-format", &[]),
    ("qbin-calib-data", &[]),
    ("qbin-runtime", &["qbin-format"]),
    ("qbin-quant", &["qbin-format", "qbin-runtime"]),
    ("qbin-prune", &["qbin-format", "qbin-runtime", "qbin-quant"]),
    ("qbin-cli", &ALL_LIBRARIES),
    (
        "qbin-tests",
        &[
            "qbin-format",
            "qbin-calib-data",
            "qbin-runtime",
            "qbin-quant",
            "qbin-prune",
            "qbin-cli",
        ],
    ),
];

const ALL_LIBRARIES: [&str; 5] = [
    "qbin-format",
    "qbin-calib-data",
    "qbin-runtime",
    "qbin-quant",
    "qbin-prune",
];

/// Files and folders (these end in `/`) that may hold unsafe code.
const MAY_BE_UNSAFE: [&str; 2] = ["format/src/mmap.rs", "runtime/src/kernels/"];

/// Imports between our packages: package to the packages it names as normal dependencies.
type Imports = BTreeMap<String, Vec<String>>;

#[test]
fn packages_import_what_the_table_allows() {
    let metadata = MetadataCommand::new()
        .manifest_path(qbin_tests::root().join("Cargo.toml"))
        .no_deps()
        .other_options(["--offline".to_owned()])
        .exec()
        .expect("cargo metadata");
    let ours: Vec<String> = metadata
        .packages
        .iter()
        .map(|package| package.name.to_string())
        .collect();
    let imports = metadata.packages.iter().map(|package| {
        let normal = package
            .dependencies
            .iter()
            .filter(|dependency| dependency.kind == DependencyKind::Normal)
            .map(|dependency| dependency.name.clone())
            .filter(|name| ours.contains(name))
            .collect();
        (package.name.to_string(), normal)
    });
    assert_none(import_faults(&imports.collect()));
}

#[test]
fn import_faults_are_found() {
    let allowed: Imports = MAY_IMPORT
        .iter()
        .map(|(name, may)| {
            (
                name.to_string(),
                may.iter().map(ToString::to_string).collect(),
            )
        })
        .collect();
    assert_eq!(import_faults(&allowed), Vec::<String>::new());

    let mut upward = allowed.clone();
    upward.insert("qbin-runtime".into(), vec!["qbin-quant".into()]);
    assert_eq!(
        import_faults(&upward),
        ["`qbin-runtime` must not import `qbin-quant`"]
    );

    let mut unknown = allowed.clone();
    unknown.insert("qbin-new".into(), vec![]);
    assert_eq!(import_faults(&unknown), ["`qbin-new` is not in the table"]);

    let mut gone = allowed;
    gone.remove("qbin-prune");
    assert_eq!(
        import_faults(&gone),
        ["`qbin-prune` is in the table but no package"]
    );
}

/// Every breach of the table.
fn import_faults(imports: &Imports) -> Vec<String> {
    let table = BTreeMap::from(MAY_IMPORT);
    let mut faults = Vec::new();
    for (package, imported) in imports {
        let Some(allowed) = table.get(package.as_str()) else {
            faults.push(format!("`{package}` is not in the table"));
            continue;
        };
        let forbidden = imported
            .iter()
            .filter(|name| !allowed.contains(&name.as_str()));
        faults.extend(forbidden.map(|name| format!("`{package}` must not import `{name}`")));
    }
    let gone = table.keys().filter(|name| !imports.contains_key(**name));
    faults.extend(gone.map(|name| format!("`{name}` is in the table but no package")));
    faults
}

#[test]
fn source_files_begin_with_a_description() {
    let mut faults = Vec::new();
    for (path, text) in source_files() {
        if !text.starts_with("//!") {
            faults.push(format!("`{path}` does not begin with `//!`"));
        }
    }
    assert_none(faults);
}

#[test]
fn unsafe_stands_only_where_it_may() {
    let mut faults = Vec::new();
    for (path, text) in source_files() {
        let allowed = MAY_BE_UNSAFE
            .iter()
            .any(|place| path == *place || place.ends_with('/') && path.starts_with(place));
        if !allowed && let Some(line) = unsafe_line(&text) {
            faults.push(format!(
                "`{path}`, line {line}: not a file that may hold such code"
            ));
        }
    }
    assert_none(faults);
}

#[test]
fn unsafe_code_is_told_from_its_name() {
    let word = unsafe_word();
    assert_eq!(
        unsafe_line(&format!("fn f() {{}}\n{word} {{ f() }}")),
        Some(2)
    );
    assert_eq!(unsafe_line(&format!("pub {word} fn f()")), Some(1));
    assert_eq!(unsafe_line(&format!("#[{word}(no_mangle)]")), Some(1));
    assert_eq!(unsafe_line(&format!("#![forbid({word}_code)]")), None);
    assert_eq!(unsafe_line(&format!("f(); // nothing {word} here")), None);
    assert_eq!(unsafe_line(&format!("//! no {word} code")), None);
}

/// The first line of `source`, counted from 1, with the keyword outside a line comment.
fn unsafe_line(source: &str) -> Option<usize> {
    let word = unsafe_word();
    let is_code = |line: &str| {
        let code = line.split("//").next().unwrap_or_default();
        code.split(|c: char| !(c.is_alphanumeric() || c == '_'))
            .any(|token| token == word)
    };
    source.lines().position(is_code).map(|index| index + 1)
}

/// The keyword, put together here so that this file passes its own check.
fn unsafe_word() -> String {
    ["un", "safe"].concat()
}

#[test]
fn no_file_names_a_machines_folder() {
    let mut faults = Vec::new();
    for (path, text) in text_files() {
        if let Some(found) = machine_path(&text) {
            faults.push(format!("`{path}` contains `{found}`"));
        }
    }
    assert_none(faults);
}

#[test]
fn machine_paths_are_told_from_other_slashes() {
    for folder in ["work", "root", "home"] {
        let needle = format!("/{folder}/");
        assert_eq!(
            machine_path(&format!("in {needle}x")).as_ref(),
            Some(&needle)
        );
        assert_eq!(machine_path(&format!("{needle}x")).as_ref(), Some(&needle));
        assert_eq!(
            machine_path(&format!("path=\"{needle}x\"")).as_ref(),
            Some(&needle)
        );
        assert_eq!(
            machine_path(&format!("docs{needle}x and {needle}y")).as_ref(),
            Some(&needle)
        );
        assert_eq!(machine_path(&format!("docs{needle}x")), None);
        assert_eq!(machine_path(&format!("/{folder}ing/x")), None);
    }
}

/// The first absolute path in `text` that lies in a folder where people's machines keep their work.
fn machine_path(text: &str) -> Option<String> {
    let needles = ["work", "root", "home"].map(|folder| format!("/{folder}/"));
    needles.into_iter().find(|needle| {
        text.match_indices(needle.as_str()).any(|(at, _)| {
            // After a name it is a part of a relative path or of an address.
            let before = text[..at].chars().next_back();
            !before.is_some_and(|c| c.is_alphanumeric() || "._-~".contains(c))
        })
    })
}

/// Every Rust file of the repository with its text.
fn source_files() -> Vec<(String, String)> {
    let mut files = text_files();
    files.retain(|(path, _)| path.ends_with(".rs"));
    assert!(files.len() > 10, "only {} Rust files found", files.len());
    files
}

/// Every UTF-8 file of the repository: path from the root, with `/`, and text.
fn text_files() -> Vec<(String, String)> {
    let root = qbin_tests::root();
    let mut paths = Vec::new();
    collect(&root, &mut paths);
    paths.sort();
    let text = |path: &PathBuf| {
        let relative = path.strip_prefix(&root).expect("below the root");
        let name = relative.to_string_lossy().replace('\\', "/");
        Some((name, String::from_utf8(fs::read(path).expect("read")).ok()?))
    };
    paths.iter().filter_map(text).collect()
}

/// Files below `folder`, without git's and cargo's own folders, and without large binaries.
fn collect(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("read a folder") {
        let entry = entry.expect("read a folder");
        let kind = entry.file_type().expect("type of a file");
        let path = entry.path();
        if kind.is_dir() {
            if entry.file_name() != "target" && entry.file_name() != ".git" {
                collect(&path, paths);
            }
        } else if kind.is_file() && entry.file_name() != ".git" && !is_binary(&path) {
            paths.push(path);
        }
    }
}

/// Weights and artifacts, which may be gigabytes in a working copy.
fn is_binary(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str());
    matches!(extension, Some("safetensors" | "qbin" | "gguf" | "partial"))
}

#[track_caller]
fn assert_none(faults: Vec<String>) {
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
