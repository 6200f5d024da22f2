//! `qbin verify`.

use crate::commands::Show;
use crate::error::CliError;
use crate::progress::Progress;
use crate::render;
use qbin_format::{FormatError, Model};
use serde::Serialize;
use std::path::Path;
use std::process::ExitCode;

#[derive(Serialize)]
struct Verified {
    ok: bool,
    bytes: u64,
    tensors: usize,
    /// What is wrong, where something is.
    error: Option<String>,
}

/// Exit status 1 where the file can be read but its contents are not what its manifest says.
pub(crate) fn run(path: &Path, show: Show) -> Result<ExitCode, CliError> {
    let Model::Artifact(artifact) = Model::open(path)? else {
        return Err(CliError::NoArtifact { path: path.into() });
    };
    let bytes = artifact.file_bytes();
    let mut progress = Progress::new("verifying", show.quiet);
    let result = artifact.verify(&mut |done| progress.set(done, bytes, ""));
    progress.finish();
    let (code, error) = match result {
        Ok(()) => (ExitCode::SUCCESS, None),
        Err(
            error @ (FormatError::Digest { .. }
            | FormatError::Padding { .. }
            | FormatError::InvalidArtifact { .. }),
        ) => (ExitCode::from(1), Some(error)),
        Err(error) => return Err(error.into()),
    };
    if let Some(error) = &error {
        render::error(error, error.hint());
    }
    let verified = Verified {
        ok: error.is_none(),
        bytes,
        tensors: artifact.manifest().tensors.len(),
        error: error.map(|e| e.to_string()),
    };
    show.print(&verified, |v| match v.ok {
        true => format!("ok: {} tensors, {}\n", v.tensors, render::bytes(v.bytes)),
        false => String::new(),
    })?;
    Ok(code)
}
