//! The model as data, its decoder, the walk over its blocks, and evaluation: token ids in, logits out.
//!
//! Where to look: [`config`] what a `config.json` says, [`spec`] which tensors that implies,
//! [`Linear`] and [`Block`] the arithmetic of one decoder block, [`Decoder`] the whole model,
//! [`generate`] sampling from it, [`Cpu`] what it runs on, [`walk`] the pass over blocks in which weights are rewritten,
//! [`eval`] perplexity and the comparison with another model.
//!
//! A linear is computed on one of three [`Path`]s: the *reference path*, weights dequantized to f32 and f32 arithmetic;
//! the *bf16 path*, the same with both rounded to bf16; or the *fast path*, packed weights as they are with int8
//! activations. Everything between the linears is the same on all, and so is the promise of [`kernels`]: the same bits for every instruction set, number of threads and batch.

mod attention;
mod batch;
mod block;
mod buffers;
pub mod config;
mod cpu;
mod decoder;
mod error;
pub mod eval;
pub mod generate;
mod input;
pub mod kernels;
mod kv_cache;
mod linear;
mod math;
mod rope;
mod sampler;
pub mod spec;
pub mod times;
pub mod walk;

pub use block::{Block, Side, Sublayer};
pub use config::ModelConfig;
pub use cpu::{Cpu, Path, UnknownPath};
pub use decoder::{Decoder, Parts};
pub use error::RuntimeError;
pub use kv_cache::{KvCache, KvDtype};
pub use linear::{Linear, Matrix};
pub use sampler::{Sampler, Sampling};
