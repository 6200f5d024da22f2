//! Products of operands rounded to bf16: the same bits with and without an instruction for them.
//!
//! Definition: [`product`] of both operands, each element rounded by [`bf16::round`].
//!
//! `vdpbf16ps` gives these bits ([`bf16`](crate::kernels::bf16) says why).

use super::columns;
use super::tile::{COLS, ROWS, Tile};
use super::{DEPTH, Put, Store, View, product};
use crate::kernels::bf16;
use crate::kernels::isa::{Isa, Vectorized};
use crate::kernels::pool::Pool;

/// Pairs of terms of one chain.
const PAIRS: usize = DEPTH / 2;

/// The left operand of products, rounded once for all of them.
pub struct Rounded {
    rows: usize,
    cols: usize,
    form: Form,
}

enum Form {
    /// For `vdpbf16ps`: `[rows / ROWS][cols / 2][ROWS]` pairs, the earlier term in the high half, filled up with zeros.
    Pairs(Vec<u32>),
    /// For multiply-adds: `[rows, cols]`.
    Values(Vec<f32>),
}

impl Rounded {
    /// Rounds `x[rows, cols]`.
    ///
    /// # Panics
    /// If `x` is not a whole number of rows of `cols`.
    pub fn new(isa: Isa, pool: &Pool, x: &[f32], cols: usize) -> Self {
        assert!(
            cols > 0 && x.len().is_multiple_of(cols),
            "whole rows of {cols}"
        );
        let rows = x.len() / cols;
        let x = |tile: usize| &x[tile * ROWS * cols..x.len().min((tile + 1) * ROWS * cols)];
        let form = if isa.has_bf16() {
            let tile = cols.div_ceil(2) * ROWS;
            let mut pairs = vec![0; rows.div_ceil(ROWS) * tile];
            pool.parts(&mut pairs, tile, |number, tile| {
                for (part, panel) in tile.chunks_mut(PAIRS * ROWS).enumerate() {
                    pack::<ROWS>(isa, x(number), cols, part * DEPTH, panel);
                }
            });
            Form::Pairs(pairs)
        } else {
            let mut values = vec![0.0; rows * cols];
            pool.parts(&mut values, ROWS * cols, |number, out| {
                isa.run(Values { x: x(number), out });
            });
            Form::Values(values)
        };
        Self { rows, cols, form }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
}

/// `out ← a·bᵀ` with `b[cols, a.cols]`, rounded here, and `out[a.rows, cols]`. All of `b`'s rows are packed together,
/// 256 terms at a time.
///
/// # Panics
/// If the shapes disagree, or `a` was rounded for another instruction set.
pub fn product_rounded(isa: Isa, out: &mut [f32], a: &Rounded, b: &[f32]) {
    assert!(b.len().is_multiple_of(a.cols), "whole rows of {}", a.cols);
    let (rows, depth, cols) = (a.rows, a.cols, b.len() / a.cols);
    assert_eq!(out.len(), rows * cols, "out is not [{rows}, {cols}]");
    if out.is_empty() {
        return;
    }
    let pairs = match &a.form {
        Form::Pairs(pairs) => pairs,
        Form::Values(values) => {
            let mut rounded = vec![0.0; b.len()];
            isa.run(Values {
                x: b,
                out: &mut rounded,
            });
            let a = View::row_major(values, rows, depth);
            let b = View::row_major(&rounded, cols, depth).transpose();
            return product(isa, out, cols, Store::Replace, a, b);
        }
    };
    let tiles = pairs.chunks_exact(depth.div_ceil(2) * ROWS);
    let mut packed = vec![0; PAIRS.min(depth.div_ceil(2)) * cols.next_multiple_of(COLS)];
    for first in (0..depth).step_by(DEPTH) {
        let terms = first / 2..depth.min(first + DEPTH).div_ceil(2);
        let size = terms.len() * COLS;
        for (panel, b) in packed.chunks_exact_mut(size).zip(b.chunks(COLS * depth)) {
            pack::<COLS>(isa, b, depth, first, panel);
        }
        let store = if first > 0 {
            Store::Add
        } else {
            Store::Replace
        };
        for (tile, out) in tiles.clone().zip(out.chunks_mut(ROWS * cols)) {
            let a = tile[terms.start * ROWS..terms.end * ROWS].as_chunks().0;
            for (left, panel) in (0..cols).step_by(COLS).zip(packed.chunks_exact(size)) {
                let mut sums: Tile<f32> = [[0.0; COLS]; ROWS];
                dot(isa, a, panel.as_chunks().0, &mut sums);
                isa.run(Put {
                    rows: out.len() / cols,
                    out,
                    stride: cols,
                    cols: left..cols.min(left + COLS),
                    sums: &sums,
                    store,
                });
            }
        }
    }
}

/// Whether products on `isa` have the bits of those without the instruction: it is taken only then.
#[cfg(target_arch = "x86_64")]
pub(in crate::kernels) fn agrees(isa: Isa) -> bool {
    // Numbers of many sizes and both signs, so that the order of the additions and each rounding show.
    let values = |len: u32, step: u32| -> Vec<f32> {
        let value = |i: u32| {
            let mixed = i.wrapping_mul(step).wrapping_mul(0x9e37_79b9);
            f32::from_bits((mixed & 0x807f_ffff) | (((mixed >> 8 & 0xf) + 120) << 23))
        };
        (1..=len).map(value).collect()
    };
    let (a, b) = (values(9 * 301, 7), values(33 * 301, 13));
    let run = |isa: Isa| {
        let mut out = vec![0.0; 9 * 33];
        let a = Rounded::new(isa, &Pool::new(1), &a, 301);
        product_rounded(isa, &mut out, &a, &b);
        out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    run(isa) == run(Isa::SCALAR)
}

/// Packs the terms from `first` on of up to `W` rows of `x` as `[pair][W]`, as many pairs as `panel` holds; what is not
/// there counts as zero. `W` is a multiple of [`ROWS`].
fn pack<const W: usize>(isa: Isa, x: &[f32], cols: usize, first: usize, panel: &mut [u32]) {
    let pairs = panel.len() / W;
    let terms = first..cols.min(first + 2 * pairs);
    let mut rows = x.chunks_exact(cols);
    for group in (0..W).step_by(ROWS) {
        let mut lines = [[0; PAIRS]; ROWS];
        for (line, x) in lines.iter_mut().zip(&mut rows) {
            isa.run(Pairs {
                x: &x[terms.clone()],
                out: line,
            });
        }
        let end = panel.len() - (W - group - ROWS);
        let lines = lines.each_ref().map(|line| &line[..pairs]);
        columns::single(isa, lines, &mut panel[group..end], W);
    }
}

/// Rounds a row to pairs.
struct Pairs<'a> {
    x: &'a [f32],
    out: &'a mut [u32; PAIRS],
}

impl Vectorized for Pairs<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let (whole, rest) = self.x.as_chunks();
        for (out, &[early, late]) in self.out.iter_mut().zip(whole) {
            *out = bf16::pair(early, late);
        }
        if let &[last] = rest {
            self.out[whole.len()] = bf16::round(last);
        }
    }
}

/// Rounds to values.
struct Values<'a> {
    x: &'a [f32],
    out: &'a mut [f32],
}

impl Vectorized for Values<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (out, &x) in self.out.iter_mut().zip(self.x) {
            *out = f32::from_bits(bf16::round(x));
        }
    }
}

/// `Σ a[k][row] · b[k][col]` over both terms of every pair `k`.
fn dot(isa: Isa, a: &[[u32; ROWS]], b: &[[u32; COLS]], out: &mut Tile<f32>) {
    assert_eq!(a.len(), b.len(), "panels of one depth");
    assert!(isa.has_bf16(), "rounded for this instruction set");
    // SAFETY: an `Isa` says this only where detection found the features.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        x86::dot(a, b, out)
    };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = out;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{COLS, ROWS, Tile};

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn pairs(bits: __m512i) -> __m512bh {
        // SAFETY: both are 512 bits, and any bits are pairs of bf16.
        unsafe { std::mem::transmute(bits) }
    }

    /// # Safety
    /// The CPU has these features.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn dot(a: &[[u32; ROWS]], b: &[[u32; COLS]], out: &mut Tile<f32>) {
        let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
        for (a, b) in a.iter().zip(b) {
            // SAFETY: the first and the second half of `b`.
            let b = unsafe {
                [
                    pairs(_mm512_loadu_si512(b.as_ptr().cast())),
                    pairs(_mm512_loadu_si512(b.as_ptr().add(16).cast())),
                ]
            };
            for (sums, &a) in sums.iter_mut().zip(a) {
                let a = pairs(_mm512_set1_epi32(a.cast_signed()));
                sums[0] = _mm512_dpbf16_ps(sums[0], a, b[0]);
                sums[1] = _mm512_dpbf16_ps(sums[1], a, b[1]);
            }
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            // SAFETY: the first and the second half of `out`.
            unsafe {
                _mm512_storeu_ps(out.as_mut_ptr(), sums[0]);
                _mm512_storeu_ps(out.as_mut_ptr().add(16), sums[1]);
            }
        }
    }
}
