//! Coordinate descent after GPTQ: moves single codes and scales while that lowers the layer's loss.
//!
//! The sweep of GPTQ never looks back at a column. Here every scale is set again to the best one given the
//! codes, and every code to the best one given all the others; both only lower `(W−Q)·H·(W−Q)ᵀ`. Source of
//! the code step: Behdin et al., QuantEase, arXiv 2309.01885, which uses it instead of GPTQ; the scale step
//! is the least squares in one variable.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use crate::grid::{Grid, GroupParams, storable};
use crate::rtn::Panel;

/// The damped Hessian, `[n, n]`, columns as in the file, zeros for dead columns.
#[derive(Clone, Debug)]
pub(crate) struct Curvature {
    n: usize,
    values: Vec<f32>,
}

impl Curvature {
    /// From the undamped Hessian; [`Self::damp`] adds the rest once it is known.
    pub(crate) fn new(n: usize, hessian: &[f64]) -> Self {
        Self {
            n,
            values: hessian.iter().map(|&value| value as f32).collect(),
        }
    }

    pub(crate) fn damp(&mut self, damp: f64) {
        for i in 0..self.n {
            let value = &mut self.values[i * self.n + i];
            if *value > 0.0 {
                *value += damp as f32;
            }
        }
    }

    fn view(&self) -> MatRef<'_, f32> {
        MatRef::from_row_major_slice(&self.values, self.n, self.n)
    }
}

/// What a refinement achieved over the rows of a panel.
pub(crate) struct Gain {
    /// Decrease of the loss under the damped Hessian.
    pub(crate) loss: f64,
    /// `‖W − Q‖²` of live columns afterwards.
    pub(crate) error: f64,
}

/// Refines the rows of a panel: `weight` is `[panel rows, n]`, `zeros` tells which of them are held at zero,
/// `out` is what GPTQ made of it.
pub(crate) fn refine(
    curvature: &Curvature,
    grid: &Grid,
    weight: &[f32],
    zeros: Option<&[bool]>,
    out: &mut Panel<'_>,
    sweeps: usize,
) -> Gain {
    let groups = grid.scheme().groups(curvature.n);
    let mut state = Refinement::new(curvature, grid, weight, zeros, out);
    for _ in 0..sweeps {
        let moves = state.moves;
        (0..groups).for_each(|group| state.group(group));
        if state.moves == moves {
            break;
        }
    }
    state.finish()
}

/// A panel under refinement; matrices are row major.
struct Refinement<'a, 'b> {
    curvature: &'a Curvature,
    grid: &'a Grid,
    weight: &'a [f32],
    zeros: Option<&'a [bool]>,
    out: &'a mut Panel<'b>,
    groups: usize,
    /// `W − Q`, `[rows, n]`; zero for dead columns.
    errors: Vec<f32>,
    gained: f64,
    moves: u64,
}

/// One row of one group while it is worked on.
struct Part<'a> {
    row: usize,
    columns: Range<usize>,
    params: GroupParams,
    /// `(W−Q)·H`, of these columns.
    gradient: &'a mut [f32],
    /// The codes less the zero point.
    steps: &'a mut [f32],
    /// `steps·H` within the group.
    bend: &'a [f32],
}

impl<'a, 'b> Refinement<'a, 'b> {
    fn new(
        curvature: &'a Curvature,
        grid: &'a Grid,
        weight: &'a [f32],
        zeros: Option<&'a [bool]>,
        out: &'a mut Panel<'b>,
    ) -> Self {
        let n = curvature.n;
        let groups = grid.scheme().groups(n);
        let mut errors = vec![0f32; weight.len()];
        for (at, error) in errors.iter_mut().enumerate() {
            let (row, col) = (at / n, at % n);
            if curvature.values[col * n + col] > 0.0 {
                let params = out.params(row * groups + grid.scheme().group_of(col));
                *error = weight[at] - params.value(out.codes[at]);
            }
        }
        Self {
            curvature,
            grid,
            weight,
            zeros,
            out,
            groups,
            errors,
            gained: 0.0,
            moves: 0,
        }
    }

    fn finish(self) -> Gain {
        let error = self
            .errors
            .iter()
            .map(|&e| f64::from(e) * f64::from(e))
            .sum();
        Gain {
            loss: self.gained,
            error,
        }
    }

    /// One group of every row: gradients as one product, then scale and codes row by row.
    fn group(&mut self, group: usize) {
        let n = self.curvature.n;
        let rows = self.weight.len() / n;
        let columns = self.grid.columns(group, n);
        let (first, len) = (columns.start, columns.len());
        let h = self.curvature.view();
        let product = |lhs: MatRef<'_, f32>, rhs: MatRef<'_, f32>| {
            let mut out = vec![0f32; rows * len];
            let view = MatMut::from_row_major_slice_mut(&mut out, rows, len);
            matmul(view, Accum::Replace, lhs, rhs, 1.0, Par::Seq);
            out
        };
        let errors = MatRef::from_row_major_slice(&self.errors, rows, n);
        let mut gradient = product(errors, h.subcols(first, len));
        let mut steps = Vec::with_capacity(rows * len);
        for row in 0..rows {
            let zero = f32::from(self.out.params(row * self.groups + group).zero_point);
            let codes = &self.out.codes[row * n..][columns.clone()];
            steps.extend(codes.iter().map(|&code| f32::from(code) - zero));
        }
        let inside = h.submatrix(first, first, len, len);
        let bend = product(MatRef::from_row_major_slice(&steps, rows, len), inside);
        for row in 0..rows {
            let span = row * len..(row + 1) * len;
            let mut part = Part {
                row,
                columns: columns.clone(),
                params: self.out.params(row * self.groups + group),
                gradient: &mut gradient[span.clone()],
                steps: &mut steps[span.clone()],
                bend: &bend[span],
            };
            self.scale(&mut part);
            self.codes(&mut part);
            self.out.set(row * self.groups + group, part.params);
        }
    }

    /// The scale with the least loss for the present codes, as far as it can be stored.
    fn scale(&mut self, part: &mut Part<'_>) {
        let dot = |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
        let slope = dot(part.gradient, part.steps);
        let curvature = dot(part.bend, part.steps);
        let wanted = part.params.scale + slope / curvature;
        // NaN and infinity where no live column has a code off zero.
        if !wanted.is_finite() || wanted * part.params.scale <= 0.0 {
            return;
        }
        let change = storable(wanted) - part.params.scale;
        let gain = change * (2.0 * slope - change * curvature);
        if gain <= 0.0 {
            return;
        }
        part.params.scale += change;
        for (gradient, bend) in part.gradient.iter_mut().zip(part.bend) {
            *gradient -= change * bend;
        }
        let n = self.curvature.n;
        let errors = &mut self.errors[part.row * n..][part.columns.clone()];
        for ((error, steps), col) in errors
            .iter_mut()
            .zip(&*part.steps)
            .zip(part.columns.clone())
        {
            if self.curvature.values[col * n + col] > 0.0 {
                *error -= change * steps;
            }
        }
        self.gained += f64::from(gain);
        self.moves += 1;
    }

    /// Every code in turn to the one with the least loss given the others; dead columns to the nearest.
    fn codes(&mut self, part: &mut Part<'_>) {
        let n = self.curvature.n;
        let rounder = self.grid.rounder(part.params);
        for (i, col) in part.columns.clone().enumerate() {
            let at = part.row * n + col;
            if self.zeros.is_some_and(|zeros| zeros[at]) {
                continue;
            }
            let h = &self.curvature.values[col * n..][..n];
            let live = h[col] > 0.0;
            let now = rounder.value(part.steps[i]);
            let target = if live {
                now + part.gradient[i] / h[col]
            } else {
                self.weight[at]
            };
            let steps = rounder.steps(target);
            if steps == part.steps[i] {
                continue;
            }
            part.steps[i] = steps;
            self.out.codes[at] = rounder.code(steps);
            if live {
                let change = rounder.value(steps) - now;
                self.gained += f64::from(change * (2.0 * part.gradient[i] - change * h[col]));
                self.moves += 1;
                self.errors[at] -= change;
                for (gradient, &h) in part.gradient.iter_mut().zip(&h[part.columns.clone()]) {
                    *gradient -= change * h;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    //! Each of the two steps alone, on a case where the best answer is known.

    use half::f16;
    use rayon::prelude::*;

    use super::*;
    use crate::grid::{Granularity, ScaleSearch};
    use crate::rtn::Parts;

    /// Sixteen weights on the levels of scale 0.5, given with `scale` and `codes`; after one sweep.
    fn refined(scale: f32, codes: [u8; 16]) -> (Vec<f16>, Vec<u8>, Gain) {
        let grid = Grid {
            bits: 4,
            symmetric: false,
            granularity: Granularity::Channel,
            search: ScaleSearch::None,
        };
        let weight: Vec<f32> = (0..16).map(|code| 0.5 * (code as f32 - 8.0)).collect();
        let identity: Vec<f64> = (0..256)
            .map(|i| if i / 16 == i % 16 { 1.0 } else { 0.0 })
            .collect();
        let curvature = Curvature::new(16, &identity);
        let mut parts = Parts::new(1, 16, &grid);
        let gain = parts
            .par_panels(1)
            .map(|mut panel| {
                panel.set(
                    0,
                    GroupParams {
                        scale,
                        zero_point: 8,
                    },
                );
                panel.codes.copy_from_slice(&codes);
                refine(&curvature, &grid, &weight, None, &mut panel, 1)
            })
            .find_any(|_| true)
            .expect("one panel");
        let matrix = parts.finish();
        (matrix.scales, matrix.codes, gain)
    }

    #[test]
    fn a_scale_is_fitted_to_its_codes() {
        let codes: [u8; 16] = std::array::from_fn(|code| code as u8);
        let (scales, kept, gain) = refined(0.5625, codes);
        assert_eq!((scales[0].to_f32(), kept), (0.5, codes.to_vec()));
        // Σ (code − 8)² = 344 times the square of 1/16.
        assert_eq!((gain.loss, gain.error), (344.0 / 256.0, 0.0));
    }

    #[test]
    fn a_code_is_moved_to_its_best_level() {
        let codes: [u8; 16] = std::array::from_fn(|code| code as u8);
        let mut wrong = codes;
        // Around the zero point and balanced, so that the scale that fits best stays what it is.
        (wrong[8], wrong[3], wrong[13]) = (9, 4, 14);
        let (scales, moved, gain) = refined(0.5, wrong);
        assert_eq!(moved, codes);
        assert!((scales[0].to_f32() - 0.5).abs() < 0.01);
        assert!(
            gain.loss > 0.7 && gain.error < 0.04,
            "{} {}",
            gain.loss,
            gain.error
        );
    }
}
