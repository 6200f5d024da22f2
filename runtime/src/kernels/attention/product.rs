//! The two products of attention: of queries and keys, and of probabilities and values.
//!
//! Operands are words of a cache's type ([`KvDtype`]). Each element of a product is one chain over the words in order, of one fused
//! multiply-add for each term of a word.

use crate::kernels::bf16;
use crate::kernels::isa::{Isa, Level, Vectorized};
use crate::kv_cache::KvDtype;

/// Rows whose sums are in registers at once: with 2 vectors each, 12 of the 16 registers of AVX2, and enough
/// independent sums for every machine.
pub(super) const ROWS: usize = 6;

/// Words of the depth that are multiplied at a time.
const STEP: usize = 8;

/// The left factor of a product: rows of `depth` words that follow each other at `stride`.
#[derive(Clone, Copy)]
pub(super) struct Factor<'a> {
    pub(super) words: &'a [u32],
    pub(super) stride: usize,
    pub(super) depth: usize,
}

/// `c += a · b`, or `c = a · b` where `replace`, for at most [`ROWS`] rows, of which only the first `columns` columns are
/// computed. `b` and `c` have rows of `stride`; it and `columns` are multiples of 16.
pub(super) struct Product<'a> {
    pub(super) a: Factor<'a>,
    pub(super) b: &'a [u32],
    pub(super) c: &'a mut [f32],
    pub(super) stride: usize,
    pub(super) columns: usize,
    pub(super) replace: bool,
}

impl Product<'_> {
    pub(super) fn run(self, isa: Isa, dtype: KvDtype) {
        match (dtype, isa.level() >= Level::Avx512) {
            #[cfg(target_arch = "x86_64")]
            (KvDtype::Bf16, _) if isa.has_bf16() => {
                // SAFETY: an `Isa` says this only where detection found the features.
                unsafe { x86::product(self) }
            }
            #[cfg(target_arch = "x86_64")]
            (KvDtype::Bf16, false) if isa.level() >= Level::Avx2 => {
                // SAFETY: as above.
                unsafe { avx2::product(self) }
            }
            (KvDtype::Bf16, true) => isa.run(Words::<true, 32>(self)),
            (KvDtype::Bf16, false) => isa.run(Words::<true, 16>(self)),
            (KvDtype::F32, true) => isa.run(Words::<false, 32>(self)),
            (KvDtype::F32, false) => isa.run(Words::<false, 16>(self)),
        }
    }
}

/// The product of words of one or, where `PAIRS`, two terms, with `WIDTH` columns in registers.
struct Words<'a, const PAIRS: bool, const WIDTH: usize>(Product<'a>);

impl<const PAIRS: bool, const WIDTH: usize> Vectorized for Words<'_, PAIRS, WIDTH> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        // Fewer rows in registers only where no more are left.
        match self.0.c.len() / self.0.stride {
            1 => self.rows::<1>(),
            2 => self.rows::<2>(),
            3 => self.rows::<3>(),
            4 => self.rows::<4>(),
            5 => self.rows::<5>(),
            _ => self.rows::<ROWS>(),
        }
    }
}

impl<const PAIRS: bool, const WIDTH: usize> Words<'_, PAIRS, WIDTH> {
    #[inline(always)]
    fn rows<const ROWS: usize>(mut self) {
        let mut column = 0;
        while column + WIDTH <= self.0.columns {
            self.tile::<ROWS, WIDTH>(column);
            column += WIDTH;
        }
        if column < self.0.columns {
            self.tile::<ROWS, 16>(column);
        }
    }

    #[inline(always)]
    fn tile<const ROWS: usize, const COLS: usize>(&mut self, column: usize) {
        let Product {
            a,
            b,
            ref mut c,
            stride,
            replace,
            ..
        } = self.0;
        let (b, c) = (&b[column..], &mut c[column..]);
        let mut sums = [[0f32; COLS]; ROWS];
        if !replace {
            for (row, sums) in sums.iter_mut().enumerate() {
                sums.copy_from_slice(&c[row * stride..][..COLS]);
            }
        }
        // A step at a time, so that bounds are checked once for each.
        let steps = a.depth / STEP;
        for step in 0..steps {
            let mut now = [&[0; STEP]; ROWS];
            for (row, now) in now.iter_mut().enumerate() {
                let a = &a.words[row * a.stride + step * STEP..][..STEP];
                *now = a.try_into().expect("of this length");
            }
            let b = &b[step * STEP * stride..][..(STEP - 1) * stride + COLS];
            for at in 0..STEP {
                let b: &[u32; COLS] = b[at * stride..][..COLS].try_into().expect("of this width");
                for (sums, a) in sums.iter_mut().zip(now) {
                    add::<PAIRS, COLS>(a[at], b, sums);
                }
            }
        }
        for at in steps * STEP..a.depth {
            let b: &[u32; COLS] = b[at * stride..][..COLS].try_into().expect("of this width");
            for (row, sums) in sums.iter_mut().enumerate() {
                add::<PAIRS, COLS>(a.words[row * a.stride + at], b, sums);
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            c[row * stride..][..COLS].copy_from_slice(sums);
        }
    }
}

/// Adds the products of one word with those of a row.
#[inline(always)]
fn add<const PAIRS: bool, const COLS: usize>(a: u32, b: &[u32; COLS], sums: &mut [f32; COLS]) {
    for (sum, &b) in sums.iter_mut().zip(b) {
        *sum = match PAIRS {
            true => bf16::add_products(a, b, *sum),
            false => f32::from_bits(a).mul_add(f32::from_bits(b), *sum),
        };
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
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
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
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
}
