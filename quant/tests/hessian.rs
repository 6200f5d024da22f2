//! Second moments against their definition.

mod common;

use common::{Random, activations, moments};
use qbin_quant::{Moments, QuantError};

/// `Σ x·xᵀ` and `Σ |x|` in f64.
fn definition(x: &[f32], n: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut second, mut abs) = (vec![0.0; n * n], vec![0.0; n]);
    for x in x.chunks(n) {
        for i in 0..n {
            abs[i] += f64::from(x[i]).abs();
            for j in 0..n {
                second[i * n + j] += f64::from(x[i]) * f64::from(x[j]);
            }
        }
    }
    (second, abs)
}

#[test]
fn means_are_those_of_the_definition() {
    // Across the borders of slabs (2048 tokens) and of what is summed in f64 (256 features).
    for (n, tokens) in [(1, 1), (31, 3), (33, 2047), (40, 2049), (257, 2049)] {
        let x = activations(&mut Random(n as u64), tokens, n);
        let (second, abs) = definition(&x, n);
        let largest: Vec<f64> = (0..n)
            .map(|i| {
                x.iter()
                    .skip(i)
                    .step_by(n)
                    .fold(0f64, |m, &v| m.max(f64::from(v).abs()))
            })
            .collect();
        let mut parts = Moments::new(n);
        for part in x.chunks(n * tokens.div_ceil(3)) {
            parts.add(part).unwrap();
        }
        for mut got in [moments(&x, n), parts] {
            assert_eq!((got.n(), got.tokens()), (n, tokens as u64));
            for (mean, sum) in got.abs_mean().iter().zip(&abs) {
                let expected = sum / tokens as f64;
                assert!((mean - expected).abs() <= 1e-12 * expected);
            }
            let squares = got.square_mean();
            let metric = got.metric();
            assert_eq!(metric.n(), n);
            let hessian = got.finish();
            for i in 0..n * n {
                let expected = 2.0 * second[i] / tokens as f64;
                // Each factor is off by at most half a step of 1/127 of its channel's largest.
                let size = largest[i / n] * largest[i % n];
                let tolerance = 2.0 * size * (2.0 * 0.501 / 127.0 + (0.501f64 / 127.0).powi(2));
                let value = hessian.values()[i];
                assert!(
                    (value - expected).abs() <= tolerance,
                    "{n} {i}: {value} {expected}"
                );
                assert_eq!(value, hessian.values()[i % n * n + i / n], "symmetric");
            }
            for (i, square) in squares.iter().enumerate() {
                let expected = hessian.values()[i * n + i] / 2.0;
                assert!((square - expected).abs() <= 1e-12 * expected);
            }
        }
    }
}

#[test]
fn inputs_of_few_values_have_exact_moments() {
    let (n, tokens) = (290, 300);
    let x = activations(&mut Random(8), tokens, n);
    let (second, _) = definition(&x, n);
    let hessian = moments(&x, n).finish();
    for (i, value) in hessian.values().iter().enumerate() {
        let expected = 2.0 * second[i] / tokens as f64;
        let size = 2.0 * (second[i / n * (n + 1)] * second[i % n * (n + 1)]).sqrt() / tokens as f64;
        // The step and every input were rounded to f32.
        let tolerance = 4.0 * f64::from(f32::EPSILON) * size;
        assert!(
            (value - expected).abs() <= tolerance,
            "{i}: {value} {expected}"
        );
    }
}

#[test]
fn scaled_moments_are_those_of_scaled_inputs() {
    let n = 37;
    let mut random = Random(6);
    let x = activations(&mut random, 90, n);
    // Powers of two: both sides are exact.
    let s: Vec<f32> = (0..n)
        .map(|_| 2f32.powi((random.bits() % 9) as i32 - 4))
        .collect();
    let mut scaled = moments(&x, n);
    scaled.scaled(&s);
    let divided: Vec<f32> = x.iter().enumerate().map(|(i, x)| x / s[i % n]).collect();
    let direct = moments(&divided, n);
    assert_eq!(scaled.abs_mean(), direct.abs_mean());
    assert_eq!(scaled.finish().values(), direct.finish().values());
}

#[test]
fn inputs_that_are_not_finite_are_refused_and_change_nothing() {
    // Summed in f64; rounded; rounded in two slabs, of which the second is bad.
    for (n, tokens) in [(8, 3), (300, 3), (300, 2051)] {
        let mut got = moments(&activations(&mut Random(1), 5, n), n);
        let before = got.clone();
        for bad in [f32::INFINITY, f32::NEG_INFINITY, 1e17, f32::NAN] {
            let mut x = vec![1f32; tokens * n];
            x[(tokens - 1) * n + 6] = bad;
            let error = got.add(&x).unwrap_err();
            let QuantError::NonFiniteInput {
                token,
                col: 6,
                value,
            } = error
            else {
                panic!("{error}");
            };
            assert_eq!((token, value.to_bits()), (tokens as u64 + 4, bad.to_bits()));
            assert_eq!(got, before);
        }
    }
}

#[test]
fn no_token_is_no_evidence() {
    let mut got = Moments::new(3);
    got.add(&[]).unwrap();
    assert_eq!(got.tokens(), 0);
    assert_eq!(got.abs_mean(), [0.0; 3]);
    assert_eq!(got.finish().values(), [0.0; 9]);
}
