//! Better zeros: a weight comes back where another one of its row, or of its run, can go for less.
//!
//! SparseGPT chooses a weight's fate when the sweep reaches it, knowing only the columns before. Once all are
//! chosen, the full Hessian tells what exchanging a survivor `j` for a zero `k` does to the loss of the row, all
//! other weights as they are: with `e = w − ŵ`, `g = e·H` and `v = ŵ_j`,
//! `2·v·g_j + v²·H_jj − (g_k + v·H_jk)² / H_kk`, at the best value for `k`. An exchange is made only if that is
//! negative, so the loss falls with each. Counts stay, in every row and in every run.

use qbin_quant::Metric;
use rayon::prelude::*;

use crate::refit::Quadratic;
use crate::{Pruned, Sparsity};

/// Rows of a panel.
const PANEL_ROWS: usize = 64;
/// Of a row's survivors, the cheapest `1 / CANDIDATES` are offered for exchange.
const CANDIDATES: usize = 4;
/// The least gain worth an exchange, relative to what the survivor's loss would cost.
const WORTH: f32 = 1e-3;

/// Exchanges survivors for zeros, once over every row; returns how many exchanges were made.
///
/// # Panics
/// If the matrices are not of the same whole number of rows of `n`.
pub fn swap(
    weight: &[f32],
    pruned: &mut Pruned,
    sparsity: Sparsity,
    metric: &Metric,
    damping: f64,
) -> usize {
    let n = metric.n();
    assert!(
        weight.len().is_multiple_of(n) && weight.len() == pruned.weight.len(),
        "matrices are not of the same [rows, n]"
    );
    let height = PANEL_ROWS * n;
    let quadratic = Quadratic::new(metric, damping);
    let diagonal = quadratic.diagonal();
    (
        weight.par_chunks(height),
        pruned.weight.par_chunks_mut(height),
        pruned.zeros.par_chunks_mut(height),
    )
        .into_par_iter()
        .map(|(weight, values, zeros)| {
            let error: Vec<f32> = weight.iter().zip(&*values).map(|(w, v)| w - v).collect();
            let mut gradient = quadratic.product(&error);
            let rows = gradient
                .chunks_mut(n)
                .zip(values.chunks_mut(n))
                .zip(zeros.chunks_mut(n));
            rows.map(|((gradient, values), zeros)| {
                let mut row = Row {
                    quadratic: &quadratic,
                    diagonal: &diagonal,
                    gradient,
                    values,
                    zeros,
                };
                match sparsity.run() {
                    Some(run) => row.runs(run),
                    None => row.anywhere(),
                }
            })
            .sum::<usize>()
        })
        .sum()
}

/// One row under exchange.
struct Row<'a> {
    quadratic: &'a Quadratic<'a>,
    diagonal: &'a [f32],
    /// `(w − ŵ)·H`.
    gradient: &'a mut [f32],
    values: &'a mut [f32],
    zeros: &'a mut [bool],
}

impl Row<'_> {
    /// Within every run, the best exchange, if there is one.
    fn runs(&mut self, run: usize) -> usize {
        let n = self.values.len();
        let mut swaps = 0;
        for start in (0..n).step_by(run) {
            let columns = start..n.min(start + run);
            let best = columns
                .clone()
                .filter(|&j| !self.zeros[j])
                .filter_map(|j| Some((j, self.best_for(j, columns.clone())?)))
                .min_by(|a, b| a.1.1.total_cmp(&b.1.1));
            if let Some((j, (k, _))) = best {
                self.exchange(j, k);
                swaps += 1;
            }
        }
        swaps
    }

    /// For each of the cheapest survivors of the row, the best exchange.
    fn anywhere(&mut self) -> usize {
        let n = self.values.len();
        let mut survivors: Vec<usize> = (0..n).filter(|&j| !self.zeros[j]).collect();
        let offered = survivors.len().div_ceil(CANDIDATES);
        survivors.sort_by(|&a, &b| self.cost(a).total_cmp(&self.cost(b)).then(a.cmp(&b)));
        let mut swaps = 0;
        for &j in &survivors[..offered] {
            if let Some((k, _)) = self.best_for(j, 0..n) {
                self.exchange(j, k);
                swaps += 1;
            }
        }
        swaps
    }

    /// What setting a survivor to zero adds to the loss.
    fn cost(&self, j: usize) -> f32 {
        let v = self.values[j];
        2.0 * v * self.gradient[j] + v * v * self.diagonal[j]
    }

    /// The zero among `columns` that best replaces survivor `j`, and what that adds to the loss, if it lowers it.
    fn best_for(&self, j: usize, columns: std::ops::Range<usize>) -> Option<(usize, f32)> {
        let (v, h) = (self.values[j], self.quadratic.row(j));
        let cost = self.cost(j);
        let mut best: Option<(usize, f32)> = None;
        let least = -WORTH * v * v * self.diagonal[j];
        for k in columns.filter(|&k| self.zeros[k] && self.diagonal[k] > 0.0) {
            let slope = self.gradient[k] + v * h[k];
            let change = cost - slope * slope / self.diagonal[k];
            if change < best.map_or(least, |(_, change)| change) {
                best = Some((k, change));
            }
        }
        best
    }

    fn exchange(&mut self, j: usize, k: usize) {
        let v = self.values[j];
        self.shift(j, -v);
        let new = self.gradient[k] / self.diagonal[k];
        self.shift(k, new);
        self.values[j] = 0.0;
        (self.zeros[j], self.zeros[k]) = (true, false);
    }

    /// Adds `by` to a weight and keeps the gradient true.
    fn shift(&mut self, col: usize, by: f32) {
        self.values[col] += by;
        for (gradient, h) in self.gradient.iter_mut().zip(self.quadratic.row(col)) {
            *gradient -= by * h;
        }
        // The damping of a live column is not in the metric's row.
        self.gradient[col] -= by * (self.diagonal[col] - self.quadratic.row(col)[col]);
    }
}
