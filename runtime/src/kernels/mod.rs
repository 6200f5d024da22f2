//! Arithmetic at the machine's limit, on the artifact's own layout.
//!
//! The scalar code of each kernel is its definition. Every other instruction set gives the same bits: integer parts
//! are exact, and float parts follow one fixed order with the same multiplications and fused multiply-adds.
//!
//! This folder is the only place of the crate where `unsafe` is allowed: instruction sets, tiles and the pool's
//! borrowed work need it.
#![allow(unsafe_code)]

pub mod gemm;
pub mod gram;
mod isa;

pub use isa::{Isa, Level, UnknownLevel, UnsupportedLevel, Vectorized};
