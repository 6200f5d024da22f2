//! Grids: bounds of the rounding error, the ends of f16, and the search's promise.

mod common;

use common::{Random, grid};
use half::f16;
use proptest::prelude::*;
use qbin_quant::{Granularity, Grid, QuantError, ScaleSearch, rtn};

const WIDTHS: [u8; 3] = [3, 4, 8];

fn all_grids() -> impl Iterator<Item = Grid> {
    WIDTHS
        .into_iter()
        .flat_map(|bits| [false, true].map(|symmetric| grid(bits, symmetric, Granularity::Channel)))
}

/// The weights after one round trip through the codes of `grid`, as one group.
fn round_trip(grid: &Grid, weights: &[f32], importance: Option<&[f32]>) -> (f32, Vec<f32>) {
    let matrix = rtn(weights, 1, weights.len(), grid, importance, None).unwrap();
    (matrix.scales[0].to_f32(), matrix.dequantize())
}

/// `Σ h·(w − ŵ)²` in f64.
fn weighted_error(weights: &[f32], rounded: &[f32], importance: &[f32]) -> f64 {
    let term = |i: usize| {
        f64::from(importance[i]) * (f64::from(weights[i]) - f64::from(rounded[i])).powi(2)
    };
    (0..weights.len()).map(term).sum()
}

proptest! {
    #[test]
    fn error_is_at_most_half_a_step(
        weights in prop::collection::vec(-3f32..3.0, 1..70),
        shift in -4f32..4.0,
    ) {
        let weights: Vec<f32> = weights.iter().map(|w| w + shift).collect();
        for grid in all_grids() {
            let (scale, rounded) = round_trip(&grid, &weights, None);
            let steps = f32::from(u8::MAX >> (8 - grid.bits));
            // Rounding the scale to f16 moves the ends of the range by up to `steps · scale · 2⁻¹¹`; an
            // asymmetric zero point moves the grid by up to half a step, which only the ends feel.
            let at_the_ends = if grid.symmetric { 0.0 } else { 0.5 };
            let half = scale * (0.5 + at_the_ends + steps * 2f32.powi(-11) + 1e-5 * steps);
            for (w, r) in weights.iter().zip(&rounded) {
                prop_assert!((w - r).abs() <= half, "{grid:?}: {w} became {r}, scale {scale}");
            }
        }
    }

    #[test]
    fn zero_stays_zero(weights in prop::collection::vec(-3f32..3.0, 1..70)) {
        let mut weights = weights;
        weights[0] = 0.0;
        for grid in all_grids() {
            let (_, rounded) = round_trip(&grid, &weights, None);
            prop_assert_eq!(rounded[0], 0.0);
        }
    }

    #[test]
    fn search_is_never_worse_than_none(seed in 0u64..1000, len in 1usize..200, tail in 0.0f64..4.0) {
        let mut random = Random(seed);
        let weights: Vec<f32> =
            (0..len).map(|_| (random.normal() * (tail * random.normal()).exp()) as f32).collect();
        let importance: Vec<f32> = (0..len).map(|_| random.unit() as f32).collect();
        for plain in all_grids() {
            let searched = Grid { search: ScaleSearch::Weighted, ..plain };
            let error = |grid: &Grid| {
                let (_, rounded) = round_trip(grid, &weights, Some(&importance));
                weighted_error(&weights, &rounded, &importance)
            };
            let (before, after) = (error(&plain), error(&searched));
            // The search compares sums in f32.
            prop_assert!(after <= before * (1.0 + 1e-5), "{searched:?}: {before} to {after}");
        }
    }
}

#[test]
fn search_gains_on_a_group_with_an_outlier() {
    let mut weights = Random(1).normals(128, 1.0);
    weights[17] = 9.0;
    let ones = vec![1.0; 128];
    for plain in all_grids() {
        let searched = Grid {
            search: ScaleSearch::Weighted,
            ..plain
        };
        let error = |grid| weighted_error(&weights, &round_trip(grid, &weights, None).1, &ones);
        let (before, after) = (error(&plain), error(&searched));
        let factor = if plain.bits == 8 { 1.0 } else { 0.97 };
        assert!(
            after <= factor * before,
            "{searched:?}: {before} to {after}"
        );
    }
}

#[test]
fn search_follows_the_importance() {
    let mut weights = Random(4).normals(64, 1.0);
    weights[5] = 12.0;
    for plain in all_grids() {
        let searched = Grid {
            search: ScaleSearch::Weighted,
            ..plain
        };
        let mut importance = vec![1.0; 64];
        importance[5] = 0.0;
        let (ignored, _) = round_trip(&searched, &weights, Some(&importance));
        importance[5] = 1e6;
        let (_, kept) = round_trip(&searched, &weights, Some(&importance));
        assert!((kept[5] - 12.0).abs() < 0.05, "{searched:?}: {}", kept[5]);
        let (plain_scale, _) = round_trip(&plain, &weights, None);
        assert!(
            ignored.abs() < 0.9 * plain_scale,
            "{searched:?}: {ignored} of {plain_scale}"
        );
    }
}

#[test]
fn a_symmetric_scale_may_be_negative() {
    // −8 … 7 with the large weight on the positive side: only a negative scale has a level for it.
    let weights: Vec<f32> = (-7..=8).map(|step| 0.25 * step as f32).collect();
    let plain = grid(4, true, Granularity::Channel);
    let searched = Grid {
        search: ScaleSearch::Weighted,
        ..plain
    };
    let (scale, rounded) = round_trip(&searched, &weights, None);
    assert_eq!((scale, rounded), (-0.25, weights.clone()));
    assert_ne!(round_trip(&plain, &weights, None).1, weights);
}

#[test]
fn published_min_max_rule() {
    let weights = [-0.6, 0.2, 0.9, 0.0];
    let rounded = |value: f64| f16::from_f64(value);
    for (bits, steps) in [(3u8, 7.0), (4, 15.0), (8, 255.0)] {
        let asymmetric = grid(bits, false, Granularity::Channel);
        let matrix = rtn(&weights, 1, 4, &asymmetric, None, None).unwrap();
        let scale = rounded(1.5 / steps);
        assert_eq!(matrix.scales, [scale]);
        let zero = (0.6 / scale.to_f64()).round_ties_even();
        assert_eq!(f64::from(matrix.zero_points[0]), zero);
        let code = |w: f32| (f64::from(w) / scale.to_f64()).round_ties_even() + zero;
        let expected = weights.map(|w| code(w).clamp(0.0, steps) as u8);
        assert_eq!(matrix.codes, expected);

        let symmetric = grid(bits, true, Granularity::Channel);
        let matrix = rtn(&weights, 1, 4, &symmetric, None, None).unwrap();
        assert_eq!(matrix.scales, [rounded(1.8 / steps)]);
        assert!(matrix.zero_points.is_empty());
        let (low, high) = symmetric.codes();
        // The largest weight lies half a step beyond the last level.
        assert_eq!(matrix.codes[2], high);
        assert_eq!(u32::from(high - low), steps as u32);
        assert_eq!(
            u32::from(matrix.scheme.mid()),
            u32::from(low) + (steps as u32).div_ceil(2)
        );
    }
}

#[test]
fn ties_round_to_even() {
    let weights = [15.0, 0.5, 1.5, 2.5, 3.5, 0.0];
    let matrix = rtn(
        &weights,
        1,
        6,
        &grid(4, false, Granularity::Channel),
        None,
        None,
    )
    .unwrap();
    assert_eq!(matrix.scales, [f16::ONE]);
    assert_eq!(matrix.codes, [15, 0, 2, 2, 4, 0]);
}

#[test]
fn scales_stay_inside_f16() {
    let smallest = f16::from_bits(1).to_f32();
    let cases: [(&[f32], f32); 6] = [
        (&[0.0; 5], f32::NAN), // any scale will do
        (&[-0.0, 0.0], f32::NAN),
        (&[1e-30, -1e-30], smallest),
        (&[f32::from_bits(1)], smallest),
        (&[f32::MAX, f32::MIN, 1.0], f16::MAX.to_f32()),
        (&[3e38, 1e38], f16::MAX.to_f32()),
    ];
    for search in [ScaleSearch::None, ScaleSearch::Weighted] {
        for plain in all_grids() {
            let grid = Grid { search, ..plain };
            for (weights, expected) in cases {
                let (scale, rounded) = round_trip(&grid, weights, None);
                assert!(
                    scale != 0.0 && scale.is_finite(),
                    "{grid:?} {weights:?}: {scale}"
                );
                if !expected.is_nan() {
                    assert_eq!(scale.abs(), expected, "{grid:?} {weights:?}");
                }
                assert!(rounded.iter().all(|w| w.is_finite()));
            }
            assert_eq!(round_trip(&grid, &[0.0; 5], None).1, [0.0; 5]);
        }
    }
}

#[test]
fn one_signed_groups_use_the_whole_range() {
    for sign in [1.0, -1.0] {
        let weights: Vec<f32> = (0..16).map(|step| sign * step as f32).collect();
        let (scale, rounded) = round_trip(&grid(4, false, Granularity::Channel), &weights, None);
        assert_eq!((scale, rounded), (1.0, weights));
    }
}

#[test]
fn clip_bounds_a_group_before_its_scale_is_chosen() {
    let weights = [1.0, -0.5, 0.25, 8.0, 1.0, -0.5, 0.25, 8.0];
    let grid = grid(4, false, Granularity::Group(4));
    let clip = [1.0, f32::INFINITY];
    let matrix = rtn(&weights, 1, 8, &grid, None, Some(&clip)).unwrap();
    let limited = rtn(&[1.0, -0.5, 0.25, 1.0], 1, 4, &grid, None, None).unwrap();
    assert_eq!(matrix.codes[..4], limited.codes);
    assert_eq!(matrix.scales[0], limited.scales[0]);
    assert_eq!(
        matrix.codes[4..],
        rtn(&weights[4..], 1, 4, &grid, None, None).unwrap().codes
    );
}

#[test]
fn short_last_group_and_rows_stand_alone() {
    let (rows, cols) = (35, 50);
    let weight = Random(8).normals(rows * cols, 0.1);
    for plain in WIDTHS.map(|bits| grid(bits, false, Granularity::Group(16))) {
        let whole = rtn(&weight, rows, cols, &plain, None, None).unwrap();
        for row in [0, 15, 16, 34] {
            for group in 0..4 {
                let columns = group * 16..50.min(group * 16 + 16);
                let alone = Grid {
                    granularity: Granularity::Channel,
                    ..plain
                };
                let weights = &weight[row * cols..][columns.clone()];
                let alone = rtn(weights, 1, weights.len(), &alone, None, None).unwrap();
                assert_eq!(whole.codes[row * cols..][columns], alone.codes);
                assert_eq!(whole.scales[row * 4 + group], alone.scales[0]);
                assert_eq!(whole.zero_points[row * 4 + group], alone.zero_points[0]);
            }
        }
    }
}

#[test]
fn impossible_grids_are_refused() {
    let weights = [1.0; 8];
    for bits in [0, 1, 2, 5, 16] {
        let grid = grid(bits, true, Granularity::Channel);
        let error = rtn(&weights, 1, 8, &grid, None, None).unwrap_err();
        assert_eq!(error, QuantError::Bits { bits });
    }
    for group_size in [0, 9] {
        let grid = grid(4, true, Granularity::Group(group_size));
        let error = rtn(&weights, 1, 8, &grid, None, None).unwrap_err();
        assert_eq!(
            error,
            QuantError::GroupSize {
                group_size,
                cols: 8
            }
        );
        assert!(error.hint().is_some());
    }
    let infinite = [1.0, f32::NEG_INFINITY, f32::NAN];
    let error = rtn(
        &infinite,
        3,
        1,
        &grid(4, true, Granularity::Channel),
        None,
        None,
    )
    .unwrap_err();
    let expected = QuantError::NonFiniteWeight {
        row: 1,
        col: 0,
        value: f32::NEG_INFINITY,
    };
    assert_eq!(error, expected);
}
