//! The product of pairs by `vdpbf16ps`.

use std::arch::x86_64::*;

use super::{Product, ROWS};

/// Columns of a vector.
const LANES: usize = 16;

#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn product(product: Product) {
    match product.c.len() / product.stride {
        1 => rows::<1>(product),
        2 => rows::<2>(product),
        3 => rows::<3>(product),
        4 => rows::<4>(product),
        5 => rows::<5>(product),
        _ => rows::<ROWS>(product),
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn rows<const ROWS: usize>(mut product: Product) {
    let mut column = 0;
    while column < product.columns {
        let vectors = match (product.columns - column) / LANES {
            1 => {
                tile::<ROWS, 1>(&mut product, column);
                1
            }
            2 | 3 => {
                tile::<ROWS, 2>(&mut product, column);
                2
            }
            _ => {
                tile::<ROWS, 4>(&mut product, column);
                4
            }
        };
        column += vectors * LANES;
    }
}

// Loops by index over arrays of registers, each small enough to be unrolled.
#[expect(clippy::needless_range_loop)]
#[target_feature(enable = "avx512f,avx512bf16")]
fn tile<const ROWS: usize, const VECTORS: usize>(product: &mut Product, column: usize) {
    let Product { a, stride, .. } = *product;
    let width = column + VECTORS * LANES;
    assert!(
        (ROWS - 1) * a.stride + a.depth <= a.words.len()
            && (a.depth == 0 || (a.depth - 1) * stride + width <= product.b.len())
            && (ROWS - 1) * stride + width <= product.c.len(),
        "factors of {ROWS} rows and {width} columns"
    );
    let (b, c) = (
        product.b[column..].as_ptr(),
        product.c[column..].as_mut_ptr(),
    );
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    // SAFETY: rows, words and columns are inside the slices, as just checked.
    unsafe {
        if !product.replace {
            for row in 0..ROWS {
                for v in 0..VECTORS {
                    sums[row][v] = _mm512_loadu_ps(c.add(row * stride + v * LANES));
                }
            }
        }
        for at in 0..a.depth {
            let mut now = [_mm512_setzero_si512(); VECTORS];
            for v in 0..VECTORS {
                now[v] = _mm512_loadu_si512(b.add(at * stride + v * LANES).cast());
            }
            for row in 0..ROWS {
                let word = *a.words.get_unchecked(row * a.stride + at);
                let a = pairs(_mm512_set1_epi32(word.cast_signed()));
                for v in 0..VECTORS {
                    sums[row][v] = _mm512_dpbf16_ps(sums[row][v], a, pairs(now[v]));
                }
            }
        }
        for row in 0..ROWS {
            for v in 0..VECTORS {
                _mm512_storeu_ps(c.add(row * stride + v * LANES), sums[row][v]);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits, and any bits are pairs of bf16.
    unsafe { std::mem::transmute(bits) }
}
