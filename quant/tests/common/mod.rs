//! Seeded matrices for the tests of this crate.
#![allow(dead_code)]

use qbin_quant::{Granularity, Grid, Moments, ScaleSearch};

/// A small generator (SplitMix64), so that a case is its seed on every platform.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub(crate) fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Close to normal: the sum of twelve uniforms, mean 0, variance 1.
    pub(crate) fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }

    pub(crate) fn normals(&mut self, len: usize, sigma: f64) -> Vec<f32> {
        (0..len).map(|_| (sigma * self.normal()) as f32).collect()
    }
}

/// `[tokens, n]`: correlated channels of unequal size, as a hidden state has them. They have at most 255 values each,
/// so that second moments of all tokens together are exact.
pub(crate) fn activations(random: &mut Random, tokens: usize, n: usize) -> Vec<f32> {
    let size: Vec<f64> = (0..n).map(|_| (0.8 * random.normal()).exp()).collect();
    let rank = n.div_ceil(4);
    let mix: Vec<f64> = (0..rank * n)
        .map(|_| random.normal() / (rank as f64).sqrt())
        .collect();
    let mut x = Vec::with_capacity(tokens * n);
    for _ in 0..tokens {
        let latent: Vec<f64> = (0..rank).map(|_| random.normal()).collect();
        for col in 0..n {
            let shared: f64 = latent
                .iter()
                .enumerate()
                .map(|(k, z)| z * mix[k * n + col])
                .sum();
            x.push((size[col] * (shared + 0.5 * random.normal())) as f32);
        }
    }
    for col in 0..n {
        let channel = || x.iter().skip(col).step_by(n);
        let step = channel().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
        for value in x.iter_mut().skip(col).step_by(n) {
            *value = (*value / step).round() * step;
        }
    }
    x
}

pub(crate) fn moments(x: &[f32], n: usize) -> Moments {
    let mut moments = Moments::new(n);
    moments.add(x).expect("finite inputs");
    moments
}

pub(crate) fn grid(bits: u8, symmetric: bool, granularity: Granularity) -> Grid {
    Grid {
        bits,
        symmetric,
        granularity,
        search: ScaleSearch::None,
    }
}

/// `Σ ‖ΔW·x‖² / Σ ‖W·x‖²`, straight from its definition in f64.
pub(crate) fn relative_error(weight: &[f32], other: &[f32], x: &[f32], cols: usize) -> f64 {
    let (mut error, mut signal) = (0f64, 0f64);
    for (w, q) in weight.chunks(cols).zip(other.chunks(cols)) {
        for x in x.chunks(cols) {
            let dot = |v: &dyn Fn(usize) -> f64| -> f64 {
                (0..cols).map(|c| v(c) * f64::from(x[c])).sum()
            };
            error += dot(&|c| f64::from(w[c]) - f64::from(q[c])).powi(2);
            signal += dot(&|c| f64::from(w[c])).powi(2);
        }
    }
    error / signal
}
