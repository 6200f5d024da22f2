//! Tokens too large for the rounding of the others.
//!
//! Language models give a few tokens, often the first of a text, single features hundreds of times their usual size.
//! A step fit for those would round every other token to zero there. Such tokens are found here, and kept whole.

use rayon::prelude::*;

/// How often a feature's usual size is massive. Below, a step of the codes, 1/127 of the largest, is at most about an
/// eighth of that size, and the mean square of the rounding about a thousandth of the feature's.
const MULTIPLE: f64 = 16.0;
/// At most one token of this many is kept whole, so that their products cost less than half of the others'.
const SHARE: usize = 32;
/// Features searched by one task.
const FEATURES: usize = 32;

/// The massive tokens of `x` (`[tokens, features]`), ascending, at most one of thirty-two: those furthest beyond a limit
/// if there are more. `largest` and `abs_sums` are the features' largest magnitudes and sums of magnitudes.
///
/// A feature's limit is sixteen times the root mean square of its values up to sixteen times its mean magnitude:
/// neither is set by a few massive tokens, however large. A feature that is otherwise zero loses nothing and has none.
pub(super) fn massive(
    x: &[f32],
    features: usize,
    largest: impl Iterator<Item = f64>,
    abs_sums: &[f64],
) -> Vec<usize> {
    let tokens = x.len() / features;
    let bound = |abs_sum: f64| MULTIPLE * abs_sum / tokens as f64;
    // Of the others the limit, being no less than this bound, is not exceeded.
    let suspects: Vec<(usize, f64)> = largest
        .zip(abs_sums)
        .map(|(largest, &abs_sum)| (largest, bound(abs_sum)))
        .enumerate()
        .filter(|(_, (largest, bound))| largest > bound)
        .map(|(feature, (_, bound))| (feature, bound))
        .collect();
    let excess = suspects
        .par_chunks(FEATURES)
        .map(|suspects| excess(x, features, suspects))
        .reduce(
            || vec![0.0; tokens],
            |mut excess, other| {
                let pairs = excess.iter_mut().zip(other);
                pairs.for_each(|(excess, other)| *excess = excess.max(other));
                excess
            },
        );
    let mut massive: Vec<usize> = (0..tokens).filter(|&token| excess[token] > 1.0).collect();
    massive.sort_by(|&a, &b| excess[b].total_cmp(&excess[a]).then(a.cmp(&b)));
    massive.truncate(tokens / SHARE);
    massive.sort_unstable();
    massive
}

/// The largest multiple of a limit that each token reaches in the features `suspects`, which come with the bound of
/// the values that set the limit.
fn excess(x: &[f32], features: usize, suspects: &[(usize, f64)]) -> Vec<f64> {
    let mut rest = vec![(0f64, 0usize); suspects.len()];
    for row in x.chunks_exact(features) {
        for ((squares, count), &(feature, bound)) in rest.iter_mut().zip(suspects) {
            let value = f64::from(row[feature].abs());
            if value <= bound {
                *squares += value * value;
                *count += 1;
            }
        }
    }
    let limits = rest.iter().map(|&(squares, count)| {
        if squares > 0.0 {
            MULTIPLE * (squares / count as f64).sqrt()
        } else {
            f64::INFINITY
        }
    });
    let limits: Vec<f64> = limits.collect();
    let of_row = |row: &[f32]| {
        let suspects = suspects.iter().zip(&limits);
        suspects.fold(0f64, |excess, (&(feature, _), limit)| {
            excess.max(f64::from(row[feature].abs()) / limit)
        })
    };
    x.chunks_exact(features).map(of_row).collect()
}
