//! The moments against their definition, and equal at every level.

use super::*;

/// Seeded inputs of about normal shape, feature `f` of size `2^(f mod 7)`, one feature all zero.
fn inputs(tokens: usize, features: usize) -> Vec<f32> {
    let mut state = 7u64;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..tokens * features)
        .map(|at| {
            let feature = at % features;
            let x = next() + next() + next();
            if feature == 3 {
                0.0
            } else {
                x * f32::from(1u8 << (feature % 7))
            }
        })
        .collect()
}

fn moments(isa: Isa, x: &[f32], features: usize) -> Vec<f64> {
    let mut second = vec![0.0; features * features];
    Slab::new(isa, x, features).add_to(isa, &mut second);
    second
}

#[test]
fn agrees_with_the_definition() {
    for (tokens, features) in [(1, 1), (3, 5), (64, 31), (450, 33), (901, 100), (37, 290)] {
        let x = inputs(tokens, features);
        let largest: Vec<f64> = (0..features)
            .map(|f| {
                x.iter()
                    .skip(f)
                    .step_by(features)
                    .fold(0f32, |m, v| m.max(v.abs()))
                    .into()
            })
            .collect();
        let got = moments(Isa::detect(), &x, features);
        for row in 0..features {
            for col in 0..features {
                let at = |token: usize, f: usize| f64::from(x[token * features + f]);
                let exact: f64 = (0..tokens).map(|t| at(t, row) * at(t, col)).sum();
                // Either factor is off by at most half a step, and a little for the rounding of the scale.
                let step = |f: usize| largest[f] / 127.0 * 0.5001;
                let tolerance = tokens as f64
                    * (step(row) * largest[col] + step(col) * largest[row] + step(row) * step(col));
                let value = got[row * features + col];
                if col <= row {
                    assert!(
                        (value - exact).abs() <= tolerance,
                        "{row} {col}: {value} {exact}"
                    );
                } else {
                    assert_eq!(value, 0.0, "above the diagonal");
                }
            }
        }
    }
}

#[test]
fn multiples_of_a_step_are_exact() {
    // With ±127 in every feature each whole number is a code.
    let (tokens, features) = (130, 40);
    let x: Vec<f32> = (0..tokens * features)
        .map(|at| match at / features {
            0 => -127.0,
            token => ((token * 31 + at % features * 17) % 255) as f32 - 127.0,
        })
        .collect();
    let got = moments(Isa::detect(), &x, features);
    for row in 0..features {
        for col in 0..=row {
            let at = |token: usize, f: usize| f64::from(x[token * features + f]);
            let exact: f64 = (0..tokens).map(|t| at(t, row) * at(t, col)).sum();
            assert_eq!(got[row * features + col], exact, "{row} {col}");
        }
    }
}

#[test]
fn every_level_gives_the_same_bits() {
    for (tokens, features) in [(1, 1), (7, 33), (449, 65), (1000, 140)] {
        let x = inputs(tokens, features);
        let expected = moments(Isa::available()[0], &x, features);
        for isa in Isa::available() {
            assert_eq!(moments(isa, &x, features), expected, "{}", isa.level());
        }
    }
}

#[test]
fn slabs_add_up() {
    let (tokens, features) = (64, 20);
    let x = inputs(tokens, features);
    let isa = Isa::detect();
    let mut twice = vec![0.0; features * features];
    for _ in 0..2 {
        Slab::new(isa, &x, features).add_to(isa, &mut twice);
    }
    let once = moments(isa, &x, features);
    let doubled: Vec<f64> = once.iter().map(|value| 2.0 * value).collect();
    assert_eq!(twice, doubled);
    let exact: f64 = x
        .iter()
        .step_by(features)
        .map(|&v| f64::from(v.abs()))
        .sum();
    assert_eq!(Slab::new(isa, &x, features).abs_sums()[0], exact);
    assert_eq!(moments(isa, &[], features), vec![0.0; features * features]);
}

#[test]
fn quadratic_forms_agree_with_the_definition_at_every_level() {
    for (tokens, features) in [(1, 1), (50, 33), (400, 100)] {
        let x = inputs(tokens, features);
        let m: Vec<f32> = (0..features * features)
            .map(|at| {
                let (row, col) = (at / features, at % features);
                1.0 / (1 + row.abs_diff(col)) as f32 - 0.01 * (row * col % 5) as f32
            })
            .collect();
        let largest = |f: usize| -> f64 {
            x.iter()
                .skip(f)
                .step_by(features)
                .fold(0f32, |m, v| m.max(v.abs()))
                .into()
        };
        let largest: Vec<f64> = (0..features).map(largest).collect();
        let (mut exact, mut tolerance) = (0f64, 0f64);
        for (at, &m) in m.iter().enumerate() {
            let (row, col) = (at / features, at % features);
            let terms = x
                .chunks(features)
                .map(|x| f64::from(x[row]) * f64::from(x[col]));
            exact += f64::from(m) * terms.sum::<f64>();
            if row != col {
                // As for the moments.
                let bound = (2.0 * 0.5001 / 127.0 + (0.5001f64 / 127.0).powi(2)) * tokens as f64;
                tolerance += f64::from(m.abs()) * bound * largest[row] * largest[col];
            }
        }
        let tolerance = tolerance + 1e-12 * exact.abs();
        let mut expected = None;
        for isa in Isa::available() {
            let got = Slab::new(isa, &x, features).quadratic(isa, &m);
            assert!(
                (got - exact).abs() <= tolerance,
                "{got} {exact} {tolerance}"
            );
            assert_eq!(*expected.get_or_insert(got), got, "{}", isa.level());
        }
    }
}
