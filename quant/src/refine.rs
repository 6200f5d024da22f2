//! Coordinate descent after GPTQ: moves single codes and scales while that lowers the layer's loss.
//!
//! The sweep of GPTQ never looks back at a column. Here every scale is set again to the best one given the
//! codes, and every code to the best one given all the others; both only lower `(W−Q)·H·(W−Q)ᵀ`. Source of
//! the code step: Behdin et al., QuantEase, arXiv 2309.01885, which uses it instead of GPTQ; the scale step
//! is the least squares in one variable.

use std::ops::Range;

use qbin_runtime::kernels::gemm::{COLS, Operand, Right, Store, View, product};
use qbin_runtime::kernels::{Isa, Vectorized};

use crate::curvature::Curvature;
use crate::grid::{Grid, GroupParams, Rounder, storable};
use crate::rtn::{Panel, kept};

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

/// A panel under refinement. Matrices have one row per column of the weight, so that the inner loops run over the
/// panel's rows.
struct Refinement<'a, 'b> {
    isa: Isa,
    curvature: &'a Curvature,
    grid: &'a Grid,
    /// `[rows, n]`.
    weight: &'a [f32],
    zeros: Option<&'a [bool]>,
    out: &'a mut Panel<'b>,
    rows: usize,
    groups: usize,
    /// `W − Q`, `[rows, n]`; zero for dead columns.
    errors: Right<f32>,
    /// Decrease of the loss, per row.
    gained: Vec<f64>,
    moves: u64,
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
        let rows = weight.len() / n;
        let mut errors = Right::zeros(rows, n);
        let mut column = vec![0f32; rows];
        for group in 0..groups {
            for col in grid.columns(group, n).filter(|&col| curvature.live(col)) {
                for (row, error) in column.iter_mut().enumerate() {
                    let (at, params) = (row * n + col, out.params(row * groups + group));
                    *error = weight[at] - params.value(out.codes[at]);
                }
                errors.set(col, &column);
            }
        }
        Self {
            isa: Isa::detect(),
            curvature,
            grid,
            weight,
            zeros,
            out,
            rows,
            groups,
            errors,
            gained: vec![0.0; rows],
            moves: 0,
        }
    }

    fn finish(self) -> Gain {
        let mut column = vec![0f32; self.rows];
        let mut error = 0.0;
        for col in 0..self.curvature.n {
            self.errors.get(col, &mut column);
            error = column
                .iter()
                .fold(error, |sum, &e| sum + f64::from(e) * f64::from(e));
        }
        Gain {
            loss: self.gained.iter().sum(),
            error,
        }
    }

    /// One group of every row: gradients as one product, then scales, then codes.
    fn group(&mut self, group: usize) {
        let (n, rows) = (self.curvature.n, self.rows);
        let columns = self.grid.columns(group, n);
        let (first, len) = (columns.start, columns.len());
        let h = self.curvature.view();
        let mut params: Vec<GroupParams> = (0..rows)
            .map(|row| self.out.params(row * self.groups + group))
            .collect();
        let mut steps = vec![0f32; len * rows];
        for (row, params) in params.iter().enumerate() {
            let codes = &self.out.codes[row * n..][columns.clone()];
            for (steps, &code) in steps.chunks_mut(rows).zip(codes) {
                steps[row] = f32::from(code) - f32::from(params.zero_point);
            }
        }
        let order: Vec<usize> = columns.clone().collect();
        let mut errors = vec![0f32; len * rows];
        self.errors.get(first, &mut errors);
        let mut part = Part {
            curvature: self.curvature,
            kept: kept(self.zeros, n, rows, &order),
            columns: columns.clone(),
            gradient: self.product(h.subrows(first, len), self.errors.all()),
            bend: self.product(
                h.submatrix(first, first, len, len),
                View::row_major(&steps, len, rows),
            ),
            steps,
            errors: &mut errors,
            gained: &mut self.gained,
            moves: &mut self.moves,
        };
        let fit = self.isa.run(Fit(&part));
        let changes: Vec<f32> = (params.iter_mut().zip(fit))
            .map(|(params, fit)| part.rescale(params, fit))
            .collect();
        self.isa.run(Rescale(&mut part, &changes));
        let rounders: Vec<Rounder> = params.iter().map(|&p| self.grid.rounder(p)).collect();
        for (i, col) in columns.clone().enumerate() {
            if self.curvature.live(col) {
                self.isa.run(MoveCodes(&mut part, &rounders, i));
            } else {
                for (row, rounder) in rounders.iter().enumerate() {
                    let at = i * rows + row;
                    part.steps[at] = rounder.steps(self.weight[row * n + col]) * part.kept[at];
                }
            }
        }
        for (row, rounder) in rounders.iter().enumerate() {
            let codes = &mut self.out.codes[row * n..][columns.clone()];
            for (code, steps) in codes.iter_mut().zip(part.steps.chunks(rows)) {
                *code = rounder.code(steps[row]);
            }
            self.out.set(row * self.groups + group, params[row]);
        }
        self.errors.set(first, &errors);
    }

    /// `h·x` for `x[.., rows]`.
    fn product(&self, h: View<'_, f32>, x: impl Operand<f32, COLS>) -> Vec<f32> {
        let mut out = vec![0f32; h.rows() * self.rows];
        product(self.isa, &mut out, self.rows, Store::Replace, h, x);
        out
    }
}

/// One group of all rows while it is worked on; all matrices are `[len, rows]`.
struct Part<'a> {
    curvature: &'a Curvature,
    columns: Range<usize>,
    /// 0 for what is held at zero and 1 for the rest.
    kept: Vec<f32>,
    /// `H·(W−Q)`, of these columns.
    gradient: Vec<f32>,
    /// `H·steps` within the group.
    bend: Vec<f32>,
    /// The codes less the zero point.
    steps: Vec<f32>,
    /// `W − Q` of these columns.
    errors: &'a mut [f32],
    gained: &'a mut [f64],
    moves: &'a mut u64,
}

impl Part<'_> {
    /// Gives a row's group the scale with the least loss for the present codes, as far as it can be stored, and tells
    /// by how much it changed.
    fn rescale(&mut self, params: &mut GroupParams, fit: RowFit) -> f32 {
        let wanted = params.scale + fit.slope / fit.curvature;
        // NaN and infinity where no live column has a code off zero.
        if !wanted.is_finite() || wanted * params.scale <= 0.0 {
            return 0.0;
        }
        let change = storable(wanted) - params.scale;
        let gain = change * (2.0 * fit.slope - change * fit.curvature);
        if gain <= 0.0 {
            return 0.0;
        }
        params.scale += change;
        self.gained[fit.row] += f64::from(gain);
        *self.moves += 1;
        change
    }
}

/// The loss of one row as a parabola of its scale.
struct RowFit {
    row: usize,
    slope: f32,
    curvature: f32,
}

/// Slope and curvature of the loss along every row's scale.
struct Fit<'a, 'b>(&'a Part<'b>);

impl Vectorized for Fit<'_, '_> {
    type Output = Vec<RowFit>;

    #[inline(always)]
    fn run(self) -> Vec<RowFit> {
        let rows = self.0.gained.len();
        let (mut slopes, mut curvatures) = (vec![0f32; rows], vec![0f32; rows]);
        let columns = self.0.gradient.chunks(rows).zip(self.0.bend.chunks(rows));
        for ((gradient, bend), steps) in columns.zip(self.0.steps.chunks(rows)) {
            let sums = slopes.iter_mut().zip(&mut curvatures);
            for (((slope, curvature), &steps), (&gradient, &bend)) in
                sums.zip(steps).zip(gradient.iter().zip(bend))
            {
                *slope = gradient.mul_add(steps, *slope);
                *curvature = bend.mul_add(steps, *curvature);
            }
        }
        let fits = slopes.into_iter().zip(curvatures).enumerate();
        fits.map(|(row, (slope, curvature))| RowFit {
            row,
            slope,
            curvature,
        })
        .collect()
    }
}

/// What the changes of the scales make of gradients and errors.
struct Rescale<'a, 'b>(&'a mut Part<'b>, &'a [f32]);

impl Vectorized for Rescale<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self(part, changes) = self;
        let rows = changes.len();
        let gradients = part.gradient.chunks_mut(rows).zip(part.bend.chunks(rows));
        let errors = part.errors.chunks_mut(rows).zip(part.steps.chunks(rows));
        for ((gradients, errors), col) in gradients.zip(errors).zip(part.columns.clone()) {
            if !part.curvature.live(col) {
                continue;
            }
            for ((gradient, &bend), &change) in gradients.0.iter_mut().zip(gradients.1).zip(changes)
            {
                *gradient = change.mul_add(-bend, *gradient);
            }
            for ((error, &steps), &change) in errors.0.iter_mut().zip(errors.1).zip(changes) {
                *error = change.mul_add(-steps, *error);
            }
        }
    }
}

/// The codes of the group's live column `.2` to those with the least loss given all others; only the columns after it
/// look at their gradients again.
struct MoveCodes<'a, 'b>(&'a mut Part<'b>, &'a [Rounder], usize);

impl Vectorized for MoveCodes<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self(part, rounders, i) = self;
        let rows = rounders.len();
        let col = part.columns.start + i;
        let h = &part.curvature.values()[col * part.curvature.n..][part.columns.clone()];
        let curvature = h[i];
        let (gradient, later) = part.gradient[i * rows..].split_at_mut(rows);
        let cells = part.steps[i * rows..]
            .iter_mut()
            .zip(&mut part.errors[i * rows..]);
        let mut moves = 0u32;
        for ((((rounder, gained), gradient), &kept), (steps, error)) in rounders
            .iter()
            .zip(&mut *part.gained)
            .zip(&mut *gradient)
            .zip(&part.kept[i * rows..])
            .zip(cells)
        {
            let now = rounder.value(*steps);
            let best = rounder.steps(now + *gradient / curvature) * kept;
            let change = rounder.value(best) - now;
            *gained += f64::from(change * (2.0 * *gradient - change * curvature));
            *error -= change;
            moves += u32::from(best != *steps);
            *steps = best;
            // From here on the column holds what the later ones must hear of.
            *gradient = change;
        }
        *part.moves += u64::from(moves);
        if moves == 0 {
            return;
        }
        for (later, &h) in later.chunks_mut(rows).zip(&h[i + 1..]) {
            for (later, &change) in later.iter_mut().zip(&*gradient) {
                *later = change.mul_add(-h, *later);
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
        let curvature = Curvature::new(16, identity);
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
