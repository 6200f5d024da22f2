//! Softmax attention of some queries over pages of keys and values, with nothing kept but the running result.
//!
//! Definition, for one query: positions are cut into splits of [`SPLIT`], counted from 0, and a split into pages of
//! [`PAGE`](crate::kv_cache::PAGE). Over the pages of a split, in order, runs an online softmax (Milakov and Gimelshein,
//! arXiv 1805.02867; Dao et al., FlashAttention, arXiv 2205.14135, Algorithm 1): with `s` the scores of a page,
//! sums over the channels,
//!
//! ```text
//! m' = max(m, max s);  c = exp(m − m') (1 if m' = m);  p = exp(s − m'), 0 where s < m' − 38, or s = −∞: where the query must not look
//! l = l·c + Σp in 16 lanes, p_j in lane j mod 16, j in order;  acc = acc·c + Σ p_j v_j
//! ```
//!
//! in which `product` says in what order sums over channels and positions are taken. `acc·c` below 2⁻¹⁰⁰ is 0. Where the cache
//! holds bf16, `q`, `k`, `p` and `v` are rounded to it and sums stay in f32; what was said of multiples of 2⁻¹²⁶ in
//! [`bf16`](super::bf16) then holds for `acc`, too. Splits are merged in order in the same way; the
//! lanes of `l` are added, in order, only at the end. Nothing of this depends on which queries are computed together, so a
//! result has the same bits for every batch, thread count and instruction set. Pages in which a query sees nothing do
//! not change its state, so it does not matter whether they are visited.

mod product;

use super::bf16;
use super::isa::{Isa, Vectorized};
use crate::kv_cache::{BlockCache, KvDtype, PAGE};
use crate::math;
use product::{Factor, Product, Shapes, rows_at_once};
use std::ops::Range;

/// Positions that are one unit of parallel work when there are few queries.
pub(crate) const SPLIT: usize = 8 * PAGE;

/// Lanes of a sum of probabilities.
const LANES: usize = 16;

/// How far below the maximum a score counts: `exp(−38)` is above 2⁻⁵⁶, so that a probability is 0 or can be a term of bf16.
const FARTHEST: f32 = 38.0;

/// What is smaller of a sum that was scaled counts as zero: 2⁻¹⁰⁰.
const SMALLEST: f32 = f32::from_bits((127 - 100) << 23);

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
    let shape = cache.shape();
    let count = queries.seen.len();
    let mut q = vec![0; count * shape.key_words()];
    isa.run(QueryWords {
        q: queries.q,
        dim: shape.head_dim,
        dtype: shape.dtype,
        out: &mut q,
    });
    let mut room = Room {
        scores: vec![0.0; count * PAGE],
        probabilities: vec![0; count * PAGE / shape.dtype.per_word()],
        shapes: Shapes::default(),
    };
    let mut result: Option<State> = None;
    for split in splits {
        let positions = (split * SPLIT).max(first)..((split + 1) * SPLIT).min(last);
        if positions.is_empty() {
            continue;
        }
        let mut state = State::new(count, shape.value_width());
        for page in positions.start / PAGE..positions.end.div_ceil(PAGE) {
            let (keys, values) = cache.page(page, head);
            let page = Page {
                q: &q,
                seen: queries.seen,
                dtype: shape.dtype,
                start: page * PAGE,
                keys,
                values,
            };
            page.visit(isa, &mut state, &mut room);
        }
        match &mut result {
            None => result = Some(state),
            Some(result) => result.merge(isa, &state),
        }
    }
    result.unwrap_or_else(|| State::new(count, shape.value_width()))
}

/// Makes words of queries: of bf16, channel `c` beside channel `c + key words`, as keys have them.
struct QueryWords<'a> {
    q: &'a [f32],
    dim: usize,
    dtype: KvDtype,
    out: &'a mut [u32],
}

impl Vectorized for QueryWords<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let width = self.dim.div_ceil(self.dtype.per_word());
        let queries = self.q.chunks_exact(self.dim);
        for (q, out) in queries.zip(self.out.chunks_exact_mut(width)) {
            match self.dtype {
                KvDtype::F32 => {
                    for (word, q) in out.iter_mut().zip(q) {
                        *word = q.to_bits();
                    }
                }
                KvDtype::Bf16 => {
                    let (early, late) = q.split_at(width);
                    // An odd number of channels has one without a second.
                    for (word, early) in out.iter_mut().zip(early) {
                        *word = bf16::pair(*early, 0.0);
                    }
                    for (word, late) in out.iter_mut().zip(late) {
                        *word |= bf16::pair(0.0, *late);
                    }
                }
            }
        }
    }
}

/// What a page makes of all queries.
struct Room {
    /// `[queries, PAGE]`.
    scores: Vec<f32>,
    /// `[queries, position words of a page]`.
    probabilities: Vec<u32>,
    shapes: Shapes,
}

/// One page, and who looks at it.
#[derive(Clone, Copy)]
struct Page<'a> {
    /// `[queries, key words]`.
    q: &'a [u32],
    /// Positions that each query sees.
    seen: &'a [Range<usize>],
    dtype: KvDtype,
    /// Its first position.
    start: usize,
    keys: &'a [u32],
    values: &'a [u32],
}

/// Neighbouring queries of a page.
struct Block {
    first: usize,
    count: usize,
    /// Keys that are not behind what all of them see.
    used: usize,
}

impl Page<'_> {
    /// Carries the state over this page.
    fn visit(self, isa: Isa, state: &mut State, room: &mut Room) {
        let Room {
            scores,
            probabilities,
            shapes,
        } = room;
        // Apart, so that each has the registers for itself.
        for block in self.blocks(isa) {
            self.score(isa, &block, scores, shapes);
        }
        match self.dtype {
            KvDtype::F32 => isa.run(Softmax::<1>(self, isa, scores, probabilities, state)),
            KvDtype::Bf16 => isa.run(Softmax::<2>(self, isa, scores, probabilities, state)),
        }
        for block in self.blocks(isa) {
            self.mix(isa, &block, probabilities, &mut state.mixed, shapes);
        }
    }

    /// The scores of a block, whole lanes of them.
    fn score(self, isa: Isa, block: &Block, scores: &mut [f32], shapes: &mut Shapes) {
        let key_words = self.keys.len() / PAGE;
        let product = Product {
            a: Factor {
                words: &self.q[block.first * key_words..],
                stride: key_words,
                depth: key_words,
            },
            b: self.keys,
            c: &mut scores[block.first * PAGE..][..block.count * PAGE],
            stride: PAGE,
            columns: block.used.next_multiple_of(LANES),
            replace: true,
        };
        product.run(isa, self.dtype, shapes);
    }

    /// Adds the sums of the values by a block's probabilities to what was mixed before.
    fn mix(
        self,
        isa: Isa,
        block: &Block,
        probabilities: &[u32],
        mixed: &mut [f32],
        shapes: &mut Shapes,
    ) {
        let (position_words, width) = (self.position_words(), self.value_width());
        let product = Product {
            // Those of keys behind `used` are 0.
            a: Factor {
                words: &probabilities[block.first * position_words..],
                stride: position_words,
                depth: self.dtype.position_words(block.used),
            },
            b: self.values,
            c: &mut mixed[block.first * width..][..block.count * width],
            stride: width,
            columns: width,
            replace: false,
        };
        product.run(isa, self.dtype, shapes);
    }

    /// The positions of this page that are among some.
    fn seen(self, positions: &Range<usize>) -> Range<usize> {
        let in_page = |position: usize| position.saturating_sub(self.start).min(PAGE);
        in_page(positions.start)..in_page(positions.end)
    }

    /// The queries in blocks whose products are computed together.
    fn blocks(self, isa: Isa) -> impl Iterator<Item = Block> {
        let rows = rows_at_once(isa, self.dtype, self.seen.len());
        let blocks = self.seen.chunks(rows).enumerate();
        blocks.map(move |(block, seen)| {
            let used = seen.iter().map(|seen| self.seen(seen).end).max();
            Block {
                first: block * rows,
                count: seen.len(),
                used: used.unwrap_or(0),
            }
        })
    }

    /// Words of a query's probabilities.
    fn position_words(self) -> usize {
        PAGE / self.dtype.per_word()
    }

    fn value_width(self) -> usize {
        self.values.len() / self.position_words()
    }
}

/// The step of the online softmax from scores to words of `TERMS` probabilities.
struct Softmax<'a, const TERMS: usize>(Page<'a>, Isa, &'a mut [f32], &'a mut [u32], &'a mut State);

impl<const TERMS: usize> Vectorized for Softmax<'_, TERMS> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self(page, isa, scores, probabilities, state) = self;
        let (words, width) = (page.position_words(), page.value_width());
        for block in page.blocks(isa) {
            // Whole words of scores, of which those beyond the last lanes computed are not seen.
            let used = block.used.next_multiple_of(TERMS * LANES);
            for query in block.first..block.first + block.count {
                softmax_step::<TERMS>(
                    &mut scores[query * PAGE..][..used],
                    page.seen(&page.seen[query]),
                    &mut probabilities[query * words..][..used / TERMS],
                    &mut state.max[query],
                    &mut state.sum[query],
                    &mut state.mixed[query * width..][..width],
                );
            }
        }
    }
}

/// Turns the scores of one query and page into probabilities relative to the new maximum, and rescales what was there.
#[inline(always)]
fn softmax_step<const TERMS: usize>(
    scores: &mut [f32],
    seen: Range<usize>,
    probabilities: &mut [u32],
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
    if new > *max && *max > f32::NEG_INFINITY {
        let correction = math::exp(*max - new);
        sum.iter_mut().for_each(|sum| *sum *= correction);
        for mixed in mixed {
            let scaled = *mixed * correction;
            *mixed = if scaled.abs() < SMALLEST { 0.0 } else { scaled };
        }
    }
    *max = new;
    // Finite, so that it is above the −∞ of what is not seen even where nothing was seen before.
    let least = (new - FARTHEST).max(f32::MIN);
    let mut added = [0f32; LANES];
    let words = probabilities.as_chunks_mut::<LANES>().0;
    for (words, scores) in words.iter_mut().zip(scores.chunks_exact(TERMS * LANES)) {
        let mut now = [0; LANES];
        for term in 0..TERMS {
            for lane in 0..LANES {
                let score = scores[term * LANES + lane];
                let p = math::exp(score - new);
                let p = if score < least { 0.0 } else { p };
                let bits = match TERMS {
                    1 => p.to_bits(),
                    _ => bf16::round_normal(p),
                };
                added[lane] += f32::from_bits(bits);
                now[lane] |= bits >> (16 * term);
            }
        }
        *words = now;
    }
    for (sum, added) in sum.iter_mut().zip(added) {
        *sum += added;
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
