//! The dense f32 matrix product of the reference path.
//!
//! It is sequential on purpose: callers split the work by shape and hand the pieces to rayon, so that a
//! result never depends on the number of threads.

use crate::kernels::Isa;
use crate::kernels::gemm::{Store, View, product};

/// `out[m, n] = x[m, k] · w[n, k]ᵀ`, all row major.
///
/// # Panics
/// If a slice has another length than its shape asks for.
pub fn matmul_nt(out: &mut [f32], x: &[f32], w: &[f32], (m, k, n): (usize, usize, usize)) {
    assert_eq!(out.len(), m * n, "out is not [m, n]");
    let (x, w) = (View::row_major(x, m, k), View::row_major(w, n, k));
    product(Isa::detect(), out, n, Store::Replace, x, w.transpose());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_definition() {
        for (m, k, n) in [(1, 1, 1), (1, 7, 3), (5, 64, 17), (33, 100, 65)] {
            let x: Vec<f32> = (0..m * k)
                .map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0)
                .collect();
            let w: Vec<f32> = (0..n * k)
                .map(|i| ((i * 53 % 103) as f32 - 51.0) / 51.0)
                .collect();
            let mut out = vec![f32::NAN; m * n];
            matmul_nt(&mut out, &x, &w, (m, k, n));
            for row in 0..m {
                for col in 0..n {
                    let exact: f64 = (0..k)
                        .map(|i| f64::from(x[row * k + i]) * f64::from(w[col * k + i]))
                        .sum();
                    let got = f64::from(out[row * n + col]);
                    assert!(
                        (got - exact).abs() <= k as f64 * f64::from(f32::EPSILON),
                        "{got} {exact}"
                    );
                }
            }
        }
    }
}
