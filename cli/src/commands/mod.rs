//! One file for each command.

pub(crate) mod bench;
pub(crate) mod eval;
pub(crate) mod inspect;
pub(crate) mod plan;
pub(crate) mod prune;
pub(crate) mod quantize;
pub(crate) mod run;
pub(crate) mod shell;
pub(crate) mod synth;
pub(crate) mod verify;

use crate::error::CliError;
use crate::render;
use serde::Serialize;

/// How results are shown.
#[derive(Clone, Copy)]
pub(crate) struct Show {
    /// One JSON object on stdout.
    pub(crate) json: bool,
    /// No progress.
    pub(crate) quiet: bool,
}

impl Show {
    /// Prints a result, as JSON or as the text that `text` makes of it.
    pub(crate) fn print<T: Serialize>(
        self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<(), CliError> {
        let text = match self.json {
            true => serde_json::to_string(value).expect("results have string keys only") + "\n",
            false => text(value),
        };
        render::print(&text).map_err(CliError::Stdout)
    }
}
