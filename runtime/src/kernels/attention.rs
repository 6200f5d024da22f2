//! Softmax attention of some queries over pages of keys and values, with nothing kept but the running result.
//!
//! Definition, for one query: positions are cut into splits of [`SPLIT`], counted from 0, and a split into pages of
//! [`PAGE`](crate::kv_cache::PAGE). Over the pages of a split, in order, runs an online softmax (Milakov and Gimelshein,
//! arXiv 1805.02867; Dao et al., FlashAttention, arXiv 2205.14135, Algorithm 1): with `s` the scores of a page, each a
//! chain of FMAs over the channels in order,
//!
//! ```text
//! m' = max(m, max s);  c = exp(m − m') (1 if m' = m);  p = exp(s − m'), 0 where the query must not look
//! l = l·c + Σp in 16 lanes, p_j in lane j mod 16, j in order;  acc = fma(p_j, v_j, acc·c), j in order
//! ```
//!
//! Splits are merged in order in the same way; the lanes of `l` are added, in order, only at the end. Nothing of this depends on which queries are computed together, so a
//! result has the same bits for every batch, thread count and instruction set. Pages in which a query sees nothing do
//! not change its state, so it does not matter whether they are visited.

use super::isa::{Isa, Level, Vectorized};
use crate::kv_cache::{BlockCache, PAGE};
use crate::math;
use std::ops::Range;

/// Positions that are one unit of parallel work when there are few queries.
pub(crate) const SPLIT: usize = 8 * PAGE;

/// Queries whose sums are in registers at once: with 2 vectors each, 12 of the 16 registers of AVX2, and enough
/// independent sums for every machine.
const QUERIES: usize = 6;

/// Lanes of a sum of probabilities.
const LANES: usize = 16;

/// Some queries that look at the same key-value head.
pub(crate) struct Queries<'a> {
    /// `[queries, head_dim]`, rotated, multiplied by `1/√head_dim`.
    pub(crate) q: &'a [f32],
    /// Positions that each query sees.
    pub(crate) seen: &'a [Range<usize>],
}

/// The state of the online softmax of some queries.
#[derive(Clone, Debug)]
pub(crate) struct State {
    /// Largest score so far; −∞ before the first.
    max: Vec<f32>,
    /// Sum of `exp(score − max)`, in lanes.
    sum: Vec<[f32; LANES]>,
    /// Sum of `exp(score − max) · value`, `[queries, value_width]`.
    mixed: Vec<f32>,
}

impl State {
    pub(crate) fn new(queries: usize, value_width: usize) -> Self {
        Self {
            max: vec![f32::NEG_INFINITY; queries],
            sum: vec![[0.0; LANES]; queries],
            mixed: vec![0.0; queries * value_width],
        }
    }

    fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill([0.0; LANES]);
        self.mixed.fill(0.0);
    }

    /// Adds what a later split found.
    pub(crate) fn merge(&mut self, isa: Isa, later: &Self) {
        isa.run(Merge { into: self, later });
    }

    /// The result of query `query`, as many channels as `out` has.
    pub(crate) fn write(&self, query: usize, out: &mut [f32]) {
        let width = self.mixed.len() / self.max.len();
        let scale = 1.0 / self.sum[query].iter().sum::<f32>();
        for (out, mixed) in out.iter_mut().zip(&self.mixed[query * width..]) {
            *out = mixed * scale;
        }
    }
}

/// Buffers of [`attend`].
pub(crate) struct Scratch {
    split: State,
    scores: Vec<f32>,
}

impl Scratch {
    pub(crate) fn new(queries: usize, value_width: usize) -> Self {
        Self {
            split: State::new(queries, value_width),
            scores: vec![0.0; queries * PAGE],
        }
    }
}

/// Carries `state` over the given splits of one head of a cache.
pub(crate) fn attend(
    isa: Isa,
    queries: &Queries<'_>,
    cache: &BlockCache,
    head: usize,
    splits: Range<usize>,
    state: &mut State,
    scratch: &mut Scratch,
) {
    let first = queries.seen.iter().map(|seen| seen.start).min();
    let last = queries.seen.iter().map(|seen| seen.end).max();
    let (first, last) = (first.unwrap_or(0), last.unwrap_or(0));
    for split in splits {
        let positions = (split * SPLIT).max(first)..((split + 1) * SPLIT).min(last);
        if positions.is_empty() {
            continue;
        }
        scratch.split.clear();
        let work = Pages {
            queries,
            cache,
            head,
            pages: positions.start / PAGE..positions.end.div_ceil(PAGE),
            state: &mut scratch.split,
            scores: &mut scratch.scores,
        };
        if isa.level() >= Level::Avx512 {
            isa.run(Wide::<32>(work));
        } else {
            isa.run(Wide::<16>(work));
        }
        state.merge(isa, &scratch.split);
    }
}

/// Pages of one split.
struct Pages<'a> {
    queries: &'a Queries<'a>,
    cache: &'a BlockCache,
    head: usize,
    pages: Range<usize>,
    state: &'a mut State,
    scores: &'a mut [f32],
}

/// The same with `WIDTH` columns of a product in registers.
struct Wide<'a, const WIDTH: usize>(Pages<'a>);

impl<const WIDTH: usize> Vectorized for Wide<'_, WIDTH> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Pages {
            queries,
            cache,
            head,
            pages,
            state,
            scores,
        } = self.0;
        let dim = cache.shape().head_dim;
        let width = cache.shape().value_width();
        for page in pages {
            let (keys, values) = cache.page(page, head);
            let in_page = |position: usize| position.saturating_sub(page * PAGE).min(PAGE);
            let ends = queries.seen.iter().map(|seen| in_page(seen.end));
            // The keys beyond `used` have probability 0 for all queries, and the scores beyond `scored` no reader.
            let used = ends.max().unwrap_or(0);
            let scored = used.next_multiple_of(LANES);
            let q = Factor {
                values: queries.q,
                stride: dim,
                depth: dim,
            };
            product::<WIDTH, true>(q, keys, PAGE, scored, scores);
            let rows = scores.chunks_exact_mut(PAGE).zip(queries.seen);
            for (query, (scores, seen)) in rows.enumerate() {
                softmax_step(
                    &mut scores[..scored],
                    in_page(seen.start)..in_page(seen.end),
                    &mut state.max[query],
                    &mut state.sum[query],
                    &mut state.mixed[query * width..][..width],
                );
            }
            let probabilities = Factor {
                values: scores,
                stride: PAGE,
                depth: used,
            };
            product::<WIDTH, false>(probabilities, values, width, width, &mut state.mixed);
        }
    }
}

/// Turns the scores of one query and page, whole lanes, into probabilities relative to the new maximum, and rescales
/// what was there.
#[inline(always)]
fn softmax_step(
    scores: &mut [f32],
    seen: Range<usize>,
    max: &mut f32,
    sum: &mut [f32; LANES],
    mixed: &mut [f32],
) {
    let partly = seen != (0..scores.len());
    let blank = |scores: &mut [f32], value: f32| {
        if partly {
            scores[..seen.start].fill(value);
            scores[seen.end..].fill(value);
        }
    };
    blank(scores, f32::NEG_INFINITY);
    // A NaN is passed over here, but its exponential is not.
    let page = math::max(scores);
    let new = if page > *max { page } else { *max };
    for score in scores.iter_mut() {
        *score = math::exp(*score - new);
    }
    blank(scores, 0.0);
    if new > *max {
        let correction = math::exp(*max - new);
        sum.iter_mut().for_each(|sum| *sum *= correction);
        mixed.iter_mut().for_each(|mixed| *mixed *= correction);
        *max = new;
    }
    let mut added = [0f32; LANES];
    for lanes in scores.as_chunks::<LANES>().0 {
        for (added, p) in added.iter_mut().zip(lanes) {
            *added += p;
        }
    }
    for (sum, added) in sum.iter_mut().zip(added) {
        *sum += added;
    }
}

/// The left factor of a product: rows of `depth` elements that follow each other at `stride`.
#[derive(Clone, Copy)]
struct Factor<'a> {
    values: &'a [f32],
    stride: usize,
    depth: usize,
}

/// `c += a · b`, or `c = a · b` where `NEW`, of which only the first `columns` columns are computed. Each element is a
/// chain of FMAs over the depth, in order. `b` and `c` have rows of `stride`; it and `columns` are multiples of 16.
#[inline(always)]
fn product<const WIDTH: usize, const NEW: bool>(
    a: Factor<'_>,
    b: &[f32],
    stride: usize,
    columns: usize,
    c: &mut [f32],
) {
    for (number, c) in c.chunks_mut(QUERIES * stride).enumerate() {
        let a = Factor {
            values: &a.values[number * QUERIES * a.stride..],
            ..a
        };
        // Fewer rows in registers only where no more are left.
        match c.len() / stride {
            1 => rows_product::<1, WIDTH, NEW>(a, b, stride, columns, c),
            2 => rows_product::<2, WIDTH, NEW>(a, b, stride, columns, c),
            3 => rows_product::<3, WIDTH, NEW>(a, b, stride, columns, c),
            4 => rows_product::<4, WIDTH, NEW>(a, b, stride, columns, c),
            5 => rows_product::<5, WIDTH, NEW>(a, b, stride, columns, c),
            _ => rows_product::<QUERIES, WIDTH, NEW>(a, b, stride, columns, c),
        }
    }
}

#[inline(always)]
fn rows_product<const ROWS: usize, const WIDTH: usize, const NEW: bool>(
    a: Factor<'_>,
    b: &[f32],
    stride: usize,
    columns: usize,
    c: &mut [f32],
) {
    let mut column = 0;
    while column + WIDTH <= columns {
        tile::<ROWS, WIDTH, NEW>(a, &b[column..], stride, &mut c[column..]);
        column += WIDTH;
    }
    if column < columns {
        tile::<ROWS, 16, NEW>(a, &b[column..], stride, &mut c[column..]);
    }
}

#[inline(always)]
fn tile<const ROWS: usize, const WIDTH: usize, const NEW: bool>(
    a: Factor<'_>,
    b: &[f32],
    stride: usize,
    c: &mut [f32],
) {
    let rows: [&[f32]; ROWS] = std::array::from_fn(|row| &a.values[row * a.stride..][..a.depth]);
    let mut sums = [[0f32; WIDTH]; ROWS];
    if !NEW {
        for (row, sums) in sums.iter_mut().enumerate() {
            sums.copy_from_slice(&c[row * stride..][..WIDTH]);
        }
    }
    for at in 0..a.depth {
        let b: &[f32; WIDTH] = b[at * stride..][..WIDTH].try_into().expect("of this width");
        for (sums, a) in sums.iter_mut().zip(rows) {
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = a[at].mul_add(*b, *sum);
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        c[row * stride..][..WIDTH].copy_from_slice(sums);
    }
}

struct Merge<'a> {
    into: &'a mut State,
    later: &'a State,
}

impl Vectorized for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { into, later } = self;
        let width = into.mixed.len() / into.max.len();
        for query in 0..into.max.len() {
            let (old, new) = (into.max[query], later.max[query]);
            let max = if new > old { new } else { old };
            // The side with the larger maximum, and with it a first or an empty split, is taken as it is.
            let weight = |side: f32| {
                if side == max {
                    1.0
                } else {
                    math::exp(side - max)
                }
            };
            let (a, b) = (weight(old), weight(new));
            into.max[query] = max;
            for (sum, later) in into.sum[query].iter_mut().zip(&later.sum[query]) {
                *sum = later.mul_add(b, *sum * a);
            }
            let mixed = into.mixed[query * width..][..width].iter_mut();
            for (mixed, later) in mixed.zip(&later.mixed[query * width..]) {
                *mixed = later.mul_add(b, *mixed * a);
            }
        }
    }
}
