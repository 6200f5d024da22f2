//! What can be typed: every command and option, with its help.

use clap::{Args, Parser, Subcommand, ValueEnum};
use qbin_prune::{PruneMethod, Sparsity};
use qbin_quant::{ActOrder, GroupSize, Method, ScaleSearch};
use qbin_runtime::Path;
use qbin_runtime::kernels::Level;
use std::path::PathBuf;

/// Compress a language model, know what it cost, run it anywhere.
#[derive(Debug, Parser)]
#[command(
    name = "qbin",
    version,
    arg_required_else_help = true,
    propagate_version = true
)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Threads [default: the cores this process may use]; `bench` takes a list.
    #[arg(long, global = true, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) threads: Vec<u16>,
    /// Instruction set: scalar, avx2, avxvnni, avx512, amx or neon [default: the highest of this machine]; `bench`
    /// takes a list.
    #[arg(
        long,
        global = true,
        value_name = "SET",
        value_delimiter = ',',
        env = "QBIN_ISA"
    )]
    pub(crate) isa: Vec<Level>,
    /// Print one JSON object on stdout instead of text.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// No progress on stderr.
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Compress a checkpoint into a .qbin artifact.
    Quantize(QuantizeArgs),
    /// Set weights of a checkpoint to zero and write it as a checkpoint again.
    Prune(PruneArgs),
    /// Show what `quantize` would do to every tensor, from the headers alone.
    Plan(PlanArgs),
    /// Show what is in a checkpoint or an artifact.
    Inspect(InspectArgs),
    /// Check every digest of an artifact.
    Verify {
        /// The artifact.
        artifact: PathBuf,
    },
    /// Measure a model.
    #[command(subcommand)]
    Eval(EvalCommand),
    /// Generate text.
    Run(RunArgs),
    /// Measure speed and memory, beside what this machine could do at most.
    Bench(BenchArgs),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a folder.
    Man {
        /// The folder; it is made if it does not exist.
        dir: PathBuf,
    },
    /// Write a checkpoint of seeded random weights, to try shapes and sizes.
    #[command(hide = true)]
    Synth(SynthArgs),
}

/// A model to read.
const INPUT_HELP: &str =
    "A .safetensors file, a model.safetensors.index.json, or a folder with either";

/// `qbin quantize`.
#[derive(Debug, Args)]
pub(crate) struct QuantizeArgs {
    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,
    #[command(flatten)]
    pub(crate) calibration: CalibrationArgs,
    #[arg(help = INPUT_HELP)]
    pub(crate) input: PathBuf,
    /// The artifact to write.
    pub(crate) output: PathBuf,
}

/// `qbin prune`.
#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// How the zeros are chosen.
    #[arg(long, value_enum, default_value = "sparsegpt")]
    pub(crate) method: PruneMethodArg,
    /// A share of zeros such as `0.5`, or `N:M` such as `2:4`: N zeros in every M columns.
    #[arg(long, value_name = "SHARE|N:M")]
    pub(crate) sparsity: Sparsity,
    /// Another sparsity for the tensors that match a glob, for example `*.down_proj.weight=0.3`; 0 leaves them alone.
    /// May be given several times; the last one that matches counts.
    #[arg(long, value_name = "GLOB=SPARSITY")]
    pub(crate) layer: Vec<String>,
    /// Deal a share of zeros out over all linears by what they cost in each, as measured on the model first.
    #[arg(long)]
    pub(crate) allocate: bool,
    /// Order in which SparseGPT visits columns [default: none].
    #[arg(long, value_enum)]
    pub(crate) act_order: Option<ActOrderArg>,
    /// SparseGPT's damping, as a fraction of the mean of the Hessian's diagonal [default: 0.01].
    #[arg(long, value_name = "FRACTION")]
    pub(crate) damp: Option<f64>,
    /// SparseGPT's rounds of refinement after the sweep; 0 is the plain method [default: 3].
    #[arg(long, value_name = "ROUNDS")]
    pub(crate) refine: Option<usize>,
    #[command(flatten)]
    pub(crate) calibration: CalibrationArgs,
    #[arg(help = INPUT_HELP)]
    pub(crate) input: PathBuf,
    /// The folder to write; it must not exist.
    pub(crate) output: PathBuf,
}

/// `qbin plan`.
#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,
    #[arg(help = INPUT_HELP)]
    pub(crate) input: PathBuf,
}

/// `qbin inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// A checkpoint or an artifact.
    pub(crate) model: PathBuf,
    /// List every tensor.
    #[arg(long)]
    pub(crate) tensors: bool,
}

/// The recipe: a file, or the short forms of one quantization pass.
#[derive(Debug, Args)]
pub(crate) struct RecipeArgs {
    /// Recipe file (TOML); the other recipe options are then not allowed.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["method", "bits", "group_size", "symmetric", "asymmetric", "act_order", "damp", "refine", "scale_search", "sparsity", "allocate", "keep", "head"])]
    pub(crate) recipe: Option<PathBuf>,
    /// Method [default: gptq].
    #[arg(long, value_enum)]
    pub(crate) method: Option<MethodArg>,
    /// Bits per weight: 4 or 8; 3 is a grid of 8 levels in 4-bit storage, for comparison with 3-bit tables [default: 4].
    #[arg(long)]
    pub(crate) bits: Option<u8>,
    /// Columns that share a scale: 32, 64, 128 or `channel` [default: 128].
    #[arg(long, value_name = "N")]
    pub(crate) group_size: Option<GroupSize>,
    /// Zero point in the middle of the grid [default for 8 bits].
    #[arg(long, conflicts_with = "asymmetric")]
    pub(crate) symmetric: bool,
    /// Zero point stored for each group [default below 8 bits].
    #[arg(long)]
    pub(crate) asymmetric: bool,
    /// Order in which GPTQ visits columns [default: group].
    #[arg(long, value_enum)]
    pub(crate) act_order: Option<ActOrderArg>,
    /// GPTQ's damping, as a fraction of the mean of the Hessian's diagonal [default: 0.01].
    #[arg(long, value_name = "FRACTION")]
    pub(crate) damp: Option<f64>,
    /// GPTQ's rounds of refinement after the sweep; 0 is the plain method [default: 3].
    #[arg(long, value_name = "ROUNDS")]
    pub(crate) refine: Option<usize>,
    /// How scales are chosen [default: the method's own way].
    #[arg(long, value_enum)]
    pub(crate) scale_search: Option<ScaleSearchArg>,
    /// Zeros, chosen by SparseGPT: a share such as `0.5`, or `N:M` such as `2:4`; `gptq` makes up for them in the
    /// same sweep, the other methods round what is left.
    #[arg(long, value_name = "SHARE|N:M")]
    pub(crate) sparsity: Option<Sparsity>,
    /// Deal a share of zeros out over all linears by what they cost in each, as measured on the model first.
    #[arg(long, requires = "sparsity")]
    pub(crate) allocate: bool,
    /// Leave the tensors that match this glob as they are stored; may be given several times.
    #[arg(long, value_name = "GLOB")]
    pub(crate) keep: Vec<String>,
    /// The output head: keep it as stored, or quantize it to nearest [default: keep].
    #[arg(long, value_enum)]
    pub(crate) head: Option<HeadArg>,
}

/// Calibration.
#[derive(Debug, Args)]
pub(crate) struct CalibrationArgs {
    /// `self` (text the model writes itself), `builtin` (the corpus inside this program), or files:
    /// text, .jsonl, .parquet, or .npy of token ids. May be given several times.
    #[arg(long, value_name = "SOURCE|FILE", default_value = "self")]
    pub(crate) calib: Vec<String>,
    /// Windows of calibration tokens.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = positive)]
    pub(crate) calib_windows: usize,
    /// Tokens of a window [default: 512, or the model's context if that is shorter].
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) calib_tokens: Option<usize>,
    /// Field of a JSON line or Parquet row that holds the text.
    #[arg(long, value_name = "NAME", default_value = "text")]
    pub(crate) calib_field: String,
    /// Seed of everything that is drawn.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|&n| n > 0)
        .ok_or_else(|| format!("`{text}` is not a whole number above 0"))
}

/// `qbin eval`.
#[derive(Debug, Subcommand)]
pub(crate) enum EvalCommand {
    /// Perplexity of a checkpoint or an artifact on a text.
    Perplexity {
        /// The model.
        model: PathBuf,
        #[command(flatten)]
        text: TextArgs,
    },
    /// How a model differs from a base, token by token: KL divergence, agreement, perplexity ratio.
    Compare {
        /// The model to compare with, usually the original.
        base: PathBuf,
        /// The model, usually an artifact made from it.
        model: PathBuf,
        #[command(flatten)]
        text: TextArgs,
    },
}

/// The text of an evaluation and how it is scored.
#[derive(Debug, Args)]
pub(crate) struct TextArgs {
    /// Text file, UTF-8; tokenized as a whole.
    #[arg(long, value_name = "FILE")]
    pub(crate) data: PathBuf,
    /// `gptq-N`: windows of N tokens, all scored but the first; `llamacpp-N`: only the second half of each.
    #[arg(long, default_value = "gptq-2048")]
    pub(crate) protocol: String,
    /// Only the first N windows.
    #[arg(long, value_name = "N", value_parser = positive)]
    pub(crate) windows: Option<usize>,
    /// Arithmetic of the measured model's linears: `reference` (dequantized, f32), `bf16` (the same rounded to
    /// bf16) or `fast` (packed weights, int8 activations). The base of a comparison always takes the reference path.
    #[arg(long, value_name = "PATH", default_value_t = Path::Reference)]
    pub(crate) path: Path,
}

/// `qbin run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// A checkpoint or an artifact.
    pub(crate) model: PathBuf,
    /// Text to continue.
    #[arg(long, short)]
    pub(crate) prompt: String,
    /// Put the prompt as a user's message through the model's chat template.
    #[arg(long)]
    pub(crate) chat: bool,
    /// Arithmetic of the linears: `reference` (dequantized, f32), `bf16` (the same rounded to bf16) or `fast` (packed
    /// weights, int8 activations).
    #[arg(long, value_name = "PATH", default_value_t = Path::Fast)]
    pub(crate) path: Path,
    /// Most tokens to generate.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) max_tokens: usize,
    /// 0 is greedy.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temperature: f32,
    /// Only the N most likely tokens; 0 is all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) top_k: usize,
    /// Only the most likely tokens that together reach this probability.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) top_p: f32,
    /// Only tokens at least this likely, relative to the most likely one.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) min_p: f32,
    /// Seed of the choice.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Copy the model into huge pages of memory first: generates faster where page translation is the bound, starts
    /// later, and shares no memory with other processes.
    #[arg(long)]
    pub(crate) huge_pages: bool,
}

/// `qbin bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// A checkpoint or an artifact; it needs no tokenizer.
    pub(crate) model: PathBuf,
    /// Tokens of a prompt.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = positive)]
    pub(crate) prompt: usize,
    /// Tokens to generate.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = positive)]
    pub(crate) generate: usize,
    /// Positions in the cache before the first generated token [default: those of the prompt].
    #[arg(long, value_name = "N")]
    pub(crate) depth: Option<usize>,
    /// Sequences at the same time; a list, for example `1,4`.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1", value_parser = positive)]
    pub(crate) batch: Vec<usize>,
    /// Arithmetic of the linears: `reference` (dequantized, f32), `bf16` (the same rounded to bf16) or `fast` (packed
    /// weights, int8 activations).
    #[arg(long, value_name = "PATH", default_value_t = Path::Fast)]
    pub(crate) path: Path,
    /// Measurements of each figure, after one that does not count.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = positive)]
    pub(crate) repeat: usize,
    /// Price of this machine for an hour, in any currency: shows what a million tokens cost.
    #[arg(long, value_name = "X", value_parser = price, allow_negative_numbers = true)]
    pub(crate) price_per_hour: Option<f64>,
    /// Copy the model into huge pages of memory first: generates faster where page translation is the bound, starts
    /// later, and shares no memory with other processes.
    #[arg(long)]
    pub(crate) huge_pages: bool,
    /// Do not measure what the machine could do.
    #[arg(long)]
    pub(crate) no_limits: bool,
    /// Seed of the prompts' token ids.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

fn price(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|price: &f64| price.is_finite() && *price >= 0.0)
        .ok_or_else(|| format!("`{text}` is no price, expected a number from 0 up"))
}

/// `qbin synth`.
#[derive(Debug, Args)]
pub(crate) struct SynthArgs {
    /// Folder to write.
    pub(crate) output: PathBuf,
    /// A known shape.
    #[arg(long, value_enum, default_value = "1b")]
    pub(crate) shape: ShapeArg,
    /// Decoder blocks, if not the shape's own number.
    #[arg(long)]
    pub(crate) blocks: Option<usize>,
    /// Seed of the weights.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

/// Shapes for `qbin synth`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum ShapeArg {
    /// hidden 64, 2 blocks.
    Tiny,
    /// hidden 1024, 24 blocks, vocabulary 32000.
    #[value(name = "0.5b")]
    HalfB,
    /// hidden 2048, 16 blocks, vocabulary 128256.
    #[value(name = "1b")]
    OneB,
}

/// The output head.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize, Default,
)]
#[serde(rename_all = "lowercase")]
pub(crate) enum HeadArg {
    /// As stored.
    #[default]
    Keep,
    /// 8 bits.
    Int8,
    /// 4 bits.
    Int4,
}

/// Declares a command-line twin of a library enum, so that libraries need not know clap.
macro_rules! twin {
    ($(#[$doc:meta])* $name:ident for $of:ident { $($(#[$variant_doc:meta])* $variant:ident),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, ValueEnum)]
        pub(crate) enum $name { $($(#[$variant_doc])* $variant),* }
        impl From<$name> for $of {
            fn from(value: $name) -> Self {
                match value { $($name::$variant => Self::$variant),* }
            }
        }
    };
}

twin! {
    /// Quantization methods.
    MethodArg for Method {
        /// Round to nearest; needs no calibration.
        Rtn,
        /// Error feedback over columns.
        Gptq,
        /// Activation-aware scaling and clipping.
        Awq,
    }
}

twin! {
    /// Pruning methods.
    PruneMethodArg for PruneMethod {
        /// The smallest weights; needs no calibration.
        Magnitude,
        /// The smallest products of weight and input norm, row by row.
        Wanda,
        /// The weights that cost least once the others have made up for them.
        #[value(name = "sparsegpt")]
        SparseGpt,
    }
}

twin! {
    /// Column orders of GPTQ and SparseGPT.
    ActOrderArg for ActOrder {
        /// By falling Hessian diagonal inside each group, then groups by it; free at run time.
        Group,
        /// As stored.
        None,
    }
}

twin! {
    /// Ways to choose scales.
    ScaleSearchArg for ScaleSearch {
        /// From the smallest and the largest weight of a group.
        None,
        /// The narrowed range with the least weighted squared error.
        Weighted,
    }
}
