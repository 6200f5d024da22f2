//! Causal grouped-query attention: which queries and which splits of which cache form one unit of work.

use crate::kernels::attention::{Queries, SPLIT, Scratch, State, attend as attend_splits};
use crate::kv_cache::BlockCache;
use crate::{Cpu, ModelConfig};
use std::ops::Range;

/// Queries of a unit of work, all heads that share a key-value head counted: enough to read keys and values from
/// the second-level cache rarely.
const TILE_QUERIES: usize = 48;

/// One sequence's share of a batch.
pub(crate) struct Span<'a> {
    /// First row of the sequence in the batch.
    pub(crate) first: usize,
    /// New tokens.
    pub(crate) len: usize,
    /// Positions before them.
    pub(crate) past: usize,
    /// Keys (rotated) and values of all `past + len` positions.
    pub(crate) cache: &'a BlockCache,
}

/// Consecutive tokens of one sequence.
struct Tile<'a> {
    span: &'a Span<'a>,
    /// Rows of the batch.
    rows: Range<usize>,
}

impl Tile<'_> {
    /// Positions up to the last query's own.
    fn end(&self) -> usize {
        self.span.past + self.rows.end - self.span.first
    }

    fn splits(&self) -> usize {
        self.end().div_ceil(SPLIT)
    }
}

/// Everything that a unit of work reads.
struct Attention<'a> {
    cpu: &'a Cpu,
    config: &'a ModelConfig,
    /// Rotated queries, the first `q_dim` of each row of `stride`.
    q: &'a [f32],
    stride: usize,
    window: Option<usize>,
    tiles: Vec<Tile<'a>>,
}

/// Rotated queries (the first `q_dim` elements of each row of `q[tokens, stride]`) to the mixed values
/// `[tokens, q_dim]`. A token sees itself and what came before it, at most `window` positions in all.
pub(crate) fn attend(
    cpu: &Cpu,
    config: &ModelConfig,
    (q, stride): (&[f32], usize),
    spans: &[Span<'_>],
    window: Option<usize>,
) -> Vec<f32> {
    let group = config.num_heads / config.num_kv_heads;
    let tile_tokens = (TILE_QUERIES / group).max(1);
    let mut tiles = Vec::new();
    for span in spans {
        let end = span.first + span.len;
        tiles.extend((span.first..end).step_by(tile_tokens).map(|first| Tile {
            span,
            rows: first..(first + tile_tokens).min(end),
        }));
    }
    let work = Attention {
        cpu,
        config,
        q,
        stride,
        window,
        tiles,
    };
    work.run()
}

impl Attention<'_> {
    fn run(&self) -> Vec<f32> {
        let heads = self.config.num_kv_heads;
        let group_dim = self.config.q_dim() / heads;
        let rows: Vec<_> = self.tiles.iter().map(|tile| tile.rows.clone()).collect();
        let columns: Vec<_> = (0..heads)
            .map(|head| head * group_dim..(head + 1) * group_dim)
            .collect();
        // Few queries over many positions: the splits are shared out as well.
        let few = self.tiles.len() * heads < 2 * self.cpu.pool.threads();
        let parts = if few { self.split_states() } else { Vec::new() };
        let mut out = vec![0.0; self.q.len() / self.stride * self.config.q_dim()];
        let stride = self.config.q_dim();
        self.cpu
            .pool
            .grid(&mut out, stride, &rows, &columns, |tile, head, mut out| {
                let state = match few {
                    true => self.merged(tile, head, &parts),
                    false => self.state(tile, head, 0..self.tiles[tile].splits()),
                };
                let dim = self.config.head_dim;
                for token in 0..out.rows() {
                    for (at, out) in out.row(token).chunks_exact_mut(dim).enumerate() {
                        state.write(token * (group_dim / dim) + at, out);
                    }
                }
            });
        out
    }

    /// The states of single splits with what they belong to, in order.
    fn split_states(&self) -> Vec<(usize, usize, State)> {
        let mut units = Vec::new();
        for (number, tile) in self.tiles.iter().enumerate() {
            for head in 0..self.config.num_kv_heads {
                units.extend((0..tile.splits()).map(|split| (number, head, split)));
            }
        }
        let states = self.cpu.pool.map(units.len(), |unit| {
            let (tile, head, split) = units[unit];
            self.state(tile, head, split..split + 1)
        });
        let units = units.into_iter().zip(states);
        units
            .map(|((tile, head, _), state)| (tile, head, state))
            .collect()
    }

    fn merged(&self, tile: usize, head: usize, parts: &[(usize, usize, State)]) -> State {
        let mut mine = parts
            .iter()
            .filter(|part| (part.0, part.1) == (tile, head))
            .map(|part| &part.2);
        let mut state = mine.next().expect("a query sees itself").clone();
        mine.for_each(|part| state.merge(self.cpu.isa, part));
        state
    }

    /// The state of a tile's queries of one key-value head after these splits.
    fn state(&self, tile: usize, head: usize, splits: Range<usize>) -> State {
        let tile = &self.tiles[tile];
        let (dim, heads) = (self.config.head_dim, self.config.num_kv_heads);
        let group_dim = self.config.q_dim() / heads;
        let scale = 1.0 / (dim as f32).sqrt();
        let mut q = Vec::with_capacity(tile.rows.len() * group_dim);
        let mut seen = Vec::with_capacity(q.capacity() / dim);
        for row in tile.rows.clone() {
            let queries = &self.q[row * self.stride + head * group_dim..][..group_dim];
            q.extend(queries.iter().map(|q| q * scale));
            let end = tile.span.past + row - tile.span.first + 1;
            let start = self.window.map_or(0, |window| end.saturating_sub(window));
            seen.extend((0..group_dim / dim).map(|_| start..end));
        }
        let width = tile.span.cache.shape().value_width();
        let mut state = State::new(seen.len(), width);
        let mut scratch = Scratch::new(seen.len(), width);
        let queries = Queries { q: &q, seen: &seen };
        let cache = tile.span.cache;
        attend_splits(
            self.cpu.isa,
            &queries,
            cache,
            head,
            splits,
            &mut state,
            &mut scratch,
        );
        state
    }
}
