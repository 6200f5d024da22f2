//! What the products for few and for many tokens have in common.
//!
//! They serve groups of 32, 64, 96 and 128 columns. A short last group is read up to a multiple of 32: the
//! activations there are 0.

use std::ops::Range;

use qbin_format::QuantizedView;

use super::output;
use super::panel::Panel;
use super::vectors::Vectors;
use super::{Product, few, many};

/// Columns between two calls of [`Vectors::carry`].
pub(super) const STEP: usize = 32;
/// Quads of a step.
pub(super) const QUADS: usize = STEP / 4;

/// Whether [`Product`] serves groups of this many columns.
pub(super) fn serves(group: usize) -> bool {
    group.is_multiple_of(STEP)
}

/// Computes a product.
pub(super) fn run<V: Vectors>(v: V, product: Product) {
    const { assert!((V::PANELS == 1 || V::PANELS == 4) && V::TOKENS <= output::TOKENS) };
    match product.x.tokens() {
        ..=few::TOKENS => few::run(v, product),
        _ => many::run(v, product),
    }
}

/// A range in parts of at most `len`, of about equal size: a small last one would leave the multipliers waiting.
pub(super) fn parts(range: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    let count = range.len().div_ceil(len);
    let at = move |part: usize| range.start + part * range.len() / count;
    (0..count).map(move |part| at(part)..at(part + 1))
}

/// Sums that begin with `-z · Σ a`, less what [`Vectors::dot`] takes off each code; `sums` are those of the activations.
#[expect(clippy::needless_range_loop)]
#[inline(always)]
pub(super) fn starts<V: Vectors, const P: usize, const T: usize>(
    v: V,
    w: &QuantizedView,
    panels: &[Panel; P],
    weight_group: usize,
    sums: [i32; T],
) -> [[V::Sum; T]; P] {
    let mut start = [[v.start(v.splat(0)); T]; P];
    if w.scheme.symmetric {
        let z = V::CENTRE - i32::from(w.scheme.mid());
        for t in 0..T {
            let now = v.start(v.splat(z * sums[t]));
            for p in 0..P {
                start[p][t] = now;
            }
        }
    } else {
        for p in 0..P {
            let z = v.zero_points(panels[p].stored_zero_points(weight_group));
            for t in 0..T {
                start[p][t] = v.start(v.times(z, -sums[t]));
            }
        }
    }
    start
}

/// Adds the products of four columns.
#[inline(always)]
pub(super) fn dot_quad<V: Vectors, const BYTES: usize, const P: usize, const T: usize>(
    v: V,
    codes: [&[u8; BYTES]; P],
    activations: [&[[i8; 4]]; T],
    quad: usize,
    sum: &mut [[V::Sum; T]; P],
) {
    let vector = quad * BYTES / 512;
    let mut now = [v.codes(&codes[0].as_chunks().0[vector]); P];
    for p in 0..P {
        let vector = &codes[p].as_chunks().0[vector];
        now[p] = match (BYTES, quad % 2) {
            (512, _) => v.codes(vector),
            (_, 0) => v.low(vector),
            _ => v.high(v.anew(vector)),
        };
    }
    for t in 0..T {
        let a = v.quad(&activations[t][quad]);
        for p in 0..P {
            sum[p][t] = v.in_turn(v.dot(sum[p][t], now[p], a));
        }
    }
}

/// Ends a step.
#[expect(clippy::needless_range_loop)]
#[inline(always)]
pub(super) fn carry<V: Vectors, const P: usize, const T: usize>(v: V, sum: &mut [[V::Sum; T]; P]) {
    for p in 0..P {
        for t in 0..T {
            sum[p][t] = v.carry(sum[p][t]);
        }
    }
}
