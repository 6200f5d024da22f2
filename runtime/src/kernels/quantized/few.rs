//! The product for few tokens, which memory bounds.
//!
//! Panels pass by one after the other, and their codes in the order in which they are stored. That is one stream, which a
//! core's own prefetching follows as fast as memory answers where few instructions stand between two loads: with AVX-512 on Zen 4
//! and one or two tokens, several streams at a time and software prefetches were slower. Where it does not, codes are fetched
//! ahead, in one stream or in some far from each other, which memory answers sooner: [`Reads`] says how. Each load is followed
//! by its products: where loads stand together, the core finds fewer of the next misses early.

use std::ops::Range;
use std::sync::atomic::{Ordering, compiler_fence};

use qbin_format::{QuantizedView, TILE_ROWS};

use super::Product;
use super::blocks::{QUADS, STEP, parts, starts};
use super::output::Panels;
use super::panel::{Panel, VECTOR};
use super::reads::Reads;
use super::vectors::Vectors;
use crate::kernels::activations::Activations;
use crate::kernels::detect::is_intel;
use crate::kernels::isa::Vectorized;

/// Tokens for which the weights are streamed once.
pub(super) const TOKENS: usize = 4;

/// Panels whose results are kept near before they are written together: where they are written has long left the caches, and
/// with a single line written there now and then, weights were read more slowly.
const KEPT: usize = 16;

/// Computes a product.
pub(super) fn run<V: Vectors>(v: V, product: Product) {
    if is_intel() {
        run_on::<V, true>(v, product);
    } else {
        run_on::<V, false>(v, product);
    }
}

/// Computes a product as is best on one of Intel's CPUs or another.
pub(super) fn run_on<V: Vectors, const INTEL: bool>(v: V, mut product: Product) {
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
            (4, 1) => v.run(Work::<V, INTEL, 256, 1>(stream, out)),
            (4, 2) => v.run(Work::<V, INTEL, 256, 2>(stream, out)),
            (4, 3) => v.run(Work::<V, INTEL, 256, 3>(stream, out)),
            (4, _) => v.run(Work::<V, INTEL, 256, 4>(stream, out)),
            (_, 1) => v.run(Work::<V, INTEL, 512, 1>(stream, out)),
            (_, 2) => v.run(Work::<V, INTEL, 512, 2>(stream, out)),
            (_, 3) => v.run(Work::<V, INTEL, 512, 3>(stream, out)),
            (_, _) => v.run(Work::<V, INTEL, 512, 4>(stream, out)),
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

/// Activations of `T` tokens, with a scale and a sum for each group.
struct Inputs<'a, const T: usize> {
    codes: [&'a [[i8; STEP]]; T],
    scales: [&'a [f32]; T],
    sums: [&'a [i32]; T],
}

/// The product for `T` tokens on one of Intel's CPUs or another; `BYTES` are those of a step.
struct Work<'a, 'o, V, const INTEL: bool, const BYTES: usize, const T: usize>(
    Stream<'a, V>,
    &'a mut Panels<'o>,
);

impl<V: Vectors, const INTEL: bool, const BYTES: usize, const T: usize>
    Work<'_, '_, V, INTEL, BYTES, T>
{
    const READS: Reads = match INTEL {
        true => Reads::INTEL,
        false => Reads::of::<V>(T * 512 / BYTES),
    };
}

impl<V: Vectors, const INTEL: bool, const BYTES: usize, const T: usize> Vectorized
    for Work<'_, '_, V, INTEL, BYTES, T>
{
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self(stream, out) = self;
        match Self::READS.streams {
            1 => stream.run::<BYTES, 1, T>(Self::READS, out),
            2 => stream.run::<BYTES, 2, T>(Self::READS, out),
            _ => stream.run::<BYTES, 4, T>(Self::READS, out),
        }
    }
}

impl<V: Vectors> Stream<'_, V> {
    /// The product with `P` panels at a time, as far apart as can be, so that each is of a stream of its own.
    #[inline(always)]
    fn run<const BYTES: usize, const P: usize, const T: usize>(
        &self,
        reads: Reads,
        out: &mut Panels<'_>,
    ) {
        let Range { start, end } = self.panels;
        let apart = (end - start) / P;
        self.side_by_side::<BYTES, P, T>(reads, start..start + apart, apart, out);
        self.side_by_side::<BYTES, 1, T>(reads, start + P * apart..end, 0, out);
    }

    /// The product with `P` panels at a time: one of `first` and those `apart`, twice that and so on behind it.
    #[inline(always)]
    fn side_by_side<const BYTES: usize, const P: usize, const T: usize>(
        &self,
        reads: Reads,
        first: Range<usize>,
        apart: usize,
        out: &mut Panels<'_>,
    ) {
        let inputs = self.inputs();
        let mut kept = [[[[0.0; TILE_ROWS]; T]; P]; KEPT];
        for start in first.clone().step_by(KEPT) {
            let some = start..first.end.min(start + KEPT);
            for (panel, kept) in some.clone().zip(&mut kept) {
                *kept = self.panels::<BYTES, P, T>(reads, &inputs, panel, apart);
            }
            for (panel, kept) in some.zip(&kept) {
                for (p, kept) in kept.iter().enumerate() {
                    for (t, rows) in kept.iter().enumerate() {
                        out.write(self.token + t, panel + p * apart, rows);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn inputs<const T: usize>(&self) -> Inputs<'_, T> {
        let &Self { w, x, token, .. } = self;
        let steps = w.cols.div_ceil(STEP);
        Inputs {
            codes: std::array::from_fn(|t| &x.codes(token + t).as_chunks().0[..steps]),
            scales: std::array::from_fn(|t| x.scales(token + t)),
            sums: std::array::from_fn(|t| x.sums(token + t)),
        }
    }

    /// The product with `P` panels, of which the first is `first`.
    // Loops by index over arrays of registers: closures would be compiled without the vectors' features.
    #[inline(always)]
    fn panels<const BYTES: usize, const P: usize, const T: usize>(
        &self,
        reads: Reads,
        inputs: &Inputs<'_, T>,
        first: usize,
        apart: usize,
    ) -> [[[f32; TILE_ROWS]; T]; P] {
        let &Self { v, w, x, .. } = self;
        let (steps, per_group) = (w.cols.div_ceil(STEP), x.group() / STEP);
        let panels: [Panel; P] = std::array::from_fn(|p| Panel::of(w, first + p * apart));
        let codes: [&[[u8; BYTES]]; P] =
            std::array::from_fn(|p| &panels[p].codes.as_chunks().0[..steps]);
        let mut y = [[v.zero(); T]; P];
        for group in 0..x.groups() {
            let weight_group = w.scheme.group_of(group * x.group());
            let steps = group * per_group..((group + 1) * per_group).min(steps);
            let mut now = [0; T];
            let mut a = [&inputs.codes[0][steps.clone()]; T];
            for t in 0..T {
                now[t] = inputs.sums[t][group];
                a[t] = &inputs.codes[t][steps.clone()];
            }
            let mut codes_now = [&codes[0][steps.clone()]; P];
            for p in 1..P {
                codes_now[p] = &codes[p][steps.clone()];
            }
            let start = starts(v, w, &panels, weight_group, now);
            let sums = sums_of(v, reads, start, codes_now, a);
            for p in 0..P {
                panels[p].fetch(v, weight_group, reads.groups);
                let s_w = v.scales(panels[p].stored_scales(weight_group));
                for t in 0..T {
                    y[p][t] = v.add(y[p][t], s_w, inputs.scales[t][group], sums[p][t]);
                }
            }
        }
        let mut rows = [[[0.0; TILE_ROWS]; T]; P];
        for p in 0..P {
            for t in 0..T {
                rows[p][t] = v.rows(y[p][t]);
            }
        }
        rows
    }
}

/// Sums that begin with `start`, with the products of some steps, a step of each panel in turn.
// Loops by index over arrays of registers: closures would be compiled without the vectors' features.
#[inline(always)]
fn sums_of<V: Vectors, const BYTES: usize, const P: usize, const T: usize>(
    v: V,
    reads: Reads,
    start: [[V::Sum; T]; P],
    codes: [&[[u8; BYTES]]; P],
    activations: [&[[i8; STEP]]; T],
) -> [[V::Int; T]; P] {
    let mut sums = [[[v.splat(0); T]; 2]; P];
    for p in 0..P {
        for t in 0..T {
            sums[p][0][t] = v.total(start[p][t]);
        }
    }
    for step in 0..codes[0].len() {
        let mut a = [activations[0][step].as_chunks::<4>().0; T];
        for t in 1..T {
            a[t] = activations[t][step].as_chunks::<4>().0;
        }
        for p in 0..P {
            sums[p] = with_step(v, reads, sums[p], &codes[p][step], a);
        }
    }
    let mut totals = [[v.splat(0); T]; P];
    for p in 0..P {
        for t in 0..T {
            let [even, odd] = [sums[p][0][t], sums[p][1][t]];
            totals[p][t] = match (BYTES, odd_apart::<V, T>()) {
                (_, false) => even,
                (512, _) => v.plus(even, odd),
                _ => v.plus(even, v.of_high_in_place(odd)),
            };
        }
    }
    totals
}

/// Whether sums of even and of odd quads are apart: one would wait for itself, but both must have registers.
const fn odd_apart<V: Vectors, const T: usize>() -> bool {
    2 * T <= V::SUMS
}

/// Sums of even and of odd quads with the products of one step of a panel.
#[inline(always)]
fn with_step<V: Vectors, const BYTES: usize, const T: usize>(
    v: V,
    reads: Reads,
    sums: [[V::Int; T]; 2],
    codes: &[u8; BYTES],
    activations: [&[[i8; 4]]; T],
) -> [[V::Int; T]; 2] {
    let odd = usize::from(odd_apart::<V, T>());
    let mut now = [[v.start(v.splat(0)); T]; 2];
    for parity in 0..=odd {
        for t in 0..T {
            now[parity][t] = v.start(sums[parity][t]);
        }
    }
    let (vectors, _) = codes.as_chunks::<VECTOR>();
    for quad in 0..QUADS {
        let vector = &vectors[quad * BYTES / 512];
        if BYTES == 512 || quad % 2 == 0 {
            for ahead in [reads.ahead, reads.again] {
                if ahead > 0 {
                    v.prefetch_near(vector.as_ptr().wrapping_add(ahead));
                }
            }
        }
        let codes = match (BYTES, quad % 2, odd) {
            (512, ..) => v.codes(vector),
            (_, 0, _) => v.low(vector),
            (_, _, 0) => v.high(vector),
            _ => v.high_in_place(vector),
        };
        for t in 0..T {
            let sum = &mut now[quad % 2 * odd][t];
            *sum = v.dot(*sum, codes, v.quad(&activations[t][quad]));
        }
        if BYTES == 512 || quad % 2 == 1 {
            // The compiler would gather the loads of several vectors.
            compiler_fence(Ordering::SeqCst);
        }
    }
    let mut sums = sums;
    for parity in 0..=odd {
        for t in 0..T {
            sums[parity][t] = v.total(v.carry(now[parity][t]));
        }
    }
    sums
}
