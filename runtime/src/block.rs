//! One decoder block: two sublayers of the same form, `x += outer(mix(inner(norm(x))))`.
//!
//! For attention `inner` is q, k, v, `mix` the attention itself and `outer` is o; for the MLP `inner` is
//! gate and up, `mix` is `silu(gate) · up` and `outer` is down. The walk uses the same four steps.

use crate::attention::{Span, attend};
use crate::batch::{Batch, windows};
use crate::buffers::{Buffer, with_own};
use crate::input::{Input, Room};
use crate::kernels::{Columns, elementwise};
use crate::kv_cache::{BlockCache, HeadShape, KvDtype};
use crate::linear::check_finite;
use crate::rope::{Angles, Rope};
use crate::spec::{LinearKind, QK_NORMS, bias_name, block_tensor, weight_name};
use crate::{Cpu, KvCache, Linear, Matrix, ModelConfig, RuntimeError};
use qbin_format::Model;
use std::ops::Range;

/// Elements of a unit of elementwise work.
const ELEMENTS: usize = 1 << 14;

/// Tokens whose inner activations are in memory at once.
const OUTPUT_TOKENS: usize = 2048;

/// Half of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sublayer {
    /// Self-attention.
    Attention,
    /// The gated MLP.
    Mlp,
}

impl Sublayer {
    /// Both, in order.
    pub const ALL: [Self; 2] = [Self::Attention, Self::Mlp];

    /// Name of the norm in front, inside the block.
    pub fn norm_name(self) -> &'static str {
        ["input_layernorm.weight", "post_attention_layernorm.weight"][self as usize]
    }
}

/// Which linears of a sublayer: those that read the normed stream, or the one that writes to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// q, k, v, or gate, up.
    Inner,
    /// o, or down.
    Outer,
}

impl Side {
    /// Both, in order.
    pub const ALL: [Self; 2] = [Self::Inner, Self::Outer];
}

/// What a block computes on the way. Kept from block to block.
#[derive(Default)]
pub(crate) struct Buffers {
    inner: Room,
    heads: Buffer,
    outer: Room,
}

/// Where the input of the inner linears comes from, `[tokens, hidden]`.
#[derive(Clone, Copy)]
enum Source<'a> {
    /// The stream, yet to be normed.
    Stream(&'a [f32]),
    /// What was normed before.
    Normed(&'a [f32]),
}

impl<'a> Source<'a> {
    fn values(self) -> &'a [f32] {
        let (Self::Stream(values) | Self::Normed(values)) = self;
        values
    }
}

/// One decoder block.
pub struct Block<'m> {
    /// Number of the block.
    pub index: usize,
    /// Weights of the two norms, `[hidden]` each, by [`Sublayer`].
    pub norms: [Vec<f32>; 2],
    /// The linears, by [`LinearKind`].
    pub linears: [Linear<'m>; 7],
    qk_norms: Option<[Vec<f32>; 2]>,
    config: &'m ModelConfig,
    rope: &'m Rope,
    cpu: &'m Cpu,
}

impl<'m> Block<'m> {
    pub(crate) fn load(
        model: &'m Model,
        config: &'m ModelConfig,
        rope: &'m Rope,
        cpu: &'m Cpu,
        index: usize,
    ) -> Result<Self, RuntimeError> {
        let vector = |rest: &str| load_vector(model, &block_tensor(index, rest));
        let [attention, mlp] = Sublayer::ALL.map(|sublayer| vector(sublayer.norm_name()));
        let qk_norms = if config.qk_norm {
            Some([vector(QK_NORMS[0])?, vector(QK_NORMS[1])?])
        } else {
            None
        };
        let mut linears = Vec::with_capacity(LinearKind::ALL.len());
        for kind in LinearKind::ALL {
            let bias = kind
                .has_bias(config)
                .then(|| load_vector(model, &bias_name(index, kind)))
                .transpose()?;
            linears.push(load_linear(
                model,
                weight_name(index, kind),
                kind.shape(config),
                bias,
            )?);
        }
        let linears = linears
            .try_into()
            .ok()
            .expect("one linear for each of the seven kinds");
        Ok(Self {
            index,
            norms: [attention?, mlp?],
            linears,
            qk_norms,
            config,
            rope,
            cpu,
        })
    }

    /// The linear of one kind.
    pub fn linear(&self, kind: LinearKind) -> &Linear<'m> {
        &self.linears[kind as usize]
    }

    /// The linear of one kind, to be changed.
    pub fn linear_mut(&mut self, kind: LinearKind) -> &mut Linear<'m> {
        &mut self.linears[kind as usize]
    }

    /// What it runs on.
    pub fn cpu(&self) -> &'m Cpu {
        self.cpu
    }

    /// `norm(x)`: what the inner linears read. `x` is `[tokens, hidden]`.
    pub fn normed(&self, sublayer: Sublayer, x: &[f32]) -> Vec<f32> {
        let mut room = Room::default();
        let source = Source::Stream(x);
        self.inner_input(self.cpu, sublayer, source, &[], &mut room);
        room.into_values(x.len())
    }

    /// What some inner linears read.
    fn inner_input<'b>(
        &self,
        cpu: &Cpu,
        sublayer: Sublayer,
        source: Source<'b>,
        readers: &[&Linear<'_>],
        room: &'b mut Room,
    ) -> Input<'b> {
        let x = match source {
            Source::Stream(x) => x,
            Source::Normed(normed) => return room.hold(cpu, normed, readers),
        };
        let weight = &self.norms[sublayer as usize];
        let (width, eps) = (weight.len(), self.config.rms_norm_eps);
        let tokens = x.len() / width;
        let parts = parts(tokens, rows_per_part(width));
        let all = 0..width;
        let grid: [&[Range<usize>]; 2] = [&parts, &[all]];
        room.make(cpu, [tokens, width], readers, grid, |part, _, mut piece| {
            let x = x[parts[part].start * width..].chunks_exact(width);
            for (row, x) in (0..piece.rows()).zip(x) {
                piece.row(cpu.isa, row, |out| {
                    elementwise::rms_norm(cpu.isa, x, weight, eps, out);
                });
            }
        })
    }

    /// What the outer linear reads, for windows that all start at position 0: `normed` is
    /// `[windows · window_tokens, hidden]`.
    pub(crate) fn mixed(
        &self,
        cpu: &Cpu,
        sublayer: Sublayer,
        normed: &[f32],
        window_tokens: usize,
    ) -> Vec<f32> {
        let tokens = normed.len() / self.config.hidden_size;
        let batch = Batch::new(cpu, self.rope, windows(tokens, window_tokens));
        let mut buffers = Buffers::default();
        let source = Source::Normed(normed);
        let mixed = self.outer_input(cpu, sublayer, source, &batch, None, &[], &mut buffers);
        let len = mixed.values().len();
        buffers.outer.into_values(len)
    }

    /// What the sublayer adds to the stream, for windows that all start at position 0; a few windows at a time,
    /// because the MLP's inner activations are much wider than the result.
    pub fn output(&self, sublayer: Sublayer, normed: &[f32], window_tokens: usize) -> Vec<f32> {
        let mut out = vec![0.0; normed.len()];
        let windows = (OUTPUT_TOKENS / window_tokens).max(1);
        let batch = windows * window_tokens * self.config.hidden_size;
        for (normed, out) in normed.chunks(batch).zip(out.chunks_mut(batch)) {
            let mixed = self.mixed(self.cpu, sublayer, normed, window_tokens);
            self.add_outer(self.cpu, sublayer, &mixed, out);
        }
        out
    }

    /// Adds the sublayer's output to the stream `x`, given what its outer linear reads.
    pub(crate) fn add_outer(&self, cpu: &Cpu, sublayer: Sublayer, mixed: &[f32], x: &mut [f32]) {
        let outer = self.outer(sublayer);
        let mut room = Room::default();
        outer.add_to(cpu, &room.hold(cpu, mixed, &[outer]), x);
    }

    fn outer(&self, sublayer: Sublayer) -> &Linear<'m> {
        self.linear(LinearKind::at(sublayer, Side::Outer)[0])
    }

    /// The whole block: `x` is changed in place. Where not all rows are wanted, only those are left, but keys and
    /// values of all of them are cached.
    pub(crate) fn forward(
        &self,
        x: &mut Vec<f32>,
        batch: &Batch,
        mut caches: Option<&mut [KvCache]>,
        buffers: &mut Buffers,
    ) {
        for sublayer in Sublayer::ALL {
            let outer = self.outer(sublayer);
            let caches = caches.as_deref_mut();
            let source = Source::Stream(x);
            let mixed =
                self.outer_input(self.cpu, sublayer, source, batch, caches, &[outer], buffers);
            if let (Sublayer::Attention, Some(wanted)) = (sublayer, batch.wanted()) {
                *x = wanted.of(x, self.config.hidden_size);
            }
            outer.add_to(self.cpu, &mixed, x);
        }
    }

    /// What the outer linear reads, made for `readers`.
    #[expect(clippy::too_many_arguments)]
    fn outer_input<'b>(
        &self,
        cpu: &Cpu,
        sublayer: Sublayer,
        source: Source<'_>,
        batch: &Batch,
        caches: Option<&mut [KvCache]>,
        readers: &[&Linear<'_>],
        buffers: &'b mut Buffers,
    ) -> Input<'b> {
        match sublayer {
            Sublayer::Attention => self.attention(cpu, source, batch, caches, readers, buffers),
            Sublayer::Mlp => self.gated(cpu, source, readers, buffers),
        }
    }

    /// `silu(gate) · up`, `[tokens, inner]`.
    fn gated<'b>(
        &self,
        cpu: &Cpu,
        source: Source<'_>,
        readers: &[&Linear<'_>],
        Buffers { inner, outer, .. }: &'b mut Buffers,
    ) -> Input<'b> {
        let [gate, up] = [LinearKind::Gate, LinearKind::Up].map(|kind| self.linear(kind));
        let input = self.inner_input(cpu, Sublayer::Mlp, source, &[gate, up], inner);
        let tokens = input.tokens();
        let (all, chunks) = (0..tokens, gate.chunks(cpu, tokens));
        let grid: [&[Range<usize>]; 2] = [&[all], &chunks];
        outer.make(
            cpu,
            [tokens, gate.rows],
            readers,
            grid,
            |_, chunk, mut piece| {
                let rows = &chunks[chunk];
                let width = rows.len();
                let room = Columns::room(tokens, width);
                with_own(2 * room, |both| {
                    let (gates, ups) = both.split_at_mut(room);
                    let [mut gates, mut ups] =
                        [gates, ups].map(|room| Columns::in_room(room, tokens, width));
                    gate.rows(cpu, &input, rows.clone(), &mut gates);
                    up.rows(cpu, &input, rows.clone(), &mut ups);
                    for token in 0..tokens {
                        piece.row(cpu.isa, token, |out| {
                            elementwise::silu_times(cpu.isa, &mut gates, &mut ups, token, out);
                        });
                    }
                });
            },
        )
    }

    /// The mixed values of the wanted rows, `[rows, q_dim]`.
    fn attention<'b>(
        &self,
        cpu: &Cpu,
        source: Source<'_>,
        batch: &Batch,
        caches: Option<&mut [KvCache]>,
        readers: &[&Linear<'_>],
        Buffers {
            inner,
            heads,
            outer,
        }: &'b mut Buffers,
    ) -> Input<'b> {
        use LinearKind::{K, Q, V};
        let kv_dim = self.config.kv_dim();
        let kinds: &[_] = match batch.wanted() {
            None => &[Q, K, V],
            Some(_) => &[K, V],
        };
        let all = self.heads(cpu, source, kinds, batch.angles(), inner, heads);
        let mut wanted_heads = Buffer::default();
        let queries = batch.wanted().map(|wanted| {
            let values = wanted.of(source.values(), self.config.hidden_size);
            let source = match source {
                Source::Stream(_) => Source::Stream(&values),
                Source::Normed(_) => Source::Normed(&values),
            };
            let angles = wanted.angles();
            let heads = self.heads(cpu, source, &[Q], angles, inner, &mut wanted_heads);
            (heads, wanted.rows())
        });
        let mut own: Vec<BlockCache> = Vec::new();
        let mut all_caches: Vec<&mut BlockCache> = match caches {
            Some(caches) => {
                let caches = caches.iter_mut();
                caches.map(|cache| cache.block_mut(self.index)).collect()
            }
            None => {
                let shape = HeadShape::of(self.config, KvDtype::of(cpu.path));
                own.extend(
                    batch
                        .rows()
                        .iter()
                        .map(|rows| BlockCache::new(shape, rows.len)),
                );
                own.iter_mut().collect()
            }
        };
        for (cache, rows) in all_caches.iter_mut().zip(batch.rows()) {
            cache.append(&self.cpu.pool, rows.len, |token| {
                let row = all.row(rows.first + token);
                row[row.len() - 2 * kv_dim..].split_at(kv_dim)
            });
        }
        let (queries, rows) = match &queries {
            Some((queries, rows)) => (queries, *rows),
            None => (&all, batch.rows()),
        };
        let spans: Vec<Span<'_>> = rows
            .iter()
            .zip(&all_caches)
            .map(|(rows, cache)| Span {
                first: rows.first,
                len: rows.len,
                past: rows.past,
                cache,
            })
            .collect();
        let window = self.config.sliding_window[self.index];
        let queries = (queries.values, queries.width);
        attend(cpu, self.config, queries, &spans, window, readers, outer)
    }

    /// What some of q, k and v make of every row, side by side, queries and keys normed (where the model has such
    /// norms) and turned.
    fn heads<'b>(
        &self,
        cpu: &Cpu,
        source: Source<'_>,
        kinds: &[LinearKind],
        angles: &Angles,
        room: &mut Room,
        values: &'b mut Buffer,
    ) -> Heads<'b> {
        let linears: Vec<_> = kinds.iter().map(|&kind| self.linear(kind)).collect();
        let input = self.inner_input(cpu, Sublayer::Attention, source, &linears, room);
        let mut chunks: Vec<(&Linear<'_>, Range<usize>)> = Vec::new();
        let mut columns = Vec::new();
        let mut width = 0;
        for linear in linears {
            for rows in linear.chunks(cpu, input.tokens()) {
                columns.push(width + rows.start..width + rows.end);
                chunks.push((linear, rows));
            }
            width += linear.rows;
        }
        let values = values.get(input.tokens() * width);
        cpu.pool.columns(values, width, &columns, |chunk, mut out| {
            let (linear, rows) = &chunks[chunk];
            linear.rows(cpu, &input, rows.clone(), &mut out);
        });
        self.turn(values, kinds, width, angles);
        Heads { values, width }
    }

    /// Norms (where the model has them) and turns the heads of queries and keys in rows of `width`.
    fn turn(&self, values: &mut [f32], kinds: &[LinearKind], width: usize, angles: &Angles) {
        let (isa, eps) = (self.cpu.isa, self.config.rms_norm_eps);
        let norms = self.qk_norms.as_ref();
        let rows = rows_per_part(width);
        self.cpu.pool.parts(values, rows * width, |part, values| {
            for (row, mut rest) in values.chunks_exact_mut(width).enumerate() {
                for kind in kinds {
                    let (norm, dim) = match kind {
                        LinearKind::Q => (norms.map(|norms| &norms[0]), self.config.q_dim()),
                        LinearKind::K => (norms.map(|norms| &norms[1]), self.config.kv_dim()),
                        // Values stay as they are.
                        _ => break,
                    };
                    let heads;
                    (heads, rest) = rest.split_at_mut(dim);
                    if let Some(norm) = norm {
                        elementwise::rms_norm_heads(isa, heads, norm, eps);
                    }
                    angles.turn(isa, heads, part * rows + row);
                }
            }
        });
    }
}

/// Queries, keys or values of some rows, side by side.
struct Heads<'a> {
    /// `[rows, width]`.
    values: &'a [f32],
    width: usize,
}

impl Heads<'_> {
    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.width..][..self.width]
    }
}

/// A vector of the model (a norm or a bias) in f32.
pub(crate) fn load_vector(model: &Model, name: &str) -> Result<Vec<f32>, RuntimeError> {
    let weight = model
        .weight(name)
        .ok_or_else(|| RuntimeError::MissingTensor {
            tensor: name.into(),
            expected: vec![],
        })?;
    let qbin_format::Weight::Dense(view) = weight else {
        return Err(RuntimeError::Dtype {
            tensor: name.into(),
            got: "quantized codes".into(),
        });
    };
    let values = view.to_f32();
    check_finite(name, &values)?;
    Ok(values)
}

/// A linear whose weight stays in the file.
pub(crate) fn load_linear<'m>(
    model: &'m Model,
    name: String,
    [rows, cols]: [usize; 2],
    bias: Option<Vec<f32>>,
) -> Result<Linear<'m>, RuntimeError> {
    let weight = model
        .weight(&name)
        .ok_or_else(|| RuntimeError::MissingTensor {
            tensor: name.clone(),
            expected: vec![rows, cols],
        })?;
    Ok(Linear {
        name,
        rows,
        cols,
        weight: Matrix::Stored(weight),
        bias,
    })
}

/// Root-mean-square norm over rows as wide as `weight`: `out = x / sqrt(mean(x²) + eps) · weight`.
pub(crate) fn rms_norm(cpu: &Cpu, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    let rows = rows_per_part(width);
    cpu.pool.parts(out, rows * width, |part, out| {
        let x = &x[part * rows * width..];
        for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            elementwise::rms_norm(cpu.isa, x, weight, eps, out);
        }
    });
}

/// `count` in parts of `len`, the last one possibly shorter.
fn parts(count: usize, len: usize) -> Vec<Range<usize>> {
    let starts = (0..count).step_by(len);
    starts
        .map(|first| first..(first + len).min(count))
        .collect()
}

/// Rows of a unit of elementwise work.
fn rows_per_part(width: usize) -> usize {
    (ELEMENTS / width).max(1)
}
