//! Cholesky factorization in place, in f64, the same for every number of threads.

use qbin_runtime::kernels::Isa;
use qbin_runtime::kernels::gemm::{Store, View, product};
use rayon::prelude::*;

/// Columns eliminated at once.
const STRIP: usize = 256;
/// Rows or columns per task of the updates.
const TASK: usize = 256;
/// Side of the squares on the diagonal of which only one half is updated.
const SQUARE: usize = 32;

/// A pivot of the Cholesky factorization that is not positive beyond rounding: the matrix is singular or
/// indefinite.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct NonPositivePivot {
    /// Position in the order of elimination.
    pub(crate) index: usize,
    /// The pivot.
    pub(crate) value: f64,
}

/// Factors the symmetric `A = L·Lᵀ`: `a` is `n × n`, column major; the lower triangle (row ≥ column) is
/// read and becomes `L`, the upper one is neither read nor written.
///
/// Right-looking by strips: factor the diagonal tile, multiply the strip below it by the tile's inverse
/// transpose, subtract the outer product from the columns to the right.
///
/// # Errors
/// [`NonPositivePivot`] where a pivot is at or below the rounding noise `n·ε` of its diagonal element;
/// the lower triangle is then half done.
pub(crate) fn cholesky_in_place(a: &mut [f64], n: usize) -> Result<(), NonPositivePivot> {
    assert_eq!(a.len(), n * n, "a is not [n, n]");
    let isa = Isa::detect();
    let noise: Vec<f64> = (0..n)
        .map(|i| a[i * n + i] * n as f64 * f64::EPSILON)
        .collect();
    for start in (0..n).step_by(STRIP) {
        let width = STRIP.min(n - start);
        let end = start + width;
        let (left, right) = a.split_at_mut(end * n);
        let strip = &mut left[start * n..];
        factor_tile(strip, n, start, width, &noise)?;
        if end == n {
            break;
        }
        let inverse = invert_tile(strip, n, start, width);
        let solved = solve_below(isa, strip, n, end, width, &inverse);
        let below = View::row_major(&solved, n - end, width);
        right
            .par_chunks_mut(TASK * n)
            .enumerate()
            .for_each(|(task, columns)| subtract_outer(isa, columns, n, end, below, task * TASK));
    }
    Ok(())
}

/// `C −= S·S[first..]ᵀ` for some columns of height `n`, rows at and below the diagonal only; `strip` is `S`, whose
/// first row belongs to row `end` of `C`.
fn subtract_outer(
    isa: Isa,
    columns: &mut [f64],
    n: usize,
    end: usize,
    strip: View<'_, f64>,
    first: usize,
) {
    let count = columns.len() / n;
    for (i, columns) in columns.chunks_mut(SQUARE * n).enumerate() {
        let (top, side) = (first + i * SQUARE, columns.len() / n);
        let pivots = strip.subrows(top, side);
        let mut square = [0f64; SQUARE * SQUARE];
        product(
            isa,
            &mut square,
            SQUARE,
            Store::Replace,
            pivots,
            pivots.transpose(),
        );
        for (j, (column, products)) in columns.chunks_mut(n).zip(square.chunks(SQUARE)).enumerate()
        {
            let column = &mut column[end + top..][j..side];
            column
                .iter_mut()
                .zip(&products[j..])
                .for_each(|(c, p)| *c -= p);
        }
        // The rest of these columns as far as the task's own square of rows reaches.
        let rest = strip.subrows(top + side, first + count - top - side);
        let out = &mut columns[end + top + side..];
        product(isa, out, n, Store::Subtract, pivots, rest.transpose());
    }
    let below = first + count;
    if below < strip.rows() {
        let rest = strip.subrows(below, strip.rows() - below);
        let pivots = strip.subrows(first, count);
        product(
            isa,
            &mut columns[end + below..],
            n,
            Store::Subtract,
            pivots,
            rest.transpose(),
        );
    }
}

/// Factors the diagonal tile at rows `start..start + width` of `strip` (columns of height `n`).
fn factor_tile(
    strip: &mut [f64],
    n: usize,
    start: usize,
    width: usize,
    noise: &[f64],
) -> Result<(), NonPositivePivot> {
    for j in 0..width {
        let (done, rest) = strip.split_at_mut(j * n);
        let column = &mut rest[start + j..start + width];
        for earlier in done.chunks(n) {
            let earlier = &earlier[start + j..start + width];
            let factor = earlier[0];
            for (value, &other) in column.iter_mut().zip(earlier) {
                *value -= factor * other;
            }
        }
        let pivot = column[0];
        if pivot.is_nan() || pivot <= noise[start + j] {
            return Err(NonPositivePivot {
                index: start + j,
                value: pivot,
            });
        }
        let root = pivot.sqrt();
        column.iter_mut().for_each(|value| *value /= root);
        column[0] = root;
    }
    Ok(())
}

/// The inverse of the lower triangular tile, `[width, width]` column major.
fn invert_tile(strip: &[f64], n: usize, start: usize, width: usize) -> Vec<f64> {
    let mut inverse = vec![0f64; width * width];
    for (j, column) in inverse.chunks_mut(width).enumerate() {
        column[j] = 1.0;
        for k in j..width {
            let tile = &strip[k * n + start..][..width];
            let value = column[k] / tile[k];
            column[k] = value;
            for (below, &l) in column[k + 1..].iter_mut().zip(&tile[k + 1..]) {
                *below -= value * l;
            }
        }
    }
    inverse
}

/// Replaces the rows from `end` on of the strip by their product with the transposed `inverse`; also returns them,
/// `[rows, width]` row major.
fn solve_below(
    isa: Isa,
    strip: &mut [f64],
    n: usize,
    end: usize,
    width: usize,
    inverse: &[f64],
) -> Vec<f64> {
    let inverse = View::col_major(inverse, width, width);
    let mut solved = vec![0f64; (n - end) * width];
    let source = &*strip;
    solved
        .par_chunks_mut(TASK * width)
        .enumerate()
        .for_each(|(task, out)| {
            let (first, count) = (end + task * TASK, out.len() / width);
            let mut rows = vec![0f64; out.len()];
            for (j, column) in source.chunks(n).enumerate() {
                for (row, &value) in rows.chunks_mut(width).zip(&column[first..first + count]) {
                    row[j] = value;
                }
            }
            let rows = View::row_major(&rows, count, width);
            product(isa, out, width, Store::Replace, rows, inverse.transpose());
        });
    strip.par_chunks_mut(n).enumerate().for_each(|(j, column)| {
        for (value, solved) in column[end..].iter_mut().zip(solved.chunks(width)) {
            *value = solved[j];
        }
    });
    solved
}

#[cfg(test)]
mod tests {
    //! The factor against its definition, and what failure leaves behind.

    use super::*;

    /// `A = B·Bᵀ + shift·I` of a seeded `B[n, rank]`, column major.
    fn positive(n: usize, rank: usize, shift: f64) -> Vec<f64> {
        let mut state = 12345u64;
        let mut next = || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 11) as f64 / (1u64 << 53) as f64 - 0.5
        };
        let b: Vec<f64> = (0..n * rank).map(|_| next()).collect();
        let dot = |i: usize, j: usize| -> f64 {
            (0..rank).map(|k| b[i * rank + k] * b[j * rank + k]).sum()
        };
        let value = |at: usize| {
            let (i, j) = (at % n, at / n);
            dot(i.max(j), i.min(j)) + if i == j { shift } else { 0.0 }
        };
        (0..n * n).map(value).collect()
    }

    #[test]
    fn factor_reproduces_the_matrix() {
        // Around the borders of strips (128) and tasks (256).
        for n in [1, 2, 127, 128, 129, 256, 300, 513, 700] {
            let a = positive(n, n + 3, 0.1);
            let mut l = a.clone();
            cholesky_in_place(&mut l, n).unwrap();
            let trace: f64 = (0..n).map(|i| a[i * n + i]).sum();
            for j in 0..n {
                for i in j..n {
                    let product: f64 = (0..=j).map(|k| l[k * n + i] * l[k * n + j]).sum();
                    let tolerance = 8.0 * n as f64 * f64::EPSILON * trace;
                    assert!((product - a[j * n + i]).abs() <= tolerance, "{n}: {i} {j}");
                }
                for i in 0..j {
                    assert_eq!(
                        l[j * n + i],
                        a[j * n + i],
                        "the upper triangle is untouched"
                    );
                }
            }
        }
    }

    #[test]
    fn rank_deficient_matrices_are_refused() {
        for (n, rank) in [(40, 7), (300, 200), (300, 280)] {
            let error = cholesky_in_place(&mut positive(n, rank, 0.0), n).unwrap_err();
            // A pivot that is nothing but rounding may pass, not all of them.
            assert!((rank..n).contains(&error.index), "{}", error.index);
            cholesky_in_place(&mut positive(n, rank, 1e-6), n).unwrap();
        }
        let error = cholesky_in_place(&mut [f64::NAN], 1).unwrap_err();
        assert!(error.value.is_nan());
    }
}
