//! AWQ: scales input channels so that important weights round finely, then clips group ranges.
//!
//! Source: Lin et al., AWQ, arXiv 2306.00978. Ours: losses of single linears are measured on the second
//! moments, so over all calibration tokens instead of a sample; a group's clip is judged by the error of the
//! whole output, given the clips of the other groups, not by the group's part of it alone; channels that are
//! always zero keep the scale 1.

use std::ops::Range;

use rayon::prelude::*;

use crate::error::QuantError;
use crate::grid::Grid;
use crate::hessian::Metric;
use crate::rtn::check_weight;

/// Rows that one task works on.
const PANEL_ROWS: usize = 64;
/// The smallest scale before normalization, as in the published code.
const SMALLEST: f64 = 1e-4;

/// Channel scales to try: `s = mean|x|^r` for `r = 0, 1/n_grid, …, (n_grid−1)/n_grid`, each normalized by
/// `√(max·min)`.
///
/// `abs_mean` is `[cols]`. The first candidate is the identity, so the best of them is never worse than
/// no scaling by its own measure.
///
/// # Panics
/// If `n_grid` is 0.
pub fn scale_candidates(abs_mean: &[f64], n_grid: usize) -> Vec<Vec<f32>> {
    assert!(n_grid > 0, "at least the identity");
    let candidate = |i: usize| -> Vec<f32> {
        let power = i as f64 / n_grid as f64;
        let raw: Vec<f64> = abs_mean
            .iter()
            .map(|mean| mean.powf(power).max(SMALLEST))
            .collect();
        let seen = || {
            raw.iter()
                .zip(abs_mean)
                .filter(|&(_, &mean)| mean > 0.0)
                .map(|(&s, _)| s)
        };
        let (low, high) = seen().fold((f64::INFINITY, 0f64), |(l, h), s| (l.min(s), h.max(s)));
        let middle = (low * high).sqrt();
        raw.iter()
            .zip(abs_mean)
            .map(|(&s, &mean)| if mean > 0.0 { (s / middle) as f32 } else { 1.0 })
            .collect()
    };
    (0..n_grid).map(candidate).collect()
}

/// The matrix as a runtime would see it with inputs scaled by `1/s`: `Q(W·diag(s))·diag(1/s)`, `[rows, cols]`.
///
/// `scales` is `[cols]`.
///
/// # Errors
/// [`QuantError::Bits`], [`QuantError::GroupSize`], [`QuantError::NonFiniteWeight`].
///
/// # Panics
/// If a slice does not have the length its shape says.
pub fn rounded(
    weight: &[f32],
    rows: usize,
    cols: usize,
    scales: &[f32],
    grid: &Grid,
) -> Result<Vec<f32>, QuantError> {
    check_weight(weight, rows, cols)?;
    grid.check(cols)?;
    assert_eq!(scales.len(), cols, "scales is not [cols]");
    let mut out = vec![0f32; rows * cols];
    out.par_chunks_mut(PANEL_ROWS * cols)
        .zip(weight.par_chunks(PANEL_ROWS * cols))
        .for_each(|(out, weight)| round_scaled(weight, cols, scales, grid, out));
    Ok(out)
}

/// [`rounded`] for the rows of one panel.
fn round_scaled(weight: &[f32], cols: usize, scales: &[f32], grid: &Grid, out: &mut [f32]) {
    for (out, weight) in out.chunks_mut(cols).zip(weight.chunks(cols)) {
        for ((out, &w), &s) in out.iter_mut().zip(weight).zip(scales) {
            *out = w * s;
        }
        for group in 0..grid.scheme().groups(cols) {
            let columns = grid.columns(group, cols);
            let group = &mut out[columns.clone()];
            let rounder = grid.rounder(grid.params(group, None));
            for (w, &s) in group.iter_mut().zip(&scales[columns]) {
                *w = rounder.value(rounder.steps(*w)) / s;
            }
        }
    }
}

/// The mean over tokens of `‖ΔW·x‖²` for `ΔW = Q(W·diag(s))·diag(1/s) − W`.
///
/// `weight` is `[rows, cols]`; `metric` are the moments of the inputs before scaling. Sums of this over
/// the linears that share an input rank scales where the loss of the whole module cannot be had.
///
/// # Errors
/// [`QuantError::Bits`], [`QuantError::GroupSize`], [`QuantError::NonFiniteWeight`].
///
/// # Panics
/// If a slice does not have the length its shape says.
pub fn quadratic_loss(
    weight: &[f32],
    rows: usize,
    cols: usize,
    metric: &Metric,
    scales: &[f32],
    grid: &Grid,
) -> Result<f64, QuantError> {
    check_weight(weight, rows, cols)?;
    grid.check(cols)?;
    assert_eq!(scales.len(), cols, "scales is not [cols]");
    assert_eq!(metric.n(), cols, "metric is not [cols, cols]");
    let panels: Vec<f64> = weight
        .par_chunks(PANEL_ROWS * cols)
        .map(|weight| {
            let mut delta = vec![0f32; weight.len()];
            round_scaled(weight, cols, scales, grid, &mut delta);
            delta.iter_mut().zip(weight).for_each(|(d, &w)| *d -= w);
            metric.measure(&delta)
        })
        .collect();
    Ok(panels.iter().sum())
}

/// The magnitude at which each group is best clipped before rounding, `[rows, groups]`, for [`crate::rtn`].
///
/// Tries `max|w|·(1 − i/n_grid)` for `i < n_grid·max_shrink`, group by group, and takes the least `Δw·M·Δwᵀ`, the
/// error of the row's output over all tokens with the other groups as they are rounded so far. It starts
/// without any clip and never takes a step that is worse. `weight` (`[rows, cols]`) and `metric` are those
/// after channel scales were folded. Published: `n_grid` 20, `max_shrink` 0.5,
/// and not for query and key projections.
///
/// # Errors
/// [`QuantError::Bits`], [`QuantError::GroupSize`], [`QuantError::NonFiniteWeight`].
///
/// # Panics
/// If a slice does not have the length its shape says.
pub fn search_clip(
    weight: &[f32],
    rows: usize,
    cols: usize,
    metric: &Metric,
    grid: &Grid,
    n_grid: usize,
    max_shrink: f64,
) -> Result<Vec<f32>, QuantError> {
    check_weight(weight, rows, cols)?;
    grid.check(cols)?;
    assert_eq!(metric.n(), cols, "metric is not [cols, cols]");
    let groups = grid.scheme().groups(cols);
    let candidates = ((n_grid as f64 * max_shrink) as usize).max(1);
    let mut limits = vec![f32::INFINITY; rows * groups];
    limits
        .par_chunks_mut(PANEL_ROWS * groups)
        .zip(weight.par_chunks(PANEL_ROWS * cols))
        .for_each(|(limits, weight)| {
            let delta = vec![0.0; weight.len()];
            let mut search = ClipSearch {
                grid,
                metric,
                weight,
                cols,
                delta,
                limits,
            };
            // The first round only rounds: every group is judged beside the errors of all others.
            for candidates in [1, candidates, candidates] {
                (0..groups).for_each(|group| search.group(group, candidates, n_grid));
            }
        });
    Ok(limits)
}

/// The clip search over some rows.
struct ClipSearch<'a> {
    grid: &'a Grid,
    metric: &'a Metric,
    weight: &'a [f32],
    cols: usize,
    /// `Q − W` under the limits so far, `[rows, cols]`.
    delta: Vec<f32>,
    limits: &'a mut [f32],
}

impl ClipSearch<'_> {
    /// The error of group `columns` of every row under each row's limit, into `delta` (`[rows, len]`).
    fn round(&self, columns: Range<usize>, limits: &[f32], delta: &mut [f32]) {
        let mut clipped = vec![0f32; columns.len()];
        let rows = self
            .weight
            .chunks(self.cols)
            .map(|row| &row[columns.clone()]);
        for ((delta, row), &limit) in delta.chunks_mut(columns.len()).zip(rows).zip(limits) {
            for (clipped, w) in clipped.iter_mut().zip(row) {
                *clipped = w.clamp(-limit, limit);
            }
            let rounder = self.grid.rounder(self.grid.params(&clipped, None));
            for ((delta, &w), &clipped) in delta.iter_mut().zip(row).zip(&clipped) {
                *delta = rounder.value(rounder.steps(clipped)) - w;
            }
        }
    }

    /// Chooses one group's limits, given the errors of all the others.
    fn group(&mut self, group: usize, candidates: usize, n_grid: usize) {
        let columns = self.grid.columns(group, self.cols);
        let (first, len) = (columns.start, columns.len());
        let rows = self.weight.len() / self.cols;
        let groups = self.limits.len() / rows;
        let largest: Vec<f32> = self
            .weight
            .chunks(self.cols)
            .map(|row| {
                row[columns.clone()]
                    .iter()
                    .fold(0f32, |m, w| m.max(w.abs()))
            })
            .collect();
        // What the other groups' errors make of this group's: M[group, others] of their sum.
        for delta in self.delta.chunks_mut(self.cols) {
            delta[columns.clone()].fill(0.0);
        }
        let cross = self.metric.cross(&self.delta, first, len);
        let mut best = vec![f64::INFINITY; rows];
        let mut chosen = vec![0f32; rows * len];
        let mut delta = vec![0f32; rows * len];
        for i in 0..candidates {
            let part = 1.0 - i as f32 / n_grid as f32;
            // "Nothing" rather than the largest magnitude, so that no rounding can clip it.
            let limits: Vec<f32> = largest
                .iter()
                .map(|largest| {
                    if i == 0 {
                        f32::INFINITY
                    } else {
                        largest * part
                    }
                })
                .collect();
            self.round(columns.clone(), &limits, &mut delta);
            let own = self.metric.measure_rows(&delta, first, len);
            for (row, own) in own.into_iter().enumerate() {
                let place = row * len..(row + 1) * len;
                let shared: f64 = delta[place.clone()]
                    .iter()
                    .zip(&cross[place.clone()])
                    .map(|(&d, &c)| f64::from(d) * f64::from(c))
                    .sum();
                let error = own + 2.0 * shared;
                if error < best[row] {
                    best[row] = error;
                    self.limits[row * groups + group] = limits[row];
                    chosen[place.clone()].copy_from_slice(&delta[place]);
                }
            }
        }
        for (delta, chosen) in self.delta.chunks_mut(self.cols).zip(chosen.chunks(len)) {
            delta[columns.clone()].copy_from_slice(chosen);
        }
    }
}

/// Multiplies the columns of `weight` (`[rows, cols]`) by `s` (`[cols]`): the reading side of a fold.
///
/// # Panics
/// If `weight` is not a whole number of rows.
pub fn scale_columns(weight: &mut [f32], s: &[f32]) {
    assert!(
        weight.len().is_multiple_of(s.len()),
        "weight is not [rows, cols]"
    );
    for row in weight.chunks_mut(s.len()) {
        row.iter_mut().zip(s).for_each(|(w, &s)| *w *= s);
    }
}

/// Divides the rows of `weight` (`[rows, cols]`) by `s` (`[rows]`): the writing side of a fold. A bias is
/// divided by [`divide_vector`].
///
/// # Panics
/// If `weight` has not one row for each factor.
pub fn divide_rows(weight: &mut [f32], s: &[f32]) {
    assert!(
        weight.len().is_multiple_of(s.len()),
        "weight is not [rows, cols]"
    );
    let cols = weight.len() / s.len();
    for (row, &s) in weight.chunks_mut(cols).zip(s) {
        row.iter_mut().for_each(|w| *w /= s);
    }
}

/// Divides a bias or the weight of a norm by `s`. `offset` is what the norm adds to its weight (1 for norms
/// that multiply by `1 + w`, else 0): `w ← (offset + w)/s − offset`.
///
/// # Panics
/// If the lengths differ.
pub fn divide_vector(vector: &mut [f32], s: &[f32], offset: f32) {
    assert_eq!(vector.len(), s.len(), "one factor per element");
    for (v, &s) in vector.iter_mut().zip(s) {
        *v = (offset + *v) / s - offset;
    }
}

/// Makes the means of the output projection's inputs equal among the query heads that share a key-value
/// head, by averaging them; scales made of the result can be folded into the value projection exactly.
///
/// `abs_mean` is `[heads · head_dim]`, and so is the result.
///
/// # Panics
/// If `heads` is no multiple of `kv_heads`, or does not divide `abs_mean`.
pub fn gqa_mean(abs_mean: &[f64], heads: usize, kv_heads: usize) -> Vec<f64> {
    assert!(heads.is_multiple_of(kv_heads), "heads share evenly");
    assert!(
        abs_mean.len().is_multiple_of(heads),
        "abs_mean is not [heads · head_dim]"
    );
    let (head_dim, sharing) = (abs_mean.len() / heads, heads / kv_heads);
    (0..abs_mean.len())
        .map(|at| {
            let (first, channel) = (at / head_dim / sharing * sharing, at % head_dim);
            let shared = (first..first + sharing).map(|head| abs_mean[head * head_dim + channel]);
            shared.sum::<f64>() / sharing as f64
        })
        .collect()
}

/// The factors for the value projection's rows, `[kv_heads · head_dim]`, out of the output projection's
/// column scales `s` (`[heads · head_dim]`), which must be equal where heads share.
///
/// # Panics
/// If they are not equal there, or as [`gqa_mean`].
pub fn gqa_producer_scales(s: &[f32], heads: usize, kv_heads: usize) -> Vec<f32> {
    assert!(heads.is_multiple_of(kv_heads), "heads share evenly");
    assert!(s.len().is_multiple_of(heads), "s is not [heads · head_dim]");
    let (head_dim, sharing) = (s.len() / heads, heads / kv_heads);
    for (head, scales) in s.chunks(head_dim).enumerate() {
        let first = head / sharing * sharing;
        assert_eq!(
            scales,
            &s[first * head_dim..][..head_dim],
            "scales differ among sharing heads"
        );
    }
    s.chunks(head_dim)
        .step_by(sharing)
        .flatten()
        .copied()
        .collect()
}
