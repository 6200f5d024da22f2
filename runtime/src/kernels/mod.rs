//! Arithmetic at the machine's limit, on the artifact's own layout.
//!
//! The scalar code of each kernel is its definition. Every other instruction set gives the same bits: integer parts
//! are exact, and float parts follow one fixed order with the same multiplications and fused multiply-adds.
//!
//! Where to look: `isa` sets of instructions, and portable Rust compiled for each of them, `detect` which of them this machine has; `pool` the threads of a
//! forward pass and `columns` what each of them writes. The fast path's linears: `activations` rounding to int8, `quantized` packed
//! and sparse weights, `dense` weights that are not quantized. Between the linears, on every path: `attention`,
//! `elementwise`, `logits`. Offline and the other paths: [`gemm`] products in f32, f64 and bf16, [`gram`] second
//! moments. Under all of them: `bf16` rounding to pairs of bf16, [`pages`] memory in large
//! pages, `ahead` reads begun early.
//! [`limits`] measures what the machine could do at most.
//!
//! This folder is the only place of the crate where `unsafe` is allowed: instruction sets, tiles, the pool's
//! borrowed work and advice to the system need it.
#![allow(unsafe_code)]

mod activations;
mod ahead;
pub(crate) mod attention;
pub(crate) mod bf16;
mod columns;
pub(crate) mod dense;
mod detect;
pub(crate) mod elementwise;
pub mod gemm;
pub mod gram;
mod isa;
pub mod limits;
pub(crate) mod logits;
pub mod pages;
mod pool;
mod quantized;
#[cfg(target_arch = "x86_64")]
mod tile_config;

pub(crate) use activations::{ActivationCell, whole_groups};
pub use activations::{Activations, activation_group};
pub use columns::Columns;
pub use detect::UnsupportedLevel;
pub use isa::{Isa, Level, UnknownLevel, Vectorized};
pub use pool::{Pool, default_threads};
pub use quantized::matmul;
