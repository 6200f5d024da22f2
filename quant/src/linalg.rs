//! Cholesky factorization in place, in f64, the same for every number of threads.

use qbin_runtime::kernels::Isa;
use qbin_runtime::kernels::gemm::{Element, Store, View, product};
use rayon::prelude::*;

/// Columns eliminated at once.
const STRIP: usize = 256;
/// Rows or columns per task of the updates.
const TASK: usize = 256;
/// Rows updated at once: the products of a task's columns with them stay in cache.
const ROWS: usize = 512;

/// A pivot of the Cholesky factorization that is not positive beyond rounding: the matrix is singular or
/// indefinite.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct NonPositivePivot {
    /// Position in the order of elimination.
    pub(crate) index: usize,
    /// The pivot.
    pub(crate) value: f64,
}

/// How the products of strips, nearly all of the work, are computed; everything else is in f64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Products {
    /// In f32, twice as fast. A pivot is refused that is not far above their rounding.
    Single,
    /// In f64.
    Double,
}

impl Products {
    /// The part of a diagonal element below which what is left of it may be rounding.
    fn noise(self, n: usize) -> f64 {
        match self {
            // The errors of `n/STRIP` strips are independent and each below `ε` of the element.
            Self::Single => 64.0 * f64::from(f32::EPSILON),
            Self::Double => n as f64 * f64::EPSILON,
        }
    }
}

/// Factors the symmetric `A = L·Lᵀ`: `a` is `n × n`, column major; the lower triangle (row ≥ column) is
/// read and becomes `L`, the upper one is neither read nor written.
///
/// Right-looking by strips: factor the diagonal tile, multiply the strip below it by the tile's inverse
/// transpose, subtract the outer product from the columns to the right.
///
/// # Errors
/// [`NonPositivePivot`] where a pivot is at or below the rounding noise of its diagonal element;
/// the lower triangle is then half done.
pub(crate) fn cholesky_in_place(
    a: &mut [f64],
    n: usize,
    products: Products,
) -> Result<(), NonPositivePivot> {
    assert_eq!(a.len(), n * n, "a is not [n, n]");
    let isa = Isa::detect();
    let noise: Vec<f64> = (0..n).map(|i| a[i * n + i] * products.noise(n)).collect();
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
        match products {
            Products::Double => subtract_outer(isa, right, n, &solved),
            Products::Single => {
                let solved: Vec<f32> = solved.iter().map(|&value| value as f32).collect();
                subtract_outer(isa, right, n, &solved);
            }
        }
    }
    Ok(())
}

/// `C −= S·Sᵀ` for the last columns of height `n`, rows at and below the diagonal only; `strip` is `S`, row major.
fn subtract_outer<T: Element + Into<f64>>(isa: Isa, columns: &mut [f64], n: usize, strip: &[T]) {
    let size = columns.len() / n;
    let strip = View::row_major(strip, size, strip.len() / size);
    columns
        .par_chunks_mut(TASK * n)
        .enumerate()
        .for_each(|(task, columns)| {
            let (first, count) = (task * TASK, columns.len() / n);
            let pivots = strip.subrows(first, count);
            let mut products = vec![T::default(); count * ROWS];
            for top in (first..size).step_by(ROWS) {
                let rest = strip.subrows(top, ROWS.min(size - top));
                product(
                    isa,
                    &mut products,
                    ROWS,
                    Store::Replace,
                    pivots,
                    rest.transpose(),
                );
                for (j, (column, products)) in
                    columns.chunks_mut(n).zip(products.chunks(ROWS)).enumerate()
                {
                    let column = &mut column[n - size + top..][..rest.rows()];
                    let above = (first + j).saturating_sub(top).min(rest.rows());
                    for (value, &product) in column.iter_mut().zip(products).skip(above) {
                        *value -= product.into();
                    }
                }
            }
        });
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
        // Around the borders of strips and tasks (256) and of rows (512).
        let sizes = [1, 2, 255, 256, 257, 300, 513, 700, 1100];
        for (n, products, epsilon) in sizes.into_iter().flat_map(|n| {
            let single = (n, Products::Single, f64::from(f32::EPSILON));
            [(n, Products::Double, f64::EPSILON), single]
        }) {
            let a = positive(n, n + 3, 0.1);
            let mut l = a.clone();
            cholesky_in_place(&mut l, n, products).unwrap();
            let trace: f64 = (0..n).map(|i| a[i * n + i]).sum();
            for j in 0..n {
                for i in j..n {
                    let product: f64 = (0..=j).map(|k| l[k * n + i] * l[k * n + j]).sum();
                    let tolerance = 8.0 * n as f64 * epsilon * trace;
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
            let error =
                cholesky_in_place(&mut positive(n, rank, 0.0), n, Products::Double).unwrap_err();
            // A pivot that is nothing but rounding may pass, not all of them.
            assert!((rank..n).contains(&error.index), "{}", error.index);
            cholesky_in_place(&mut positive(n, rank, 1e-6), n, Products::Double).unwrap();
        }
        // What f64 can still factor may be too little for products in f32, and then is refused, not wrong.
        let mut little = positive(300, 200, 1e-6);
        let error = cholesky_in_place(&mut little, 300, Products::Single).unwrap_err();
        assert!(error.index >= 200, "{}", error.index);
        let error = cholesky_in_place(&mut [f64::NAN], 1, Products::Double).unwrap_err();
        assert!(error.value.is_nan());
    }
}
