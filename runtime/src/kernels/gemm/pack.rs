//! Operands copied into the order in which the tiles read them.

use super::View;
use super::tile::Element;
use crate::kernels::isa::{Isa, Vectorized};

/// Side of the squares that are transposed in registers.
const SQUARE: usize = 8;

/// Packs the rows `first .. first + W` of `source`, columns `cols.start .. cols.end`, as `[column][W]`; rows that
/// are not there count as zeros. `W` is a multiple of [`SQUARE`].
pub(super) fn pack<T: Element, const W: usize>(
    isa: Isa,
    source: View<'_, T>,
    first: usize,
    cols: std::ops::Range<usize>,
    panel: &mut [T],
) {
    assert_eq!(panel.len(), cols.len() * W, "panel is not [cols, W]");
    isa.run(Pack::<T, W> {
        source,
        first,
        cols,
        panel,
    });
}

struct Pack<'a, 'b, T, const W: usize> {
    source: View<'a, T>,
    first: usize,
    cols: std::ops::Range<usize>,
    panel: &'b mut [T],
}

impl<T: Element, const W: usize> Vectorized for Pack<'_, '_, T, W> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        let rows = W.min(self.source.rows() - self.first);
        if rows < W {
            self.panel.fill(T::default());
        }
        if rows == W && self.source.has_contiguous_rows() {
            self.squares();
        } else if self.source.transpose().has_contiguous_rows() {
            let source = self.source.transpose();
            for (out, col) in self.panel.chunks_exact_mut(W).zip(self.cols) {
                out[..rows].copy_from_slice(source.run(col, self.first, rows));
            }
        } else {
            for (out, col) in self.panel.chunks_exact_mut(W).zip(self.cols) {
                for (row, value) in out[..rows].iter_mut().enumerate() {
                    *value = self.source.at(self.first + row, col);
                }
            }
        }
    }
}

impl<T: Element, const W: usize> Pack<'_, '_, T, W> {
    /// Contiguous rows, all of them there: squares of eight by eight, and the last columns one by one.
    #[inline(always)]
    fn squares(&mut self) {
        let whole = self.cols.len() / SQUARE * SQUARE;
        let (squares, rest) = self.panel.split_at_mut(whole * W);
        for group in (0..W).step_by(SQUARE) {
            let rows: [&[T]; SQUARE] = std::array::from_fn(|i| {
                let row = self.first + group + i;
                self.source.run(row, self.cols.start, self.cols.len())
            });
            for (at, out) in squares.chunks_exact_mut(SQUARE * W).enumerate() {
                let square: [[T; SQUARE]; SQUARE] = std::array::from_fn(|i| {
                    let (chunks, _) = rows[i].as_chunks();
                    chunks[at]
                });
                for (col, out) in out.chunks_exact_mut(W).enumerate() {
                    let column: [T; SQUARE] = std::array::from_fn(|i| square[i][col]);
                    out[group..group + SQUARE].copy_from_slice(&column);
                }
            }
            for (col, out) in rest.chunks_exact_mut(W).enumerate() {
                for (row, value) in rows.iter().zip(&mut out[group..]) {
                    *value = row[whole + col];
                }
            }
        }
    }
}
