//! Causal grouped-query attention: which queries and which splits of which cache form one unit of work.

use crate::input::{Input, Room};
use crate::kernels::attention::{Queries, SPLIT, State, attend as attend_splits};
use crate::kernels::elementwise;
use crate::kv_cache::BlockCache;
use crate::{Cpu, Linear, ModelConfig};
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
/// `[tokens, q_dim]`, made for `readers`. A token sees itself and what came before it, at most `window` positions in all.
pub(crate) fn attend<'b>(
    cpu: &Cpu,
    config: &ModelConfig,
    (q, stride): (&[f32], usize),
    spans: &[Span<'_>],
    window: Option<usize>,
    readers: &[&Linear<'_>],
    room: &'b mut Room,
) -> Input<'b> {
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
    work.run(readers, room)
}

impl Attention<'_> {
    fn run<'b>(&self, readers: &[&Linear<'_>], room: &'b mut Room) -> Input<'b> {
        let heads = self.config.num_kv_heads;
        let group_dim = self.config.q_dim() / heads;
        let rows: Vec<_> = self.tiles.iter().map(|tile| tile.rows.clone()).collect();
        let columns: Vec<_> = (0..heads)
            .map(|head| head * group_dim..(head + 1) * group_dim)
            .collect();
        // Few queries over many positions: the splits are shared out as well.
        let few = self.tiles.len() * heads < 2 * self.cpu.pool.threads();
        let parts = if few { self.split_states() } else { Vec::new() };
        let tokens = rows.last().map_or(0, |rows| rows.end);
        let shape = [tokens, self.config.q_dim()];
        let grid: [&[Range<usize>]; 2] = [&rows, &columns];
        room.make(self.cpu, shape, readers, grid, |tile, head, mut piece| {
            let state = match few {
                true => self.merged(tile, head, &parts),
                false => self.state(tile, head, 0..self.tiles[tile].splits()),
            };
            let dim = self.config.head_dim;
            for token in 0..piece.rows() {
                piece.row(self.cpu.isa, token, |out| {
                    state.write(self.cpu.isa, token * (group_dim / dim), dim, out);
                });
            }
        })
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
            q.extend_from_slice(queries);
            let end = tile.span.past + row - tile.span.first + 1;
            let start = self.window.map_or(0, |window| end.saturating_sub(window));
            seen.extend((0..group_dim / dim).map(|_| start..end));
        }
        elementwise::scale(self.cpu.isa, &mut q, scale);
        let queries = Queries { q: &q, seen: &seen };
        attend_splits(self.cpu.isa, &queries, tile.span.cache, head, splits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Path;
    use crate::kernels::Isa;
    use crate::kv_cache::{HeadShape, KvDtype};

    fn config(heads: usize, kv_heads: usize, head_dim: usize) -> ModelConfig {
        let text = format!(
            r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads},
            "head_dim": {head_dim}, "intermediate_size": 8, "vocab_size": 8, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": true}}"#
        );
        ModelConfig::from_json(text.as_bytes()).expect("a config")
    }

    /// Queries, keys and values of one sequence, `[tokens, q_dim + 2 · kv_dim]`.
    struct Case {
        config: ModelConfig,
        rows: Vec<f32>,
        tokens: usize,
        window: Option<usize>,
    }

    impl Case {
        fn new(config: ModelConfig, tokens: usize, window: Option<usize>) -> Self {
            let stride = config.q_dim() + 2 * config.kv_dim();
            // Scores of some size, so that maxima change from page to page.
            let value = |i: usize| ((i * 7919 % 1009) as f32 * 0.123).sin() * 1.7;
            Self {
                rows: (0..tokens * stride).map(value).collect(),
                config,
                tokens,
                window,
            }
        }

        fn stride(&self) -> usize {
            self.config.q_dim() + 2 * self.config.kv_dim()
        }

        /// All tokens in steps of the given lengths.
        fn run(&self, cpu: &Cpu, steps: &[usize]) -> Vec<f32> {
            assert_eq!(steps.iter().sum::<usize>(), self.tokens);
            let (stride, q_dim) = (self.stride(), self.config.q_dim());
            let shape = HeadShape::of(&self.config, KvDtype::of(cpu.path));
            let mut cache = BlockCache::new(shape, 0);
            let (mut out, mut past) = (Vec::new(), 0);
            for &len in steps {
                let rows = &self.rows[past * stride..(past + len) * stride];
                cache.append(&cpu.pool, len, |token| {
                    rows[token * stride + q_dim..(token + 1) * stride]
                        .split_at(self.config.kv_dim())
                });
                let span = Span {
                    first: 0,
                    len,
                    past,
                    cache: &cache,
                };
                let (q, mut room) = ((rows, stride), Room::default());
                let mixed = attend(cpu, &self.config, q, &[span], self.window, &[], &mut room);
                out.extend_from_slice(mixed.values());
                past += len;
            }
            out
        }

        /// Softmax in f64 over the whole row, of queries, keys and values that are rounded as the cache's are: the
        /// mixed value of one channel and the largest value it mixes.
        fn exact(&self, dtype: KvDtype, token: usize, head: usize, channel: usize) -> (f64, f64) {
            let (dim, stride, q_dim) = (self.config.head_dim, self.stride(), self.config.q_dim());
            let kv_head = head / (self.config.num_heads / self.config.num_kv_heads);
            let at = |row: usize, from: usize| &self.rows[row * stride + from..][..dim];
            let round = |x: f32| match dtype {
                KvDtype::F32 => f64::from(x),
                KvDtype::Bf16 => half::bf16::from_f32(x).to_f64(),
            };
            let first = self
                .window
                .map_or(0, |window| (token + 1).saturating_sub(window));
            let scale = 1.0 / (dim as f32).sqrt();
            let q = at(token, head * dim);
            let (mut sum, mut mixed, mut largest) = (0.0, 0.0, 0f64);
            for position in first..=token {
                let key = at(position, q_dim + kv_head * dim);
                let products = q.iter().zip(key).map(|(q, k)| round(q * scale) * round(*k));
                let weight = products.sum::<f64>().exp();
                let v = at(position, q_dim + self.config.kv_dim() + kv_head * dim)[channel];
                sum += weight;
                mixed += weight * round(v);
                largest = largest.max(round(v).abs());
            }
            (mixed / sum, largest)
        }
    }

    /// A path for each type of cache.
    const PATHS: [Path; 2] = [Path::Reference, Path::Fast];

    #[test]
    fn agrees_with_a_softmax_in_f64() {
        let cases = [
            Case::new(config(4, 2, 12), 150, None),
            Case::new(config(2, 2, 64), 70, None),
            Case::new(config(7, 1, 80), 65, None),
            Case::new(config(4, 2, 16), 200, Some(33)),
            Case::new(config(2, 1, 32), 3 * SPLIT / 2, None),
        ];
        for (case, path) in cases.iter().flat_map(|case| PATHS.map(|path| (case, path))) {
            let cpu = Cpu::new(path, Isa::detect(), 2);
            let dtype = KvDtype::of(path);
            let out = case.run(&cpu, &[case.tokens]);
            for token in (0..case.tokens).step_by(7).chain([case.tokens - 1]) {
                for head in 0..case.config.num_heads {
                    let dim = case.config.head_dim;
                    for channel in [0, dim / 2, dim - 1] {
                        let (exact, largest) = case.exact(dtype, token, head, channel);
                        let got = out[token * case.config.q_dim() + head * dim + channel];
                        // A score is off by about ε·dim·|q||k|/√dim, at most 3·dim·ε here, and a weight by as much
                        // relatively; exponentials are good to 2⁻²², sums to ε per position. A probability is rounded to
                        // bf16 where the cache is, both where it weighs a value and where weights are summed.
                        let epsilon = f64::from(f32::EPSILON);
                        let rounding = match dtype {
                            KvDtype::F32 => 0.0,
                            KvDtype::Bf16 => f64::exp2(-9.0),
                        };
                        let relative = (3 * dim + token + 8) as f64 * epsilon + rounding;
                        let error = (f64::from(got) - exact).abs();
                        assert!(
                            error <= 2.0 * relative * largest,
                            "{path}, {token}: {error:e}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn the_same_bits_for_every_level_thread_count_and_step() {
        let cases = [
            Case::new(config(4, 2, 12), 150, None),
            Case::new(config(7, 1, 80), 90, Some(40)),
            Case::new(config(2, 1, 16), 2 * SPLIT + 5, None),
            Case::new(config(2, 1, 16), 2 * SPLIT + 5, Some(SPLIT - 30)),
        ];
        for (case, path) in cases.iter().flat_map(|case| PATHS.map(|path| (case, path))) {
            let scalar = Cpu::new(path, Isa::available()[0], 1);
            let expected = case.run(&scalar, &[case.tokens]);
            for isa in Isa::available() {
                for threads in 1..=3 {
                    let cpu = Cpu::new(path, isa, threads);
                    let n = case.tokens;
                    for steps in [vec![n], vec![1; n], vec![n / 2, 1, n - n / 2 - 4, 3]] {
                        let got = case.run(&cpu, &steps);
                        let same = got
                            .iter()
                            .zip(&expected)
                            .all(|(a, b)| a.to_bits() == b.to_bits());
                        assert!(
                            same,
                            "{path}, {isa:?}, {threads} threads, {} steps",
                            steps.len()
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn the_same_bits_where_products_would_be_subnormal() {
        // Scores that are far apart, within a page and from page to page, and the smallest values that bf16 has here.
        let mut case = Case::new(config(1, 1, 16), 150, None);
        let stride = case.stride();
        for (position, row) in case.rows.chunks_exact_mut(stride).enumerate() {
            row[..32].fill(0.0);
            // The query times 1/√16, times the key's only channel: the score.
            row[0] = 4.0;
            let below = position * 7 % 61;
            row[16] = (position / 64 * 55) as f32 - below as f32;
            // Later sums do not hide the first page's, nor near scores the far ones of the last.
            let counts = position < 64 || position >= 128 && below > 52;
            for (channel, value) in row[32..].iter_mut().enumerate() {
                let small = f32::exp2(-56.0) * (1 + (position + channel) % 5) as f32;
                *value = if counts { small } else { 0.0 };
            }
        }
        let scalar = Cpu::new(Path::Fast, Isa::available()[0], 1);
        let expected = case.run(&scalar, &[case.tokens]);
        assert!(expected.iter().any(|value| *value != 0.0));
        for isa in Isa::available() {
            let got = case.run(&Cpu::new(Path::Fast, isa, 1), &[case.tokens]);
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert!(bits(&got) == bits(&expected), "{isa:?}");
        }
    }

    #[test]
    fn what_is_forgotten_leaves_no_trace() {
        // A word of bf16 holds two positions: the second may have been written before the sequence was cut.
        let mut case = Case::new(config(2, 1, 16), 60, None);
        let (stride, q_dim, kv_dim) = (case.stride(), case.config.q_dim(), case.config.kv_dim());
        let cpu = Cpu::new(Path::Fast, Isa::detect(), 1);
        let shape = HeadShape::of(&case.config, KvDtype::Bf16);
        for kept in [5, 15, 16, 20, 31, 32, 40] {
            let end = kept + 2;
            case.rows[end * stride..].fill(f32::INFINITY);
            let append = |cache: &mut BlockCache, tokens: Range<usize>| {
                cache.append(&cpu.pool, tokens.len(), |token| {
                    let row = &case.rows[(tokens.start + token) * stride..][..stride];
                    row[q_dim..].split_at(kv_dim)
                });
            };
            let mixed = |cache: &BlockCache| {
                let span = Span {
                    first: 0,
                    len: 1,
                    past: end - 1,
                    cache,
                };
                let q = (&case.rows[(end - 1) * stride..end * stride], stride);
                let mut room = Room::default();
                let mixed = attend(&cpu, &case.config, q, &[span], None, &[], &mut room);
                mixed.values().to_vec()
            };
            let mut cache = BlockCache::new(shape, 0);
            append(&mut cache, 0..end);
            let expected = mixed(&cache);
            assert!(expected.iter().all(|value| value.is_finite()));
            append(&mut cache, end..60);
            cache.truncate(kept);
            append(&mut cache, kept..end);
            assert_eq!(mixed(&cache), expected, "{kept} kept");
            case.rows = Case::new(config(2, 1, 16), 60, None).rows;
        }
    }

    #[test]
    fn what_is_not_finite_stays_visible() {
        for (path, level) in PATHS
            .into_iter()
            .flat_map(|path| Isa::available().into_iter().map(move |isa| (path, isa)))
        {
            let mut case = Case::new(config(2, 1, 16), 80, None);
            let (stride, q_dim) = (case.stride(), case.config.q_dim());
            case.rows[70 * stride + q_dim] = f32::from_bits(u32::MAX >> 1);
            let cpu = Cpu::new(path, level, 1);
            let out = case.run(&cpu, &[80]);
            assert!(out[..70 * q_dim].iter().all(|value| value.is_finite()));
            assert!(out[70 * q_dim..].iter().all(|value| value.is_nan()));
        }
    }
}
