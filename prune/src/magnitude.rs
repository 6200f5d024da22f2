//! Magnitude pruning: the smallest weights become zero, the others stay as they are.
//!
//! Source: Han et al., Learning both Weights and Connections, arXiv 1506.02626, without its retraining.

use crate::Sparsity;

/// Zeros the smallest magnitudes of `weight[rows, cols]`; returns how many weights it zeroed.
///
/// The count is exact: of equal magnitudes those that come first go first. A share is taken of the whole
/// matrix, rounded down; a pattern leaves a short last run of a row its share of zeros, rounded down.
///
/// # Panics
/// If `weight` is not a whole number of rows.
pub fn magnitude(weight: &mut [f32], cols: usize, sparsity: Sparsity) -> usize {
    assert!(
        weight.len().is_multiple_of(cols),
        "weight is not [rows, cols]"
    );
    match sparsity {
        Sparsity::Share(share) => {
            let zeros = (share * weight.len() as f64) as usize;
            zero_smallest(weight, zeros)
        }
        Sparsity::Pattern { zeros, of } => {
            let runs = weight.chunks_mut(cols).flat_map(|row| row.chunks_mut(of));
            runs.map(|run| zero_smallest(run, zeros * run.len() / of))
                .sum()
        }
    }
}

fn zero_smallest(weights: &mut [f32], zeros: usize) -> usize {
    if zeros == 0 {
        return 0;
    }
    let mut order: Vec<u32> = (0..weights.len() as u32).collect();
    let key = |&at: &u32| (weights[at as usize].abs().to_bits(), at);
    // Magnitudes are not negative, so their bits order as their values do.
    order.select_nth_unstable_by_key(zeros - 1, key);
    for &at in &order[..zeros] {
        weights[at as usize] = 0.0;
    }
    zeros
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ties_go_in_order_and_the_count_is_exact() {
        let mut weight = vec![1.0, -1.0, 1.0, 2.0];
        assert_eq!(magnitude(&mut weight, 4, Sparsity::Share(0.5)), 2);
        assert_eq!(weight, [0.0, 0.0, 1.0, 2.0]);
    }

    proptest! {
        #[test]
        fn a_pattern_holds_in_every_run(values in prop::collection::vec(-4i8..4, 60), zeros in 1usize..4) {
            let original: Vec<f32> = values.iter().map(|&v| f32::from(v)).collect();
            let mut weight = original.clone();
            // Rows of 10: two runs of four and a short one of two.
            magnitude(&mut weight, 10, Sparsity::Pattern { zeros, of: 4 });
            for (row, before) in weight.chunks(10).zip(original.chunks(10)) {
                for (run, before) in row.chunks(4).zip(before.chunks(4)) {
                    let zeroed = run.iter().filter(|w| **w == 0.0).count();
                    prop_assert!(zeroed >= zeros * run.len() / 4);
                    let least_kept = run.iter().zip(before).filter(|(w, _)| **w != 0.0).map(|(w, _)| w.abs()).fold(f32::MAX, f32::min);
                    let most_gone = run.iter().zip(before).filter(|(w, _)| **w == 0.0).map(|(_, b)| b.abs()).fold(0.0, f32::max);
                    prop_assert!(most_gone <= least_kept);
                    prop_assert!(run.iter().zip(before).all(|(w, b)| *w == 0.0 || w == b));
                }
            }
        }

        #[test]
        fn a_share_is_exact(values in prop::collection::vec(1u8..9, 1..80), share in 0.0f64..1.0) {
            let mut weight: Vec<f32> = values.iter().map(|&v| f32::from(v)).collect();
            let len = weight.len();
            let zeroed = magnitude(&mut weight, len, Sparsity::Share(share));
            prop_assert_eq!(zeroed, (share * len as f64) as usize);
            prop_assert_eq!(weight.iter().filter(|w| **w == 0.0).count(), zeroed);
        }
    }
}
