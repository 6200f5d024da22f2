//! Least squares on the survivors: given the zeros, the weights that change the layer's output least.
//!
//! The sweep of SparseGPT lets only later columns make up for a zero. The best survivors solve, row by row,
//! `H_SS · w_S = (H · w)_S`; the preconditioned method of conjugate gradients gets there from the sweep's result
//! in a few products with `H`, all rows of a panel at once.

use qbin_quant::Metric;
use rayon::prelude::*;

/// Rows of a panel.
const PANEL_ROWS: usize = 64;

/// Improves the survivors of `pruned` (`[rows, n]`) against the original `weight` by `steps` steps; `metric` is
/// the mean of `x·xᵀ`, `damping` what is added to its diagonal. Zeros stay, as do weights of dead columns.
///
/// # Panics
/// If the matrices are not of the same whole number of rows of `n`.
pub fn refit(
    weight: &[f32],
    pruned: &mut [f32],
    zeros: &[bool],
    metric: &Metric,
    damping: f64,
    steps: usize,
) {
    let n = metric.n();
    assert!(
        weight.len().is_multiple_of(n)
            && weight.len() == pruned.len()
            && zeros.len() == weight.len(),
        "matrices are not of the same [rows, n]"
    );
    let height = PANEL_ROWS * n;
    (
        weight.par_chunks(height),
        pruned.par_chunks_mut(height),
        zeros.par_chunks(height),
    )
        .into_par_iter()
        .for_each(|(weight, pruned, zeros)| {
            let quadratic = Quadratic::new(metric, damping);
            quadratic.minimize(weight, pruned, zeros, steps);
        });
}

/// The damped metric.
pub(crate) struct Quadratic<'a> {
    metric: &'a Metric,
    damping: f32,
}

impl<'a> Quadratic<'a> {
    pub(crate) fn new(metric: &'a Metric, damping: f64) -> Self {
        let damping = damping as f32;
        Self { metric, damping }
    }

    pub(crate) fn row(&self, col: usize) -> &[f32] {
        let n = self.metric.n();
        &self.metric.values()[col * n..][..n]
    }

    /// The damped diagonal; 0 for a dead column.
    pub(crate) fn diagonal(&self) -> Vec<f32> {
        let diagonal = (0..self.metric.n()).map(|i| self.row(i)[i]);
        diagonal
            .map(|h| if h > 0.0 { h + self.damping } else { 0.0 })
            .collect()
    }

    /// `delta · H`, `[rows, n]`.
    pub(crate) fn product(&self, delta: &[f32]) -> Vec<f32> {
        let n = self.metric.n();
        let mut product = self.metric.cross(delta, 0, n);
        for (product, delta) in product.iter_mut().zip(delta) {
            *product += self.damping * delta;
        }
        product
    }

    fn minimize(&self, weight: &[f32], pruned: &mut [f32], zeros: &[bool], steps: usize) {
        let n = self.metric.n();
        let diagonal = self.diagonal();
        let free = |at: usize| !zeros[at] && diagonal[at % n] > 0.0;
        // Zero wherever nothing may move, so that every product stays among the survivors.
        let among = |mut values: Vec<f32>| {
            (values.iter_mut().enumerate())
                .filter(|(at, _)| !free(*at))
                .for_each(|(_, value)| *value = 0.0);
            values
        };
        let scaled = |values: &[f32]| -> Vec<f32> {
            let unscaled = values.iter().enumerate();
            unscaled
                .map(|(at, value)| {
                    if free(at) {
                        value / diagonal[at % n]
                    } else {
                        0.0
                    }
                })
                .collect()
        };
        let dots = |a: &[f32], b: &[f32]| -> Vec<f32> {
            let rows = a.chunks(n).zip(b.chunks(n));
            rows.map(|(a, b)| a.iter().zip(b).map(|(a, b)| a * b).sum())
                .collect()
        };
        let error: Vec<f32> = weight.iter().zip(&*pruned).map(|(w, p)| w - p).collect();
        let mut residual = among(self.product(&error));
        let mut direction = scaled(&residual);
        let mut norm = dots(&residual, &direction);
        for _ in 0..steps {
            let bent = among(self.product(&direction));
            let curvature = dots(&direction, &bent);
            for (row, (&norm, &curvature)) in norm.iter().zip(&curvature).enumerate() {
                // A row that is solved, or has nothing free, stays.
                let step = if curvature > 0.0 {
                    norm / curvature
                } else {
                    0.0
                };
                for at in row * n..(row + 1) * n {
                    pruned[at] += step * direction[at];
                    residual[at] -= step * bent[at];
                }
            }
            let gradient = scaled(&residual);
            let next = dots(&residual, &gradient);
            for (at, direction) in direction.iter_mut().enumerate() {
                let (old, new) = (norm[at / n], next[at / n]);
                let keep = if old > 0.0 { new / old } else { 0.0 };
                *direction = gradient[at] + keep * *direction;
            }
            norm = next;
        }
    }
}
