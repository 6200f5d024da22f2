//! Dense matrix products in f32 and f64, and of operands rounded to bf16, the same bits on every machine.
//!
//! An element of a product is the sum, in order, of the parts of 256 terms; a part is one chain of fused
//! multiply-adds over its terms in order, starting from zero. Nothing else is rounded, so a result depends neither on
//! the instruction set, nor on the other rows and columns computed with it, nor on threads.

mod bf16;
mod columns;
mod pack;
mod tile;
mod transpose;
mod view;

use std::ops::Range;

use super::isa::{Isa, Vectorized};
use tile::{COLS, ROWS, Tile};

#[cfg(target_arch = "x86_64")]
pub(in crate::kernels) use bf16::agrees;
pub use bf16::{Rounded, product_rounded};
pub use tile::Element;
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
    a: View<'_, T>,
    b: View<'_, T>,
) {
    assert_eq!(a.cols(), b.rows(), "inner dimensions");
    let (rows, depth, cols) = (a.rows(), a.cols(), b.cols());
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
    let columns = b.transpose();
    let mut packed_a = vec![T::default(); DEPTH.min(depth) * ROWS];
    let mut packed_b =
        vec![T::default(); DEPTH.min(depth) * width.min(cols.next_multiple_of(COLS))];
    for left in (0..cols).step_by(width) {
        let starts = (left..cols.min(left + width)).step_by(COLS);
        for first in (0..depth).step_by(DEPTH) {
            let terms = first..depth.min(first + DEPTH);
            let panels = packed_b.chunks_exact_mut(terms.len() * COLS);
            for (col, panel) in starts.clone().zip(panels) {
                pack::pack::<T, COLS>(isa, columns, col, terms.clone(), panel);
            }
            // Only the first part replaces what was there.
            let store = match store {
                Store::Replace if first > 0 => Store::Add,
                store => store,
            };
            for top in (0..rows).step_by(ROWS) {
                let packed_a = &mut packed_a[..terms.len() * ROWS];
                pack::pack::<T, ROWS>(isa, a, top, terms.clone(), packed_a);
                let panels = packed_b.chunks_exact(terms.len() * COLS);
                for (col, panel) in starts.clone().zip(panels) {
                    let mut sums: Tile<T> = [[T::default(); COLS]; ROWS];
                    T::tile(isa, packed_a.as_chunks().0, panel.as_chunks().0, &mut sums);
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
