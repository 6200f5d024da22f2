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
    add(isa, &[Slab::new(isa, x, features)], &mut second);
    second
}

/// Compares moments with the definition: `massive` tokens are exact up to f64, of the others each factor is off by at most
/// half a step of its feature.
#[track_caller]
fn assert_agrees(got: &[f64], x: &[f32], features: usize, massive: &[usize]) {
    let tokens = x.len() / features;
    let mut largest = vec![0f64; features];
    let ordinary = x.chunks(features).enumerate();
    for (_, row) in ordinary.filter(|(token, _)| !massive.contains(token)) {
        for (largest, &x) in largest.iter_mut().zip(row) {
            *largest = largest.max(x.abs().into());
        }
    }
    // A little more than half, for the rounding of the scale.
    let step = |f: usize| largest[f] / 127.0 * 0.5001;
    let epsilon = if massive.is_empty() {
        0.0
    } else {
        f64::EPSILON
    };
    for row in 0..features {
        for col in 0..features {
            let value = got[row * features + col];
            if col > row {
                assert_eq!(value, 0.0, "above the diagonal");
                continue;
            }
            let terms = x
                .chunks(features)
                .map(|x| f64::from(x[row]) * f64::from(x[col]));
            let exact: f64 = terms.clone().sum();
            let sizes: f64 = terms.map(f64::abs).sum();
            let tolerance = tokens as f64
                * (step(row) * largest[col]
                    + step(col) * largest[row]
                    + step(row) * step(col)
                    + epsilon * sizes);
            assert!(
                (value - exact).abs() <= tolerance,
                "{row} {col}: {value} {exact} {tolerance}"
            );
        }
    }
}

#[test]
fn agrees_with_the_definition() {
    for (tokens, features) in [(1, 1), (3, 5), (64, 31), (450, 33), (901, 100), (37, 290)] {
        let x = inputs(tokens, features);
        let got = moments(Isa::detect(), &x, features);
        assert_agrees(&got, &x, features, &[]);
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
    let slabs = [&x, &x].map(|x| Slab::new(isa, x, features));
    add(isa, &slabs, &mut twice);
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
fn a_slab_filled_again_is_a_new_one() {
    // The same number of tokens, fewer, none, more; after massive ones.
    let features = 70;
    let isa = Isa::detect();
    let mut slab = Slab::new(isa, &inputs_with(&[9, 31], 64, features), features);
    for tokens in [64, 37, 0, 90] {
        let x = inputs(tokens, features);
        slab.fill(isa, &x);
        assert_eq!(slab, Slab::new(isa, &x, features), "{tokens}");
    }
}

#[test]
fn slabs_added_together_give_the_same_bits_as_one_by_one() {
    // Beyond a block of the matrix in both directions; the third slab ends within a quad, the fourth is empty.
    let features = 290;
    let isa = Isa::detect();
    let slabs = [
        Slab::new(isa, &inputs(40, features), features),
        Slab::new(isa, &inputs_with(&[9, 31], 64, features), features),
        Slab::new(isa, &inputs(37, features), features),
        Slab::new(isa, &[], features),
    ];
    assert!(!slabs[1].massive.is_empty());
    let mut one_by_one = vec![0.5; features * features];
    let mut together = one_by_one.clone();
    for slab in &slabs {
        add(isa, std::slice::from_ref(slab), &mut one_by_one);
    }
    add(isa, &slabs, &mut together);
    assert_eq!(together, one_by_one);
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

/// [`inputs`] of which feature 5 follows feature 4, and whose tokens `massive` carry a thousand times the usual size in
/// feature 5, one of them in the last feature too.
fn inputs_with(massive: &[usize], tokens: usize, features: usize) -> Vec<f32> {
    let mut x = inputs(tokens, features);
    for row in x.chunks_mut(features) {
        row[5] += 2.0 * row[4];
    }
    for (i, token) in massive.iter().enumerate() {
        x[token * features + 5] = if i % 2 == 0 { 3e4 } else { -2e4 };
    }
    x[massive[0] * features + features - 1] = 1e5;
    x
}

#[test]
fn massive_tokens_leave_the_others_their_precision() {
    for (massive, tokens, features) in [
        (vec![0], 40, 7),
        (vec![0, 17, 200, 399], 400, 33),
        (vec![9, 31], 64, 290),
        ((0..25).map(|i| 32 * i + 3).collect(), 800, 70),
    ] {
        let x = inputs_with(&massive, tokens, features);
        let got = moments(Isa::detect(), &x, features);
        assert_agrees(&got, &x, features, &massive);
    }
}

#[test]
fn massive_tokens_keep_sums_and_quadratic_forms() {
    let (tokens, features) = (400, 75);
    let massive = [0, 17, 200, 399];
    let x = inputs_with(&massive, tokens, features);
    let m: Vec<f32> = (0..features * features)
        .map(|at| 1.0 / (1 + (at / features).abs_diff(at % features)) as f32)
        .collect();
    let form = |x: &[f32]| -> (f64, f64) {
        let (mut sum, mut sizes) = (0.0, 0.0);
        for (row, m) in x.iter().zip(m.chunks(features)) {
            for (col, m) in x.iter().zip(m) {
                let term = f64::from(*row) * f64::from(*col) * f64::from(*m);
                sum += term;
                sizes += term.abs();
            }
        }
        (sum, sizes)
    };
    let forms: Vec<(f64, f64)> = x.chunks(features).map(form).collect();
    let exact: f64 = forms.iter().map(|(sum, _)| sum).sum();
    let of = |token: &usize| forms[*token].1;
    // A chain of f32 for the massive tokens; steps of an ordinary token's largest values, at most 1.5·64 here, for the
    // others, off the diagonal.
    let chain = (features + 2) as f64 * f64::from(f32::EPSILON);
    let weights: f64 = m.iter().map(|&m| f64::from(m)).sum::<f64>() - features as f64;
    let steps = (2.0 * 0.5001 / 127.0 + (0.5001f64 / 127.0).powi(2)) * 96.0f64.powi(2);
    let tolerance = chain * massive.iter().map(of).sum::<f64>() + tokens as f64 * weights * steps;
    let expected = Slab::new(Isa::available()[0], &x, features);
    let value = expected.quadratic(Isa::available()[0], &m);
    assert!(
        (value - exact).abs() <= tolerance,
        "{value} {exact} {tolerance}"
    );
    let column = || x.iter().skip(5).step_by(features).map(|&x| f64::from(x));
    assert_eq!(expected.abs_sums()[5], column().map(f64::abs).sum::<f64>());
    assert_eq!(
        expected.square_sums()[5],
        column().fold(0.0, |sum, x| x.mul_add(x, sum))
    );
    let second = moments(Isa::available()[0], &x, features);
    for isa in Isa::available() {
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                assert_eq!(moments(isa, &x, features), second, "{}", isa.level());
                let got = Slab::new(isa, &x, features).quadratic(isa, &m);
                assert_eq!(got, value, "{}", isa.level());
            });
        }
    }
}

#[test]
fn massive_is_beyond_sixteen_times_the_usual_size() {
    let (tokens, features) = (256, 40);
    let kept = |x: &[f32]| {
        let slab = Slab::new(Isa::detect(), x, features);
        slab.massive
            .chunks(features)
            .map(|row| row[2])
            .collect::<Vec<f32>>()
    };
    let at = |values: &[(usize, f32)], usual: f32| {
        let mut x: Vec<f32> = (0..tokens * features)
            .map(|at| {
                if at / features % 2 == 0 {
                    usual
                } else {
                    -usual
                }
            })
            .collect();
        for (token, value) in values {
            x[token * features + 2] = *value;
        }
        x
    };
    assert_eq!(kept(&at(&[], 1.0)), [0f32; 0]);
    assert_eq!(kept(&at(&[(7, 15.5)], 1.0)), [0f32; 0]);
    assert_eq!(kept(&at(&[(7, 17.5)], 1.0)), [17.5]);
    // A feature that is otherwise zero loses nothing.
    // Otherwise zero, the feature loses nothing; with one small value it would.
    assert_eq!(kept(&at(&[(7, 1e6), (8, -1e6)], 0.0)), [0f32; 0]);
    assert_eq!(kept(&at(&[(7, 1e6), (8, 2.0)], 0.0)), [1e6]);
    // Eight at most, those of the largest multiple, in the order of the tokens.
    let mut x = at(&[0, 50, 150, 200, 250].map(|token| (token, 400.0)), 0.1);
    assert_eq!(kept(&x), [400.0; 5]);
    for token in 100..107 {
        x[token * features + 9] = 700.0;
    }
    assert_eq!(kept(&x)[0], 400.0);
    assert!(kept(&x)[1..].iter().all(|x| x.abs() == 0.1));
    assert_eq!(kept(&x).len(), 8);
}
