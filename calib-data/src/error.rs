//! What can go wrong between a text and its windows of token ids.

use std::io;

/// An error of this crate. Its text leaves out what its `source` says, and the way out, which is
/// [`Error::hint`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened or read.
    #[error("`{file}` cannot be read")]
    Read {
        /// The path as given.
        file: String,
        /// What the system said.
        source: io::Error,
    },

    /// A text file holds bytes that are no UTF-8.
    #[error("`{file}`: not UTF-8 at byte {offset}, expected UTF-8 text")]
    NotUtf8 {
        /// The path as given.
        file: String,
        /// Offset of the first byte that is no UTF-8.
        offset: usize,
    },

    /// A line of a JSON Lines file, or a row of a Parquet file, is no document.
    #[error("`{file}:{line}` is no document")]
    Record {
        /// The path as given.
        file: String,
        /// Line or row, from 1.
        line: usize,
        /// What is wrong with it.
        #[source]
        fault: RecordFault,
    },

    /// A `.npy` file is damaged, or holds no token ids of the wanted shape.
    #[error("`{file}`: {fault}")]
    Npy {
        /// The path as given.
        file: String,
        /// What is wrong with it.
        fault: String,
    },

    /// A `.npy` file's windows are longer or shorter than asked.
    #[error("`{file}`: windows of {got} tokens, expected {expected} tokens")]
    NpyTokens {
        /// The path as given.
        file: String,
        /// Tokens per window asked for.
        expected: usize,
        /// Tokens per window in the file.
        got: usize,
    },

    /// Token-id files and text files were given together.
    #[error("`{npy}` holds token ids and `{text}` holds text, expected one kind")]
    MixedKinds {
        /// A file of ids.
        npy: String,
        /// A file of text.
        text: String,
    },

    /// No calibration file was named.
    #[error("the list of calibration files is empty")]
    NoFiles,

    /// The program was built without the Parquet reader.
    #[error("`{file}` is a Parquet file, and this program was built without Parquet")]
    ParquetNotBuilt {
        /// The path as given.
        file: String,
    },

    /// A Parquet file is damaged or uses something that is not built in.
    #[cfg(feature = "parquet")]
    #[error("`{file}` cannot be read as Parquet")]
    Parquet {
        /// The path as given.
        file: String,
        /// What the reader said.
        source: parquet::errors::ParquetError,
    },

    /// A Parquet file has no text column of the wanted name.
    #[error("`{file}`: no text column `{field}`, the text columns are {columns}")]
    ParquetColumn {
        /// The path as given.
        file: String,
        /// The wanted column.
        field: String,
        /// The columns that hold text, each in backticks.
        columns: String,
    },

    /// Text was given, but no tokenizer.
    #[error("{origin} is text, and the model comes without a tokenizer")]
    NoTokenizer {
        /// The texts, in words.
        origin: String,
    },

    /// `tokenizer.json` could not be understood.
    #[error("`tokenizer.json` cannot be read as a tokenizer")]
    TokenizerJson {
        /// What the tokenizer library said.
        source: tokenizers::Error,
    },

    /// A file beside `tokenizer.json` is not JSON.
    #[error("`{file}` cannot be read as JSON")]
    ConfigJson {
        /// The file's conventional name.
        file: &'static str,
        /// What the JSON reader said.
        source: serde_json::Error,
    },

    /// A value beside `tokenizer.json` is not what it should be.
    #[error("`{file}`: `{key}` is `{got}`, expected {expected}")]
    ConfigValue {
        /// The file's conventional name.
        file: &'static str,
        /// The key.
        key: String,
        /// What stands there.
        got: String,
        /// What should stand there.
        expected: String,
    },

    /// A chat was to be encoded, but the model has no chat template.
    #[error("the model has no chat template, and chat messages need one")]
    NoChatTemplate,

    /// The chat template does not compile, or refused the messages.
    #[error("the chat template cannot be rendered")]
    ChatTemplate {
        /// What the template engine, or the template itself, said.
        source: minijinja::Error,
    },

    /// The tokenizer failed on a text.
    #[error("the tokenizer cannot encode this text")]
    Encode {
        /// What the tokenizer library said.
        source: tokenizers::Error,
    },

    /// The tokenizer failed on token ids.
    #[error("the tokenizer cannot decode these token ids")]
    Decode {
        /// What the tokenizer library said.
        source: tokenizers::Error,
    },

    /// Windows without a token, or no window at all, were asked for.
    #[error("asked for {windows} windows of {tokens} tokens, expected at least 1 of each")]
    EmptySpec {
        /// Windows asked for.
        windows: usize,
        /// Tokens per window asked for.
        tokens: usize,
    },

    /// The texts hold no token.
    #[error("{origin}: the text is empty")]
    Empty {
        /// The texts, in words.
        origin: String,
    },

    /// The texts are too short for what was asked.
    #[error(
        "{origin}: asked for {wanted} windows of {tokens} tokens, \
         there are {available} ({found} tokens)"
    )]
    TooShort {
        /// The texts, in words.
        origin: String,
        /// Windows asked for.
        wanted: usize,
        /// Tokens per window asked for.
        tokens: usize,
        /// Windows there are.
        available: usize,
        /// Tokens there are.
        found: usize,
    },

    /// A token id lies outside the model's vocabulary.
    #[error(
        "{origin}: token id {id} in window {window}, \
         expected ids below the model's vocabulary of {vocab}"
    )]
    OutsideVocabulary {
        /// The texts, in words.
        origin: String,
        /// The id.
        id: u32,
        /// The window it stands in, from 0.
        window: usize,
        /// Ids must be below this.
        vocab: usize,
    },

    /// The model could not be run to generate text.
    #[error("the model cannot generate its own calibration text")]
    Generator {
        /// What the runtime said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// The model generates loops or nothing, again and again.
    #[error(
        "self-generated text: {filled} of {wanted} windows filled after {sequences} sequences, \
         of which {loops} were loops and {empty} were empty"
    )]
    Degenerate {
        /// Windows filled.
        filled: usize,
        /// Windows asked for.
        wanted: usize,
        /// Sequences generated.
        sequences: usize,
        /// Sequences dropped as loops.
        loops: usize,
        /// Sequences that ended at once.
        empty: usize,
    },

    /// The generated text uses too few different tokens to calibrate on.
    #[error(
        "self-generated text: {distinct} distinct tokens in {total}, expected at least {least}"
    )]
    LowDiversity {
        /// Distinct tokens.
        distinct: usize,
        /// Tokens in all.
        total: usize,
        /// Distinct tokens needed.
        least: usize,
    },
}

/// What is wrong with one record of a file of documents.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordFault {
    /// Not JSON.
    #[error("not JSON")]
    Json(#[from] serde_json::Error),
    /// Not UTF-8.
    #[error("not UTF-8")]
    NotUtf8,
    /// JSON, but no object.
    #[error("got {0}, expected a JSON object")]
    NotObject(&'static str),
    /// Neither the wanted field nor chat messages.
    #[error("no field `{field}` and no `messages`, the fields are {keys}")]
    NoField {
        /// The wanted field.
        field: String,
        /// The fields there are, each in backticks.
        keys: String,
    },
    /// The field holds neither text nor chat messages.
    #[error("`{field}` is {got}, expected a string or a list of messages")]
    FieldType {
        /// The field.
        field: String,
        /// The JSON type there.
        got: &'static str,
    },
    /// A chat message without a role or a text.
    #[error("message {index} of `{field}` has no text in `{key}`, expected `role` and `content`")]
    Message {
        /// The field.
        field: String,
        /// The message, from 0.
        index: usize,
        /// `role` or `content`.
        key: &'static str,
    },
    /// The chat could not be rendered or encoded.
    #[error(transparent)]
    Chat(Box<Error>),
    /// An empty cell where text should be.
    #[error("no text in column `{0}`")]
    Null(String),
}

impl Error {
    /// The way out, in one sentence without a full stop, where there is one.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::NotUtf8 { .. } => "convert the file to UTF-8",
            Self::Record { fault, .. } => return fault.hint(),
            Self::NpyTokens { got, .. } => {
                return Some(format!("ask for windows of {got} tokens"));
            }
            Self::Npy { .. } => {
                "save a C-ordered array of shape [windows, tokens] and type int32, int64 or uint32"
            }
            Self::MixedKinds { .. } => "give only `.npy` files, or only texts",
            Self::NoFiles => "name a file, or use `--calib builtin` or `--calib self`",
            Self::ParquetNotBuilt { .. } => {
                "build with `--features parquet`, or convert the file to JSON Lines"
            }
            Self::ParquetColumn { .. } => "name one of these columns as the field",
            Self::NoTokenizer { .. } => {
                "put `tokenizer.json` beside the model, or give token ids in a `.npy` file"
            }
            Self::NoChatTemplate => NO_TEMPLATE_HINT,
            Self::TooShort { .. } => {
                "give more text, ask for fewer or shorter windows, or use `--calib self`"
            }
            Self::Empty { .. } => "give a file with text, or use `--calib self`",
            Self::OutsideVocabulary { .. } => {
                "the tokenizer, or the file of ids, belongs to another model"
            }
            Self::Degenerate { .. } | Self::LowDiversity { .. } => {
                "use `--calib builtin` or a text of your own"
            }
            _ => return None,
        };
        Some(text.to_owned())
    }
}

impl RecordFault {
    fn hint(&self) -> Option<String> {
        match self {
            Self::NoField { .. } => Some("name the field that holds the text".to_owned()),
            Self::Chat(error) => error.hint(),
            _ => None,
        }
    }
}

const NO_TEMPLATE_HINT: &str = "put `chat_template.jinja` or a `tokenizer_config.json` with \
                                `chat_template` beside the model, or give plain text";

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
