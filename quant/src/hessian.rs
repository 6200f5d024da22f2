//! Second moments of a linear's inputs: the Hessian of its squared output error.

use qbin_runtime::kernels::Isa;
use qbin_runtime::kernels::gemm::{Store, View, product};
use qbin_runtime::kernels::gram::{self, Slab};
use qbin_runtime::kernels::pages;
use rayon::prelude::*;

use crate::error::QuantError;
use crate::scan::position;

/// Tokens that share a feature's rounding step.
const SLAB: usize = 2048;
/// Slabs whose moments are summed together: the sums, `n²` numbers, are then read and written less often.
const PENDING: usize = 4;
/// The most features whose moments are summed in f64 instead, which then costs next to nothing.
const EXACT_FEATURES: usize = 256;
/// The largest magnitude of an input.
const LARGEST: f32 = 1e16;
/// Rows measured by one task.
const PANEL_ROWS: usize = 64;

/// Sums over the calibration tokens `x` that one linear saw.
///
/// One `n × n` f64 buffer, `n` the number of input features, and while tokens come in up to four slabs of 2048 of
/// them as int8. Feed real tokens only: padding counts as evidence too.
///
/// The second moments are those of the inputs rounded to int8, feature by feature with a step of 1/127 of the
/// feature's largest magnitude among 2048 tokens: exact integer sums, about four times as fast as f32, and positive
/// semidefinite like those of any inputs. Tokens with a feature beyond sixteen times its usual size, at most one of
/// thirty-two, are not rounded and set no step. Up to 256 features nothing is rounded, and the sums are in f64.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    n: usize,
    tokens: u64,
    /// `Σ x·xᵀ` but for the pending slabs, row major; valid for column ≤ row.
    second: Vec<f64>,
    pending: Vec<Slab>,
    /// What was pending, for its memory.
    spare: Vec<Slab>,
    abs_sum: Vec<f64>,
}

impl Moments {
    /// Moments of no tokens yet.
    pub fn new(n: usize) -> Self {
        Self {
            n,
            tokens: 0,
            second: pages::zeros(n * n),
            pending: Vec::new(),
            spare: Vec::new(),
            abs_sum: vec![0.0; n],
        }
    }

    /// Input features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Tokens seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Mean of `|x|` per input feature; zeros before the first token.
    pub fn abs_mean(&self) -> Vec<f64> {
        self.abs_sum.iter().map(|sum| sum / self.count()).collect()
    }

    /// Mean of `x²` per input feature; zeros before the first token.
    pub fn square_mean(&mut self) -> Vec<f64> {
        self.settle();
        (0..self.n)
            .map(|i| self.second[i * self.n + i] / self.count())
            .collect()
    }

    /// Adds the tokens `x` (`[tokens, n]`, row major).
    ///
    /// # Errors
    /// [`QuantError::NonFiniteInput`]; the moments are then unchanged.
    ///
    /// # Panics
    /// If `x` is not a whole number of tokens.
    pub fn add(&mut self, x: &[f32]) -> Result<(), QuantError> {
        let n = self.n;
        assert!(x.len().is_multiple_of(n), "x is not [tokens, n]");
        let isa = Isa::detect();
        // The sums of a slab tell whether its inputs are fine; of several the first would be added before the last is seen.
        if n <= EXACT_FEATURES || x.len() > SLAB * n {
            self.check(x)?;
        }
        for x in x.chunks(SLAB * n) {
            if n <= EXACT_FEATURES {
                self.add_exact(isa, x);
                continue;
            }
            let mut slab = self.spare.pop().unwrap_or_else(|| Slab::empty(n));
            slab.fill(isa, x);
            // Not so if one of them is NaN.
            if !slab.abs_sums().iter().all(|&sum| sum <= f64::from(LARGEST)) {
                self.check(x)?;
            }
            for (sum, part) in self.abs_sum.iter_mut().zip(slab.abs_sums()) {
                *sum += part;
            }
            self.pending.push(slab);
            if self.pending.len() == PENDING {
                self.settle();
            }
        }
        self.tokens += (x.len() / n) as u64;
        Ok(())
    }

    fn check(&self, x: &[f32]) -> Result<(), QuantError> {
        let n = self.n;
        match position(x, |v| !(-LARGEST..=LARGEST).contains(&v)) {
            Some(at) => Err(QuantError::NonFiniteInput {
                token: self.tokens + (at / n) as u64,
                col: at % n,
                value: x[at],
            }),
            None => Ok(()),
        }
    }

    /// Adds what is pending to the sums.
    fn settle(&mut self) {
        gram::add(Isa::detect(), &self.pending, &mut self.second);
        self.spare.append(&mut self.pending);
    }

    fn add_exact(&mut self, isa: Isa, x: &[f32]) {
        let n = self.n;
        for x in x.chunks(n) {
            for (sum, x) in self.abs_sum.iter_mut().zip(x) {
                *sum += f64::from(x.abs());
            }
        }
        let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let x = View::row_major(&x, x.len() / n, n);
        product(isa, &mut self.second, n, Store::Add, x.transpose(), x);
    }

    /// The moments of the inputs `x / s`, exactly: `Σ → D⁻¹ Σ D⁻¹` with `D = diag(s)`.
    ///
    /// # Panics
    /// If `s` is not `[n]` or a factor is not a positive number.
    pub fn scaled(&mut self, s: &[f32]) {
        assert_eq!(s.len(), self.n, "s is not [n]");
        assert!(
            s.iter().all(|&s| s > 0.0 && s.is_finite()),
            "factors are positive"
        );
        self.settle();
        self.second
            .par_chunks_mut(self.n)
            .enumerate()
            .for_each(|(row, values)| {
                for (value, &other) in values[..=row].iter_mut().zip(s) {
                    *value /= f64::from(s[row]) * f64::from(other);
                }
            });
        for (sum, &s) in self.abs_sum.iter_mut().zip(s) {
            *sum /= f64::from(s);
        }
    }

    /// The mean of `2·x·xᵀ` over tokens, in the same buffer; zeros where no token was seen.
    pub fn finish(mut self) -> Hessian {
        self.settle();
        self.spare.clear();
        let factor = 2.0 / self.count();
        mirror(&mut self.second, self.n, |values| {
            values.iter_mut().for_each(|value| *value *= factor);
        });
        Hessian {
            n: self.n,
            values: self.second,
        }
    }

    /// The mean of `x·xᵀ` in f32, for repeated products.
    pub fn metric(&mut self) -> Metric {
        self.settle();
        let n = self.n;
        let mut values = vec![0f32; n * n];
        values.par_chunks_mut(n).enumerate().for_each(|(row, out)| {
            for (col, out) in out.iter_mut().enumerate() {
                let at = row.max(col) * n + row.min(col);
                *out = (self.second[at] / self.count()) as f32;
            }
        });
        Metric { n, values }
    }

    /// Divisor of the means.
    fn count(&self) -> f64 {
        self.tokens.max(1) as f64
    }
}

/// Copies the lower triangle (column ≤ row) of `values[n, n]` onto the upper, once `prepare` has seen each piece of its
/// rows. Tiles are turned in a buffer: rows are often a power of two apart, and their lines then drive each other out.
pub(crate) fn mirror(values: &mut [f64], n: usize, prepare: impl Fn(&mut [f64])) {
    const TILE: usize = 32;
    let mut turned = [[0f64; TILE]; TILE];
    for top in (0..n).step_by(TILE) {
        let bottom = n.min(top + TILE);
        for left in (0..=top).step_by(TILE) {
            for row in top..bottom {
                let piece = &mut values[row * n..][left..(row + 1).min(left + TILE)];
                prepare(piece);
                for (turned, &value) in turned.iter_mut().zip(&*piece) {
                    turned[row - top] = value;
                }
            }
            for (turned, col) in turned.iter().zip(left..n) {
                let first = bottom.min(top.max(col + 1));
                let values = &mut values[col * n..][first..bottom];
                values.copy_from_slice(&turned[first - top..bottom - top]);
            }
        }
    }
}

/// The mean of `2·x·xᵀ`, `[n, n]`, symmetric, undamped.
#[derive(Clone, Debug)]
pub struct Hessian {
    pub(crate) n: usize,
    pub(crate) values: Vec<f64>,
}

impl Hessian {
    /// Rows and columns.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The values, `[n, n]`.
    pub fn values(&self) -> &[f64] {
        &self.values
    }
}

/// The mean of `x·xᵀ` in f32, `[n, n]`: measures a change of weights as `δᵀ M δ`, which is the mean
/// over all tokens of the squared change of one output.
#[derive(Clone, Debug)]
pub struct Metric {
    n: usize,
    values: Vec<f32>,
}

impl Metric {
    /// Rows and columns.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The values, `[n, n]`.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The mean of `x²` per input feature.
    pub fn diagonal(&self) -> Vec<f64> {
        (0..self.n)
            .map(|i| f64::from(self.values[i * self.n + i]))
            .collect()
    }

    /// `Σ_rows δᵀ M δ` for the rows `delta` (`[rows, n]`).
    pub(crate) fn measure(&self, delta: &[f32]) -> f64 {
        self.measure_rows(delta, 0, self.n).iter().sum()
    }

    /// `‖(W−V)·X‖² / ‖W·X‖²` of matrices `[rows, n]`; 0 where `W·X` is.
    pub fn relative_error(&self, weight: &[f32], other: &[f32]) -> f64 {
        let delta: Vec<f32> = weight.iter().zip(other).map(|(w, v)| w - v).collect();
        let signal = self.measure_panels(weight);
        if signal > 0.0 {
            self.measure_panels(&delta) / signal
        } else {
            0.0
        }
    }

    /// [`Self::measure`] with the rows in fixed panels, in parallel.
    pub(crate) fn measure_panels(&self, delta: &[f32]) -> f64 {
        let panels: Vec<f64> = delta
            .par_chunks(PANEL_ROWS * self.n)
            .map(|rows| self.measure(rows))
            .collect();
        panels.iter().sum()
    }

    /// `δ·M` for the columns `first..first + len`, `[rows, len]`; `delta` is `[rows, n]`.
    pub fn cross(&self, delta: &[f32], first: usize, len: usize) -> Vec<f32> {
        let rows = delta.len() / self.n;
        let mut out = vec![0f32; rows * len];
        let (delta, m) = (View::row_major(delta, rows, self.n), self.view());
        // M is symmetric, and its rows are contiguous.
        let m = m.subrows(first, len).transpose();
        product(Isa::detect(), &mut out, len, Store::Replace, delta, m);
        out
    }

    /// `δᵀ M δ` of every row of `delta` (`[rows, len]`), with the square of `M` from `first` on.
    pub(crate) fn measure_rows(&self, delta: &[f32], first: usize, len: usize) -> Vec<f64> {
        let rows = delta.len() / len;
        let mut out = vec![0f32; delta.len()];
        let m = self.view().submatrix(first, first, len, len);
        let left = View::row_major(delta, rows, len);
        product(Isa::detect(), &mut out, len, Store::Replace, left, m);
        let dot = |(d, p): (&[f32], &[f32])| {
            d.iter()
                .zip(p)
                .map(|(&d, &p)| f64::from(d) * f64::from(p))
                .sum()
        };
        delta.chunks(len).zip(out.chunks(len)).map(dot).collect()
    }

    fn view(&self) -> View<'_, f32> {
        View::row_major(&self.values, self.n, self.n)
    }
}

/// `‖(W−V)·X‖² / ‖W·X‖²` under the metric, or `‖W−V‖² / ‖W‖²` where there is none; 0 where the divisor is.
pub fn relative_error(weight: &[f32], other: &[f32], metric: Option<&Metric>) -> f64 {
    if let Some(metric) = metric {
        return metric.relative_error(weight, other);
    }
    let square = |values: &mut dyn Iterator<Item = f32>| -> f64 {
        values.map(|v| f64::from(v) * f64::from(v)).sum()
    };
    let signal = square(&mut weight.iter().copied());
    if signal > 0.0 {
        square(&mut weight.iter().zip(other).map(|(w, v)| w - v)) / signal
    } else {
        0.0
    }
}
