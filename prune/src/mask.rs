//! Exact choices: the least valuable weights of a range, of a row, or of every run of a row.
//!
//! A mask is `[rows, cols]` as the weight, true for the weights that become zero.

use rayon::prelude::*;

use crate::Sparsity;

/// Marks the `count` smallest of `scores`; of equal ones those that come first go first.
///
/// Scores are at least 0 and not NaN, so that their bits order as their values do.
pub(crate) fn mark_smallest(scores: &[f32], count: usize, mut mark: impl FnMut(usize)) {
    if count == 0 {
        return;
    }
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    let key = |&at: &u32| (scores[at as usize].to_bits(), at);
    order.select_nth_unstable_by_key(count - 1, key);
    order[..count].iter().for_each(|&at| mark(at as usize));
}

/// The mask of the smallest `scores` (`[rows, cols]`): of a share in every `unit` consecutive scores, of a
/// pattern in every run of a row.
pub(crate) fn smallest(scores: &[f32], cols: usize, unit: usize, sparsity: Sparsity) -> Vec<bool> {
    let unit = match sparsity {
        Sparsity::Share(_) => unit,
        Sparsity::Pattern { .. } => cols,
    };
    let mut mask = vec![false; scores.len()];
    mask.par_chunks_mut(unit)
        .zip(scores.par_chunks(unit))
        .for_each(|(mask, scores)| {
            let run = sparsity.run().unwrap_or(unit);
            for (mask, scores) in mask.chunks_mut(run).zip(scores.chunks(run)) {
                mark_smallest(scores, sparsity.zeros_in(mask.len()), |at| mask[at] = true);
            }
        });
    mask
}

/// Sets the masked weights to zero.
pub(crate) fn apply(weight: &mut [f32], mask: &[bool]) {
    for (weight, _) in weight.iter_mut().zip(mask).filter(|(_, zero)| **zero) {
        *weight = 0.0;
    }
}
