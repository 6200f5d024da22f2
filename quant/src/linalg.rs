//! Cholesky factorization in place, in f64, the same for every number of threads.

use qbin_runtime::kernels::gemm::{Element, Left, Right, Store, View, product};
use qbin_runtime::kernels::{Isa, pages};
use rayon::prelude::*;

/// Columns eliminated at once.
const STRIP: usize = 256;
/// Columns whose products are subtracted from all later ones together: those, most of the matrix, come from memory.
const SPAN: usize = 4 * STRIP;
/// Rows or columns per task of the updates.
const TASK: usize = 256;
/// Rows of a tile's inverse multiplied at once, and columns of a square on the diagonal.
const PART: usize = 64;
/// Rows updated at once: the products of a task's columns with them stay in cache.
const ROWS: usize = 256;

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
            // The errors of `n/STRIP` strips, and of their sums in a span, are independent and each below `ε` of the
            // element.
            Self::Single => 64.0 * f64::from(f32::EPSILON),
            Self::Double => n as f64 * f64::EPSILON,
        }
    }
}

/// Factors the symmetric `A = L·Lᵀ`: `a` is `n × n`, column major; the lower triangle (row ≥ column) is
/// read and becomes `L`, the upper one is neither read nor written.
///
/// Right-looking by strips: factor the diagonal tile, multiply the strip below it by the tile's inverse
/// transpose, subtract the outer product from the columns to the right; from those of the next spans for all
/// strips of a span at once.
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
    let subtract = match products {
        Products::Single => subtract_outer::<f32>,
        Products::Double => subtract_outer::<f64>,
    };
    for first in (0..n).step_by(SPAN) {
        let last = n.min(first + SPAN);
        let (span, rest) = a[first * n..].split_at_mut((last - first) * n);
        for start in (first..last).step_by(STRIP) {
            let end = last.min(start + STRIP);
            let (strip, later) = span[(start - first) * n..].split_at_mut((end - start) * n);
            factor_tile(strip, n, start, end - start, &noise)?;
            let inverse = invert_tile(strip, n, start, end - start);
            solve_below(isa, strip, n, end, &inverse);
            subtract(isa, strip, later, n, end);
        }
        subtract(isa, span, rest, n, last);
    }
    Ok(())
}

/// What products of strips are computed in.
trait Precision: Element + Into<f64> {
    fn rounded(value: f64) -> Self;
}

impl Precision for f32 {
    fn rounded(value: f64) -> Self {
        value as f32
    }
}

impl Precision for f64 {
    fn rounded(value: f64) -> Self {
        value
    }
}

/// `C −= S·Sᵀ` for the columns from `first` on, rows at and below the diagonal only; `done` are finished columns, all of
/// height `n`, and `S` is what they hold from row `first` on.
fn subtract_outer<T: Precision>(
    isa: Isa,
    done: &[f64],
    columns: &mut [f64],
    n: usize,
    first: usize,
) {
    if columns.is_empty() {
        return;
    }
    let (depth, size) = (done.len() / n, n - first);
    let mut strip = pages::zeros::<T>(depth * size);
    let rounding = strip.par_chunks_mut(size).zip(done.par_chunks(n));
    rounding.for_each(|(strip, done)| {
        let values = strip.iter_mut().zip(&done[first..]);
        values.for_each(|(value, &done)| *value = T::rounded(done));
    });
    let strip = View::col_major(&strip, size, depth);
    let packed = Left::new(isa, strip.subrows(0, columns.len() / n));
    let right = Right::new(isa, strip);
    let tasks = columns.par_chunks_mut(TASK * n).enumerate();
    tasks.for_each(|(task, columns)| {
        let (first, count) = (task * TASK, columns.len() / n);
        let mut products = vec![T::default(); count * ROWS];
        for top in (first..size).step_by(ROWS) {
            // Of the square on the diagonal, not much more than the lower half.
            let width = if top == first { PART } else { count };
            for left in (0..count).step_by(width) {
                let (width, skipped) =
                    (width.min(count - left), if top == first { left } else { 0 });
                let (top, height) = (top + skipped, ROWS.min(size - top) - skipped);
                let pivots = packed.lines(first + left..first + left + width);
                let rest = right.lines(top..top + height);
                product(isa, &mut products, ROWS, Store::Replace, pivots, rest);
                let columns = columns[left * n..].chunks_mut(n).zip(products.chunks(ROWS));
                for (j, (column, products)) in columns.enumerate().take(width) {
                    let column = &mut column[n - size + top..][..height];
                    let above = (first + left + j).saturating_sub(top).min(height);
                    for (value, &product) in column.iter_mut().zip(products).skip(above) {
                        *value -= product.into();
                    }
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

/// Replaces the rows from `end` on of the strip by their product with the transposed `inverse`.
fn solve_below(isa: Isa, strip: &mut [f64], n: usize, end: usize, inverse: &[f64]) {
    let width = strip.len() / n;
    let inverse = View::col_major(inverse, width, width);
    let below = View::row_major(strip, width, n);
    let pieces: Vec<Vec<f64>> = (end..n)
        .into_par_iter()
        .step_by(TASK)
        .map(|first| {
            let count = TASK.min(n - first);
            let mut solved = vec![0f64; width * count];
            let below = Right::new(isa, below.subcols(first, count).transpose());
            for (part, solved) in solved.chunks_mut(PART * count).enumerate() {
                // The inverse is triangular: nothing lies behind the last column of the part.
                let (top, rows) = (part * PART, solved.len() / count);
                let inverse = inverse.submatrix(top, 0, rows, top + rows);
                let below = below.head(top + rows);
                product(isa, solved, count, Store::Replace, inverse, below);
            }
            solved
        })
        .collect();
    strip.par_chunks_mut(n).enumerate().for_each(|(j, column)| {
        for (rows, solved) in column[end..].chunks_mut(TASK).zip(&pieces) {
            rows.copy_from_slice(&solved[j * rows.len()..][..rows.len()]);
        }
    });
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
        // Around the borders of strips, tasks and rows (256), and beyond a span (1024).
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
