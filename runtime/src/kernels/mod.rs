//! Arithmetic at the machine's limit, on the artifact's own layout.
//!
//! The scalar code of each kernel is its definition. Every other instruction set gives the same bits: integer parts
//! are exact, and float parts follow one fixed order with the same multiplications and fused multiply-adds.
//!
//! This folder is the only place of the crate where `unsafe` is allowed: instruction sets, tiles and the pool's
//! borrowed work need it.
#![allow(unsafe_code)]

mod activations;
pub(crate) mod attention;
pub(crate) mod dense;
pub(crate) mod elementwise;
mod isa;
pub mod limits;
pub(crate) mod logits;
mod pool;
mod quantized;

pub use activations::{ActivationRows, Activations, activation_group};
pub use isa::{Isa, Level, UnknownLevel, UnsupportedLevel};
pub use pool::{Columns, Pool, default_threads};
pub use quantized::matmul;
