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
//!
//! Where to look: `portable` is the definition, `blocks` the algorithm of the fast kernels over `vectors`, which one
//! file per instruction set implements.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
mod output;
mod panel;
mod portable;
#[cfg(test)]
mod tests;
mod vectors;

use std::ops::Range;

use qbin_format::{QuantizedView, TILE_ROWS};

pub use output::Output;

use super::activations::{Activations, activation_group};
use super::isa::Isa;
use super::pool::Columns;
use output::Panels;

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
    let product = Product {
        w,
        x,
        panels: panels.clone(),
        out: out.claim(panels),
    };
    product.run_at(isa);
}

/// Rows `16 · panels` of `W·x` for every token.
struct Product<'a, 'o> {
    w: &'a QuantizedView<'a>,
    x: &'a Activations,
    panels: Range<usize>,
    out: Panels<'o>,
}

impl Product<'_, '_> {
    fn run_at(self, isa: Isa) {
        match blocks::serves(self.x.group()) {
            true => vectorized(isa, self),
            false => isa.run(self),
        }
    }
}

/// The product of groups that the vector kernels serve.
#[cfg(target_arch = "x86_64")]
fn vectorized(isa: Isa, product: Product) {
    use avx2::{Bytes, Halves, Nibbles, Vnni};
    if let Some(v) = avx512::Avx512::of(isa) {
        blocks::run(v, product);
    } else if let Some(v) = Halves::<Vnni>::of(isa) {
        blocks::run(v, product);
    } else if product.w.scheme.bits == 4
        && let Some(v) = Halves::<Nibbles>::of(isa)
    {
        blocks::run(v, product);
    } else if product.w.scheme.bits == 8
        && let Some(v) = Halves::<Bytes>::of(isa)
    {
        blocks::run(v, product);
    } else {
        isa.run(product);
    }
}

/// The product of groups that the vector kernels serve.
#[cfg(not(target_arch = "x86_64"))]
fn vectorized(isa: Isa, product: Product) {
    isa.run(product);
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
    let product = Product {
        w,
        x,
        panels,
        out: Panels::of_columns(out, rows),
    };
    product.run_at(isa);
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
