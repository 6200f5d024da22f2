//! Pruning: which weights of a linear become zero.
//!
//! Arithmetic only, as in the quantization crate: values in, values and a report out.
#![forbid(unsafe_code)]

mod error;
mod magnitude;
mod pass;
mod sparsity;

pub use error::PruneError;
pub use magnitude::magnitude;
pub use pass::{PruneMethod, PrunePass, PruneRecipe};
pub use sparsity::Sparsity;
