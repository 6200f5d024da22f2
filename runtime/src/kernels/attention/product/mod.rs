//! The two products of attention: of queries and keys, and of probabilities and values.
//!
//! Operands are words of a cache's type ([`KvDtype`]). Of f32, each element of a product is one chain of fused multiply-adds over
//! the words in order. Of bf16, every 16 words are a part: a chain over their early terms and one over their late terms begin with
//! zero; their sum is added to the element (0 at first where it is replaced). This is the order of `tdpbf16ps` (see [`bf16`](crate::kernels::bf16)).

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::ops::Range;

use crate::kernels::bf16;
use crate::kernels::isa::{Isa, Level, Vectorized};
use crate::kv_cache::KvDtype;

#[cfg(target_arch = "x86_64")]
pub(super) use amx::Shapes;

/// There are no tiles.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Default)]
pub(super) struct Shapes;

/// Rows whose sums are in registers at once: with 2 vectors each, 12 of the 16 registers of AVX2, and enough
/// independent sums for every machine.
pub(super) const ROWS: usize = 6;

/// Rows from which tiles are used: the vector kernels' blocks are no larger.
const TILED: usize = ROWS + 1;

/// Rows of a block for tiles: those of three.
const TILED_ROWS: usize = 48;

/// Words of a part.
pub(super) const PART: usize = 16;

/// Rows of a product that are given together, where there are `rows` in all.
pub(super) fn rows_at_once(isa: Isa, dtype: KvDtype, rows: usize) -> usize {
    match isa.level() == Level::Amx && dtype == KvDtype::Bf16 && rows >= TILED {
        true => TILED_ROWS,
        false => ROWS,
    }
}

/// The left factor of a product: rows of `depth` words that follow each other at `stride`.
#[derive(Clone, Copy)]
pub(super) struct Factor<'a> {
    pub(super) words: &'a [u32],
    pub(super) stride: usize,
    pub(super) depth: usize,
}

/// `c += a · b`, or `c = a · b` where `replace`, for at most [`rows_at_once`], of which only the first `columns` columns are
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
    pub(super) fn run(self, isa: Isa, dtype: KvDtype, shapes: &mut Shapes) {
        #[cfg(not(target_arch = "x86_64"))]
        let _ = shapes;
        #[cfg(target_arch = "x86_64")]
        if dtype == KvDtype::Bf16 {
            if isa.level() == Level::Amx && self.c.len() / self.stride >= TILED {
                // SAFETY: an `Isa` of this level exists only where detection found it.
                return unsafe { amx::product(self, shapes) };
            } else if isa.has_bf16() {
                // SAFETY: an `Isa` says this only where detection found the features.
                return unsafe { avx512::product(self) };
            } else if matches!(isa.level(), Level::Avx2 | Level::AvxVnni) {
                // SAFETY: as of AMX.
                return unsafe { avx2::product(self) };
            }
        }
        match (dtype, isa.level() >= Level::Avx512) {
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
            ref mut c,
            stride,
            replace,
            ..
        } = self.0;
        let c = &mut c[column..];
        let mut sums = [[0f32; COLS]; ROWS];
        if !replace {
            for (row, sums) in sums.iter_mut().enumerate() {
                sums.copy_from_slice(&c[row * stride..][..COLS]);
            }
        }
        if !PAIRS {
            self.chain::<WHOLE, ROWS, COLS>(0..a.depth, column, &mut sums);
        } else {
            for first in (0..a.depth).step_by(PART) {
                let words = first..a.depth.min(first + PART);
                let mut early = [[0f32; COLS]; ROWS];
                self.chain::<EARLY, ROWS, COLS>(words.clone(), column, &mut early);
                let mut late = [[0f32; COLS]; ROWS];
                self.chain::<LATE, ROWS, COLS>(words, column, &mut late);
                let parts = early.as_flattened().iter().zip(late.as_flattened());
                for (sum, (early, late)) in sums.as_flattened_mut().iter_mut().zip(parts) {
                    *sum += early + late;
                }
            }
        }
        let c = &mut self.0.c[column..];
        for (row, sums) in sums.iter().enumerate() {
            c[row * stride..][..COLS].copy_from_slice(sums);
        }
    }

    /// Adds the products of one term of each of some words.
    #[inline(always)]
    fn chain<const TERM: u8, const ROWS: usize, const COLS: usize>(
        &self,
        words: Range<usize>,
        column: usize,
        sums: &mut [[f32; COLS]; ROWS],
    ) {
        let Product { a, b, stride, .. } = self.0;
        let a: [&[u32]; ROWS] =
            std::array::from_fn(|row| &a.words[row * a.stride..][words.clone()]);
        for (at, word) in words.enumerate() {
            let b: &[u32; COLS] = b[word * stride + column..][..COLS]
                .try_into()
                .expect("of this width");
            for (sums, a) in sums.iter_mut().zip(a) {
                let a = term::<TERM>(a[at]);
                for (sum, &b) in sums.iter_mut().zip(b) {
                    *sum = a.mul_add(term::<TERM>(b), *sum);
                }
            }
        }
    }
}

/// All of a word, or one of its two terms.
const WHOLE: u8 = 0;
const EARLY: u8 = 1;
const LATE: u8 = 2;

#[inline(always)]
fn term<const TERM: u8>(word: u32) -> f32 {
    f32::from_bits(match TERM {
        WHOLE => word,
        EARLY => word & bf16::EARLY,
        _ => word << 16,
    })
}
