//! GPTQ: rounds column by column and lets the later columns make up for the error so far.

mod params;

use qbin_format::QuantizedMatrix;
use qbin_runtime::times::{Stage, Times};
use rayon::prelude::*;

use crate::error::QuantError;
pub use crate::factor::Factor;
use crate::grid::Grid;
use crate::hessian::{Metric, Moments};
use crate::refine::refine;
use crate::rtn::{Panel, Parts, check_weight, rtn};
use crate::sweep::{Sweep, Tally};
pub use params::{ActOrder, GptqParams};

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
        self.quantize_timed(weight, rows, grid, survivors, &mut Times::default())
    }

    /// [`Factor::quantize_survivors`], with the time of its stages added to `times`.
    pub(crate) fn quantize_timed(
        &self,
        weight: &[f32],
        rows: usize,
        grid: &Grid,
        survivors: Option<&Survivors<'_>>,
        times: &mut Times,
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

        let mut out = Parts::new(rows, cols, grid);
        let total = self.round(weight, start, zeros, grid, &mut out, times);
        report.clipped = total.clipped;
        let quantized = out.finish();
        report.relative_error = match survivors {
            // The sums of a sweep that starts elsewhere are not those of `weight`.
            Some(Survivors { metric, .. }) => {
                metric.relative_error(weight, &quantized.dequantize())
            }
            None => self.relative_error(weight, &total),
        };
        Ok(Gptq { quantized, report })
    }

    /// Sweeps over the rows from `start`, and refines them against `weight`.
    fn round(
        &self,
        weight: &[f32],
        start: &[f32],
        zeros: Option<&[bool]>,
        grid: &Grid,
        out: &mut Parts,
        times: &mut Times,
    ) -> Tally {
        let height = if weight.len() / self.n() < 2048 {
            32
        } else {
            128
        };
        let len = height * self.n();
        let zeros = |panel: usize, weight: &[f32]| -> Option<&[bool]> {
            Some(&zeros?[panel * len..][..weight.len()])
        };
        let importance: Vec<f32> = self.root.iter().map(|root| root * root).collect();
        let mut tallies: Vec<Tally> = times.of(Stage::Sweep, || {
            let panels = (out.par_panels(height), start.par_chunks(len)).into_par_iter();
            let sweep = |(panel, (mut out, start)): (usize, (Panel<'_>, &[f32]))| {
                let zeros = zeros(panel, start);
                Sweep::new(self, grid, &importance, start, zeros, &mut out).run()
            };
            panels.enumerate().map(sweep).collect()
        });
        if self.refine_sweeps > 0 {
            times.of(Stage::Refine, || {
                let panels = (out.par_panels(height), weight.par_chunks(len), &mut tallies);
                let panels = panels.into_par_iter().enumerate();
                panels.for_each(|(panel, (mut out, weight, tally))| {
                    let (zeros, sweeps) = (zeros(panel, weight), self.refine_sweeps);
                    let gain = refine(&self.curvature, grid, weight, zeros, &mut out, sweeps);
                    tally.loss -= gain.loss;
                    tally.error = gain.error;
                });
            });
        }
        // In the order of the panels, so that the sums are the same for every number of threads.
        let mut total = Tally::default();
        tallies.iter().for_each(|tally| total.add(tally));
        total
    }

    /// Of the sums of a sweep over `weight`, the damping taken out of both sides again.
    fn relative_error(&self, weight: &[f32], total: &Tally) -> f64 {
        let (signal, norm) = self.curvature.signal(weight);
        let signal = signal - self.damp * norm;
        match signal > 0.0 {
            true => (total.loss - self.damp * total.error).max(0.0) / signal,
            false => 0.0,
        }
    }
}
