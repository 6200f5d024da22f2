//! The product of pairs by `vdpbf16ps`, which adds both products of a word to one chain: the terms are paired anew, two neighbours
//! of a chain in a word.

use std::arch::x86_64::*;

use super::{PART, Product, ROWS};
use crate::kernels::bf16::EARLY;

/// Columns of a vector.
const LANES: usize = 16;

/// A part of a row: pairs of early terms, then of late ones.
type Pairs = [[u32; PART / 2]; 2];

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
    // SAFETY: rows, words and columns are inside the slices, as just checked.
    unsafe {
        if product.replace {
            for row in 0..ROWS {
                for v in 0..VECTORS {
                    _mm512_storeu_ps(c.add(row * stride + v * LANES), _mm512_setzero_ps());
                }
            }
        }
        for first in (0..a.depth).step_by(PART) {
            let depth = PART.min(a.depth - first);
            let mut of_rows: [Pairs; ROWS] = [[[0; PART / 2]; 2]; ROWS];
            for (row, pairs) in of_rows.iter_mut().enumerate() {
                *pairs = paired(&a.words[row * a.stride + first..][..depth]);
            }
            let mut parts = [[[_mm512_setzero_ps(); VECTORS]; ROWS]; 2];
            for (term, part) in parts.iter_mut().enumerate() {
                let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
                for pair in 0..depth.div_ceil(2) {
                    let b = b.add((first + 2 * pair) * stride);
                    let mut now = [_mm512_setzero_si512(); VECTORS];
                    for v in 0..VECTORS {
                        let one = _mm512_loadu_si512(b.add(v * LANES).cast());
                        let other = match 2 * pair + 1 < depth {
                            true => _mm512_loadu_si512(b.add(stride + v * LANES).cast()),
                            false => _mm512_setzero_si512(),
                        };
                        let early = _mm512_set1_epi32(EARLY.cast_signed());
                        now[v] = match term {
                            0 => _mm512_or_si512(
                                _mm512_and_si512(one, early),
                                _mm512_srli_epi32::<16>(other),
                            ),
                            _ => _mm512_or_si512(
                                _mm512_slli_epi32::<16>(one),
                                _mm512_andnot_si512(early, other),
                            ),
                        };
                    }
                    for row in 0..ROWS {
                        let a = of_rows[row][term][pair];
                        let a = pairs(_mm512_set1_epi32(a.cast_signed()));
                        for v in 0..VECTORS {
                            sums[row][v] = _mm512_dpbf16_ps(sums[row][v], a, pairs(now[v]));
                        }
                    }
                }
                *part = sums;
            }
            for row in 0..ROWS {
                for v in 0..VECTORS {
                    let at = c.add(row * stride + v * LANES);
                    let part = _mm512_add_ps(parts[0][row][v], parts[1][row][v]);
                    _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), part));
                }
            }
        }
    }
}

/// Pairs of neighbouring words' early terms, and of their late ones; the earlier word's in the high half, which is added first.
fn paired(words: &[u32]) -> Pairs {
    let mut pairs = [[0; PART / 2]; 2];
    for (pair, words) in words.chunks(2).enumerate() {
        let (one, other) = (words[0], words.get(1).copied().unwrap_or(0));
        pairs[0][pair] = one & EARLY | other >> 16;
        pairs[1][pair] = one << 16 | other & !EARLY;
    }
    pairs
}

#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits, and any bits are pairs of bf16.
    unsafe { std::mem::transmute(bits) }
}
