//! Products of operands rounded to bf16: the same bits with and without an instruction for them.
//!
//! Definition: both operands are rounded by [`bf16::round`]. A sum starts from zero and takes 32 terms at a time. Their
//! products go into two chains of fused multiply-adds that start from zero, those of the even terms into one, those of the
//! odd terms into the other, each in order; then the two are added, and the result is added to the sum. Terms beyond the
//! last count as zero.
//!
//! This is what AMX's `tdpbf16ps` does (Intel's manual at `TDPBF16PS`; on a Xeon, 1.2 billion sums of numbers of all sizes
//! agreed). `vdpbf16ps`, two steps of a chain at once, gives the same bits with the terms of a chain as pairs. Both flush
//! subnormals, but there are none ([`bf16`](crate::kernels::bf16) says why).

mod pack;
#[cfg(target_arch = "x86_64")]
mod pairs;
#[cfg(any(test, target_arch = "x86_64"))]
mod tiles;
mod values;

use super::COLS;
#[cfg(target_arch = "x86_64")]
use crate::kernels::detect;
use crate::kernels::isa::Isa;
#[cfg(target_arch = "x86_64")]
use crate::kernels::isa::Level;
use crate::kernels::pool::Pool;

/// Terms that are added to a sum at once.
const STEP: usize = 32;
/// Columns packed at once: what is packed of them stays in the second cache while all rows pass by.
const COLUMNS: usize = 256;
/// The most rows of a panel.
const MOST_ROWS: usize = 32;

/// One way to multiply: how the operands lie in memory, and the sums of two panels of them. A value of an implementation is
/// the proof that its instructions may be executed.
///
/// A panel of the left operand is [`Self::ROWS`] rows, one of the right operand [`COLS`] columns, which lie side by side
/// in groups of [`Self::WIDTH`].
trait Kernel: Sized {
    const ROWS: usize;
    const WIDTH: usize;
    /// Words of a step of a line.
    const WORDS: usize;
    /// Steps for which the right operand is packed at once.
    const PART: usize;

    /// Rounds a step of a line.
    fn arrange(x: &[f32; STEP], words: &mut [u32]);

    /// The same of what a line has left, which may be less, with 0 behind it.
    #[inline(always)]
    fn arrange_part(x: &[f32], words: &mut [u32]) {
        match x.first_chunk() {
            Some(x) => Self::arrange(x, words),
            None => {
                let mut last = [0.0; STEP];
                last[..x.len()].copy_from_slice(x);
                Self::arrange(&last, words);
            }
        }
    }

    /// Packs rows of `depth` terms as a panel of the left operand.
    fn pack_left(isa: Isa, x: &[f32], depth: usize, panel: &mut [u32]) {
        pack::transposed::<Self>(isa, x, depth, 0, Self::ROWS, panel);
    }

    /// Called before the products of a thread, and after them.
    fn begin(&mut self) {}
    fn end(&mut self) {}

    /// Multiplies two panels.
    ///
    /// # Panics
    /// If they have not the same steps, or what takes their product is too short.
    fn multiply(&mut self, panels: Panels<'_>);
}

/// Two panels, and what becomes of their product.
struct Panels<'a> {
    a: &'a [u32],
    b: &'a [u32],
    /// Read next, by and by.
    ahead: &'a [u32],
    /// The product is added to these rows of [`COLS`], `stride` apart, or replaces them.
    c: &'a mut [f32],
    stride: usize,
    replace: bool,
}

/// The kernels, for what is decided when a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kernels) enum Form {
    /// Fused multiply-adds of f32.
    Values,
    /// `vdpbf16ps`.
    #[cfg(target_arch = "x86_64")]
    Pairs,
    /// `tdpbf16ps`.
    #[cfg(target_arch = "x86_64")]
    Tiles,
}

impl Form {
    /// The fastest one.
    pub(in crate::kernels) fn of(isa: Isa) -> Self {
        #[cfg(target_arch = "x86_64")]
        if isa.level() == Level::Amx {
            return Self::Tiles;
        } else if isa.has_bf16() && !detect::is_intel() {
            // Intel's CPUs begin one every other cycle, half of what f32's multiply-adds come to.
            return Self::Pairs;
        }
        let _ = isa;
        Self::Values
    }
}

/// The left operand of products, rounded once for all of them.
pub struct Rounded {
    rows: usize,
    cols: usize,
    form: Form,
    /// `[panel][step]`, each as its kernel reads it.
    words: pack::Words,
}

impl Rounded {
    /// Rounds `x[rows, cols]`.
    ///
    /// # Panics
    /// If `x` is not a whole number of rows of `cols`.
    pub fn new(isa: Isa, pool: &Pool, x: &[f32], cols: usize) -> Self {
        Self::in_form(Form::of(isa), isa, pool, x, cols)
    }

    fn in_form(form: Form, isa: Isa, pool: &Pool, x: &[f32], cols: usize) -> Self {
        assert!(
            cols > 0 && x.len().is_multiple_of(cols),
            "whole rows of {cols}"
        );
        let words = match form {
            Form::Values => pack::left::<values::Values>(isa, pool, x, cols),
            #[cfg(target_arch = "x86_64")]
            Form::Pairs => pack::left::<pairs::Pairs>(isa, pool, x, cols),
            #[cfg(target_arch = "x86_64")]
            Form::Tiles => pack::left::<tiles::Amx>(isa, pool, x, cols),
        };
        Self {
            rows: x.len() / cols,
            cols,
            form,
            words,
        }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }
}

/// `out ← a·bᵀ` with `b[cols, a.cols]`, rounded here, and `out[a.rows, cols]`.
///
/// # Panics
/// If the shapes disagree, or `a` was rounded for another instruction set.
pub fn product_rounded(isa: Isa, out: &mut [f32], a: &Rounded, b: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    const PROOF: &str = "rounded for this instruction set";
    match a.form {
        Form::Values => multiply(isa, &mut values::Values(isa), out, a, b),
        #[cfg(target_arch = "x86_64")]
        Form::Pairs => multiply(isa, &mut pairs::Pairs::of(isa).expect(PROOF), out, a, b),
        #[cfg(target_arch = "x86_64")]
        Form::Tiles => multiply(isa, &mut tiles::Amx::of(isa).expect(PROOF), out, a, b),
    }
}

/// The product by one kernel. A part of the depth of some columns is packed, then all rows pass by.
fn multiply<K: Kernel>(isa: Isa, kernel: &mut K, out: &mut [f32], a: &Rounded, b: &[f32]) {
    assert!(b.len().is_multiple_of(a.cols), "whole rows of {}", a.cols);
    let (rows, depth, cols) = (a.rows, a.cols, b.len() / a.cols);
    assert_eq!(out.len(), rows * cols, "out is not [{rows}, {cols}]");
    if out.is_empty() {
        return;
    }
    let steps = depth.div_ceil(STEP);
    let panel = K::ROWS * K::WORDS;
    let room = COLUMNS.min(cols.next_multiple_of(COLS)) * K::PART.min(steps) * K::WORDS;
    let mut packed = pack::Words::zeros(room);
    kernel.begin();
    for (first_col, b) in (0..cols).step_by(COLUMNS).zip(b.chunks(COLUMNS * depth)) {
        let width = b.len() / depth;
        for first in (0..steps).step_by(K::PART) {
            let part = first..steps.min(first + K::PART);
            let size = part.len() * K::WORDS;
            let packed = &mut packed.all_mut()[..width.next_multiple_of(COLS) * size];
            pack::right::<K>(isa, b, depth, first, packed);
            let left = |number: usize| {
                let first = number * steps + part.start;
                let words = a
                    .words
                    .all()
                    .get(first * panel..(first + part.len()) * panel);
                words.unwrap_or_default()
            };
            let rights = || packed.chunks_exact(size * COLS).enumerate();
            for (number, out) in out.chunks_mut(K::ROWS * cols).enumerate() {
                let (a, next) = (left(number), left(number + 1));
                let share = next.len().div_ceil(rights().len());
                for (at, b) in rights() {
                    let col = at * COLS;
                    let product = Panels {
                        a,
                        b,
                        ahead: &next[next.len().min(at * share)..],
                        c: &mut out[first_col + col..],
                        stride: cols,
                        replace: first == 0,
                    };
                    product.within::<K>(kernel, COLS.min(width - col));
                }
            }
        }
    }
    kernel.end();
}

impl Panels<'_> {
    /// Multiplies so that only the first `width` columns of the rows that are there are written.
    fn within<K: Kernel>(self, kernel: &mut K, width: usize) {
        let Self { c, stride, .. } = self;
        if width == COLS && c.len() >= (K::ROWS - 1) * stride + COLS {
            return kernel.multiply(Panels { c, ..self });
        }
        let mut copy = [[0.0; COLS]; MOST_ROWS];
        let rows = K::ROWS.min(c.len().div_ceil(stride));
        for (copy, row) in copy[..rows].iter_mut().zip(c.chunks(stride)) {
            copy[..width].copy_from_slice(&row[..width]);
        }
        kernel.multiply(Panels {
            c: copy.as_flattened_mut(),
            stride: COLS,
            ..self
        });
        for (copy, row) in copy[..rows].iter().zip(c.chunks_mut(stride)) {
            row[..width].copy_from_slice(&copy[..width]);
        }
    }
}

/// Whether products in one form have the bits of the definition: it is taken only then.
#[cfg(target_arch = "x86_64")]
pub(in crate::kernels) fn agrees(isa: Isa, form: Form) -> bool {
    // Numbers of many sizes and both signs, so that the order of the additions and each rounding show.
    let values = |len: u32, step: u32| -> Vec<f32> {
        let value = |i: u32| {
            let mixed = i.wrapping_mul(step).wrapping_mul(0x9e37_79b9);
            f32::from_bits((mixed & 0x807f_ffff) | (((mixed >> 8 & 0xf) + 120) << 23))
        };
        (1..=len).map(value).collect()
    };
    let (rows, cols, depth) = (33, 33, STEP * 64 + 45);
    let a = values((rows * depth) as u32, 7);
    let b = values((cols * depth) as u32, 13);
    let run = |isa: Isa, form: Form| {
        let mut out = vec![0.0; rows * cols];
        let a = Rounded::in_form(form, isa, &Pool::new(1), &a, depth);
        product_rounded(isa, &mut out, &a, &b);
        out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    run(isa, form) == run(Isa::SCALAR, Form::Values)
}

#[cfg(test)]
mod tests;
