//! Rows to columns.

use super::View;
use super::tile::{Element, ROWS};
use crate::kernels::isa::Isa;

/// Writes the transpose of `source`, `[source.cols, source.rows]` row major, to `out`.
///
/// # Panics
/// If `out` has another size, or the rows of `source` are not contiguous.
pub fn transpose<T: Element>(isa: Isa, source: View<'_, T>, out: &mut [T]) {
    let (rows, cols) = (source.rows(), source.cols());
    assert!(
        source.has_contiguous_rows(),
        "rows of the source are contiguous"
    );
    assert_eq!(out.len(), rows * cols, "out is not [cols, rows]");
    if cols == 0 {
        return;
    }
    let whole = rows / ROWS * ROWS;
    for top in (0..whole).step_by(ROWS) {
        let lines: [&[T]; ROWS] = std::array::from_fn(|i| source.run(top + i, 0, cols));
        let end = out.len() - (rows - top - ROWS);
        T::columns(isa, lines, &mut out[top..end], rows);
    }
    for row in whole..rows {
        for (col, &value) in source.run(row, 0, cols).iter().enumerate() {
            out[col * rows + row] = value;
        }
    }
}
