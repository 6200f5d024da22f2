//! What can go wrong in a command: the libraries' errors, and what only the commands know.

use crate::render;
use std::path::{Path, PathBuf};

/// An error of a command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum CliError {
    #[error(transparent)]
    Format(#[from] qbin_format::FormatError),
    #[error(transparent)]
    Runtime(#[from] qbin_runtime::RuntimeError),
    #[error(transparent)]
    Calibration(#[from] qbin_calib_data::Error),
    #[error(transparent)]
    Isa(#[from] qbin_runtime::kernels::UnsupportedLevel),
    #[error(transparent)]
    Quant(#[from] qbin_quant::QuantError),
    #[error(transparent)]
    Prune(#[from] qbin_prune::PruneError),
    #[error("cannot read `{}`", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot write `{}`", path.display())]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot write to stdout")]
    Stdout(#[source] std::io::Error),
    #[error("recipe `{}`", path.display())]
    Recipe {
        path: PathBuf,
        source: Box<CliError>,
    },
    #[error("the recipe is not valid")]
    RecipeSyntax(#[source] toml::de::Error),
    #[error(
        "pass method `{method}` is not known, expected `magnitude`, `wanda`, `sparsegpt`, `rtn`, `gptq` or `awq`"
    )]
    RecipeMethod { method: String },
    #[error(
        "pass `{method}` cannot stand there: at most one of `magnitude`, `wanda`, `sparsegpt`, then exactly one of `rtn`, `gptq`, `awq`"
    )]
    RecipeOrder { method: String },
    #[error(
        "the recipe puts nothing on a grid: it needs one pass with method `rtn`, `gptq` or `awq`"
    )]
    RecipeWithoutGrid,
    #[error("`joint` pruning needs the pass `gptq` after it, not `{method}`")]
    JointWithout { method: &'static str },
    #[error("`{}` exists already, expected a new folder", path.display())]
    FolderExists { path: PathBuf },
    #[error(
        "`--layer {given}` is not of the form `GLOB=SPARSITY`, such as `*.down_proj.weight=0.3`"
    )]
    LayerSyntax { given: String },
    #[error("`{option}` belongs to method `{of}`, not to `{method}`")]
    OptionOfOtherMethod {
        option: &'static str,
        of: &'static str,
        method: &'static str,
    },
    #[error("`{}` is an artifact already, expected a checkpoint", path.display())]
    AlreadyQuantized { path: PathBuf },
    #[error("`{}` is no artifact, expected a .qbin file", path.display())]
    NoArtifact { path: PathBuf },
    #[error("`tokenizer.json` is missing beside the weights of `{}`", path.display())]
    NoTokenizer { path: PathBuf },
    #[error(
        "the tokenizer has {tokenizer} entries, but the embedding has {vocab}: they do not belong together"
    )]
    TokenizerTooLarge { tokenizer: usize, vocab: usize },
    #[error("`--calib {source_name}` stands alone, not beside other sources")]
    CalibSources { source_name: String },
    #[error(
        "calibration windows of {tokens} tokens are longer than the model's context of {max_positions}"
    )]
    WindowTooLong { tokens: usize, max_positions: usize },
    #[error("`{}` is no UTF-8 text: byte {at} cannot be read", path.display())]
    NotText { path: PathBuf, at: usize },
    #[error("the prompt is empty and the model has no beginning-of-sequence token to start from")]
    EmptyPrompt,
    #[error("`--threads` and `--isa` take one value each, except for `bench`")]
    SeveralMachines,
    #[error(
        "a batch of {batch} sequences of {positions} tokens needs about {}, but only {} of memory is available",
        render::bytes(*need), render::bytes(*available)
    )]
    BatchTooLarge {
        batch: usize,
        positions: usize,
        need: u64,
        available: u64,
    },
}

impl CliError {
    pub(crate) fn in_recipe(self, path: &Path) -> Self {
        Self::Recipe {
            path: path.into(),
            source: Box::new(self),
        }
    }

    /// The way out, where there is one beyond what the message says.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Format(error) => error.hint(),
            Self::Runtime(qbin_runtime::RuntimeError::Pass(error)) => {
                let quant = error.downcast_ref::<qbin_quant::QuantError>().and_then(qbin_quant::QuantError::hint);
                let format = || error.downcast_ref::<qbin_format::FormatError>().and_then(qbin_format::FormatError::hint);
                let runtime = || error.downcast_ref::<qbin_runtime::RuntimeError>().and_then(qbin_runtime::RuntimeError::hint);
                quant.or_else(format).or_else(runtime)
            }
            Self::Runtime(error) => error.hint(),
            Self::Calibration(error) => error.hint(),
            Self::Quant(error) => error.hint(),
            Self::Recipe { source, .. } => source.hint(),
            Self::NoTokenizer { .. } => Some("put the model's `tokenizer.json` into the same folder, or give token ids with `--calib FILE.npy`".into()),
            Self::WindowTooLong { .. } => Some("give `--calib-tokens` a smaller number".into()),
            Self::BatchTooLarge { .. } => Some("ask for fewer sequences with `--batch` or fewer tokens with `--prompt` and `--generate`".into()),
            Self::FolderExists { path } if path.extension().is_some_and(|end| end == "partial") => {
                Some("another run is writing it, or one was cut off: then delete it".into())
            }
            Self::AlreadyQuantized { .. } => Some("start from the original checkpoint".into()),
            _ => None,
        }
    }
}
