//! Quantization of weight matrices: grids, second moments, round-to-nearest, GPTQ, AWQ.
//!
//! Arithmetic only: values in, values and a report out. Nothing here opens a file, prints, or reads
//! global state, and no result depends on the number of threads: work is cut by shape.
//!
//! `W` is `[out_features, in_features]`, row major, everywhere.
#![forbid(unsafe_code)]

mod awq;
mod curvature;
mod error;
mod factor;
mod feedback;
mod gptq;
mod grid;
mod hessian;
mod linalg;
mod pass;
mod patterns;
mod recipe;
mod refine;
mod rtn;
mod scan;
mod sweep;

pub use awq::{
    divide_rows, divide_vector, gqa_mean, gqa_producer_scales, quadratic_loss, rounded,
    scale_candidates, scale_columns, search_clip,
};
pub use error::QuantError;
pub use gptq::{ActOrder, Factor, Gptq, GptqParams, GptqReport, Survivors, gptq};
pub use grid::{Granularity, Grid, GroupParams, Rounder, ScaleSearch};
pub use hessian::{Hessian, Metric, Moments, relative_error};
pub use pass::{Found, Held, QuantPass, WEIGHTS_ALONE, Zeros, observe};
pub use patterns::Patterns;
pub use recipe::{Fate, GroupSize, Method, Override, QuantRecipe};
pub use rtn::rtn;
