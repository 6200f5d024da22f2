//! Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864), in the half-split form of the
//! Hugging Face checkpoints: channel `i` turns with channel `i + head_dim/2`.

use crate::config::{ModelConfig, RopeScaling};
use crate::kernels::{Isa, Pool, elementwise};

/// Positions of a unit of parallel work.
const POSITIONS: usize = 64;

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

    /// The angles of these positions.
    pub(crate) fn angles(&self, pool: &Pool, positions: &[usize]) -> Angles {
        let half = self.frequencies.len();
        let mut table = vec![0.0; 2 * half * positions.len()];
        pool.parts(&mut table, 2 * half * POSITIONS, |part, table| {
            let positions = &positions[part * POSITIONS..];
            for (table, &position) in table.chunks_exact_mut(2 * half).zip(positions) {
                let (sin, cos) = table.split_at_mut(half);
                for ((sin, cos), &frequency) in sin.iter_mut().zip(cos).zip(&self.frequencies) {
                    // f32, as the reference implementation does it.
                    (*sin, *cos) = (position as f32 * frequency).sin_cos();
                }
            }
        });
        Angles { table, half }
    }
}

/// The angles of some positions.
#[derive(Debug)]
pub(crate) struct Angles {
    /// `[positions, 2, head_dim / 2]`, sines before cosines.
    table: Vec<f32>,
    half: usize,
}

impl Angles {
    /// Turns every head of one row, which stands at the position number `row` of these.
    pub(crate) fn turn(&self, isa: Isa, heads: &mut [f32], row: usize) {
        let (sin, cos) = self.table[2 * row * self.half..][..2 * self.half].split_at(self.half);
        elementwise::turn(isa, heads, sin, cos);
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
