//! The product of pairs, their terms apart: the compiler, left alone with words, keeps sums in memory.

use std::arch::x86_64::*;

use super::{Factor, PART, Product, ROWS};
use crate::kernels::bf16;

/// Columns of a vector.
const LANES: usize = 8;
/// Vectors whose sums are in registers at once, for each row.
const VECTORS: usize = 2;

/// The early and the late terms of a part of a row, in memory, from where each can be broadcast.
type Terms = [[f32; PART]; 2];

#[target_feature(enable = "avx2,fma")]
pub(super) fn product(mut product: Product) {
    let Product {
        a, stride, columns, ..
    } = product;
    let rows = (product.c.len() / stride).min(ROWS);
    for first in (0..a.depth.max(1)).step_by(PART) {
        let depth = PART.min(a.depth - first);
        let mut terms = [[[0.0; PART]; 2]; ROWS];
        for (row, [early, late]) in terms.iter_mut().take(rows).enumerate() {
            let words = &a.words[row * a.stride + first..][..depth];
            for ((early, late), &word) in early.iter_mut().zip(late).zip(words) {
                *early = f32::from_bits(word & bf16::EARLY);
                *late = f32::from_bits(word << 16);
            }
        }
        let mut part = Product {
            a: Factor { depth, ..a },
            b: &product.b[first * stride..],
            c: product.c,
            replace: product.replace && first == 0,
            ..product
        };
        for column in (0..columns).step_by(VECTORS * LANES) {
            match rows {
                1 => tile::<1>(&terms, &mut part, column),
                2 => tile::<2>(&terms, &mut part, column),
                3 => tile::<3>(&terms, &mut part, column),
                4 => tile::<4>(&terms, &mut part, column),
                5 => tile::<5>(&terms, &mut part, column),
                _ => tile::<ROWS>(&terms, &mut part, column),
            }
        }
        product.c = part.c;
    }
}

// Loops by index over arrays of registers, each small enough to be unrolled.
#[expect(clippy::needless_range_loop)]
#[target_feature(enable = "avx2,fma")]
fn tile<const ROWS: usize>(terms: &[Terms], product: &mut Product, column: usize) {
    let &mut Product {
        a: Factor { depth, .. },
        b,
        ref mut c,
        stride,
        replace,
        ..
    } = product;
    let width = column + VECTORS * LANES;
    assert!(
        ROWS <= terms.len()
            && depth <= PART
            && (depth == 0 || (depth - 1) * stride + width <= b.len())
            && (ROWS - 1) * stride + width <= c.len(),
        "factors of {ROWS} rows and {width} columns"
    );
    let (b, c) = (b[column..].as_ptr(), c[column..].as_mut_ptr());
    // SAFETY: rows, words and columns are inside the slices, as just checked.
    unsafe {
        let mut parts = [[[_mm256_setzero_ps(); VECTORS]; ROWS]; 2];
        for (term, sums) in parts.iter_mut().enumerate() {
            let mut now = [[_mm256_setzero_ps(); VECTORS]; ROWS];
            for at in 0..depth {
                let b = b.add(at * stride).cast::<__m256i>();
                let mut terms_of_b = [_mm256_setzero_ps(); VECTORS];
                for v in 0..VECTORS {
                    let words = _mm256_loadu_si256(b.add(v));
                    let bits = match term {
                        0 => _mm256_and_si256(words, _mm256_set1_epi32(bf16::EARLY.cast_signed())),
                        _ => _mm256_slli_epi32::<16>(words),
                    };
                    terms_of_b[v] = _mm256_castsi256_ps(bits);
                }
                for row in 0..ROWS {
                    let a = _mm256_broadcast_ss(terms.get_unchecked(row)[term].get_unchecked(at));
                    for v in 0..VECTORS {
                        now[row][v] = _mm256_fmadd_ps(a, terms_of_b[v], now[row][v]);
                    }
                }
            }
            *sums = now;
        }
        for row in 0..ROWS {
            for v in 0..VECTORS {
                let at = c.add(row * stride + v * LANES);
                let before = match replace {
                    true => _mm256_setzero_ps(),
                    false => _mm256_loadu_ps(at),
                };
                let part = _mm256_add_ps(parts[0][row][v], parts[1][row][v]);
                _mm256_storeu_ps(at, _mm256_add_ps(before, part));
            }
        }
    }
}
