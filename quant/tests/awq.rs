//! AWQ: candidates, losses, clipping and folds.

mod common;

use common::{Random, activations, grid, moments, relative_error};
use qbin_quant::{
    Granularity, Grid, QuantError, divide_rows, divide_vector, gqa_mean, gqa_producer_scales,
    quadratic_loss, rounded, rtn, scale_candidates, scale_columns, search_clip,
};

fn grids() -> [Grid; 4] {
    [
        grid(4, false, Granularity::Group(16)),
        grid(4, true, Granularity::Group(16)),
        grid(3, false, Granularity::Group(20)), // the last group is short
        grid(4, false, Granularity::Channel),
    ]
}

/// `Σ ‖ΔW·x‖² / tokens` in f64.
fn loss(weight: &[f32], other: &[f32], x: &[f32], cols: usize) -> f64 {
    let signal: f64 = weight
        .chunks(cols)
        .flat_map(|w| {
            x.chunks(cols).map(move |x| {
                let dot: f64 = w
                    .iter()
                    .zip(x)
                    .map(|(w, x)| f64::from(*w) * f64::from(*x))
                    .sum();
                dot * dot
            })
        })
        .sum();
    relative_error(weight, other, x, cols) * signal / (x.len() / cols) as f64
}

#[test]
fn candidates_are_powers_of_the_mean_around_one() {
    let mean = [1.0, 4.0, 0.0, 0.25];
    let candidates = scale_candidates(&mean, 20);
    assert_eq!(candidates.len(), 20);
    assert_eq!(candidates[0], [1.0; 4], "r = 0 is the identity");
    // r = 1/2: 1, 2, –, 1/2, and √(2 · 1/2) = 1; a channel without input keeps 1.
    assert_eq!(candidates[10], [1.0, 2.0, 1.0, 0.5]);
    for scales in scale_candidates(&[1e-9, 3.0, 1e9], 20) {
        assert!(scales.iter().all(|s| *s > 0.0 && s.is_finite()));
        let largest = scales.iter().fold(0f32, |m, s| m.max(*s));
        let smallest = scales.iter().fold(f32::INFINITY, |m, s| m.min(*s));
        assert!((largest * smallest - 1.0).abs() < 1e-5);
    }
    assert_eq!(scale_candidates(&[0.0; 3], 2), [[1.0; 3], [1.0; 3]]);
}

#[test]
fn identity_scales_are_round_to_nearest() {
    let (rows, cols) = (70, 48);
    let weight = Random(1).normals(rows * cols, 0.1);
    for grid in grids() {
        let nearest = rtn(&weight, rows, cols, &grid, None, None)
            .unwrap()
            .dequantize();
        assert_eq!(
            rounded(&weight, rows, cols, &[1.0; 48], &grid).unwrap(),
            nearest
        );
    }
}

#[test]
fn loss_is_the_one_of_the_definition() {
    let (rows, cols) = (70, 48);
    let mut random = Random(2);
    let x = activations(&mut random, 150, cols);
    let weight = random.normals(rows * cols, 0.1);
    let mut moments = moments(&x, cols);
    let metric = moments.metric();
    for grid in grids() {
        for scales in scale_candidates(&moments.abs_mean(), 4) {
            let other = rounded(&weight, rows, cols, &scales, &grid).unwrap();
            let exact = loss(&weight, &other, &x, cols);
            let got = quadratic_loss(&weight, rows, cols, &metric, &scales, &grid).unwrap();
            // f32 products over `cols` terms with partly cancelling signs.
            let tolerance = exact * cols as f64 * f64::from(f32::EPSILON) * 16.0;
            assert!(
                (got - exact).abs() <= tolerance,
                "{grid:?}: {got}, expected {exact}"
            );
        }
    }
}

#[test]
fn scaling_helps_where_few_channels_are_large() {
    let (rows, cols) = (32, 64);
    let mut random = Random(13);
    let mut x = activations(&mut random, 200, cols);
    x.chunks_mut(cols).for_each(|token| token[9] *= 50.0);
    let weight = random.normals(rows * cols, 0.1);
    let mut moments = moments(&x, cols);
    let metric = moments.metric();
    for grid in [
        grid(4, false, Granularity::Group(32)),
        grid(4, true, Granularity::Group(32)),
    ] {
        let losses: Vec<f64> = scale_candidates(&moments.abs_mean(), 20)
            .iter()
            .map(|s| quadratic_loss(&weight, rows, cols, &metric, s, &grid).unwrap())
            .collect();
        let best = losses.iter().copied().fold(f64::INFINITY, f64::min);
        assert!(best < 0.5 * losses[0], "{best} of {}", losses[0]);
    }
}

#[test]
fn clipping_is_never_worse_and_helps_on_outliers() {
    let (rows, cols) = (70, 48);
    let mut random = Random(4);
    let x = activations(&mut random, 150, cols);
    let mut weight = random.normals(rows * cols, 0.1);
    weight.iter_mut().step_by(37).for_each(|w| *w *= 5.0);
    let mut moments = moments(&x, cols);
    let metric = moments.metric();
    for grid in grids() {
        let clip = search_clip(&weight, rows, cols, &metric, &grid, 20, 0.5).unwrap();
        let nearest = rtn(&weight, rows, cols, &grid, None, None)
            .unwrap()
            .dequantize();
        let clipped = rtn(&weight, rows, cols, &grid, None, Some(&clip))
            .unwrap()
            .dequantize();
        let mut gained = 0;
        for row in 0..rows {
            // The objective: the row's whole output, all groups together.
            let part = |matrix: &[f32]| matrix[row * cols..][..cols].to_vec();
            let original = part(&weight);
            let before = relative_error(&original, &part(&nearest), &x, cols);
            let after = relative_error(&original, &part(&clipped), &x, cols);
            assert!(
                after <= before * (1.0 + 1e-4),
                "{grid:?}: {before} to {after}"
            );
            gained += usize::from(after < 0.9 * before);
        }
        assert!(gained * 10 > rows, "{grid:?}: {gained} rows gained");
    }
}

#[test]
fn clipping_offers_the_identity() {
    // Exactly on the grid already: any clip would lose.
    let weight: Vec<f32> = (0..16).map(|step| step as f32).collect();
    let grid = grid(4, false, Granularity::Group(16));
    let x = activations(&mut Random(5), 40, 16);
    let metric = moments(&x, 16).metric();
    let clip = search_clip(&weight, 1, 16, &metric, &grid, 20, 0.5).unwrap();
    assert_eq!(clip, [f32::INFINITY]);
}

#[test]
fn a_fold_changes_nothing_but_rounding() {
    let (rows, cols, tokens) = (12, 24, 9);
    let mut random = Random(6);
    let x = random.normals(tokens * cols, 1.0);
    let producer = random.normals(cols * cols, 0.3);
    let bias = random.normals(cols, 0.3);
    let consumer = random.normals(rows * cols, 0.3);
    let s: Vec<f32> = (0..cols)
        .map(|_| (0.7 * random.normal()).exp() as f32)
        .collect();
    let (mut folded, mut folded_bias, mut scaled) =
        (producer.clone(), bias.clone(), consumer.clone());
    divide_rows(&mut folded, &s);
    divide_vector(&mut folded_bias, &s, 0.0);
    scale_columns(&mut scaled, &s);
    // One output in f64, and the sum of magnitudes that bounds what rounding may do.
    let output = |p: &[f32], b: &[f32], c: &[f32], x: &[f32]| -> (f64, f64) {
        let hidden = |k: usize| -> (f64, f64) {
            let terms = p[k * cols..][..cols].iter().zip(x);
            let products = terms.map(|(p, x)| f64::from(*p) * f64::from(*x));
            products.fold((f64::from(b[k]), f64::from(b[k]).abs()), |(v, m), t| {
                (v + t, m + t.abs())
            })
        };
        (0..cols).fold((0.0, 0.0), |(value, size), k| {
            let (h, m) = hidden(k);
            (
                value + f64::from(c[k]) * h,
                size + f64::from(c[k]).abs() * m,
            )
        })
    };
    for x in x.chunks(cols) {
        for row in 0..rows {
            let columns = row * cols..(row + 1) * cols;
            let (before, size) = output(&producer, &bias, &consumer[columns.clone()], x);
            let (after, _) = output(&folded, &folded_bias, &scaled[columns], x);
            // One division and one multiplication, each rounded to f32.
            let tolerance = 2.0 * f64::from(f32::EPSILON) * size;
            assert!((before - after).abs() <= tolerance, "{before} {after}");
        }
    }
}

#[test]
fn norms_with_an_offset_fold_too() {
    let mut weight = [0.5f32, -0.25];
    divide_vector(&mut weight, &[2.0, 0.5], 1.0);
    assert_eq!(weight, [-0.25, 0.5]); // 1.5/2 − 1, 0.75/0.5 − 1
}

#[test]
fn heads_that_share_values_share_scales() {
    // Two kv heads, two query heads each, two channels.
    let mean = [1.0, 2.0, 3.0, 6.0, 10.0, 20.0, 30.0, 60.0];
    let shared = gqa_mean(&mean, 4, 2);
    assert_eq!(shared, [2.0, 4.0, 2.0, 4.0, 20.0, 40.0, 20.0, 40.0]);
    assert_eq!(gqa_mean(&mean, 4, 4), mean);
    for scales in scale_candidates(&shared, 5) {
        let producer = gqa_producer_scales(&scales, 4, 2);
        assert_eq!(producer, [scales[0], scales[1], scales[4], scales[5]]);
    }
}

#[test]
#[should_panic(expected = "scales differ among sharing heads")]
fn unequal_scales_cannot_be_folded() {
    gqa_producer_scales(&[1.0, 2.0], 2, 1);
}

#[test]
fn bad_weights_are_refused() {
    let metric = moments(&[1.0, 2.0], 2).metric();
    let grid = grid(4, false, Granularity::Channel);
    let weight = [1.0, f32::NAN];
    let refused = |error: QuantError| {
        assert!(
            matches!(error, QuantError::NonFiniteWeight { row: 0, col: 1, .. }),
            "{error}"
        );
    };
    refused(rounded(&weight, 1, 2, &[1.0; 2], &grid).unwrap_err());
    refused(quadratic_loss(&weight, 1, 2, &metric, &[1.0; 2], &grid).unwrap_err());
    refused(search_clip(&weight, 1, 2, &metric, &grid, 20, 0.5).unwrap_err());
}
