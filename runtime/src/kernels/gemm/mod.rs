//! Dense matrix products in f32 and f64, and of operands rounded to bf16, the same bits on every machine.
//!
//! An element of a product is the sum, in order, of the parts of 256 terms; a part is one chain of fused
//! multiply-adds over its terms in order, starting from zero. Nothing else is rounded, so a result depends neither on
//! the instruction set, nor on the other rows and columns computed with it, nor on threads. Of operands rounded to bf16 the
//! order is another one, that of the instruction which multiplies them fastest ([`product_rounded`]).

mod bf16;
mod columns;
mod operand;
mod pack;
mod tile;
mod transpose;
mod view;

use std::ops::Range;

use super::isa::{Isa, Vectorized};
use tile::Tile;

pub(in crate::kernels) use bf16::Form;
#[cfg(target_arch = "x86_64")]
pub(in crate::kernels) use bf16::agrees;
pub use bf16::{Rounded, product_rounded};
pub use operand::{Left, Operand, Packed, Right, Terms};
pub use tile::{COLS, Element, ROWS};
pub use transpose::transpose;
pub use view::View;

/// Terms of one chain.
const DEPTH: usize = 256;
/// Bytes of columns packed at once: half of a 1 MiB second cache.
const PACKED_BYTES: usize = 1 << 19;

/// What happens to what an output already holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// It is overwritten.
    Replace,
    /// The product is added to it, part after part.
    Add,
    /// The product is subtracted from it, part after part.
    Subtract,
}

/// `out ← a·b`, `out + a·b` or `out − a·b`. `out` is `[a.rows, b.cols]`, its rows contiguous and `stride` apart.
///
/// # Panics
/// If the shapes disagree or `out` is too short.
pub fn product<T: Element>(
    isa: Isa,
    out: &mut [T],
    stride: usize,
    store: Store,
    a: impl Operand<T, ROWS>,
    b: impl Operand<T, COLS>,
) {
    assert_eq!(a.terms(), b.terms(), "inner dimensions");
    let (rows, depth, cols) = (a.lines(), a.terms(), b.lines());
    if rows == 0 || cols == 0 {
        return;
    }
    assert!(
        cols <= stride && out.len() >= (rows - 1) * stride + cols,
        "out is too short for {rows} rows of {cols}, {stride} apart"
    );
    if depth == 0 && store == Store::Replace {
        let rows = out.chunks_mut(stride).take(rows);
        rows.for_each(|row| row[..cols].fill(T::default()));
    }
    let width = PACKED_BYTES / (DEPTH * size_of::<T>());
    let mut packed_a = scratch(a, depth, ROWS);
    let mut packed_b = scratch(b, depth, width.min(cols.next_multiple_of(COLS)));
    for left in (0..cols).step_by(width) {
        let starts = (left..cols.min(left + width)).step_by(COLS);
        for first in (0..depth).step_by(DEPTH) {
            let terms = first..depth.min(first + DEPTH);
            let (size_a, size_b) = (terms.len() * ROWS, terms.len() * COLS);
            for (at, col) in starts.clone().enumerate() {
                let place = packed_b.get_mut(at * size_b..(at + 1) * size_b);
                b.copy(isa, col, terms.clone(), place.unwrap_or_default());
            }
            // Only the first part replaces what was there.
            let store = match store {
                Store::Replace if first > 0 => Store::Add,
                store => store,
            };
            for top in (0..rows).step_by(ROWS) {
                let place = packed_a.get_mut(..size_a).unwrap_or_default();
                a.copy(isa, top, terms.clone(), place);
                let left = a.panel(top, terms.clone(), place);
                for (at, col) in starts.clone().enumerate() {
                    let place = packed_b.get(at * size_b..(at + 1) * size_b);
                    let right = b.panel(col, terms.clone(), place.unwrap_or_default());
                    let mut sums: Tile<T> = [[T::default(); COLS]; ROWS];
                    T::tile(isa, left, right, &mut sums);
                    isa.run(Put {
                        out: &mut out[top * stride..],
                        stride,
                        rows: ROWS.min(rows - top),
                        cols: col..cols.min(col + COLS),
                        sums: &sums,
                        store,
                    });
                }
            }
        }
    }
}

/// Memory for the panels of `lines` lines; none where the operand brings its own.
fn scratch<T: Element, A: Operand<T, W>, const W: usize>(
    _: A,
    depth: usize,
    lines: usize,
) -> Vec<T> {
    let lines = if A::COPIED { lines } else { 0 };
    vec![T::default(); DEPTH.min(depth) * lines]
}

/// Takes the columns `cols` of the first `rows` rows of an output from a tile.
struct Put<'a, T> {
    out: &'a mut [T],
    stride: usize,
    rows: usize,
    cols: Range<usize>,
    sums: &'a Tile<T>,
    store: Store,
}

impl<T: Element> Vectorized for Put<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let rows = self.out.chunks_mut(self.stride).take(self.rows);
        for (sums, row) in self.sums.iter().zip(rows) {
            let row = &mut row[self.cols.clone()];
            match self.store {
                Store::Replace => row.copy_from_slice(&sums[..row.len()]),
                Store::Add => row.iter_mut().zip(sums).for_each(|(out, &sum)| *out += sum),
                Store::Subtract => row.iter_mut().zip(sums).for_each(|(out, &sum)| *out -= sum),
            }
        }
    }
}

#[cfg(test)]
mod tests;
