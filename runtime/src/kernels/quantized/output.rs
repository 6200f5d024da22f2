//! Where a product goes when several threads write parts of it.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use qbin_format::TILE_ROWS;

use crate::kernels::pool::Columns;

/// The result `[tokens, rows]` of a product, row major, which several threads fill by panels of 16 rows.
///
/// Each panel may be written once; that is checked, and makes sharing it safe.
#[derive(Debug)]
pub struct Output<'a> {
    values: *mut f32,
    tokens: usize,
    rows: usize,
    /// One bit per panel that was handed out.
    claimed: Vec<AtomicU64>,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: memory is reached only through `claim`, which hands out each panel once.
unsafe impl Send for Output<'_> {}
// SAFETY: as above.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    /// A result to be written into `out`, `[tokens, rows]`.
    ///
    /// # Panics
    /// If `out` is not of whole rows.
    #[track_caller]
    pub fn new(out: &'a mut [f32], rows: usize) -> Self {
        assert!(
            rows > 0 && out.len().is_multiple_of(rows),
            "{} values in rows of {rows}",
            out.len()
        );
        let words = rows.div_ceil(TILE_ROWS).div_ceil(64);
        Self {
            values: out.as_mut_ptr(),
            tokens: out.len() / rows,
            rows,
            claimed: (0..words).map(|_| AtomicU64::new(0)).collect(),
            borrow: PhantomData,
        }
    }

    /// Tokens of the result.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Rows of the weights, columns of the result.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Hands out some panels, for once.
    ///
    /// # Panics
    /// If one of them is not there or was handed out before.
    #[track_caller]
    pub(super) fn claim(&self, panels: Range<usize>) -> Panels<'_> {
        let count = self.rows.div_ceil(TILE_ROWS);
        assert!(
            panels.start <= panels.end && panels.end <= count,
            "panels {panels:?} of {count}"
        );
        for (word, claimed) in self.claimed.iter().enumerate() {
            let from = panels.start.clamp(64 * word, 64 * word + 64) - 64 * word;
            let to = panels.end.clamp(64 * word, 64 * word + 64) - 64 * word;
            if from < to {
                let mask = u64::MAX >> (64 - (to - from)) << from;
                // Only the bits themselves matter: the pool orders the writes before whoever reads them.
                let before = claimed.fetch_or(mask, Ordering::Relaxed);
                assert_eq!(before & mask, 0, "panels {panels:?} were written before");
            }
        }
        let first = panels.start * TILE_ROWS;
        Panels {
            // Inside the values or one past them, as the panels are there.
            first: self.values.wrapping_add(first),
            stride: self.rows,
            tokens: self.tokens,
            rows: first..(panels.end * TILE_ROWS).min(self.rows),
            borrow: PhantomData,
        }
    }
}

/// Some panels of a result, handed out to one thread.
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
        let at = token * self.stride + panel * TILE_ROWS - self.rows.start;
        self.first.wrapping_add(at).cast()
    }

    #[inline(always)]
    fn rows(&mut self, token: usize, panel: usize) -> &mut [f32] {
        let row = panel * TILE_ROWS;
        assert!(self.rows.contains(&row) && token < self.tokens);
        let at = token * self.stride + row - self.rows.start;
        // SAFETY: token and row are inside the columns that were borrowed mutably or claimed for this value alone.
        unsafe {
            std::slice::from_raw_parts_mut(self.first.add(at), TILE_ROWS.min(self.rows.end - row))
        }
    }
}
