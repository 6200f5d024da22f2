//! Matrices on borrowed memory.

use super::tile::Element;

/// A matrix read in place; `stride` says how far apart neighbours lie.
#[derive(Clone, Copy, Debug)]
pub struct View<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T: Element> View<'a, T> {
    /// `[rows, cols]` with contiguous rows.
    ///
    /// # Panics
    /// If `data` is shorter or longer.
    pub fn row_major(data: &'a [T], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "data is not [rows, cols]");
        Self {
            data,
            rows,
            cols,
            row_stride: cols,
            col_stride: 1,
        }
    }

    /// `[rows, cols]` with contiguous columns.
    ///
    /// # Panics
    /// If `data` is shorter or longer.
    pub fn col_major(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::row_major(data, cols, rows).transpose()
    }

    /// Rows and columns swapped.
    pub fn transpose(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }

    /// `rows × cols` elements from `(row, col)` on.
    ///
    /// # Panics
    /// If they do not lie inside.
    pub fn submatrix(self, row: usize, col: usize, rows: usize, cols: usize) -> Self {
        assert!(
            row + rows <= self.rows && col + cols <= self.cols,
            "{rows} x {cols} at ({row}, {col}) is not inside {} x {}",
            self.rows,
            self.cols
        );
        let start = (row * self.row_stride + col * self.col_stride).min(self.data.len());
        Self {
            data: &self.data[start..],
            rows,
            cols,
            ..self
        }
    }

    /// Rows `first .. first + count`.
    ///
    /// # Panics
    /// If they do not lie inside.
    pub fn subrows(self, first: usize, count: usize) -> Self {
        self.submatrix(first, 0, count, self.cols)
    }

    /// Columns `first .. first + count`.
    ///
    /// # Panics
    /// If they do not lie inside.
    pub fn subcols(self, first: usize, count: usize) -> Self {
        self.submatrix(0, first, self.rows, count)
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Whether the elements of a row lie side by side.
    pub(super) fn has_contiguous_rows(&self) -> bool {
        self.col_stride == 1
    }

    /// One element.
    #[inline(always)]
    pub(super) fn at(&self, row: usize, col: usize) -> T {
        self.data[row * self.row_stride + col * self.col_stride]
    }

    /// `cols` elements of a row from `(row, col)` on, where rows are contiguous.
    #[inline(always)]
    pub(super) fn run(&self, row: usize, col: usize, cols: usize) -> &'a [T] {
        &self.data[row * self.row_stride + col..][..cols]
    }
}
