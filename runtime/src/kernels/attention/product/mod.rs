//! The two products of attention: of queries and keys, and of probabilities and values.
//!
//! Operands are words of a cache's type ([`KvDtype`]). Each element of a product is one chain over the words in order, of one fused
//! multiply-add for each term of a word.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

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
                unsafe { avx512::product(self) }
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
