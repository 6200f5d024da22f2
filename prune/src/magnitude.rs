//! Magnitude pruning: the smallest weights go.
//!
//! Source: Han et al., Learning both Weights and Connections, arXiv 1506.02626, without its retraining.

use crate::{Sparsity, mask};

/// The mask of the smallest magnitudes of `weight[rows, cols]`, true for the weights to set to zero.
///
/// A share is taken of the whole matrix, a pattern in every run of a row; see [`Sparsity::zeros_in`] for the
/// counts, which are exact: of equal magnitudes those that come first go first.
///
/// # Panics
/// If `weight` is not a whole number of rows.
pub fn magnitude(weight: &[f32], cols: usize, sparsity: Sparsity) -> Vec<bool> {
    assert!(
        weight.len().is_multiple_of(cols),
        "weight is not [rows, cols]"
    );
    let scores: Vec<f32> = weight.iter().map(|w| w.abs()).collect();
    mask::smallest(&scores, cols, scores.len(), sparsity)
}
