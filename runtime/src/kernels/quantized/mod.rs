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

use std::ops::Range;

use qbin_format::{QuantizedView, TILE_ROWS};

pub use output::Output;

use super::activations::{Activations, activation_group};
use super::isa::Isa;
use super::pool::Columns;
use output::Panels;
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
    check(w, x);
    assert_eq!(
        (out.tokens(), out.rows()),
        (x.tokens(), w.rows),
        "shape of the output"
    );
    let claimed = out.claim(panels.clone());
    isa.run(Product {
        w,
        x,
        panels,
        out: claimed,
    });
}

/// Writes rows `rows` of `W·x` for every token of `x` into `out`, `[x.tokens(), rows.len()]`. Bias is the caller's.
///
/// # Panics
/// If `x` was quantized for another width or scheme, `out` has another shape, or `rows` are not whole panels of `w`.
#[track_caller]
pub fn matmul_columns(
    isa: Isa,
    w: &QuantizedView,
    rows: Range<usize>,
    x: &Activations,
    out: &mut Columns<'_>,
) {
    assert!(
        rows.end <= w.rows && (rows.end == w.rows || rows.end.is_multiple_of(TILE_ROWS)),
        "rows {rows:?} of {}",
        w.rows
    );
    assert_eq!(out.rows(), x.tokens(), "tokens of output and activations");
    let panels = rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS);
    check(w, x);
    let claimed = Panels::of_columns(out, rows);
    isa.run(Product {
        w,
        x,
        panels,
        out: claimed,
    });
}

#[track_caller]
fn check(w: &QuantizedView, x: &Activations) {
    assert_eq!(x.cols(), w.cols, "columns of activations and weights");
    assert_eq!(
        x.group(),
        activation_group(w.scheme, w.cols),
        "columns of an activation group"
    );
}
