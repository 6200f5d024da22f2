//! From text to windows of token ids: what a compression pass is calibrated on.
//!
//! ```text
//! Source      files (text, JSON Lines, token ids, Parquet) | built-in corpus | the model itself
//!   ↓  Tokenizer     the model's own, chat messages through its chat template
//!   ↓  documents joined to one stream, cut into windows, chosen by a seed
//! Windows     [windows, tokens] ids, where they came from, and their digest
//! ```
//!
//! Nothing here knows a model or its weights: where the model has to speak, it is asked through
//! [`Generator`]. Equal texts, tokenizer and seed give equal windows, on every machine.

#![forbid(unsafe_code)]

mod chat;
mod corpus;
mod decode;
mod error;
mod loops;
mod npy;
#[cfg(feature = "parquet")]
mod parquet;
mod path;
mod self_generation;
mod source;
mod special;
mod strftime;
#[cfg(test)]
mod testing;
mod text;
mod tokenizer;
mod window;

pub use chat::Message;
pub use corpus::{CORPUS, CorpusText};
pub use decode::DecodeStream;
pub use error::{Error, RecordFault, Result};
pub use self_generation::{Generator, Request};
pub use source::{Source, load};
pub use tokenizer::Tokenizer;
pub use window::{WindowSpec, Windows};
