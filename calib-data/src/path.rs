//! Paths in words, for manifests and errors.

use std::path::{Path, PathBuf};

use crate::error::Error;

/// The file's name without its folder: what a manifest may say without telling about a machine.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or(path.as_os_str())
        .to_string_lossy()
        .into_owned()
}

/// The texts in words: the first file, and how many more.
pub(crate) fn origin(paths: &[PathBuf]) -> String {
    match paths {
        [] => "no file".to_owned(),
        [only] => format!("`{}`", file_name(only)),
        [first, rest @ ..] => format!("`{}` and {} more", file_name(first), rest.len()),
    }
}

pub(crate) fn display(path: &Path) -> String {
    path.display().to_string()
}

pub(crate) fn read_error(path: &Path, source: std::io::Error) -> Error {
    Error::Read {
        file: display(path),
        source,
    }
}
