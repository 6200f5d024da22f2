//! Operands copied into the order in which the tiles read them.

use std::ops::Range;

use super::View;
use super::tile::{Element, ROWS};
use crate::kernels::isa::Isa;

/// Packs the rows `first .. first + W` of `source`, columns `cols`, as `[column][W]`; rows that are not there count as
/// zeros. `W` is a multiple of [`ROWS`].
pub(super) fn pack<T: Element, const W: usize>(
    isa: Isa,
    source: View<'_, T>,
    first: usize,
    cols: Range<usize>,
    panel: &mut [T],
) {
    assert_eq!(panel.len(), cols.len() * W, "panel is not [cols, W]");
    let rows = W.min(source.rows() - first);
    if rows < W {
        panel.fill(T::default());
    }
    let columns = source.transpose();
    if rows == W && source.has_contiguous_rows() {
        for group in (0..W).step_by(ROWS) {
            let rows: [&[T]; ROWS] =
                std::array::from_fn(|i| source.run(first + group + i, cols.start, cols.len()));
            let end = panel.len() - (W - group - ROWS);
            T::columns(isa, rows, &mut panel[group..end], W);
        }
    } else if rows == W && columns.has_contiguous_rows() {
        for (out, col) in panel.as_chunks_mut::<W>().0.iter_mut().zip(cols) {
            out.copy_from_slice(columns.run(col, first, W));
        }
    } else {
        for (out, col) in panel.chunks_exact_mut(W).zip(cols) {
            for (row, value) in out[..rows].iter_mut().enumerate() {
                *value = source.at(first + row, col);
            }
        }
    }
}
