//! Softmax attention of some queries over pages of keys and values, with nothing kept but the running result.
//!
//! Definition, for one query: positions are cut into splits of [`SPLIT`], counted from 0, and a split into pages of
//! [`PAGE`](crate::kv_cache::PAGE). Over the pages of a split, in order, runs an online softmax (Milakov and Gimelshein,
//! arXiv 1805.02867; Dao et al., FlashAttention, arXiv 2205.14135, Algorithm 1): with `s` the scores of a page, each a
//! chain of FMAs over the channels in order,
//!
//! ```text
//! m' = max(m, max s);  c = exp(m − m') (1 if m' = m);  p = exp(s − m'), 0 where s = −∞: where the query must not look
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

/// Elements of the depth of a product that are multiplied at a time.
const STEP: usize = 8;

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

    /// Adds what a later split found.
    pub(crate) fn merge(&mut self, isa: Isa, later: &Self) {
        isa.run(Merge { into: self, later });
    }

    /// The results of neighbouring queries from `query` on, `dim` channels each, as many as `out` has room for.
    pub(crate) fn write(&self, isa: Isa, query: usize, dim: usize, out: &mut [f32]) {
        isa.run(Write {
            state: self,
            query,
            dim,
            out,
        });
    }
}

/// The state of some queries after the given splits of one head of a cache.
pub(crate) fn attend(
    isa: Isa,
    queries: &Queries<'_>,
    cache: &BlockCache,
    head: usize,
    splits: Range<usize>,
) -> State {
    let first = queries.seen.iter().map(|seen| seen.start).min();
    let last = queries.seen.iter().map(|seen| seen.end).max();
    let (first, last) = (first.unwrap_or(0), last.unwrap_or(0));
    let mut scores = vec![0.0; queries.seen.len() * PAGE];
    let mut result: Option<State> = None;
    for split in splits {
        let positions = (split * SPLIT).max(first)..((split + 1) * SPLIT).min(last);
        if positions.is_empty() {
            continue;
        }
        let mut state = State::new(queries.seen.len(), cache.shape().value_width());
        for page in positions.start / PAGE..positions.end.div_ceil(PAGE) {
            let (keys, values) = cache.page(page, head);
            let page = Page {
                queries,
                start: page * PAGE,
                keys,
                values,
            };
            page.visit(isa, &mut state, &mut scores);
        }
        match &mut result {
            None => result = Some(state),
            Some(result) => result.merge(isa, &state),
        }
    }
    result.unwrap_or_else(|| State::new(queries.seen.len(), cache.shape().value_width()))
}

/// One page, and who looks at it.
#[derive(Clone, Copy)]
struct Page<'a> {
    queries: &'a Queries<'a>,
    /// Its first position.
    start: usize,
    keys: &'a [f32],
    values: &'a [f32],
}

impl Page<'_> {
    /// Carries the state over this page; `scores` is room for those of all queries.
    fn visit(self, isa: Isa, state: &mut State, scores: &mut [f32]) {
        // Apart, so that each has the registers for itself.
        if isa.level() >= Level::Avx512 {
            isa.run(Scores::<32>(self, scores));
            isa.run(Softmax(self, scores, state));
            isa.run(Mix::<32>(self, scores, &mut state.mixed));
        } else {
            isa.run(Scores::<16>(self, scores));
            isa.run(Softmax(self, scores, state));
            isa.run(Mix::<16>(self, scores, &mut state.mixed));
        }
    }

    /// The positions of this page that are among some.
    fn seen(self, positions: &Range<usize>) -> Range<usize> {
        let in_page = |position: usize| position.saturating_sub(self.start).min(PAGE);
        in_page(positions.start)..in_page(positions.end)
    }

    /// The queries in blocks of [`QUERIES`]: the first, how many, and how many keys are not behind what all of them see.
    fn blocks(self) -> impl Iterator<Item = (usize, usize, usize)> {
        let blocks = self.queries.seen.chunks(QUERIES).enumerate();
        blocks.map(move |(block, seen)| {
            let used = seen.iter().map(|seen| self.seen(seen).end).max();
            (block * QUERIES, seen.len(), used.unwrap_or(0))
        })
    }

    fn head_dim(self) -> usize {
        self.keys.len() / PAGE
    }

    fn value_width(self) -> usize {
        self.values.len() / PAGE
    }
}

/// The scores of a page, whole lanes of them for each block of queries, with `WIDTH` in registers.
struct Scores<'a, const WIDTH: usize>(Page<'a>, &'a mut [f32]);

impl<const WIDTH: usize> Vectorized for Scores<'_, WIDTH> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self(page, scores) = self;
        let dim = page.head_dim();
        for (first, count, used) in page.blocks() {
            let q = Factor {
                values: &page.queries.q[first * dim..],
                stride: dim,
                depth: dim,
            };
            let scores = &mut scores[first * PAGE..][..count * PAGE];
            let columns = used.next_multiple_of(LANES);
            product::<WIDTH, true>(q, page.keys, PAGE, columns, scores);
        }
    }
}

/// The step of the online softmax from scores to probabilities.
struct Softmax<'a>(Page<'a>, &'a mut [f32], &'a mut State);

impl Vectorized for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self(page, scores, state) = self;
        let width = page.value_width();
        for (first, count, used) in page.blocks() {
            for query in first..first + count {
                softmax_step(
                    &mut scores[query * PAGE..][..used.next_multiple_of(LANES)],
                    page.seen(&page.queries.seen[query]),
                    &mut state.max[query],
                    &mut state.sum[query],
                    &mut state.mixed[query * width..][..width],
                );
            }
        }
    }
}

/// The sum of the values by their probabilities, added to what was mixed before, with `WIDTH` channels in registers.
struct Mix<'a, const WIDTH: usize>(Page<'a>, &'a [f32], &'a mut [f32]);

impl<const WIDTH: usize> Vectorized for Mix<'_, WIDTH> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self(page, probabilities, mixed) = self;
        let width = page.value_width();
        for (first, count, used) in page.blocks() {
            // Those of keys behind `used` are 0.
            let probabilities = Factor {
                values: &probabilities[first * PAGE..],
                stride: PAGE,
                depth: used,
            };
            let mixed = &mut mixed[first * width..][..count * width];
            product::<WIDTH, false>(probabilities, page.values, width, width, mixed);
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
    if seen != (0..scores.len()) {
        scores[..seen.start].fill(f32::NEG_INFINITY);
        scores[seen.end..].fill(f32::NEG_INFINITY);
    }
    // A NaN is passed over here, but its exponential is not.
    let page = math::max(scores);
    let new = if page > *max { page } else { *max };
    if new > *max {
        let correction = math::exp(*max - new);
        sum.iter_mut().for_each(|sum| *sum *= correction);
        mixed.iter_mut().for_each(|mixed| *mixed *= correction);
        *max = new;
    }
    let mut added = [0f32; LANES];
    for lanes in scores.as_chunks_mut::<LANES>().0 {
        for (added, score) in added.iter_mut().zip(lanes) {
            let p = math::exp(*score - new);
            *score = if *score == f32::NEG_INFINITY { 0.0 } else { p };
            *added += *score;
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

/// `c += a · b`, or `c = a · b` where `NEW`, for at most [`QUERIES`] rows, of which only the first `columns` columns are
/// computed. Each element is a chain of FMAs over the depth, in order. `b` and `c` have rows of `stride`; it and `columns`
/// are multiples of 16.
#[inline(always)]
fn product<const WIDTH: usize, const NEW: bool>(
    a: Factor<'_>,
    b: &[f32],
    stride: usize,
    columns: usize,
    c: &mut [f32],
) {
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
    let mut sums = [[0f32; WIDTH]; ROWS];
    if !NEW {
        for (row, sums) in sums.iter_mut().enumerate() {
            sums.copy_from_slice(&c[row * stride..][..WIDTH]);
        }
    }
    // A step at a time, so that bounds are checked once for each.
    let steps = a.depth / STEP;
    for step in 0..steps {
        let mut now = [&[0f32; STEP]; ROWS];
        for (row, now) in now.iter_mut().enumerate() {
            let a = &a.values[row * a.stride + step * STEP..][..STEP];
            *now = a.try_into().expect("of this length");
        }
        let b = &b[step * STEP * stride..][..(STEP - 1) * stride + WIDTH];
        for at in 0..STEP {
            let b: &[f32; WIDTH] = b[at * stride..][..WIDTH].try_into().expect("of this width");
            for (sums, a) in sums.iter_mut().zip(now) {
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = a[at].mul_add(*b, *sum);
                }
            }
        }
    }
    for at in steps * STEP..a.depth {
        let b: &[f32; WIDTH] = b[at * stride..][..WIDTH].try_into().expect("of this width");
        for (row, sums) in sums.iter_mut().enumerate() {
            let a = a.values[row * a.stride + at];
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = a.mul_add(*b, *sum);
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

struct Write<'a> {
    state: &'a State,
    query: usize,
    dim: usize,
    out: &'a mut [f32],
}

impl Vectorized for Write<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let State { max, sum, mixed } = self.state;
        let width = mixed.len() / max.len();
        for (number, out) in self.out.chunks_exact_mut(self.dim).enumerate() {
            let query = self.query + number;
            let scale = 1.0 / sum[query].iter().sum::<f32>();
            for (out, mixed) in out.iter_mut().zip(&mixed[query * width..]) {
                *out = mixed * scale;
            }
        }
    }
}
