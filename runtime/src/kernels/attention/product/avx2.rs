//! The product of pairs, their terms apart: the compiler, left alone with words, keeps sums in memory.

use std::arch::x86_64::*;

use super::{Factor, Product, ROWS};
use crate::kernels::bf16;

/// Columns of a vector.
const LANES: usize = 8;
/// Vectors whose sums are in registers at once, for each row.
const VECTORS: usize = 2;
/// Words of the depth that are multiplied at a time.
const DEPTH: usize = 32;

/// The early and the late terms of some words of a row, in memory, from where each can be broadcast.
type Terms = [[f32; DEPTH]; 2];

#[target_feature(enable = "avx2,fma")]
pub(super) fn product(mut product: Product) {
    let Product {
        a, stride, columns, ..
    } = product;
    let rows = (product.c.len() / stride).min(ROWS);
    for first in (0..a.depth.max(1)).step_by(DEPTH) {
        let depth = DEPTH.min(a.depth - first);
        let mut terms = [[[0.0; DEPTH]; 2]; ROWS];
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
            && depth <= DEPTH
            && (depth == 0 || (depth - 1) * stride + width <= b.len())
            && (ROWS - 1) * stride + width <= c.len(),
        "factors of {ROWS} rows and {width} columns"
    );
    let (b, c) = (b[column..].as_ptr(), c[column..].as_mut_ptr());
    let mut sums = [[_mm256_setzero_ps(); VECTORS]; ROWS];
    // SAFETY: rows, words and columns are inside the slices, as just checked.
    unsafe {
        if !replace {
            for row in 0..ROWS {
                for v in 0..VECTORS {
                    sums[row][v] = _mm256_loadu_ps(c.add(row * stride + v * LANES));
                }
            }
        }
        for at in 0..depth {
            let b = b.add(at * stride).cast::<__m256i>();
            let mut now = [_mm256_setzero_ps(); VECTORS];
            for v in 0..VECTORS {
                let early = _mm256_set1_epi32(bf16::EARLY.cast_signed());
                let words = _mm256_loadu_si256(b.add(v));
                now[v] = _mm256_castsi256_ps(_mm256_and_si256(words, early));
            }
            for row in 0..ROWS {
                let a = _mm256_broadcast_ss(terms.get_unchecked(row)[0].get_unchecked(at));
                for v in 0..VECTORS {
                    sums[row][v] = _mm256_fmadd_ps(a, now[v], sums[row][v]);
                }
            }
            for v in 0..VECTORS {
                let words = _mm256_loadu_si256(b.add(v));
                now[v] = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words));
            }
            for row in 0..ROWS {
                let a = _mm256_broadcast_ss(terms.get_unchecked(row)[1].get_unchecked(at));
                for v in 0..VECTORS {
                    sums[row][v] = _mm256_fmadd_ps(a, now[v], sums[row][v]);
                }
            }
        }
        for row in 0..ROWS {
            for v in 0..VECTORS {
                _mm256_storeu_ps(c.add(row * stride + v * LANES), sums[row][v]);
            }
        }
    }
}
