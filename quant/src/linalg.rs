//! Cholesky factorization in place, in f64, the same for every number of threads.

use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{BlockStructure, matmul as matmul_triangular};
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Columns eliminated at once.
const STRIP: usize = 128;
/// Rows or columns per task of the updates.
const TASK: usize = 256;

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
        solve_below(strip, n, end, width, &inverse);
        let strip = MatRef::from_column_major_slice_with_stride(strip, n, width, n);
        right
            .par_chunks_mut(TASK * n)
            .enumerate()
            .for_each(|(task, columns)| {
                let first = end + task * TASK;
                let count = columns.len() / n;
                let columns = MatMut::from_column_major_slice_mut(columns, n, count);
                subtract_outer(columns, strip, first, count);
            });
    }
    Ok(())
}

/// `C[first.., first..first+count] −= S[first..]·S[first..first+count]ᵀ`, lower triangle only.
fn subtract_outer(columns: MatMut<'_, f64>, strip: MatRef<'_, f64>, first: usize, count: usize) {
    let (_, below) = columns.split_at_row_mut(first);
    let (square, rest) = below.split_at_row_mut(count);
    let pivot_rows = strip.subrows(first, count);
    matmul_triangular(
        square,
        BlockStructure::TriangularLower,
        Accum::Add,
        pivot_rows,
        BlockStructure::Rectangular,
        pivot_rows.transpose(),
        BlockStructure::Rectangular,
        -1.0,
        Par::Seq,
    );
    if rest.nrows() > 0 {
        let other_rows = strip.subrows(first + count, rest.nrows());
        matmul(
            rest,
            Accum::Add,
            other_rows,
            pivot_rows.transpose(),
            -1.0,
            Par::Seq,
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

/// Replaces the rows from `end` on of the strip by their product with the transposed `inverse`.
fn solve_below(strip: &mut [f64], n: usize, end: usize, width: usize, inverse: &[f64]) {
    let inverse = MatRef::from_column_major_slice(inverse, width, width);
    let rows = n - end;
    let view = MatRef::from_column_major_slice_with_stride(&*strip, n, width, n);
    let solved: Vec<Vec<f64>> = (0..rows.div_ceil(TASK))
        .into_par_iter()
        .map(|task| {
            let first = end + task * TASK;
            let count = TASK.min(n - first);
            let mut out = vec![0f64; count * width];
            matmul(
                MatMut::from_column_major_slice_mut(&mut out, count, width),
                Accum::Replace,
                view.subrows(first, count),
                inverse.transpose(),
                1.0,
                Par::Seq,
            );
            out
        })
        .collect();
    for (j, column) in strip.chunks_mut(n).enumerate() {
        for (target, solved) in column[end..].chunks_mut(TASK).zip(&solved) {
            target.copy_from_slice(&solved[j * target.len()..][..target.len()]);
        }
    }
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
