//! Wanda: the weights that move the output least go, one by one judged, each row for itself.
//!
//! Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695.

use crate::{Sparsity, mask};

/// The mask of the smallest `|w| · ‖x‖` of `weight[rows, cols]`, true for the weights to set to zero;
/// `square_mean` (`[cols]`) is the mean square of each input, which orders like its norm.
///
/// A share is taken of every row, a pattern in every run of a row; counts are exact. Weights of inputs that
/// were always zero go first.
///
/// # Panics
/// If `weight` is not a whole number of rows, or `square_mean` is not `[cols]`.
pub fn wanda(weight: &[f32], square_mean: &[f64], sparsity: Sparsity) -> Vec<bool> {
    let cols = square_mean.len();
    assert!(
        weight.len().is_multiple_of(cols),
        "weight is not [rows, cols]"
    );
    let norms: Vec<f64> = square_mean.iter().map(|square| square.sqrt()).collect();
    let scores: Vec<f32> = weight
        .chunks(cols)
        .flat_map(|row| row.iter().zip(&norms))
        .map(|(&w, norm)| (f64::from(w.abs()) * norm) as f32)
        .collect();
    mask::smallest(&scores, cols, cols, sparsity)
}
