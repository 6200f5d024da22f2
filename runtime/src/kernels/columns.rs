//! Part of a matrix as one thread writes it.

use super::activations::FEW;
use super::ahead::{LINE, fetch_near};
use std::marker::PhantomData;

/// Columns of a room that lie together: two cache lines from row to row, so that many rows fit into the first cache.
pub(super) const BAND: usize = 32;
/// Rows that a room's are a multiple of.
const ROWS: usize = 16;

/// Neighbouring columns of a matrix, to be written by one thread while others write its other columns.
///
/// The matrix is row-major, or a room for these columns alone, for many rows in bands of 32 columns: `[bands, rows, 32]`.
#[derive(Debug)]
pub struct Columns<'a> {
    first: *mut f32,
    rows: usize,
    width: usize,
    /// Elements from one row to the next.
    stride: usize,
    /// Elements from one band to the next.
    band: usize,
    _data: PhantomData<&'a mut [f32]>,
}

impl<'a> Columns<'a> {
    /// All columns of `data[rows, width]`.
    ///
    /// # Panics
    /// If `data` is not whole rows.
    pub fn whole(data: &'a mut [f32], width: usize) -> Self {
        assert!(width > 0 && data.len().is_multiple_of(width));
        Self {
            first: data.as_mut_ptr(),
            rows: data.len() / width,
            width,
            stride: width,
            band: BAND,
            _data: PhantomData,
        }
    }

    /// Values that a room for these columns has.
    pub fn room(rows: usize, width: usize) -> usize {
        match rows > FEW {
            true => rows.next_multiple_of(ROWS) * width.next_multiple_of(BAND),
            false => rows * width,
        }
    }

    /// Columns in a room of their own: where it is in bands, all of it may be overwritten.
    ///
    /// # Panics
    /// If the room has not as many values as [`Self::room`] says, or `width` is 0.
    pub fn in_room(data: &'a mut [f32], rows: usize, width: usize) -> Self {
        assert_eq!(data.len(), Self::room(rows, width), "values of a room");
        match rows > FEW {
            true => Self {
                first: data.as_mut_ptr(),
                rows,
                width,
                stride: BAND,
                band: rows.next_multiple_of(ROWS) * BAND,
                _data: PhantomData,
            },
            false => Self::whole(data, width),
        }
    }

    /// The cell of `rows` rows and `width` columns at `first`, in a matrix with `stride` elements from row to row.
    ///
    /// # Safety
    /// For `'a` the cell lies in memory that is borrowed mutably, and nothing else touches it.
    pub(super) unsafe fn cell(first: *mut f32, rows: usize, width: usize, stride: usize) -> Self {
        Self {
            first,
            rows,
            width,
            stride,
            band: BAND,
            _data: PhantomData,
        }
    }

    /// Whether they are in a room of bands, and so their own.
    pub(super) fn in_bands(&self) -> bool {
        self.band > BAND
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of this part.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Elements from one row to the next, and from one band of 32 columns to the next.
    pub(super) fn strides(&self) -> [usize; 2] {
        [self.stride, self.band]
    }

    /// The first element. Only elements of these columns may be touched through it, or, in bands, of the whole room.
    pub(super) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.first
    }

    /// Starts to bring a row of a matrix, which need not exist, into the first cache.
    #[inline(always)]
    pub(super) fn fetch(&self, row: usize) {
        let first = self.first.wrapping_add(row * self.stride);
        let columns = (0..self.width).step_by(LINE / size_of::<f32>());
        for column in columns.chain([self.width - 1]) {
            fetch_near(first.wrapping_add(column));
        }
    }

    /// This part of row `row`, where rows lie together.
    ///
    /// # Panics
    /// If there is no such row, or they are in bands.
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(!self.in_bands(), "rows in bands");
        self.pieces(row).next().unwrap_or_default()
    }

    /// This part of row `row`, as far as it lies together.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline(always)]
    pub fn pieces(&mut self, row: usize) -> impl Iterator<Item = &mut [f32]> {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let (first, width, band) = (self.first, self.width, self.band);
        let first = first.wrapping_add(row * self.stride);
        let together = if self.in_bands() { BAND } else { width.max(1) };
        (0..width).step_by(together).map(move |column| {
            let len = together.min(width - column);
            // SAFETY: whoever made this value had the whole matrix borrowed mutably for `'a`, and gives these columns to
            // no one else; the row and the columns lie inside it, and pieces apart from each other.
            unsafe { std::slice::from_raw_parts_mut(first.add(column / BAND * band), len) }
        })
    }

    /// Writes one element.
    ///
    /// # Panics
    /// If there is no such row or column.
    #[inline(always)]
    pub(super) fn put(&mut self, row: usize, column: usize, value: f32) {
        assert!(row < self.rows && column < self.width);
        let at = row * self.stride + column / BAND * self.band + column % BAND;
        // SAFETY: as above, for one element.
        unsafe { self.first.add(at).write(value) }
    }

    /// Writes row `row`.
    ///
    /// # Panics
    /// If there is no such row, or `values` are not as many as the columns.
    pub(crate) fn write(&mut self, row: usize, mut values: &[f32]) {
        assert_eq!(values.len(), self.width, "values of a row");
        for piece in self.pieces(row) {
            let now;
            (now, values) = values.split_at(piece.len());
            piece.copy_from_slice(now);
        }
    }
}

/// The rows of what `work` makes in a room that begins with a cache line.
#[cfg(test)]
pub(super) fn made_in_room(
    rows: usize,
    width: usize,
    work: impl FnOnce(&mut Columns<'_>),
) -> Vec<f32> {
    let len = Columns::room(rows, width);
    let mut values = vec![f32::NAN; len + LINE / size_of::<f32>()];
    let start = values.as_ptr().align_offset(LINE);
    let mut columns = Columns::in_room(&mut values[start..][..len], rows, width);
    work(&mut columns);
    let mut out = Vec::new();
    for row in 0..rows {
        columns
            .pieces(row)
            .for_each(|piece| out.extend_from_slice(piece));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_in_bands_are_the_rows_written() {
        for (rows, width) in [(FEW, 70), (FEW + 1, 70), (16, 32), (33, 64), (40, 1)] {
            let value = |row: usize, column: usize| (row * width + column) as f32;
            let expected: Vec<f32> = (0..rows * width).map(|at| at as f32).collect();
            let by_row = made_in_room(rows, width, |columns| {
                for row in 0..rows {
                    columns.write(row, &expected[row * width..][..width]);
                }
            });
            let one_by_one = made_in_room(rows, width, |columns| {
                for (row, column) in (0..rows).flat_map(|row| (0..width).map(move |c| (row, c))) {
                    columns.put(row, column, value(row, column));
                }
            });
            assert_eq!([&by_row, &one_by_one], [&expected; 2], "{rows}x{width}");
        }
    }
}
