//! GPTQ: rounds column by column and lets the later columns make up for the error so far.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use qbin_format::QuantizedMatrix;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::QuantError;
use crate::factor::Block;
pub use crate::factor::Factor;
use crate::grid::{Grid, GroupParams, Rounder};
use crate::hessian::{Metric, Moments};
use crate::refine::refine;
use crate::rtn::{Panel, Parts, check_weight, rtn};

/// The order in which columns are rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActOrder {
    #[default]
    /// By falling diagonal of the Hessian inside each group, then the groups likewise; costs the runtime
    /// nothing, because groups stay whole and in place in the file.
    Group,
    /// As in the file.
    None,
}

/// How GPTQ is run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GptqParams {
    /// The grid to round to.
    pub grid: Grid,
    /// Part of the mean diagonal of the Hessian that is added to its diagonal; 0.01 in the paper.
    pub damp_fraction: f64,
    /// The order of the columns.
    pub act_order: ActOrder,
    /// Columns corrected at once, rounded up to whole groups. Speed only, up to rounding; 128 in the paper.
    pub update_block: usize,
    /// How often, at most, scales and codes are moved again after the sweep; 0 in the paper. Costs about as
    /// much as the sweep each time.
    pub refine_sweeps: usize,
}

impl GptqParams {
    /// The usual setting on `grid`: damping 0.01, group-aware order, blocks of 128 columns, three sweeps of
    /// refinement.
    pub fn new(grid: Grid) -> Self {
        Self {
            grid,
            damp_fraction: 0.01,
            act_order: ActOrder::Group,
            update_block: 128,
            refine_sweeps: 3,
        }
    }

    pub(crate) fn check(&self, cols: usize) -> Result<(), QuantError> {
        self.grid.check(cols)?;
        if !(self.damp_fraction >= 0.0 && self.damp_fraction.is_finite()) {
            return Err(QuantError::DampFraction {
                damp_fraction: self.damp_fraction,
            });
        }
        if self.update_block == 0 {
            return Err(QuantError::UpdateBlock);
        }
        Ok(())
    }
}

/// A quantized matrix and how it went.
#[derive(Clone, Debug, PartialEq)]
pub struct Gptq {
    /// The matrix, columns in their order in the file.
    pub quantized: QuantizedMatrix,
    /// What was done and how well.
    pub report: GptqReport,
}

/// A matrix in which some weights are zero and the others are to be put on a grid.
#[derive(Clone, Copy, Debug)]
pub struct Survivors<'a> {
    /// `[rows, n]`, true for the weights held at zero.
    pub zeros: &'a [bool],
    /// The weights the sweep starts from, `[rows, n]`: the original ones, for which it then makes up for the
    /// zeros too, or survivors that do so already.
    pub start: &'a [f32],
    /// The mean of `x·xᵀ`, for the report.
    pub metric: &'a Metric,
}

/// What GPTQ did with one matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct GptqReport {
    /// The damping that the factorization took.
    pub damp_fraction: f64,
    /// `‖(W−Q)·X‖² / ‖W·X‖²` over the calibration tokens; where `fallback` says so, with the diagonal of
    /// `X·Xᵀ` only; 0 where no token was seen.
    pub relative_error: f64,
    /// Weights whose corrected value lay beyond the grid.
    pub clipped: u64,
    /// Input features that were zero for every token; their weights have their nearest values.
    pub dead_columns: usize,
    /// What was done otherwise than asked, and why.
    pub fallback: Option<String>,
}

/// Quantizes one linear layer column by column, spreading each column's error over the later ones.
///
/// `weight` is `[rows, cols]`, row major; `hessian` are the moments of its inputs, consumed. For several
/// matrices with the same inputs make one [`Factor`] and call [`Factor::quantize`].
///
/// # Source
/// Frantar et al., GPTQ, arXiv 2210.17323, Algorithm 1, in the equivalent left-looking form of LDLQ (Chee et
/// al., QuIP, arXiv 2307.13304). Differences: group parameters are found on the corrected weights, also
/// inside an update block; they are rounded to f16 first; columns are ordered inside groups; dead columns
/// keep their nearest values instead of zero; ties round to even; codes and scales are refined afterwards
/// by coordinate descent.
///
/// # Errors
/// [`QuantError::NonFiniteWeight`] and the errors of [`Factor::new`].
///
/// # Panics
/// If `weight` is not `[rows, cols]` or `hessian` is not of `cols` features.
pub fn gptq(
    weight: &[f32],
    rows: usize,
    cols: usize,
    hessian: Moments,
    params: &GptqParams,
) -> Result<Gptq, QuantError> {
    assert_eq!(hessian.n(), cols, "hessian is not [cols, cols]");
    Factor::new(hessian, params)?.quantize(weight, rows, &params.grid)
}

impl Factor {
    /// [`gptq`] with the factor already made; `weight` is `[rows, n]`.
    ///
    /// # Errors
    /// [`QuantError::NonFiniteWeight`], [`QuantError::Bits`].
    ///
    /// # Panics
    /// If `weight` is not `[rows, n]`, or if `grid` has another granularity than the factor was made for.
    pub fn quantize(&self, weight: &[f32], rows: usize, grid: &Grid) -> Result<Gptq, QuantError> {
        self.quantize_survivors(weight, rows, grid, None)
    }

    /// [`Factor::quantize`] with some weights held at zero. They get the code of zero, their errors are fed forward
    /// like any other, and groups are fitted to the others.
    ///
    /// # Errors
    /// [`QuantError::NonFiniteWeight`], [`QuantError::Bits`].
    ///
    /// # Panics
    /// If a matrix is not `[rows, n]`, or if `grid` has another granularity than the factor was made for.
    pub fn quantize_survivors(
        &self,
        weight: &[f32],
        rows: usize,
        grid: &Grid,
        survivors: Option<&Survivors<'_>>,
    ) -> Result<Gptq, QuantError> {
        let cols = self.n();
        assert!(
            self.fits(grid),
            "the factor was made for another granularity"
        );
        check_weight(weight, rows, cols)?;
        grid.check(cols)?;
        let zeros = survivors.map(|survivors| survivors.zeros);
        let start = survivors.map_or(weight, |survivors| survivors.start);
        assert!(
            zeros.is_none_or(|zeros| zeros.len() == weight.len()) && start.len() == weight.len(),
            "zeros and start are not [rows, n]"
        );
        let mut report = GptqReport {
            damp_fraction: self.damp_fraction,
            relative_error: 0.0,
            clipped: 0,
            dead_columns: self.dead_columns(),
            fallback: self.fallback.clone(),
        };
        if self.is_dead() {
            report.fallback = Some("round-to-nearest: every calibration input was zero".into());
            let mut weight = weight.to_vec();
            for (weight, _) in weight
                .iter_mut()
                .zip(zeros.unwrap_or_default())
                .filter(|(_, zero)| **zero)
            {
                *weight = 0.0;
            }
            let quantized = rtn(&weight, rows, cols, grid, None, None)?;
            return Ok(Gptq { quantized, report });
        }

        let height = if rows < 2048 { 32 } else { 64 };
        let importance: Vec<f32> = self.root.iter().map(|root| root * root).collect();
        let mut out = Parts::new(rows, cols, grid);
        let panels = (
            out.par_panels(height),
            weight.par_chunks(height * cols),
            start.par_chunks(height * cols),
        );
        let tallies: Vec<Tally> = panels
            .into_par_iter()
            .enumerate()
            .map(|(panel, (mut out, weight, start))| {
                let zeros = zeros.map(|zeros| &zeros[panel * height * cols..][..weight.len()]);
                let mut tally = Sweep::new(self, grid, &importance, start, zeros, &mut out).run();
                if let Some(curvature) = &self.curvature {
                    let sweeps = self.refine_sweeps;
                    let gain = refine(curvature, grid, weight, zeros, &mut out, sweeps);
                    tally.loss -= gain.loss;
                    tally.error = gain.error;
                }
                tally
            })
            .collect();
        // In the order of the panels, so that the sums are the same for every number of threads.
        let mut total = Tally::default();
        tallies.iter().for_each(|tally| total.add(tally));
        report.clipped = total.clipped;
        report.relative_error = total.relative_error(self.damp);
        let quantized = out.finish();
        if let Some(survivors) = survivors {
            // The sums of a sweep that starts elsewhere are not those of `weight`.
            report.relative_error = survivors
                .metric
                .relative_error(weight, &quantized.dequantize());
        }
        Ok(Gptq { quantized, report })
    }
}

/// Sums over the rows of a panel.
#[derive(Default)]
struct Tally {
    /// `Σ r²·(target − q)²`: the loss under the damped Hessian.
    loss: f64,
    /// `‖W − Q‖²` of live columns.
    error: f64,
    /// `W·H·Wᵀ` under the damped Hessian.
    signal: f64,
    /// `‖W‖²` of live columns.
    weight: f64,
    clipped: u64,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.loss += other.loss;
        self.error += other.error;
        self.signal += other.signal;
        self.weight += other.weight;
        self.clipped += other.clipped;
    }

    /// Takes the damping out of both sides again.
    fn relative_error(&self, damp: f64) -> f64 {
        let signal = self.signal - damp * self.weight;
        if signal > 0.0 {
            (self.loss - damp * self.error).max(0.0) / signal
        } else {
            0.0
        }
    }
}

/// One panel of rows on its way through the blocks. Matrices are column major, so that a column of the
/// panel is contiguous and the inner loop runs over rows.
struct Sweep<'a, 'b> {
    factor: &'a Factor,
    grid: &'a Grid,
    /// Weight of each place of the sweep in the scale search.
    importance: &'a [f32],
    /// Weights held at zero, `[rows, n]`.
    zeros: Option<&'a [bool]>,
    rows: usize,
    /// `[2·rows, n]` in sweep order: the errors `W − Q` of finished columns above the weights, stacked so
    /// that the feedback and the signal's norm cost one product.
    stacked: Vec<f32>,
    out: &'a mut Panel<'b>,
    tally: Tally,
}

impl<'a, 'b> Sweep<'a, 'b> {
    fn new(
        factor: &'a Factor,
        grid: &'a Grid,
        importance: &'a [f32],
        weight: &[f32],
        zeros: Option<&'a [bool]>,
        out: &'a mut Panel<'b>,
    ) -> Self {
        let n = factor.n();
        let rows = weight.len() / n;
        let mut stacked = vec![0f32; 2 * rows * n];
        for (column, &col) in stacked.chunks_mut(2 * rows).zip(&factor.order) {
            for (row, value) in column[rows..].iter_mut().enumerate() {
                *value = weight[row * n + col];
            }
        }
        Self {
            factor,
            grid,
            importance,
            zeros,
            rows,
            stacked,
            out,
            tally: Tally::default(),
        }
    }

    fn run(mut self) -> Tally {
        let factor = self.factor;
        for block in &factor.blocks {
            let mut current = self.enter(block);
            for (group, places) in &block.groups {
                let start = block.places.start;
                let inside = places.start - start..places.end - start;
                let rounders = self.group(
                    *group,
                    places.start,
                    &current[self.rows * inside.start..][..self.rows * inside.len()],
                );
                for j in inside {
                    self.column(block, j, &mut current, &rounders);
                }
            }
        }
        self.tally
    }

    /// The corrected weights of a block, `[rows, width]`, as they stand before its first column is rounded.
    fn enter(&mut self, block: &Block) -> Vec<f32> {
        let (rows, start, width) = (self.rows, block.places.start, block.places.len());
        let mut feedback = vec![0f32; 2 * rows * width];
        if start > 0 {
            matmul(
                MatMut::from_column_major_slice_mut(&mut feedback, 2 * rows, width),
                Accum::Replace,
                MatRef::from_column_major_slice(&self.stacked[..2 * rows * start], 2 * rows, start),
                MatRef::from_column_major_slice(&block.before, start, width),
                1.0,
                Par::Seq,
            );
        }
        let feedback = MatRef::from_column_major_slice(&feedback, 2 * rows, width);
        let stacked = &self.stacked[2 * rows * start..][..2 * rows * width];
        let weight = MatRef::from_column_major_slice(stacked, 2 * rows, width).subrows(rows, rows);

        let mut signal = feedback.subrows(rows, rows).to_owned();
        let inside = MatRef::from_column_major_slice(&block.inside, width, width);
        matmul(&mut signal, Accum::Add, weight, inside, 1.0, Par::Seq);
        for (j, place) in block
            .places
            .clone()
            .enumerate()
            .filter(|&(_, p)| !self.factor.dead[p])
        {
            let square = |x: f32| f64::from(x) * f64::from(x);
            let column = signal.col(j).iter().map(|&x| square(x)).sum::<f64>();
            self.tally.signal += column * square(self.factor.root[place]);
            self.tally.weight += weight.col(j).iter().map(|&x| square(x)).sum::<f64>();
        }

        let mut current: Vec<f32> = Vec::with_capacity(rows * width);
        stacked
            .chunks(2 * rows)
            .for_each(|column| current.extend_from_slice(&column[rows..]));
        matmul(
            MatMut::from_column_major_slice_mut(&mut current, rows, width),
            Accum::Add,
            feedback.subrows(0, rows),
            MatRef::from_row_major_slice(&block.inverse, width, width),
            1.0,
            Par::Seq,
        );
        current
    }

    /// Chooses and stores every row's parameters of a group from its current weights (`[rows, width]`).
    fn group(&mut self, group: usize, place: usize, current: &[f32]) -> Vec<Rounder> {
        let rows = self.rows;
        let groups = self.out.scales.len() / rows;
        let importance = &self.importance[place..][..current.len() / rows];
        let columns = &self.factor.order[place..][..importance.len()];
        let mut weights = vec![0f32; importance.len()];
        let mut choose = |row: usize| -> GroupParams {
            for ((weight, column), &col) in
                weights.iter_mut().zip(current.chunks(rows)).zip(columns)
            {
                // Zero is on every grid, so what is held there has no say in the choice.
                *weight = match self
                    .zeros
                    .is_some_and(|zeros| zeros[row * self.factor.n() + col])
                {
                    true => 0.0,
                    false => column[row],
                };
            }
            self.grid.params(&weights, Some(importance))
        };
        (0..rows)
            .map(|row| {
                let params = choose(row);
                self.out.set(row * groups + group, params);
                self.grid.rounder(params)
            })
            .collect()
    }

    /// Rounds column `j` of the block and corrects the columns after it.
    fn column(&mut self, block: &Block, j: usize, current: &mut [f32], rounders: &[Rounder]) {
        let (rows, n, width) = (self.rows, self.factor.n(), block.places.len());
        let place = block.places.start + j;
        let (col, dead) = (self.factor.order[place], self.factor.dead[place]);
        let (column, later) = current[j * rows..].split_at_mut(rows);
        let (errors, weights) = self.stacked[place * 2 * rows..][..2 * rows].split_at_mut(rows);
        let (mut loss, mut error) = (0f64, 0f64);
        for row in 0..rows {
            let target = column[row];
            let held = self.zeros.is_some_and(|zeros| zeros[row * n + col]);
            let steps = if held {
                0.0
            } else {
                rounders[row].steps(target)
            };
            let value = rounders[row].value(steps);
            self.out.codes[row * n + col] = rounders[row].code(steps);
            self.tally.clipped += u64::from(!held && rounders[row].clips(target, steps));
            errors[row] = weights[row] - value;
            // From here on the column holds what the later ones must make up for.
            column[row] = target - value;
            loss += f64::from(column[row]) * f64::from(column[row]);
            error += f64::from(errors[row]) * f64::from(errors[row]);
        }
        if !dead {
            let root = f64::from(self.factor.root[place]);
            self.tally.loss += loss * root * root;
            self.tally.error += error;
        }
        let spread = &block.inverse[j * width..][j + 1..width];
        for (other, &factor) in later.chunks_mut(rows).zip(spread) {
            for (value, &error) in other.iter_mut().zip(&*column) {
                *value -= error * factor;
            }
        }
    }
}
