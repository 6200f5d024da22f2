//! Causal grouped-query attention over the keys and values of one sequence.

use crate::ModelConfig;
use crate::gemm::matmul_view;
use crate::math;
use faer::{MatMut, MatRef};
use rayon::prelude::*;

/// Queries per unit of work; the score matrix is never larger than this by the sequence length.
const QUERY_TILE: usize = 64;

/// One sequence's share of a batch.
pub(crate) struct Span<'a> {
    /// First row of the sequence in `q` and in the output.
    pub(crate) first: usize,
    /// New tokens.
    pub(crate) len: usize,
    /// Positions before them that are already in `keys` and `values`.
    pub(crate) past: usize,
    /// `K[past + len, kv_dim]`, rotated.
    pub(crate) keys: &'a [f32],
    /// `V[past + len, kv_dim]`.
    pub(crate) values: &'a [f32],
}

/// A query tile of one head of one sequence.
struct Tile {
    span: usize,
    head: usize,
    first: usize,
    len: usize,
}

/// `q[tokens, heads · head_dim]` (rotated) to the mixed values of the same shape. A token sees itself and
/// what came before it, at most `window` positions in all.
pub(crate) fn attend(
    config: &ModelConfig,
    q: &[f32],
    spans: &[Span<'_>],
    window: Option<usize>,
) -> Vec<f32> {
    let (q_dim, dim) = (config.q_dim(), config.head_dim);
    let mut tiles = Vec::new();
    for (span, s) in spans.iter().enumerate() {
        for first in (0..s.len).step_by(QUERY_TILE) {
            let len = QUERY_TILE.min(s.len - first);
            tiles.extend((0..config.num_heads).map(|head| Tile {
                span,
                head,
                first,
                len,
            }));
        }
    }
    let mixed: Vec<Vec<f32>> = tiles
        .par_iter()
        .map(|tile| attend_tile(config, q, &spans[tile.span], tile, window))
        .collect();
    let mut out = vec![0.0; q.len()];
    for (tile, values) in tiles.iter().zip(&mixed) {
        let first = spans[tile.span].first + tile.first;
        for (row, value) in values.chunks_exact(dim).enumerate() {
            let at = (first + row) * q_dim + tile.head * dim;
            out[at..at + dim].copy_from_slice(value);
        }
    }
    out
}

/// The mixed values of one tile, `[tile.len, head_dim]`.
fn attend_tile(
    config: &ModelConfig,
    q: &[f32],
    span: &Span<'_>,
    tile: &Tile,
    window: Option<usize>,
) -> Vec<f32> {
    let (dim, kv_dim) = (config.head_dim, config.kv_dim());
    let kv_offset = tile.head / (config.num_heads / config.num_kv_heads) * dim;
    let last = span.past + tile.first + tile.len;
    let oldest = |position: usize| window.map_or(0, |window| (position + 1).saturating_sub(window));
    let low = oldest(span.past + tile.first);
    let keys = last - low;
    let q_at = (span.first + tile.first) * config.q_dim() + tile.head * dim;
    let queries =
        MatRef::from_row_major_slice_with_stride(&q[q_at..], tile.len, dim, config.q_dim());

    let mut scores = vec![0.0; tile.len * keys];
    let k = MatRef::from_row_major_slice_with_stride(
        &span.keys[low * kv_dim + kv_offset..],
        keys,
        dim,
        kv_dim,
    );
    let scale = 1.0 / (dim as f32).sqrt();
    matmul_view(
        MatMut::from_row_major_slice_mut(&mut scores, tile.len, keys),
        queries,
        k.transpose(),
        scale,
    );
    for (row, scores) in scores.chunks_exact_mut(keys).enumerate() {
        let position = span.past + tile.first + row;
        softmax_between(scores, oldest(position) - low, position + 1 - low);
    }
    let mut out = vec![0.0; tile.len * dim];
    let v = MatRef::from_row_major_slice_with_stride(
        &span.values[low * kv_dim + kv_offset..],
        keys,
        dim,
        kv_dim,
    );
    let scores = MatRef::from_row_major_slice(&scores, tile.len, keys);
    matmul_view(
        MatMut::from_row_major_slice_mut(&mut out, tile.len, dim),
        scores,
        v,
        1.0,
    );
    out
}

/// Softmax of `scores[from..to]`; everything outside becomes zero.
fn softmax_between(scores: &mut [f32], from: usize, to: usize) {
    scores[..from].fill(0.0);
    scores[to..].fill(0.0);
    let seen = &mut scores[from..to];
    let max = math::max(seen);
    seen.iter_mut()
        .for_each(|score| *score = math::exp(*score - max));
    let scale = 1.0 / math::sum(seen, |score| score);
    seen.iter_mut().for_each(|score| *score *= scale);
}
