//! Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864), in the half-split form of the
//! Hugging Face checkpoints: channel `i` turns with channel `i + head_dim/2`.

use crate::config::{ModelConfig, RopeScaling};
use rayon::prelude::*;

/// Rotary frequencies of a model, radians per position, `[head_dim / 2]`.
#[derive(Clone, Debug)]
pub(crate) struct Rope {
    frequencies: Vec<f32>,
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        let half = config.head_dim / 2;
        let frequencies = (0..half)
            .map(|i| {
                let base = config
                    .rope_theta
                    .powf(-(2.0 * i as f64) / config.head_dim as f64);
                scaled(base, config.rope_scaling) as f32
            })
            .collect();
        Self { frequencies }
    }

    /// Turns every head of `x[tokens, heads · head_dim]`; row `t` stands at `positions[t]`.
    pub(crate) fn turn(&self, x: &mut [f32], positions: &[usize]) {
        let half = self.frequencies.len();
        let width = x.len() / positions.len().max(1);
        let rows = x
            .par_chunks_exact_mut(width)
            .zip(positions)
            .with_min_len(64);
        rows.for_each_init(
            || vec![(0.0f32, 0.0f32); half],
            |table, (row, &position)| {
                for (entry, &frequency) in table.iter_mut().zip(&self.frequencies) {
                    // f32, as the reference implementation does it.
                    *entry = (position as f32 * frequency).sin_cos();
                }
                for head in row.chunks_exact_mut(2 * half) {
                    let (low, high) = head.split_at_mut(half);
                    for ((a, b), &(sin, cos)) in low.iter_mut().zip(high).zip(&*table) {
                        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                    }
                }
            },
        );
    }
}

fn scaled(frequency: f64, scaling: RopeScaling) -> f64 {
    match scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_positions,
        } => {
            let turns = original_max_positions * frequency / std::f64::consts::TAU;
            // 0 where a full turn takes longer than the old context allows for, 1 where it is short.
            let smooth =
                ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
            (1.0 - smooth) * frequency / factor + smooth * frequency
        }
    }
}
