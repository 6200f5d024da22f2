//! Products against their definition in f64, and equal bits however they are computed.

use super::*;

/// Seeded values in −0.5 .. 0.5.
pub(super) fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let next = |_| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..len).map(next).collect()
}

/// Around the borders of tiles (8, 32), squares (8), packed columns (512) and parts (256).
const SHAPES: [(usize, usize, usize); 9] = [
    (1, 1, 1),
    (8, 8, 32),
    (9, 7, 31),
    (7, 9, 33),
    (17, 255, 64),
    (3, 256, 40),
    (20, 257, 5),
    (2, 600, 545),
    (65, 100, 1),
];

#[test]
fn agrees_with_the_definition_at_every_level() {
    for (rows, depth, cols) in SHAPES {
        let (a, b) = (values(rows * depth, 1), values(depth * cols, 2));
        let mut expected: Option<Vec<f32>> = None;
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; rows * cols];
            let (left, right) = (
                View::row_major(&a, rows, depth),
                View::row_major(&b, depth, cols),
            );
            product(isa, &mut out, cols, Store::Replace, left, right);
            for (at, &got) in out.iter().enumerate() {
                let (row, col) = (at / cols, at % cols);
                let terms = (0..depth)
                    .map(|k| f64::from(a[row * depth + k]) * f64::from(b[k * cols + col]));
                let exact: f64 = terms.clone().sum();
                // One rounding per term of a chain and one per part, each of a sum no larger than this.
                let size: f64 = terms.map(f64::abs).sum();
                let roundings = (depth.min(DEPTH) + depth / DEPTH + 1) as f64;
                let tolerance = roundings * f64::from(f32::EPSILON) / 2.0 * size;
                assert!(
                    (f64::from(got) - exact).abs() <= tolerance,
                    "{row} {col}: {got} {exact}"
                );
            }
            assert_eq!(expected.get_or_insert(out.clone()), &out, "{}", isa.level());
        }
    }
}

#[test]
fn double_precision_agrees_with_the_definition_at_every_level() {
    for (rows, depth, cols) in SHAPES {
        // Whole numbers: every sum is exact.
        let whole = |seed, len| -> Vec<f64> {
            values(len, seed)
                .iter()
                .map(|v| f64::from((v * 2000.0).round()))
                .collect()
        };
        let (a, b) = (whole(3, rows * depth), whole(4, depth * cols));
        let exact: Vec<f64> = (0..rows * cols)
            .map(|at| {
                (0..depth)
                    .map(|k| a[at / cols * depth + k] * b[k * cols + at % cols])
                    .sum()
            })
            .collect();
        let thirds: Vec<f64> = a.iter().map(|v| v / 3.0).collect();
        let mut expected: Option<Vec<f64>> = None;
        for isa in Isa::available() {
            let run = |a| {
                let mut out = vec![f64::NAN; rows * cols];
                let (left, right) = (
                    View::row_major(a, rows, depth),
                    View::row_major(&b, depth, cols),
                );
                product(isa, &mut out, cols, Store::Replace, left, right);
                out
            };
            assert_eq!(run(&a), exact, "{}", isa.level());
            let rounded = run(&thirds);
            assert_eq!(
                expected.get_or_insert(rounded.clone()),
                &rounded,
                "{}",
                isa.level()
            );
        }
    }
}

#[test]
fn layouts_and_neighbours_do_not_matter() {
    let isa = Isa::detect();
    let transposed = |m: &[f32], rows: usize, cols: usize| -> Vec<f32> {
        (0..rows * cols)
            .map(|at| m[at % rows * cols + at / rows])
            .collect()
    };
    for (rows, depth, cols) in SHAPES {
        let (a, b) = (values(rows * depth, 5), values(depth * cols, 6));
        let (a_cols, b_cols) = (transposed(&a, rows, depth), transposed(&b, depth, cols));
        let lefts = [
            View::row_major(&a, rows, depth),
            View::col_major(&a_cols, rows, depth),
        ];
        let rights = [
            View::row_major(&b, depth, cols),
            View::col_major(&b_cols, depth, cols),
        ];
        let mut expected = vec![f32::NAN; rows * cols];
        product(
            isa,
            &mut expected,
            cols,
            Store::Replace,
            lefts[0],
            rights[0],
        );
        for (left, right) in lefts.into_iter().zip(rights).chain([(lefts[0], rights[1])]) {
            // Rows further apart, and each element alone.
            let stride = cols + 3;
            let mut out = vec![7f32; rows * stride - 3];
            product(isa, &mut out, stride, Store::Replace, left, right);
            for (at, &value) in out.iter().enumerate() {
                let (row, col) = (at / stride, at % stride);
                if col >= cols {
                    assert_eq!(value, 7.0, "between the rows");
                    continue;
                }
                assert_eq!(value, expected[row * cols + col]);
                if rows * cols < 200 {
                    let mut one = [f32::NAN];
                    let (left, right) = (left.subrows(row, 1), right.subcols(col, 1));
                    product(isa, &mut one, 1, Store::Replace, left, right);
                    assert_eq!(one[0], value);
                }
            }
        }
    }
}

#[test]
fn products_are_added_and_subtracted() {
    let isa = Isa::detect();
    let (a, b) = ([1f64, 2.0, 3.0, 4.0], [5f64, 6.0, 7.0, 8.0]);
    let (a, b) = (View::row_major(&a, 2, 2), View::row_major(&b, 2, 2));
    let mut out = [100f64; 4];
    product(isa, &mut out, 2, Store::Add, a, b);
    assert_eq!(out, [119.0, 122.0, 143.0, 150.0]);
    product(isa, &mut out, 2, Store::Subtract, a, b.transpose());
    assert_eq!(out, [102.0, 99.0, 104.0, 97.0]);
    // No terms: a sum of zero.
    product(
        isa,
        &mut out,
        2,
        Store::Add,
        a.subcols(0, 0),
        b.subrows(0, 0),
    );
    assert_eq!(out, [102.0, 99.0, 104.0, 97.0]);
    product(
        isa,
        &mut out,
        2,
        Store::Replace,
        a.subcols(0, 0),
        b.subrows(0, 0),
    );
    assert_eq!(out, [0.0; 4]);
}

#[test]
fn transposes_are_those_of_the_definition() {
    for (rows, cols) in [(1, 1), (8, 8), (7, 20), (33, 41), (16, 3)] {
        let x = values(rows * (cols + 5), 9);
        let part = View::row_major(&x, rows, cols + 5).subcols(2, cols);
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; rows * cols];
            transpose(isa, part, &mut out);
            for (at, &value) in out.iter().enumerate() {
                assert_eq!(value, x[at % rows * (cols + 5) + 2 + at / rows]);
            }
        }
    }
}

#[test]
fn packed_operands_give_the_same_bits() {
    for (rows, depth, cols) in SHAPES {
        // More terms than the product takes, as while columns are still being decided.
        let all = depth + 3;
        let (a, b) = (values(rows * depth, 1), values(all * cols, 2));
        let (left, right) = (
            View::row_major(&a, rows, depth),
            View::row_major(&b[..depth * cols], depth, cols),
        );
        for isa in Isa::available() {
            let mut expected = vec![f32::NAN; rows * cols];
            product(isa, &mut expected, cols, Store::Replace, left, right);
            let packed_left = Left::new(isa, left);
            let mut packed_right = Right::zeros(cols, all);
            packed_right.set(0, &b);
            let heads = (packed_left.all(), packed_right.head(depth));
            let mut got = [(); 3].map(|()| vec![f32::NAN; rows * cols]);
            product(isa, &mut got[0], cols, Store::Replace, heads.0, heads.1);
            product(isa, &mut got[1], cols, Store::Replace, left, heads.1);
            product(isa, &mut got[2], cols, Store::Replace, heads.0, right);
            let all_equal = got.iter().all(|got| *got == expected);
            assert!(all_equal, "{rows} x {depth} x {cols}, {}", isa.level());
        }
    }
}

#[test]
fn packed_terms_are_read_as_they_were_written() {
    for (lines, terms) in [(1, 1), (31, 5), (32, 4), (33, 7), (70, 300)] {
        let written = values(lines * terms, 3);
        let mut packed = Right::zeros(lines, terms);
        let (first, rest) = written.split_at(lines * (terms / 2));
        packed.set(terms / 2, rest);
        packed.set(0, first);
        let mut read = vec![f32::NAN; written.len()];
        packed.get(0, &mut read);
        assert_eq!(read, written, "{lines} x {terms}");
        packed.get(terms - 1, &mut read[..lines]);
        assert_eq!(read[..lines], written[lines * (terms - 1)..]);
        let whole = Right::new(Isa::detect(), View::col_major(&written, lines, terms));
        for first in (0..lines).step_by(COLS) {
            // Zeros beyond the last line, too.
            let panels = [&whole, &packed].map(|m| m.all().panel(first, 0..terms, &[]).to_vec());
            assert_eq!(panels[0], panels[1], "{lines} x {terms}");
        }
    }
}
