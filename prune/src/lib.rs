//! Pruning: which weights of a linear become zero, and what the others become.
//!
//! Arithmetic only, as in the quantization crate: values in, values and a report out. The Hessian, its
//! factorization and the error feedback are `qbin_quant`'s.
#![forbid(unsafe_code)]

mod allocation;
mod error;
mod magnitude;
mod mask;
mod measure;
mod pass;
mod recipe;
mod refit;
mod sparsegpt;
mod sparsity;
mod swap;
mod wanda;

pub use allocation::{Curve, allocate};
pub use error::PruneError;
pub use magnitude::magnitude;
pub use measure::MeasurePass;
pub use pass::PrunePass;
pub use recipe::{PruneMethod, PruneRecipe, SparsityOverride};
pub use refit::refit;
pub use sparsegpt::{Pruned, sparsegpt};
pub use sparsity::Sparsity;
pub use swap::swap;
pub use wanda::wanda;
