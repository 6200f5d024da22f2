//! GPTQ against a slow second implementation, its limits, and its behaviour at the edges.

mod common;

use common::{Random, activations, grid, moments, relative_error};
use half::f16;
use qbin_quant::{
    ActOrder, Factor, Gptq, GptqParams, Granularity, Grid, Moments, QuantError, ScaleSearch, gptq,
    rtn,
};

/// Row-major square matrices in f64 for the reference.
struct Square(usize, Vec<f64>);

impl Square {
    fn at(&self, row: usize, col: usize) -> f64 {
        self.1[row * self.0 + col]
    }

    /// Gauss–Jordan with the diagonal as pivots, fine for a positive definite matrix.
    fn inverse(&self) -> Self {
        let n = self.0;
        let mut left = self.1.clone();
        let mut right: Vec<f64> = (0..n * n)
            .map(|i| if i / n == i % n { 1.0 } else { 0.0 })
            .collect();
        for pivot in 0..n {
            let by = left[pivot * n + pivot];
            for col in 0..n {
                left[pivot * n + col] /= by;
                right[pivot * n + col] /= by;
            }
            for row in (0..n).filter(|&row| row != pivot) {
                let by = left[row * n + pivot];
                for col in 0..n {
                    left[row * n + col] -= by * left[pivot * n + col];
                    right[row * n + col] -= by * right[pivot * n + col];
                }
            }
        }
        Self(n, right)
    }

    /// Upper triangular `U` with `A = Uᵀ·U`.
    fn upper_cholesky(&self) -> Self {
        let n = self.0;
        let mut u = vec![0f64; n * n];
        for row in 0..n {
            for col in row..n {
                let rest: f64 = (0..row).map(|k| u[k * n + row] * u[k * n + col]).sum();
                let value = self.at(row, col) - rest;
                u[row * n + col] = if row == col {
                    value.sqrt()
                } else {
                    value / u[row * n + row]
                };
            }
        }
        Self(n, u)
    }
}

/// Algorithm 1 of the GPTQ paper, column by column over the whole row, explicit inverse, f64. Gives the
/// codes `[rows, cols]`.
fn reference(weight: &[f32], cols: usize, x: &[f32], params: &GptqParams) -> Vec<u8> {
    let tokens = x.len() / cols;
    let grid = params.grid;
    let mut h = vec![0f64; cols * cols];
    for x in x.chunks(cols) {
        for i in 0..cols * cols {
            h[i] += 2.0 * f64::from(x[i / cols]) * f64::from(x[i % cols]) / tokens as f64;
        }
    }
    let diagonal: Vec<f64> = (0..cols).map(|i| h[i * cols + i]).collect();
    let mut groups: Vec<Vec<usize>> = (0..grid.scheme().groups(cols))
        .map(|group| grid.columns(group, cols).collect())
        .collect();
    if params.act_order == ActOrder::Group {
        let falling = |a: &usize, b: &usize| diagonal[*b].partial_cmp(&diagonal[*a]).unwrap();
        groups.iter_mut().for_each(|group| group.sort_by(falling));
        groups.sort_by(|a, b| falling(&a[0], &b[0]));
    }
    let order: Vec<usize> = groups.iter().flatten().copied().collect();
    let damp = params.damp_fraction * diagonal.iter().sum::<f64>() / cols as f64;
    let damped = (0..cols * cols)
        .map(|i| {
            let (row, col) = (i / cols, i % cols);
            h[order[row] * cols + order[col]] + if row == col { damp } else { 0.0 }
        })
        .collect();
    let u = Square(cols, damped).inverse().upper_cholesky();

    let mut codes = vec![0u8; weight.len()];
    for (w, codes) in weight.chunks(cols).zip(codes.chunks_mut(cols)) {
        let mut w: Vec<f64> = order.iter().map(|&col| f64::from(w[col])).collect();
        let mut place = 0;
        for group in &groups {
            let current: Vec<f32> = w[place..place + group.len()]
                .iter()
                .map(|&w| w as f32)
                .collect();
            let weights: Vec<f32> = (place..place + group.len())
                .map(|place| (1.0 / u.at(place, place)).powi(2) as f32)
                .collect();
            let chosen = grid.params(&current, Some(&weights));
            let rounder = grid.rounder(chosen);
            for _ in group {
                let steps = rounder.steps(w[place] as f32);
                codes[order[place]] = rounder.code(steps);
                let error = (w[place] - f64::from(rounder.value(steps))) / u.at(place, place);
                for (later, w) in w.iter_mut().enumerate().skip(place) {
                    *w -= error * u.at(place, later);
                }
                place += 1;
            }
        }
    }
    codes
}

fn params(grid: Grid, act_order: ActOrder, update_block: usize) -> GptqParams {
    GptqParams {
        act_order,
        update_block,
        refine_sweeps: 0,
        ..GptqParams::new(grid)
    }
}

#[test]
fn codes_equal_those_of_the_reference() {
    let granularities = [
        Granularity::Group(8),
        Granularity::Group(16),
        Granularity::Group(24), // the last group is short
        Granularity::Group(64),
        Granularity::Channel,
    ];
    for (case, granularity) in granularities.into_iter().enumerate() {
        for (bits, symmetric) in [(3, false), (3, true), (4, false), (4, true), (8, true)] {
            for act_order in [ActOrder::None, ActOrder::Group] {
                for (update_block, search) in [
                    (1, ScaleSearch::None),
                    (16, ScaleSearch::Weighted),
                    (40, ScaleSearch::None),
                    (1000, ScaleSearch::None),
                ] {
                    let (rows, cols) = (37, 64);
                    let mut random = Random(1000 + case as u64);
                    let x = activations(&mut random, 200, cols);
                    let weight = random.normals(rows * cols, 0.05);
                    let grid = Grid {
                        search,
                        ..grid(bits, symmetric, granularity)
                    };
                    let params = params(grid, act_order, update_block);
                    let ours = gptq(&weight, rows, cols, moments(&x, cols), &params).unwrap();
                    let expected = reference(&weight, cols, &x, &params);
                    let pairs = ours.quantized.codes.chunks(cols).zip(expected.chunks(cols));
                    let equal = pairs.filter(|(ours, expected)| ours == expected).count();
                    // The search compares sums, and where two candidates are as good as equal the last bit
                    // of a weight of the sum decides.
                    let needed = if search == ScaleSearch::None {
                        rows
                    } else {
                        rows * 3 / 4
                    };
                    assert!(
                        equal >= needed,
                        "{granularity:?} {bits} bits symmetric {symmetric} {act_order:?} {update_block}: {equal} rows"
                    );
                }
            }
        }
    }
}

#[test]
fn identity_hessian_is_round_to_nearest() {
    let (rows, cols) = (9, 40);
    let weight = Random(7).normals(rows * cols, 0.1);
    // 128 tokens make the mean of 2·x·xᵀ a power of four, so that weighing by it changes no comparison.
    let mut eye = vec![0f32; 128 * cols];
    (0..cols).for_each(|i| eye[i * cols + i] = 1.0);
    for granularity in [Granularity::Group(16), Granularity::Channel] {
        for symmetric in [false, true] {
            for search in [ScaleSearch::None, ScaleSearch::Weighted] {
                let grid = Grid {
                    search,
                    ..grid(4, symmetric, granularity)
                };
                let params = GptqParams {
                    damp_fraction: 0.0,
                    ..params(grid, ActOrder::None, 16)
                };
                let ours = gptq(&weight, rows, cols, moments(&eye, cols), &params).unwrap();
                let nearest = rtn(&weight, rows, cols, &grid, None, None).unwrap();
                assert_eq!(ours.quantized, nearest);
            }
        }
    }
}

#[test]
fn loses_less_than_round_to_nearest_on_average() {
    let (rows, cols) = (24, 96);
    for (bits, symmetric) in [(3, false), (4, false), (4, true)] {
        for act_order in [ActOrder::None, ActOrder::Group] {
            let mut ratio = 0.0;
            for seed in 0..8 {
                let mut random = Random(seed);
                let x = activations(&mut random, 300, cols);
                let weight = random.normals(rows * cols, 0.05);
                let grid = grid(bits, symmetric, Granularity::Group(32));
                let params = params(grid, act_order, 32);
                let ours = gptq(&weight, rows, cols, moments(&x, cols), &params).unwrap();
                let nearest = rtn(&weight, rows, cols, &grid, None, None).unwrap();
                ratio += relative_error(&weight, &ours.quantized.dequantize(), &x, cols)
                    / relative_error(&weight, &nearest.dequantize(), &x, cols)
                    / 8.0;
            }
            assert!(
                ratio < 0.9,
                "{bits} bits symmetric {symmetric} {act_order:?}: {ratio}"
            );
        }
    }
}

#[test]
fn refinement_only_lowers_the_loss() {
    let (rows, cols) = (40, 96);
    let mut gained = 0.0;
    for (case, granularity) in [
        Granularity::Group(16),
        Granularity::Group(40),
        Granularity::Channel,
    ]
    .into_iter()
    .enumerate()
    {
        for (bits, symmetric) in [(3, false), (4, false), (4, true), (8, true)] {
            let mut random = Random(70 + case as u64);
            let x = activations(&mut random, 400, cols);
            let fresh = activations(&mut Random(70 + case as u64), 2000, cols);
            let weight = random.normals(rows * cols, 0.05);
            let grid = Grid {
                search: ScaleSearch::Weighted,
                ..grid(bits, symmetric, granularity)
            };
            let run = |refine_sweeps: usize| {
                let params = GptqParams {
                    refine_sweeps,
                    ..GptqParams::new(grid)
                };
                let got = gptq(&weight, rows, cols, moments(&x, cols), &params).unwrap();
                let values = got.quantized.dequantize();
                (
                    got.report.relative_error,
                    relative_error(&weight, &values, &fresh, cols),
                )
            };
            let [none, one, three] = [run(0), run(1), run(3)];
            // The damped loss falls; what the damping adds is taken out of the reported one.
            assert!(
                one.0 < none.0 * 1.01 && three.0 <= one.0 * 1.01,
                "{none:?} {one:?} {three:?}"
            );
            gained += (three.1 / none.1).ln() / 12.0;
        }
    }
    assert!(
        gained < -0.03,
        "no gain on tokens it has not seen: {gained}"
    );
}

#[test]
fn reported_error_is_the_one_of_the_definition() {
    for (seed, tokens) in [(1, 400), (2, 20)] {
        for refine_sweeps in [0, 3] {
            let (rows, cols) = (33, 80);
            let mut random = Random(seed);
            let x = activations(&mut random, tokens, cols);
            let weight = random.normals(rows * cols, 0.05);
            let grid = grid(4, false, Granularity::Group(32));
            let params = GptqParams {
                refine_sweeps,
                ..GptqParams::new(grid)
            };
            let ours = gptq(&weight, rows, cols, moments(&x, cols), &params).unwrap();
            let exact = relative_error(&weight, &ours.quantized.dequantize(), &x, cols);
            // f32 sums of `cols` terms on both sides, and the damping taken out again.
            let rounding = cols as f64 * f64::from(f32::EPSILON);
            let tolerance = exact * 1e-3 + rounding * params.damp_fraction;
            let got = ours.report.relative_error;
            assert!(
                (got - exact).abs() <= tolerance,
                "got {got}, expected {exact}"
            );
        }
    }
}

#[test]
fn one_factor_serves_many_matrices() {
    let cols = 64;
    let mut random = Random(3);
    let x = activations(&mut random, 300, cols);
    let params = params(grid(4, true, Granularity::Group(32)), ActOrder::Group, 32);
    let factor = Factor::new(moments(&x, cols), &params).unwrap();
    for rows in [1, 20, 70] {
        let weight = random.normals(rows * cols, 0.05);
        let shared = factor.quantize(&weight, rows, &params.grid).unwrap();
        assert_eq!(
            shared,
            gptq(&weight, rows, cols, moments(&x, cols), &params).unwrap()
        );
    }
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    let (rows, cols) = (150, 300);
    let mut random = Random(11);
    let x = activations(&mut random, 700, cols);
    let weight = random.normals(rows * cols, 0.05);
    let grid = Grid {
        search: ScaleSearch::Weighted,
        ..grid(4, false, Granularity::Group(32))
    };
    let run = |threads: usize| -> (Moments, Gptq) {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let moments = moments(&x, cols);
            let params = GptqParams::new(grid);
            (
                moments.clone(),
                gptq(&weight, rows, cols, moments, &params).unwrap(),
            )
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(4));
}

#[test]
fn fewer_tokens_than_columns_are_solved_with_damping() {
    let (rows, cols, tokens) = (8, 64, 5);
    let mut random = Random(5);
    let x = activations(&mut random, tokens, cols);
    let weight = random.normals(rows * cols, 0.05);
    let grid = grid(4, false, Granularity::Group(32));
    let damped = gptq(
        &weight,
        rows,
        cols,
        moments(&x, cols),
        &GptqParams::new(grid),
    )
    .unwrap();
    assert_eq!(
        (damped.report.damp_fraction, &damped.report.fallback),
        (0.01, &None)
    );

    // Without damping the matrix is singular: the ladder steps in and says so.
    let undamped = GptqParams {
        damp_fraction: 0.0,
        ..GptqParams::new(grid)
    };
    let climbed = gptq(&weight, rows, cols, moments(&x, cols), &undamped).unwrap();
    assert_eq!(climbed.quantized, damped.quantized);
    assert_eq!(climbed.report.damp_fraction, 0.01);
    let reason = climbed.report.fallback.unwrap();
    assert!(
        reason.starts_with("damping raised to 0.01: at 0.0 pivot "),
        "{reason}"
    );
}

#[test]
fn the_ladder_ends_with_the_diagonal() {
    // Two equal columns and a damping far below what f64 resolves: no rung helps.
    let (rows, cols) = (4, 2);
    let weight = Random(9).normals(rows * cols, 0.05);
    let x = [1.0, 1.0, -2.0, -2.0, 0.5, 0.5];
    let params = GptqParams {
        damp_fraction: 1e-18,
        ..GptqParams::new(grid(4, false, Granularity::Channel))
    };
    let got = gptq(&weight, rows, cols, moments(&x, cols), &params).unwrap();
    let reason = got.report.fallback.unwrap();
    assert!(
        reason.starts_with("diagonal of the hessian only: at damping 6.4e-17 pivot 1 "),
        "{reason}"
    );
    assert_eq!(got.report.damp_fraction, 0.0);
    assert_eq!(
        got.quantized,
        rtn(&weight, rows, cols, &params.grid, None, None).unwrap()
    );
}

#[test]
fn dead_columns_keep_their_nearest_values() {
    let (rows, cols) = (6, 32);
    let mut random = Random(21);
    let mut x = activations(&mut random, 100, cols);
    let weight = random.normals(rows * cols, 0.05);
    for token in x.chunks_mut(cols) {
        token[3] = 0.0;
        token[20] = 0.0;
    }
    let grid = grid(4, true, Granularity::Group(16));
    let got = gptq(
        &weight,
        rows,
        cols,
        moments(&x, cols),
        &GptqParams::new(grid),
    )
    .unwrap();
    assert_eq!(got.report.dead_columns, 2);
    let values = got.quantized.dequantize();
    for row in 0..rows {
        for col in [3, 20] {
            let scale = got.quantized.scales[row * 2 + col / 16].to_f32();
            let off = (values[row * cols + col] - weight[row * cols + col]).abs();
            // Nearest level, but for the half step by which a symmetric range may clip.
            assert!(
                off <= 0.501 * scale,
                "row {row}, column {col}: {off} at scale {scale}"
            );
        }
    }
    // What the dead columns hold is of no consequence for the others.
    let mut changed = weight.clone();
    (0..rows).for_each(|row| changed[row * cols + 3] *= 0.25);
    let other = gptq(
        &changed,
        rows,
        cols,
        moments(&x, cols),
        &GptqParams::new(grid),
    )
    .unwrap();
    for row in 0..rows {
        assert_eq!(
            got.quantized.codes[row * cols + 16..][..4],
            other.quantized.codes[row * cols + 16..][..4]
        );
    }
}

#[test]
fn no_evidence_is_round_to_nearest_and_recorded() {
    let (rows, cols) = (5, 32);
    let weight = Random(2).normals(rows * cols, 0.05);
    let grid = grid(4, false, Granularity::Group(16));
    for x in [vec![], vec![0f32; 3 * cols]] {
        let got = gptq(
            &weight,
            rows,
            cols,
            moments(&x, cols),
            &GptqParams::new(grid),
        )
        .unwrap();
        assert_eq!(
            got.quantized,
            rtn(&weight, rows, cols, &grid, None, None).unwrap()
        );
        assert_eq!(got.report.relative_error, 0.0);
        assert_eq!(got.report.dead_columns, cols);
        let reason = got.report.fallback.unwrap();
        assert_eq!(reason, "round-to-nearest: every calibration input was zero");
    }
}

#[test]
fn channels_of_very_unequal_size_stay_finite() {
    let (rows, cols) = (8, 48);
    let mut random = Random(31);
    let mut x = activations(&mut random, 200, cols);
    for token in x.chunks_mut(cols) {
        token[0] *= 1e6;
        token[1] *= 1e-12;
        token[2] = 1e-30;
    }
    let mut weight = random.normals(rows * cols, 0.05);
    weight[5] = 1e30;
    weight[cols..cols + 16].fill(1e-30);
    for symmetric in [false, true] {
        for search in [ScaleSearch::None, ScaleSearch::Weighted] {
            let grid = Grid {
                search,
                ..grid(4, symmetric, Granularity::Group(16))
            };
            let got = gptq(
                &weight,
                rows,
                cols,
                moments(&x, cols),
                &GptqParams::new(grid),
            )
            .unwrap();
            assert!(
                got.quantized
                    .scales
                    .iter()
                    .all(|s| s.is_finite() && *s != f16::ZERO)
            );
            assert!(got.report.relative_error.is_finite());
        }
    }
}

#[test]
fn bad_values_are_refused_by_name() {
    let cols = 32;
    let mut weight = vec![0.5f32; 3 * cols];
    weight[2 * cols + 7] = f32::NAN;
    let params = GptqParams::new(grid(4, false, Granularity::Group(16)));
    let x = activations(&mut Random(1), 50, cols);
    let error = gptq(&weight, 3, cols, moments(&x, cols), &params).unwrap_err();
    assert!(
        matches!(error, QuantError::NonFiniteWeight { row: 2, col: 7, value } if value.is_nan())
    );
    assert_eq!(
        error
            .in_tensor("model.layers.0.mlp.up_proj.weight")
            .to_string(),
        "tensor `model.layers.0.mlp.up_proj.weight`: the weight in row `2`, column `7` is `NaN`, \
         expected a finite number"
    );
    weight[2 * cols + 7] = 0.5;
    for damp_fraction in [-0.1, f64::NAN, f64::INFINITY] {
        let params = GptqParams {
            damp_fraction,
            ..params
        };
        let error = gptq(&weight, 3, cols, moments(&x, cols), &params).unwrap_err();
        assert!(matches!(error, QuantError::DampFraction { .. }));
    }
    let params = GptqParams {
        update_block: 0,
        ..params
    };
    let error = gptq(&weight, 3, cols, moments(&x, cols), &params).unwrap_err();
    assert_eq!(error, QuantError::UpdateBlock);
}
