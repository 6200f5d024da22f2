//! One decoder block: two sublayers of the same form, `x += outer(mix(inner(norm(x))))`.
//!
//! For attention `inner` is q, k, v, `mix` the attention itself and `outer` is o; for the MLP `inner` is
//! gate and up, `mix` is `silu(gate) · up` and `outer` is down. The walk uses the same four steps.

use crate::attention::{Span, attend};
use crate::kv_cache::BlockCache;
use crate::linear::check_finite;
use crate::math;
use crate::rope::Rope;
use crate::spec::{LinearKind, QK_NORMS, bias_name, block_tensor, weight_name};
use crate::{KvCache, Linear, Matrix, ModelConfig, RuntimeError};
use qbin_format::Model;
use rayon::prelude::*;

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
}

/// The rows of a batch that belong to one sequence, and the positions before them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub(crate) first: usize,
    pub(crate) len: usize,
    pub(crate) past: usize,
}

impl<'m> Block<'m> {
    pub(crate) fn load(
        model: &'m Model,
        config: &'m ModelConfig,
        rope: &'m Rope,
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

    /// `norm(x)`: what the inner linears read. `x` is `[tokens, hidden]`.
    pub fn normed(&self, sublayer: Sublayer, x: &[f32]) -> Vec<f32> {
        rms_norm(x, &self.norms[sublayer as usize], self.config.rms_norm_eps)
    }

    /// What the outer linear reads, for windows that all start at position 0: `normed` is
    /// `[windows · window_tokens, hidden]`.
    pub fn mixed(&self, sublayer: Sublayer, normed: &[f32], window_tokens: usize) -> Vec<f32> {
        let rows: Vec<Rows> = windows(normed.len() / self.config.hidden_size, window_tokens);
        self.mixed_rows(sublayer, normed, &rows, None)
    }

    /// What the sublayer adds to the stream, for windows that all start at position 0; a few windows at a time,
    /// because the MLP's inner activations are much wider than the result.
    pub fn output(&self, sublayer: Sublayer, normed: &[f32], window_tokens: usize) -> Vec<f32> {
        let windows = (OUTPUT_TOKENS / window_tokens).max(1);
        let batch = windows * window_tokens * self.config.hidden_size;
        let batches = normed.chunks(batch);
        batches
            .flat_map(|normed| self.outer(sublayer, &self.mixed(sublayer, normed, window_tokens)))
            .collect()
    }

    /// What the sublayer adds to the stream, of what its outer linear reads.
    pub fn outer(&self, sublayer: Sublayer, mixed: &[f32]) -> Vec<f32> {
        self.linear(LinearKind::at(sublayer, Side::Outer)[0])
            .apply(mixed)
    }

    /// The whole block: `x` is changed in place.
    pub(crate) fn forward(&self, x: &mut [f32], rows: &[Rows], mut caches: Option<&mut [KvCache]>) {
        for sublayer in Sublayer::ALL {
            let normed = self.normed(sublayer, x);
            let mixed = self.mixed_rows(sublayer, &normed, rows, caches.as_deref_mut());
            add(x, &self.outer(sublayer, &mixed));
        }
    }

    fn mixed_rows(
        &self,
        sublayer: Sublayer,
        normed: &[f32],
        rows: &[Rows],
        caches: Option<&mut [KvCache]>,
    ) -> Vec<f32> {
        match sublayer {
            Sublayer::Attention => self.attention(normed, rows, caches),
            Sublayer::Mlp => {
                let mut gate = self.linear(LinearKind::Gate).apply(normed);
                let up = self.linear(LinearKind::Up).apply(normed);
                gate.par_chunks_mut(ELEMENTS)
                    .zip(up.par_chunks(ELEMENTS))
                    .for_each(|(gate, up)| {
                        gate.iter_mut()
                            .zip(up)
                            .for_each(|(gate, up)| *gate = silu(*gate) * up);
                    });
                gate
            }
        }
    }

    fn attention(&self, normed: &[f32], rows: &[Rows], caches: Option<&mut [KvCache]>) -> Vec<f32> {
        let mut q = self.linear(LinearKind::Q).apply(normed);
        let mut k = self.linear(LinearKind::K).apply(normed);
        let v = self.linear(LinearKind::V).apply(normed);
        if let Some([q_norm, k_norm]) = &self.qk_norms {
            q = rms_norm(&q, q_norm, self.config.rms_norm_eps);
            k = rms_norm(&k, k_norm, self.config.rms_norm_eps);
        }
        let positions: Vec<usize> = rows
            .iter()
            .flat_map(|rows| rows.past..rows.past + rows.len)
            .collect();
        self.rope.turn(&mut q, &positions);
        self.rope.turn(&mut k, &positions);
        let kv_dim = self.config.kv_dim();
        let new = |rows: &Rows| rows.first * kv_dim..(rows.first + rows.len) * kv_dim;
        let mut cached: Vec<&BlockCache> = Vec::new();
        if let Some(caches) = caches {
            for (cache, rows) in caches.iter_mut().zip(rows) {
                let cache = cache.block_mut(self.index);
                cache.keys.extend_from_slice(&k[new(rows)]);
                cache.values.extend_from_slice(&v[new(rows)]);
                cached.push(cache);
            }
        }
        let spans: Vec<Span<'_>> = rows
            .iter()
            .enumerate()
            .map(|(i, rows)| {
                let (keys, values) = match cached.get(i) {
                    Some(cache) => (cache.keys.as_slice(), cache.values.as_slice()),
                    None => (&k[new(rows)], &v[new(rows)]),
                };
                Span {
                    first: rows.first,
                    len: rows.len,
                    past: rows.past,
                    keys,
                    values,
                }
            })
            .collect();
        attend(
            self.config,
            &q,
            &spans,
            self.config.sliding_window[self.index],
        )
    }
}

/// The rows of consecutive windows that all start at position 0.
pub(crate) fn windows(tokens: usize, window_tokens: usize) -> Vec<Rows> {
    (0..tokens)
        .step_by(window_tokens)
        .map(|first| Rows {
            first,
            len: window_tokens.min(tokens - first),
            past: 0,
        })
        .collect()
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

/// Root-mean-square norm over rows as wide as `weight`: `x / sqrt(mean(x²) + eps) · weight`.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let width = weight.len();
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut(width)
        .zip(x.par_chunks(width))
        .with_min_len(32)
        .for_each(|(out, x)| {
            let mean = math::sum(x, |x| x * x) / width as f32;
            let scale = 1.0 / (mean + eps).sqrt();
            for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                *out = x * scale * weight;
            }
        });
    out
}

/// `x += y`.
pub(crate) fn add(x: &mut [f32], y: &[f32]) {
    x.par_chunks_mut(ELEMENTS)
        .zip(y.par_chunks(ELEMENTS))
        .for_each(|(x, y)| {
            x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        });
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + math::exp(-x))
}
