//! Where a product goes: the columns of the result that belong to the rows asked for.

use std::marker::PhantomData;
use std::ops::Range;

use qbin_format::TILE_ROWS;

use crate::kernels::Columns;
#[cfg(any(target_arch = "x86_64", test))]
use crate::kernels::activations::TILE;
use crate::kernels::ahead::fetch_near;
use crate::kernels::columns::BAND;

/// Some panels of 16 rows of a result, handed out to one thread.
pub(super) struct Panels<'a> {
    first: *mut f32,
    /// Values from token to token, and from 32 columns to the next 32.
    strides: [usize; 2],
    tokens: usize,
    /// Rows of the weights.
    rows: Range<usize>,
    /// Columns before those.
    before: usize,
    /// Columns of the room in bands that this is in; 0 where others write their columns.
    room: usize,
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
            strides: columns.strides(),
            tokens: columns.rows(),
            room: match columns.in_bands() {
                true => columns.width().next_multiple_of(BAND),
                false => 0,
            },
            first: columns.as_mut_ptr(),
            rows,
            before: 0,
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
            before: self.before + start - self.rows.start,
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

    /// Starts to bring a panel's rows for a token into the first cache.
    ///
    /// # Panics
    /// As [`Self::write`].
    #[inline(always)]
    pub(super) fn fetch(&mut self, token: usize, panel: usize) {
        fetch_near(self.rows(token, panel).as_ptr());
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

    /// Some of these panels with what may be overwritten around them, if that is enough.
    ///
    /// # Panics
    /// If one of them is not among these.
    #[cfg(any(target_arch = "x86_64", test))]
    #[track_caller]
    pub(super) fn spacious(&mut self, panels: Range<usize>) -> Option<Rows<'_>> {
        let row = panels.start * TILE_ROWS;
        assert!(self.rows.contains(&row) && panels.end <= self.rows.end.div_ceil(TILE_ROWS));
        let (column, count) = (self.column(row), panels.len().next_multiple_of(2));
        let on_lines = self.first.addr().is_multiple_of(align_of::<Line>());
        let fits = column.is_multiple_of(BAND) && column + count * TILE_ROWS <= self.room;
        (on_lines && fits).then(|| Rows {
            first: self.at(0, column),
            rows: self.tokens.next_multiple_of(TILE),
            band: self.strides[1],
            panels: count,
            borrow: PhantomData,
        })
    }

    /// Whether all rows of the panels below this one are there.
    pub(super) fn holds(&self, panels: usize) -> bool {
        panels * TILE_ROWS <= self.rows.end
    }

    /// `P` whole panels for `T` tokens.
    ///
    /// # Panics
    /// If a panel is not one of these or not whole, or there are no such tokens.
    #[inline(always)]
    pub(super) fn block<const P: usize, const T: usize>(
        &mut self,
        token: usize,
        panel: usize,
    ) -> Block<'_, P, T> {
        let row = panel * TILE_ROWS;
        assert!(self.rows.contains(&row) && self.holds(panel + P) && token + T <= self.tokens);
        let column = self.column(row);
        // Two panels from here on lie together, and then the next two.
        assert!(P == 1 || column.is_multiple_of(BAND) || self.room == 0);
        Block {
            first: self.at(token, column),
            strides: self.strides,
            borrow: PhantomData,
        }
    }

    #[inline(always)]
    fn rows(&mut self, token: usize, panel: usize) -> &mut [f32] {
        let row = panel * TILE_ROWS;
        assert!(self.rows.contains(&row) && token < self.tokens);
        let len = TILE_ROWS.min(self.rows.end - row);
        // SAFETY: token and row are inside the columns, which are borrowed mutably for this value alone.
        unsafe { std::slice::from_raw_parts_mut(self.at(token, self.column(row)), len) }
    }

    /// The column of a row of the weights.
    fn column(&self, row: usize) -> usize {
        self.before + (row - self.rows.start)
    }

    /// Where a column of a token is.
    fn at(&self, token: usize, column: usize) -> *mut f32 {
        let [token_stride, band] = self.strides;
        let column = column / BAND * band + column % BAND;
        self.first.wrapping_add(token * token_stride + column)
    }
}

/// Most tokens of a block.
pub(super) const TOKENS: usize = 6;

/// Results of `P` panels that lie together, on whole cache lines.
#[repr(align(64))]
pub(super) struct Near<const P: usize>([[[f32; TILE_ROWS]; P]; TOKENS]);

impl<const P: usize> Near<P> {
    /// All 0.
    #[inline(always)]
    pub(super) fn new() -> Self {
        Self([[[0.0; TILE_ROWS]; P]; TOKENS])
    }
}

/// The results of `P` whole panels for `T` tokens.
pub(super) struct Block<'a, const P: usize, const T: usize> {
    first: *mut f32,
    /// Values from token to token, and from two panels to the next two.
    strides: [usize; 2],
    borrow: PhantomData<&'a mut [f32]>,
}

impl<'a, const P: usize, const T: usize> Block<'a, P, T> {
    /// These results.
    #[inline(always)]
    pub(super) fn of(values: &'a mut Near<P>) -> Self {
        const { assert!(T <= TOKENS) };
        Self {
            first: values.0.as_mut_ptr().cast(),
            strides: [P * TILE_ROWS, BAND],
            borrow: PhantomData,
        }
    }

    /// What was written before for a token and panel.
    #[inline(always)]
    pub(super) fn get(&self, t: usize, p: usize) -> [f32; TILE_ROWS] {
        assert!(t < T && p < P);
        // SAFETY: the values of T tokens and P panels are borrowed.
        unsafe { self.at(t, p).cast::<[f32; TILE_ROWS]>().read() }
    }

    /// Writes the values for a token and panel.
    #[inline(always)]
    pub(super) fn put(&mut self, t: usize, p: usize, values: [f32; TILE_ROWS]) {
        assert!(t < T && p < P);
        // SAFETY: the values of T tokens and P panels are borrowed mutably.
        unsafe { self.at(t, p).cast::<[f32; TILE_ROWS]>().write(values) }
    }

    /// Where they are, to be fetched.
    #[inline(always)]
    pub(super) fn at(&self, t: usize, p: usize) -> *mut f32 {
        let [token, band] = self.strides;
        self.first
            .wrapping_add(t * token + p / 2 * band + p % 2 * TILE_ROWS)
    }
}

/// A line of results.
#[cfg(any(target_arch = "x86_64", test))]
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line([f32; TILE_ROWS]);

/// Results of whole tiles of tokens on whole lines, two panels at a time: `[pair, token, 2, 16]`.
#[cfg(any(target_arch = "x86_64", test))]
pub(super) struct Rows<'a> {
    first: *mut f32,
    rows: usize,
    /// Values from one pair to the next.
    band: usize,
    /// An even number.
    panels: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

#[cfg(any(target_arch = "x86_64", test))]
impl<'a> Rows<'a> {
    /// Those of so many panels, in `room`, which grows as needed.
    pub(super) fn of(room: &'a mut Vec<Line>, tokens: usize, panels: usize) -> Self {
        let rows = tokens.next_multiple_of(TILE);
        let panels = panels.next_multiple_of(2);
        room.resize(room.len().max(rows * panels), Line([0.0; TILE_ROWS]));
        Self {
            first: room.as_mut_ptr().cast(),
            rows,
            band: rows * BAND,
            panels,
            borrow: PhantomData,
        }
    }

    /// Tokens.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Two panels of some tokens.
    ///
    /// # Panics
    /// If there are no such ones.
    #[inline(always)]
    pub(super) fn pair(&mut self, rows: Range<usize>, pair: usize) -> Rows<'_> {
        assert!(rows.start <= rows.end && rows.end <= self.rows && 2 * pair < self.panels);
        Rows {
            first: self
                .first
                .wrapping_add(pair * self.band + rows.start * BAND),
            rows: rows.len(),
            panels: 2,
            ..*self
        }
    }

    /// What the first two panels have for a token.
    ///
    /// # Panics
    /// If there is no such token.
    #[inline(always)]
    pub(super) fn row(&mut self, row: usize) -> &mut [[f32; TILE_ROWS]; 2] {
        const { assert!(BAND == 2 * TILE_ROWS) };
        assert!(row < self.rows && self.panels >= 2);
        // SAFETY: rows of so many panels are borrowed mutably for this value alone.
        unsafe { &mut *self.first.add(row * BAND).cast() }
    }

    /// The first value. Those of the first two panels, 32 of each token, may be touched through it.
    pub(super) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.first
    }
}
