//! The product for many tokens, which the multipliers bound.
//!
//! Strips of panels stay in the cache while blocks of tokens pass by. A block's integer sums stay in registers, its
//! results in memory next to them: what a block costs beside its products must be small, since that time is lost.

use std::ops::Range;

use qbin_format::QuantizedView;

use super::Product;
use super::blocks::{QUADS, STEP, carry, dot_quad, parts, starts};
use super::output::{Block, Near, Panels};
use super::panel::Panel;
use super::vectors::Vectors;
use crate::kernels::activations::Activations;
use crate::kernels::isa::Vectorized;

/// Columns that are multiplied at a time: four panels of them take 128 KiB (INT4) or 256 KiB.
const COLS: usize = 4096;
/// Bytes of activations that stay in the L2 cache, beside these panels, while all panels pass by.
const CACHED: usize = 384 << 10;

/// Where a block's sums are: before the first group, between groups, and behind the last. Between groups they are not in
/// the result, whose rows for several tokens compete for few lines of the first cache.
const ZEROS: usize = 0;
const NEAR: usize = 1;
const RESULT: usize = 2;

/// Computes a product.
pub(super) fn run<V: Vectors>(v: V, product: Product) {
    let Product {
        w,
        x,
        panels,
        mut out,
    } = product;
    let tokens_at_once = CACHED / COLS.min(x.stride());
    let groups_at_once = (COLS / x.group()).max(1);
    for tokens in parts(0..x.tokens(), tokens_at_once) {
        for groups in parts(0..x.groups(), groups_at_once) {
            let mut first = panels.start;
            while first < panels.end {
                let count = match first + V::PANELS <= panels.end {
                    true => V::PANELS,
                    false => 1,
                };
                let strip = Strip {
                    v,
                    w,
                    x,
                    panel: first,
                    tokens: tokens.clone(),
                    groups: groups.clone(),
                };
                strip.run(count, &mut out);
                first += count;
            }
        }
    }
}

/// Some panels, and the tokens and groups of columns that they are multiplied by.
struct Strip<'a, V> {
    v: V,
    w: &'a QuantizedView<'a>,
    x: &'a Activations,
    panel: usize,
    tokens: Range<usize>,
    groups: Range<usize>,
}

impl<V: Vectors> Strip<'_, V> {
    fn run(self, panels: usize, out: &mut Panels) {
        let v = self.v;
        match (self.w.scheme.bits, panels) {
            (4, 1) => v.run(Work::<V, 256, 1>(self, out)),
            (_, 1) => v.run(Work::<V, 512, 1>(self, out)),
            (4, _) => v.run(Work::<V, 256, 4>(self, out)),
            _ => v.run(Work::<V, 512, 4>(self, out)),
        }
    }
}

/// A strip of `P` panels and its results; `BYTES` are those of a step of one panel.
struct Work<'a, 'o, V, const BYTES: usize, const P: usize>(Strip<'a, V>, &'a mut Panels<'o>);

impl<V: Vectors, const BYTES: usize, const P: usize> Vectorized for Work<'_, '_, V, BYTES, P> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self(strip, out) = self;
        // What an instruction set never asks for is not compiled for it.
        if P > V::PANELS {
            return;
        }
        let panels: [Panel; P] = std::array::from_fn(|p| Panel::of(strip.w, strip.panel + p));
        let steps = strip.w.cols.div_ceil(STEP);
        let codes: [&[[u8; BYTES]]; P] =
            std::array::from_fn(|p| &panels[p].codes.as_chunks().0[..steps]);
        let mut rooms = [Near::new(), Near::new(), Near::new()];
        for tokens in parts(strip.tokens.clone(), V::TOKENS) {
            let token = tokens.start;
            match tokens.len() {
                1 => strip.some::<BYTES, P, 1>(token, &panels, codes, &mut rooms, out),
                2 => strip.some::<BYTES, P, 2>(token, &panels, codes, &mut rooms, out),
                3 => strip.some::<BYTES, P, 3>(token, &panels, codes, &mut rooms, out),
                4 if V::TOKENS >= 4 => {
                    strip.some::<BYTES, P, 4>(token, &panels, codes, &mut rooms, out)
                }
                5 if V::TOKENS >= 5 => {
                    strip.some::<BYTES, P, 5>(token, &panels, codes, &mut rooms, out)
                }
                _ if V::TOKENS >= 6 => {
                    strip.some::<BYTES, P, 6>(token, &panels, codes, &mut rooms, out)
                }
                len => unreachable!("{len} tokens in a block"),
            }
        }
    }
}

impl<V: Vectors> Strip<'_, V> {
    /// The product of `P` panels for `T` tokens.
    #[inline(always)]
    fn some<const BYTES: usize, const P: usize, const T: usize>(
        &self,
        token: usize,
        panels: &[Panel; P],
        codes: [&[[u8; BYTES]]; P],
        rooms: &mut [Near<P>; 3],
        out: &mut Panels,
    ) {
        let [zeros, near, edge] = rooms;
        // The last panel may have rows that are not among the result's.
        let whole = out.holds(self.panel + P);
        if !whole {
            let mut edge = Block::<P, T>::of(edge);
            for t in 0..T {
                for p in 0..P {
                    edge.put(t, p, out.read(token + t, self.panel + p));
                }
            }
        }
        let result = match whole {
            true => out.block(token, self.panel),
            false => Block::of(edge),
        };
        let places = [Block::of(zeros), Block::of(near), result];
        self.block::<BYTES, P, T>(token, panels, codes, places);
        if !whole {
            let edge = Block::<P, T>::of(edge);
            for t in 0..T {
                for p in 0..P {
                    out.write(token + t, self.panel + p, &edge.get(t, p));
                }
            }
        }
    }

    // Loops by index over arrays of registers: closures would be compiled without the vectors' features. Each stays
    // small enough to be unrolled, or the array would not stay in registers.
    #[inline(always)]
    fn block<const BYTES: usize, const P: usize, const T: usize>(
        &self,
        token: usize,
        panels: &[Panel; P],
        mut codes: [&[[u8; BYTES]]; P],
        mut places: [Block<'_, P, T>; 3],
    ) {
        let &Self {
            v,
            w,
            x,
            ref groups,
            ..
        } = self;
        let (per_group, in_row) = (x.group() / STEP, x.groups());
        let (all_a, all_scales, all_sums) = x.rows_from(token);
        let (all_a, _) = all_a.as_chunks::<STEP>();
        let stride = x.stride() / STEP;
        // What is looked up for every group is of the same length for all panels or tokens, so that one check will do.
        let first = groups.start * per_group;
        let steps = first..(groups.end * per_group).min(codes[0].len());
        for codes in &mut codes {
            *codes = &codes[steps.clone()];
        }
        let mut a = [&all_a[steps.clone()]; T];
        let mut scales = [&all_scales[groups.clone()]; T];
        let mut sums = [&all_sums[groups.clone()]; T];
        for t in 1..T {
            a[t] = &all_a[t * stride..][steps.clone()];
            scales[t] = &all_scales[t * in_row..][groups.clone()];
            sums[t] = &all_sums[t * in_row..][groups.clone()];
        }

        for group in 0..groups.len() {
            let left = groups.len() - 1 - group;
            if left < T {
                // The lines written at the end are far apart, each token's in a page of its own. Fetched earlier, or all
                // at once, they would get in the way of the codes.
                for p in 0..P {
                    v.prefetch_near(places[RESULT].at(left, p).cast());
                }
            }
            let steps = group * per_group..((group + 1) * per_group).min(a[0].len());
            // The next tokens', where a few instructions more do not count.
            if P > 1 {
                for t in T..2 * T {
                    let next = a[0].as_ptr().wrapping_add(t * stride + steps.start);
                    v.prefetch(next.cast());
                    v.prefetch(next.wrapping_add(2).cast());
                }
            }
            let weight_group = w.scheme.group_of((groups.start + group) * x.group());
            let mut now = [0; T];
            for t in 0..T {
                now[t] = sums[t][group];
            }
            let mut sum: [[V::Sum; T]; P] = starts(v, w, panels, weight_group, now);
            for step in steps {
                let mut codes_now = [&codes[0][step]; P];
                for p in 1..P {
                    codes_now[p] = &codes[p][step];
                }
                let mut a_now = [a[0][step].as_chunks::<4>().0; T];
                for t in 1..T {
                    a_now[t] = a[t][step].as_chunks::<4>().0;
                }
                // Written out, for the compiler does not always unroll a loop of this size.
                const { assert!(QUADS == 8) };
                dot_quad(v, codes_now, a_now, 0, &mut sum);
                dot_quad(v, codes_now, a_now, 1, &mut sum);
                dot_quad(v, codes_now, a_now, 2, &mut sum);
                dot_quad(v, codes_now, a_now, 3, &mut sum);
                dot_quad(v, codes_now, a_now, 4, &mut sum);
                dot_quad(v, codes_now, a_now, 5, &mut sum);
                dot_quad(v, codes_now, a_now, 6, &mut sum);
                dot_quad(v, codes_now, a_now, 7, &mut sum);
                carry(v, &mut sum);
            }
            let mut s_w = [v.zero(); P];
            for p in 0..P {
                s_w[p] = v.scales(panels[p].stored_scales(weight_group));
            }
            let from = match (group > 0, groups.start > 0) {
                (true, _) => NEAR,
                (_, true) => RESULT,
                _ => ZEROS,
            };
            let to = if left > 0 { NEAR } else { RESULT };
            for t in 0..T {
                let scale = scales[t][group];
                for p in 0..P {
                    let y = v.values(&places[from].get(t, p));
                    let y = v.add(y, s_w[p], scale, v.total(sum[p][t]));
                    places[to].put(t, p, v.rows(y));
                }
            }
        }
    }
}
