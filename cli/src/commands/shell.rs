//! `qbin completions` and `qbin man`.

use crate::args::Cli;
use crate::error::CliError;
use crate::render;
use clap::CommandFactory as _;
use std::path::Path;
use std::process::ExitCode;

pub(crate) fn completions(shell: clap_complete::Shell) -> Result<ExitCode, CliError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "qbin", &mut script);
    render::print(&String::from_utf8_lossy(&script)).map_err(CliError::Stdout)?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn man(dir: &Path) -> Result<ExitCode, CliError> {
    let write_error = |source| CliError::Write {
        path: dir.into(),
        source,
    };
    std::fs::create_dir_all(dir).map_err(write_error)?;
    clap_mangen::generate_to(Cli::command(), dir).map_err(write_error)?;
    Ok(ExitCode::SUCCESS)
}
