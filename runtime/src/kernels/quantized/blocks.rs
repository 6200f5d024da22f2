//! The product by blocks of panels and tokens whose integer sums stay in registers, for few tokens; `many` takes over
//! where there are more.
//!
//! It serves groups of 32, 64, 96 and 128 columns. A short last group is read up to a multiple of 32: the
//! activations there are 0.

use std::ops::Range;

use qbin_format::QuantizedView;

use super::Product;
use super::many;
use super::output::{self, Panels};
use super::panel::{Panel, VECTOR};
use super::vectors::Vectors;
use crate::kernels::activations::Activations;
use crate::kernels::isa::Vectorized;

/// Columns between two calls of [`Vectors::carry`].
pub(super) const STEP: usize = 32;
/// Quads of a step.
const QUADS: usize = STEP / 4;

/// Tokens for which the weights are streamed once: memory is the bound, not arithmetic. Several panels at a time are
/// several streams, and one core reads those faster than one.
const STREAMED: usize = 4;
/// How far ahead in each stream the codes are then fetched into the second cache, in bytes. Behind the last of them comes
/// the beginning of the panel that its stream goes on with.
const PREFETCH: usize = 1024;

/// Whether [`Product`] serves groups of this many columns.
pub(super) fn serves(group: usize) -> bool {
    group.is_multiple_of(STEP)
}

/// Computes a product.
pub(super) fn run<V: Vectors>(v: V, product: Product) {
    const { assert!((V::PANELS == 1 || V::PANELS == 4) && V::TOKENS <= output::TOKENS) };
    Blocks { v, product }.run();
}

struct Blocks<'a, 'o, V> {
    v: V,
    product: Product<'a, 'o>,
}

impl<V: Vectors> Blocks<'_, '_, V> {
    fn run(mut self) {
        let Product { x, ref panels, .. } = self.product;
        let panels = panels.clone();
        let tokens = 0..x.tokens();
        if tokens.len() <= STREAMED {
            return self.panels(panels, tokens);
        }
        many::run(self.v, self.product);
    }

    /// All panels, as many at a time as fit.
    fn panels(&mut self, mut panels: Range<usize>, tokens: Range<usize>) {
        while !panels.is_empty() {
            let count = match panels.len() < V::PANELS {
                true => 1,
                false => V::PANELS,
            };
            self.blocks(panels.start, count, tokens.clone());
            panels.start += count;
        }
    }

    /// Some panels: 1 or [`Vectors::PANELS`].
    fn blocks(&mut self, panel: usize, panels: usize, tokens: Range<usize>) {
        let bits = self.product.w.scheme.bits;
        for tokens in parts(tokens, V::TOKENS) {
            let at = At {
                panel,
                token: tokens.start,
            };
            match bits {
                4 => self.block_of::<256>(panels, tokens.len(), at),
                _ => self.block_of::<512>(panels, tokens.len(), at),
            }
        }
    }

    fn block_of<const BYTES: usize>(&mut self, panels: usize, tokens: usize, at: At) {
        // Blocks that an instruction set never asks for are not compiled for it.
        if V::PANELS == 4 && panels == 4 {
            return match tokens {
                1 => self.block::<BYTES, 4, 1, 1>(at),
                2 => self.block::<BYTES, 4, 2, 1>(at),
                3 => self.block::<BYTES, 4, 3, 1>(at),
                _ => self.block::<BYTES, 4, 4, 1>(at),
            };
        }
        // Few sums are doubled: each waits for its own dot product before.
        match tokens {
            1 => self.block::<BYTES, 1, 1, 2>(at),
            2 => self.block::<BYTES, 1, 2, 2>(at),
            3 => self.block::<BYTES, 1, 3, 1>(at),
            _ => self.block::<BYTES, 1, 4, 1>(at),
        }
    }

    fn block<const BYTES: usize, const P: usize, const T: usize, const C: usize>(
        &mut self,
        at: At,
    ) {
        let Product {
            w, x, ref mut out, ..
        } = self.product;
        let v = self.v;
        v.run(Block::<V, BYTES, P, T, C> { v, w, x, out, at });
    }
}

/// A range in parts of at most `len`, of about equal size: a small last one would leave the multipliers waiting.
pub(super) fn parts(range: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    let count = range.len().div_ceil(len);
    let at = move |part: usize| range.start + part * range.len() / count;
    (0..count).map(move |part| at(part)..at(part + 1))
}

/// Where a block begins.
struct At {
    panel: usize,
    token: usize,
}

/// `P` panels for `T` tokens, with `C` sums for each; `BYTES` are those of a step of one panel.
struct Block<'a, 'o, V, const BYTES: usize, const P: usize, const T: usize, const C: usize> {
    v: V,
    w: &'a QuantizedView<'a>,
    x: &'a Activations,
    out: &'a mut Panels<'o>,
    at: At,
}

impl<V: Vectors, const BYTES: usize, const P: usize, const T: usize, const C: usize> Vectorized
    for Block<'_, '_, V, BYTES, P, T, C>
{
    type Output = ();

    // Loops by index over arrays of registers: closures would be compiled without the vectors' features. Each stays
    // small enough to be unrolled, or the array would not stay in registers.
    #[expect(clippy::needless_range_loop)]
    #[inline(always)]
    fn run(self) {
        let Self { v, w, x, out, at } = self;
        let steps = w.cols.div_ceil(STEP);
        let panels: [Panel; P] = std::array::from_fn(|p| Panel::of(w, at.panel + p));
        let codes: [&[[u8; BYTES]]; P] =
            std::array::from_fn(|p| &panels[p].codes.as_chunks().0[..steps]);
        let activations: [&[[i8; STEP]]; T] =
            std::array::from_fn(|t| &x.codes(at.token + t).as_chunks().0[..steps]);
        let scales: [&[f32]; T] = std::array::from_fn(|t| x.scales(at.token + t));
        let sums: [&[i32]; T] = std::array::from_fn(|t| x.sums(at.token + t));
        let per_group = x.group() / STEP;
        for t in 0..T {
            for p in 0..P {
                // The lines written at the end are far apart, each in its own page.
                v.prefetch(out.address(at.token + t, at.panel + p));
            }
        }
        let mut y = [[v.zero(); T]; P];
        for group in 0..x.groups() {
            let weight_group = w.scheme.group_of(group * x.group());
            let now: [i32; T] = std::array::from_fn(|t| sums[t][group]);
            let mut sum = [[[v.start(v.splat(0)); T]; P]; C];
            sum[0] = starts(v, w, &panels, weight_group, now);
            for step in group * per_group..((group + 1) * per_group).min(steps) {
                let mut now = [&codes[0][step]; P];
                for p in 1..P {
                    now[p] = &codes[p][step];
                }
                let mut a = [activations[0][step].as_chunks::<4>().0; T];
                for t in 1..T {
                    a[t] = activations[t][step].as_chunks::<4>().0;
                }
                let ahead = match step + PREFETCH / BYTES < steps {
                    true => PREFETCH,
                    false => PREFETCH + (P - 1) * steps * BYTES,
                };
                for pair in 0..QUADS / 2 {
                    for p in 0..P {
                        prefetch_pair(v, now[p], pair, ahead);
                    }
                    dot_quad(v, now, a, 2 * pair, &mut sum[0]);
                    dot_quad(v, now, a, 2 * pair + 1, &mut sum[C - 1]);
                }
                carry(v, &mut sum[0]);
                if C == 2 {
                    carry(v, &mut sum[1]);
                }
            }
            for p in 0..P {
                panels[p].prefetch_parameters(v, weight_group, P);
                let s_w = v.scales(panels[p].stored_scales(weight_group));
                for t in 0..T {
                    let mut total = v.total(sum[0][p][t]);
                    if C == 2 {
                        total = v.plus(total, v.total(sum[1][p][t]));
                    }
                    y[p][t] = v.add(y[p][t], s_w, scales[t][group], total);
                }
            }
        }
        for p in 0..P {
            for t in 0..T {
                out.write(at.token + t, at.panel + p, &v.rows(y[p][t]));
            }
        }
    }
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
            _ => v.high(vector),
        };
    }
    for t in 0..T {
        let a = v.quad(&activations[t][quad]);
        for p in 0..P {
            sum[p][t] = v.dot(sum[p][t], now[p], a);
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

/// Fetches what will be needed a while after a pair of quads.
#[inline(always)]
fn prefetch_pair<V: Vectors, const BYTES: usize>(
    v: V,
    codes: &[u8; BYTES],
    pair: usize,
    ahead: usize,
) {
    for vector in 0..BYTES / 256 {
        let line = pair * BYTES / 4 + vector * VECTOR;
        v.prefetch(codes.as_ptr().wrapping_add(ahead + line));
    }
}
