//! Products of packed weights and int8 activations (W4A8, W8A8).
//!
//! Definition, for token `t`, row `n`, and groups of columns in ascending order, all in f32:
//!
//! ```text
//! y = 0;  per group: y = fma(s_w · s_a, f32(Σ q·a − z·Σ a), y)
//! ```
//!
//! with one rounding for the product of the scales and one for the FMA. The integers are exact, and so is their
//! conversion: a group has at most 128 columns ([`activation_group`](super::activation_group)), hence
//! `|Σ (q−z)·a| ≤ 255·127·128 < 2²⁴`. Every instruction set, batch size and partition gives the same bits.

mod output;
mod panel;
mod portable;
mod sparse;

use std::ops::Range;

use qbin_format::{QuantizedView, Sparsity};

pub use output::Output;
use output::Panels;

use super::activations::{Activations, activation_group};
use super::isa::Isa;
use portable::Product;

/// Writes rows `16 · panels` of `W·x` for every token of `x`.
///
/// `out` is `[x.tokens(), w.rows]`; other panels of it may be written by other threads at the same time. Bias is the
/// caller's.
///
/// # Panics
/// If `x` was quantized for another width or scheme, `out` has another shape, or a panel was written before.
#[track_caller]
pub fn matmul(isa: Isa, w: &QuantizedView, panels: Range<usize>, x: &Activations, out: &Output) {
    assert_eq!(x.cols(), w.cols, "columns of activations and weights");
    assert_eq!(
        x.group(),
        activation_group(w.scheme, w.cols),
        "columns of an activation group"
    );
    assert_eq!(
        (out.tokens(), out.rows()),
        (x.tokens(), w.rows),
        "shape of the output"
    );
    let out = out.claim(panels.clone());
    match w.sparsity {
        Sparsity::Dense => dense(isa, w, panels, x, out),
        _ => sparse::matmul(isa, w, panels, x, out),
    }
}

/// The product of a matrix whose tiles are dense.
fn dense(isa: Isa, w: &QuantizedView, panels: Range<usize>, x: &Activations, out: Panels<'_>) {
    isa.run(Product { w, x, panels, out });
}
