//! What can go wrong between a model file and its logits.

/// An error of the runtime.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// The model carries no `config.json`.
    #[error("`{0}` is missing beside the weights: the model's shape is not known without it")]
    MissingFile(&'static str),
    /// `config.json` is not JSON.
    #[error("`config.json` is not valid JSON")]
    ConfigSyntax(#[source] serde_json::Error),
    /// A key of `config.json` has a value that cannot be used.
    #[error("`config.json`: key `{key}` is `{got}`, expected {expected}")]
    ConfigValue {
        /// The key.
        key: String,
        /// Its value, as JSON.
        got: String,
        /// What would have been accepted.
        expected: String,
    },
    /// `config.json` names an architecture that is not supported.
    #[error("architecture `{got}` is not supported, expected one of {supported}")]
    UnknownArchitecture {
        /// What the file says.
        got: String,
        /// What is supported.
        supported: String,
    },
    /// A key of `config.json` that nothing here reads, so that the model might mean something else.
    #[error(
        "`config.json`: key `{key}` (value `{value}`) is not known for `{architecture}`: it may change what the model computes"
    )]
    UnknownConfigKey {
        /// The key.
        key: String,
        /// Its value, as JSON.
        value: String,
        /// The architecture it was read for.
        architecture: &'static str,
    },
    /// A tensor the config asks for is not in the file.
    #[error("tensor `{tensor}` is missing, expected shape {expected:?} from `config.json`")]
    MissingTensor {
        /// The tensor's name.
        tensor: String,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than the config implies.
    #[error("tensor `{tensor}`: expected shape {expected:?} from `config.json`, got {got:?}")]
    Shape {
        /// The tensor's name.
        tensor: String,
        /// The shape it should have.
        expected: Vec<usize>,
        /// The shape it has.
        got: Vec<usize>,
    },
    /// A weight has a type the runtime cannot compute with.
    #[error("tensor `{tensor}`: dtype is {got}, expected F32, F16 or BF16")]
    Dtype {
        /// The tensor's name.
        tensor: String,
        /// Its type.
        got: String,
    },
    /// A tensor that no part of the model reads.
    #[error(
        "tensor `{tensor}` (shape {shape:?}) belongs to no part of a `{architecture}` model: it would be lost silently"
    )]
    UnknownTensor {
        /// The tensor's name.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// The architecture the file was read as.
        architecture: &'static str,
    },
    /// A weight is NaN or infinite.
    #[error("tensor `{tensor}`: element {index} is {value}, expected finite numbers")]
    NonFinite {
        /// The tensor's name.
        tensor: String,
        /// Row-major index of the first such element.
        index: usize,
        /// The value.
        value: f32,
    },
    /// An activation became NaN or infinite.
    #[error(
        "block {block}: activations are not finite at token {token}, channel {channel} of the batch: the model overflows in f32 or its weights are damaged"
    )]
    NonFiniteActivation {
        /// Decoder block.
        block: usize,
        /// Row of the batch.
        token: usize,
        /// Channel.
        channel: usize,
    },
    /// A token id the embedding has no row for.
    #[error(
        "token id {id} is outside the vocabulary of {vocab} entries: tokenizer and model do not belong together"
    )]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// Two models that cannot be compared.
    #[error(
        "vocabularies differ: {left} entries in the base, {right} in the model compared with it"
    )]
    VocabularyMismatch {
        /// Base vocabulary.
        left: usize,
        /// Other vocabulary.
        right: usize,
    },
    /// A text too short for the protocol.
    #[error(
        "{got} tokens, but protocol `{protocol}` needs at least {need}: give a longer text or a protocol with shorter windows"
    )]
    TooFewTokens {
        /// Tokens there.
        got: usize,
        /// Tokens needed.
        need: usize,
        /// Protocol id.
        protocol: String,
    },
    /// More windows were asked for than the text holds.
    #[error(
        "asked for {asked} windows of protocol `{protocol}`, but the text holds {there}: give a longer text or ask for fewer windows"
    )]
    TooFewWindows {
        /// Windows asked for.
        asked: usize,
        /// Windows there.
        there: usize,
        /// Protocol id.
        protocol: String,
    },
    /// More positions than the model was made for.
    #[error(
        "{need} positions, but the model's context is {max_positions} (`max_position_embeddings`)"
    )]
    ContextTooLong {
        /// Positions asked for.
        need: usize,
        /// The model's context.
        max_positions: usize,
    },
    /// A protocol id that is not known.
    #[error(
        "unknown protocol `{0}`, expected `gptq-N` or `llamacpp-N` with N = tokens per window, for example `gptq-2048`"
    )]
    UnknownProtocol(String),
    /// A sampling parameter out of its range.
    #[error("sampling: {name} is {got}, expected {expected}")]
    Sampling {
        /// Parameter.
        name: &'static str,
        /// Its value.
        got: f32,
        /// Its range.
        expected: &'static str,
    },
    /// A pass of the walk failed.
    #[error("{0}")]
    Pass(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl RuntimeError {
    /// The way out, where there is one beyond what the message says.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownConfigKey { key, .. } => Some(format!(
                "if `{key}` does not change the forward pass of this model, remove it from `config.json`"
            )),
            Self::UnknownTensor { .. } => {
                Some("remove the tensor from the checkpoint if the model does not need it".into())
            }
            Self::NonFinite { .. } => Some(
                "the checkpoint is damaged or was saved from a diverged run: download it again"
                    .into(),
            ),
            Self::MissingTensor { .. } => Some(
                "check that every shard is there and that `config.json` belongs to these weights"
                    .into(),
            ),
            Self::ContextTooLong { .. } => Some(
                "ask for shorter windows (for example `--protocol gptq-512`) or a shorter prompt"
                    .into(),
            ),
            _ => None,
        }
    }
}
