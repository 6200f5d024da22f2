//! The product for few tokens, which memory bounds.
//!
//! Panels pass by one after the other, and their codes in the order in which they are stored. That is one stream, which a
//! core's own prefetching follows as fast as memory answers where few instructions stand between two loads: with AVX-512
//! and one or two tokens, several streams at a time and software prefetches were slower. With more instructions between
//! them ([`Vectors::LATE`]) codes are fetched ahead. Each load is followed by its products: where loads stand together, the
//! core finds fewer of the next misses early.

use std::ops::Range;
use std::sync::atomic::{Ordering, compiler_fence};

use qbin_format::QuantizedView;

use super::Product;
use super::blocks::{QUADS, STEP, parts, starts};
use super::output::Panels;
use super::panel::{Panel, VECTOR};
use super::vectors::Vectors;
use crate::kernels::activations::Activations;
use crate::kernels::isa::Vectorized;

/// Tokens for which the weights are streamed once.
pub(super) const TOKENS: usize = 4;

/// How far ahead codes are fetched, in bytes, where [`Vectors::LATE`] says so.
const AHEAD: usize = 2048;

/// Computes a product.
pub(super) fn run<V: Vectors>(v: V, mut product: Product) {
    for tokens in parts(0..product.x.tokens(), TOKENS.min(V::TOKENS)) {
        let stream = Stream {
            v,
            w: product.w,
            x: product.x,
            panels: product.panels.clone(),
            token: tokens.start,
        };
        let out = &mut product.out;
        match (product.w.scheme.bits, tokens.len()) {
            (4, 1) => v.run(Work::<V, 256, 1>(stream, out)),
            (4, 2) => v.run(Work::<V, 256, 2>(stream, out)),
            (4, 3) => v.run(Work::<V, 256, 3>(stream, out)),
            (4, _) => v.run(Work::<V, 256, 4>(stream, out)),
            (_, 1) => v.run(Work::<V, 512, 1>(stream, out)),
            (_, 2) => v.run(Work::<V, 512, 2>(stream, out)),
            (_, 3) => v.run(Work::<V, 512, 3>(stream, out)),
            (_, _) => v.run(Work::<V, 512, 4>(stream, out)),
        }
    }
}

/// Panels, and the first of the tokens that they are multiplied by.
struct Stream<'a, V> {
    v: V,
    w: &'a QuantizedView<'a>,
    x: &'a Activations,
    panels: Range<usize>,
    token: usize,
}

/// The product for `T` tokens; `BYTES` are those of a step.
struct Work<'a, 'o, V, const BYTES: usize, const T: usize>(Stream<'a, V>, &'a mut Panels<'o>);

impl<V: Vectors, const BYTES: usize, const T: usize> Vectorized for Work<'_, '_, V, BYTES, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self(stream, out) = self;
        let Stream { v, w, x, token, .. } = stream;
        let (steps, per_group) = (w.cols.div_ceil(STEP), x.group() / STEP);
        let activations: [&[[i8; STEP]]; T] =
            std::array::from_fn(|t| &x.codes(token + t).as_chunks().0[..steps]);
        let scales: [&[f32]; T] = std::array::from_fn(|t| x.scales(token + t));
        let sums: [&[i32]; T] = std::array::from_fn(|t| x.sums(token + t));
        for at in stream.panels {
            let panel = Panel::of(w, at);
            let codes: &[[u8; BYTES]] = &panel.codes.as_chunks().0[..steps];
            let mut y = [v.zero(); T];
            for group in 0..x.groups() {
                let weight_group = w.scheme.group_of(group * x.group());
                let steps = group * per_group..((group + 1) * per_group).min(steps);
                let mut now = [0; T];
                let mut a = [&activations[0][steps.clone()]; T];
                for t in 0..T {
                    now[t] = sums[t][group];
                    a[t] = &activations[t][steps.clone()];
                }
                let [start] = starts(v, w, &[panel], weight_group, now);
                let sums = sums_of(v, start, &codes[steps], a);
                let s_w = v.scales(panel.stored_scales(weight_group));
                for t in 0..T {
                    y[t] = v.add(y[t], s_w, scales[t][group], sums[t]);
                }
            }
            for (t, y) in y.into_iter().enumerate() {
                out.write(token + t, at, &v.rows(y));
            }
        }
    }
}

/// Sums that begin with `start`, with the products of some steps.
// Loops by index over arrays of registers: closures would be compiled without the vectors' features.
#[expect(clippy::needless_range_loop)]
#[inline(always)]
fn sums_of<V: Vectors, const BYTES: usize, const T: usize>(
    v: V,
    start: [V::Sum; T],
    codes: &[[u8; BYTES]],
    activations: [&[[i8; STEP]]; T],
) -> [V::Int; T] {
    // Sums of even and of odd quads, where there are registers for both: one would wait for itself.
    let odd = usize::from(2 * T <= V::SUMS);
    let mut sums = [start, [v.start(v.splat(0)); T]];
    for (step, codes) in codes.iter().enumerate() {
        let (vectors, _) = codes.as_chunks::<VECTOR>();
        let mut a = [activations[0][step].as_chunks::<4>().0; T];
        for t in 1..T {
            a[t] = activations[t][step].as_chunks::<4>().0;
        }
        for quad in 0..QUADS {
            let vector = &vectors[quad * BYTES / 512];
            if T * 512 / BYTES > V::LATE && (BYTES == 512 || quad % 2 == 0) {
                v.prefetch_near(vector.as_ptr().wrapping_add(AHEAD));
            }
            let codes = match (BYTES, quad % 2, odd) {
                (512, ..) => v.codes(vector),
                (_, 0, _) => v.low(vector),
                (_, _, 0) => v.high(vector),
                _ => v.high_in_place(vector),
            };
            for t in 0..T {
                let sum = &mut sums[quad % 2 * odd][t];
                *sum = v.dot(*sum, codes, v.quad(&a[t][quad]));
            }
            if BYTES == 512 || quad % 2 == 1 {
                // The compiler would gather the loads of several vectors.
                compiler_fence(Ordering::SeqCst);
            }
        }
        for t in 0..T {
            for parity in 0..=odd {
                sums[parity][t] = v.carry(sums[parity][t]);
            }
        }
    }
    let mut totals = [v.splat(0); T];
    for t in 0..T {
        let even = v.total(sums[0][t]);
        totals[t] = match (BYTES, odd) {
            (_, 0) => even,
            (512, _) => v.plus(even, v.total(sums[1][t])),
            _ => v.plus(even, v.of_high_in_place(v.total(sums[1][t]))),
        };
    }
    totals
}
