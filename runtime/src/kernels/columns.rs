//! Part of a matrix as one thread writes it.

use super::ahead::{LINE, fetch_near};
use std::marker::PhantomData;

/// Most columns of a part that has a room of its own.
pub(super) const WIDTH: usize = 128;
/// Values from row to row in such a room: a line more than the columns, so that rows lie in all sets of a cache.
pub(super) const PITCH: usize = WIDTH + 16;
/// Rows that it is a multiple of.
const ROWS: usize = 16;

/// Neighbouring columns of a row-major matrix, to be written by one thread while others write its other columns.
#[derive(Debug)]
pub struct Columns<'a> {
    first: *mut f32,
    rows: usize,
    width: usize,
    stride: usize,
    /// Whether they are in a room of their own: whole rows of it, up to a multiple of 16 of them, may be overwritten.
    own: bool,
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
            own: false,
            _data: PhantomData,
        }
    }

    /// Values that a room for these columns has.
    pub(crate) fn room(rows: usize, width: usize) -> usize {
        match width <= WIDTH {
            true => rows.next_multiple_of(ROWS) * PITCH,
            false => rows * width,
        }
    }

    /// Columns in a room of their own, where not only they may be overwritten, if they are few.
    ///
    /// # Panics
    /// If the room has not as many values as [`Self::room`] says, or `width` is 0.
    pub(crate) fn in_room(data: &'a mut [f32], rows: usize, width: usize) -> Self {
        assert_eq!(data.len(), Self::room(rows, width), "values of a room");
        match width <= WIDTH {
            true => Self {
                first: data.as_mut_ptr(),
                rows,
                width,
                stride: PITCH,
                own: true,
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
            own: false,
            _data: PhantomData,
        }
    }

    /// Whether they are in a room of their own.
    pub(super) fn own(&self) -> bool {
        self.own
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of this part.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Elements from one row of the matrix to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The first element; those of row `r` follow at `r · stride`. Only they may be touched through it.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.first
    }

    /// Starts to bring a row, which need not exist, into the first cache.
    #[inline(always)]
    pub(super) fn fetch(&self, row: usize) {
        let first = self.first.wrapping_add(row * self.stride);
        let columns = (0..self.width).step_by(LINE / size_of::<f32>());
        for column in columns.chain([self.width - 1]) {
            fetch_near(first.wrapping_add(column));
        }
    }

    /// This part of row `row`.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: whoever made this value had the whole matrix borrowed mutably for `'a`, and gives these columns to
        // no one else; `row` and the width lie inside it.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(row * self.stride), self.width) }
    }
}
