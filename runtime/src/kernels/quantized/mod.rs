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
//! Where to look: `portable` is the definition, `few` and `many` (tokens) the algorithms of the fast kernels over
//! `vectors`, which one file per instruction set implements; `reads` is how which core reads best. `sparse` makes dense tiles of sparse weights.

#[cfg(any(target_arch = "x86_64", test))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
mod few;
mod many;
#[cfg(target_arch = "aarch64")]
mod neon;
mod output;
mod panel;
mod portable;
mod reads;
mod sparse;
#[cfg(test)]
mod tests;
mod vectors;

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use qbin_format::Scheme;
use qbin_format::{QuantizedView, Sparsity, TILE_ROWS};

use super::activations::{Activations, activation_group};
use super::columns::Columns;
use super::isa::Isa;
use output::Panels;

/// Writes rows `rows` of `W·x` for every token of `x` into `out`, `[x.tokens(), rows.len()]`. Bias is the caller's.
///
/// # Panics
/// If `x` was quantized for another width or scheme, `w` has not the bytes that its shape needs, `out` has another shape,
/// or `rows` are not whole panels of `w`.
#[track_caller]
pub fn matmul(
    isa: Isa,
    w: &QuantizedView,
    rows: Range<usize>,
    x: &Activations,
    out: &mut Columns<'_>,
) {
    assert_eq!(x.cols(), w.cols, "columns of activations and weights");
    assert!(
        panel::fits(w),
        "{} rows of {} columns do not fit the bytes of the matrix",
        w.rows,
        w.cols
    );
    assert_eq!(
        x.group(),
        activation_group(w.scheme, w.cols),
        "columns of an activation group"
    );
    assert!(
        rows.end <= w.rows && (rows.end == w.rows || rows.end.is_multiple_of(TILE_ROWS)),
        "rows {rows:?} of {}",
        w.rows
    );
    assert_eq!(out.rows(), x.tokens(), "tokens of output and activations");
    let product = Product {
        w,
        x,
        panels: rows.start / TILE_ROWS..rows.end.div_ceil(TILE_ROWS),
        out: Panels::of_columns(out, rows),
    };
    match w.sparsity {
        Sparsity::Dense => dense(isa, product),
        _ => sparse::run(isa, product),
    }
}

/// The product of weights in dense tiles.
fn dense(isa: Isa, product: Product) {
    if blocks::serves(product.x.group()) {
        vectorized(isa, product);
    } else {
        isa.run(product);
    }
}

/// Rows `16 · panels` of `W·x` for every token.
struct Product<'a, 'o> {
    w: &'a QuantizedView<'a>,
    x: &'a Activations,
    panels: Range<usize>,
    out: Panels<'o>,
}

/// The product of groups that the vector kernels serve.
#[cfg(target_arch = "x86_64")]
fn vectorized(isa: Isa, product: Product) {
    use avx2::{Bytes, Halves, Nibbles, Vnni};
    if let Some(x) = product.x.tiles()
        && let Some(tiles) = amx::Amx::of(isa)
    {
        amx::run(isa, tiles, x, product);
    } else if let Some(v) = avx512::Avx512::of(isa) {
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
#[cfg(target_arch = "aarch64")]
fn vectorized(isa: Isa, product: Product) {
    if product.w.scheme.bits == 4
        && let Some(v) = neon::Neon::<0>::of(isa)
    {
        blocks::run(v, product);
    } else if product.w.scheme.bits == 8
        && let Some(v) = neon::Neon::<128>::of(isa)
    {
        blocks::run(v, product);
    } else {
        isa.run(product);
    }
}

/// The product of groups that vector kernels would serve.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn vectorized(isa: Isa, product: Product) {
    isa.run(product);
}

/// Whether products at this level have the bits of the definition, tried on small ones.
///
/// AMX is checked by this before it is offered: silently wrong results would be worse than none.
#[cfg(target_arch = "x86_64")]
pub(super) fn agrees(isa: Isa) -> bool {
    [(4, 32), (4, 128), (8, 96)]
        .into_iter()
        .all(|(bits, group)| {
            let scheme = Scheme {
                bits,
                group_size: Some(group),
                symmetric: false,
            };
            // Any bytes will do: 33 rows and 200 columns in 3 panels of 4 tiles, f16 scales below 2.
            let bytes = |len: usize, limit: usize| -> Vec<u8> {
                (0..len).map(|i| (i * i % 251 % limit) as u8).collect()
            };
            let parameters = 3 * scheme.groups(200) * 16;
            let w = QuantizedView {
                scheme,
                rows: 33,
                cols: 200,
                sparsity: Sparsity::Dense,
                codes: &bytes(3 * 4 * 128 * usize::from(bits), 256),
                scales: &bytes(2 * parameters, 60),
                zero_points: &bytes(parameters, 16),
            };
            let x: Vec<f32> = bytes(37 * 200, 251)
                .iter()
                .map(|&byte| f32::from(byte) - 125.0)
                .collect();
            let run = |isa: Isa| {
                let mut out = vec![0.0; 37 * 33];
                let x = Activations::quantize(isa, &x, 200, scheme);
                matmul(isa, &w, 0..33, &x, &mut Columns::whole(&mut out, 33));
                out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            run(isa) == run(Isa::SCALAR)
        })
}
