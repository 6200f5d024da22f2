//! One linear layer of the reference path: `y = x · Wᵀ + b` in f32.

use crate::{RuntimeError, matmul_nt};
use qbin_format::Weight;
use rayon::prelude::*;
use std::borrow::Cow;

/// Rows of W per unit of parallel work; fixed, so that results do not depend on the thread count.
const PANEL_ROWS: usize = 128;
/// Tokens per sweep over W; bounds the memory of the panels' outputs.
const SLAB_TOKENS: usize = 1024;

/// A weight matrix `[rows, cols]`, row major.
pub enum Matrix<'m> {
    /// As it lies in the mapped file; read panel by panel, never held as a whole.
    Stored(Weight<'m>),
    /// In memory, because a pass changes it.
    Owned(Vec<f32>),
}

/// A weight matrix with its bias.
pub struct Linear<'m> {
    /// Name of the weight's tensor.
    pub name: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// `W[rows, cols]`.
    pub weight: Matrix<'m>,
    /// `b[rows]`.
    pub bias: Option<Vec<f32>>,
}

impl Linear<'_> {
    /// `x[tokens, cols]` to `[tokens, rows]`.
    ///
    /// # Panics
    /// If `x` is not a whole number of rows of `cols`.
    pub fn apply(&self, x: &[f32]) -> Vec<f32> {
        assert!(
            x.len().is_multiple_of(self.cols),
            "{}: {} inputs for {} columns",
            self.name,
            x.len(),
            self.cols
        );
        let mut out = vec![0.0; x.len() / self.cols * self.rows];
        for (x, out) in x
            .chunks(SLAB_TOKENS * self.cols)
            .zip(out.chunks_mut(SLAB_TOKENS * self.rows))
        {
            self.apply_slab(x, out);
        }
        out
    }

    fn apply_slab(&self, x: &[f32], out: &mut [f32]) {
        let tokens = x.len() / self.cols;
        let starts: Vec<usize> = (0..self.rows).step_by(PANEL_ROWS).collect();
        let panels: Vec<Vec<f32>> = starts
            .par_iter()
            .map(|&first| self.panel(x, tokens, first))
            .collect();
        out.par_chunks_mut(self.rows)
            .enumerate()
            .for_each(|(token, row)| {
                for (&first, panel) in starts.iter().zip(&panels) {
                    let width = panel.len() / tokens;
                    row[first..first + width]
                        .copy_from_slice(&panel[token * width..(token + 1) * width]);
                }
                if let Some(bias) = &self.bias {
                    row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
                }
            });
    }

    /// Output features `first..first + PANEL_ROWS` for all tokens, `[tokens, width]`.
    fn panel(&self, x: &[f32], tokens: usize, first: usize) -> Vec<f32> {
        let last = (first + PANEL_ROWS).min(self.rows);
        let width = last - first;
        let weight = match &self.weight {
            Matrix::Owned(weight) => Cow::Borrowed(&weight[first * self.cols..last * self.cols]),
            Matrix::Stored(stored) => {
                let mut panel = vec![0.0; width * self.cols];
                stored.read_rows_f32(first..last, &mut panel);
                Cow::Owned(panel)
            }
        };
        let mut out = vec![0.0; tokens * width];
        matmul_nt(&mut out, x, &weight, (tokens, self.cols, width));
        out
    }

    /// Brings the weight into memory, so that it can be changed, and checks that it is finite.
    ///
    /// # Errors
    /// [`RuntimeError::NonFinite`].
    pub fn own(&mut self) -> Result<&mut Vec<f32>, RuntimeError> {
        if let Matrix::Stored(stored) = &self.weight {
            let mut weight = vec![0.0; self.rows * self.cols];
            let cols = self.cols;
            weight
                .par_chunks_mut(PANEL_ROWS * cols)
                .enumerate()
                .for_each(|(panel, out)| {
                    let first = panel * PANEL_ROWS;
                    stored.read_rows_f32(first..first + out.len() / cols, out);
                });
            check_finite(&self.name, &weight)?;
            self.weight = Matrix::Owned(weight);
        }
        match &mut self.weight {
            Matrix::Owned(weight) => Ok(weight),
            Matrix::Stored(_) => unreachable!("owned just above"),
        }
    }
}

/// # Errors
/// [`RuntimeError::NonFinite`] for the first NaN or infinity.
pub(crate) fn check_finite(tensor: &str, values: &[f32]) -> Result<(), RuntimeError> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => Err(RuntimeError::NonFinite {
            tensor: tensor.into(),
            index,
            value: values[index],
        }),
    }
}
