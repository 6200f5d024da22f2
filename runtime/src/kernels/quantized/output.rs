//! Where a product goes: the columns of the result that belong to the rows asked for.

use std::marker::PhantomData;
use std::ops::Range;

use qbin_format::TILE_ROWS;

use crate::kernels::Columns;

/// Some panels of 16 rows of a result, handed out to one thread.
pub(super) struct Panels<'a> {
    first: *mut f32,
    stride: usize,
    tokens: usize,
    /// Rows of the weights.
    rows: Range<usize>,
    borrow: PhantomData<&'a mut [f32]>,
}

impl<'a> Panels<'a> {
    /// The columns of a result, which are the rows `rows` of the weights.
    ///
    /// # Panics
    /// If there are not as many columns as rows, or the rows do not begin with a panel.
    #[track_caller]
    pub(super) fn of_columns(columns: &'a mut Columns<'_>, rows: Range<usize>) -> Self {
        assert_eq!(columns.width(), rows.len(), "columns for rows {rows:?}");
        assert!(rows.start.is_multiple_of(TILE_ROWS), "rows {rows:?}");
        Self {
            stride: columns.stride(),
            tokens: columns.rows(),
            first: columns.as_mut_ptr(),
            rows,
            borrow: PhantomData,
        }
    }

    /// Some of these panels, counted from 0.
    ///
    /// # Panics
    /// If one of them is not among these.
    #[track_caller]
    pub(super) fn part(&mut self, panels: Range<usize>) -> Panels<'_> {
        let start = panels.start * TILE_ROWS;
        let end = (panels.end * TILE_ROWS).min(self.rows.end);
        assert!(
            self.rows.start <= start && start <= end,
            "panels {panels:?} of rows {:?}",
            self.rows
        );
        Panels {
            first: self.first.wrapping_add(start - self.rows.start),
            rows: 0..end - start,
            ..*self
        }
    }

    /// Writes the values of a panel's rows for one token; values of rows beyond the last are dropped.
    ///
    /// # Panics
    /// If the panel is not one of these, or there is no such token.
    #[inline(always)]
    pub(super) fn write(&mut self, token: usize, panel: usize, values: &[f32; TILE_ROWS]) {
        self.rows(token, panel)
            .iter_mut()
            .zip(values)
            .for_each(|(to, from)| *to = *from);
    }

    /// What was written before for a panel's rows and one token; 0 beyond the last row.
    ///
    /// # Panics
    /// As [`Self::write`].
    #[inline(always)]
    pub(super) fn read(&mut self, token: usize, panel: usize) -> [f32; TILE_ROWS] {
        let mut values = [0.0; TILE_ROWS];
        values
            .iter_mut()
            .zip(self.rows(token, panel))
            .for_each(|(to, from)| *to = *from);
        values
    }

    /// Where that will be written, to be fetched.
    #[inline(always)]
    pub(super) fn address(&self, token: usize, panel: usize) -> *const u8 {
        let row = panel * TILE_ROWS - self.rows.start;
        self.first.wrapping_add(token * self.stride + row).cast()
    }

    #[inline(always)]
    fn rows(&mut self, token: usize, panel: usize) -> &mut [f32] {
        let row = panel * TILE_ROWS;
        assert!(self.rows.contains(&row) && token < self.tokens);
        let len = TILE_ROWS.min(self.rows.end - row);
        // SAFETY: token and row are inside the columns, which are borrowed mutably for this value alone.
        unsafe {
            let first = self
                .first
                .add(token * self.stride + (row - self.rows.start));
            std::slice::from_raw_parts_mut(first, len)
        }
    }
}
