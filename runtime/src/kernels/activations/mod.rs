//! Activations as int8, one scale per token and group of columns.

#[cfg(target_arch = "x86_64")]
mod choices;
mod tiles;

use std::marker::PhantomData;
use std::ops::Range;
#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

use qbin_format::{Scheme, TILE_COLS};

use super::ahead::{AHEAD, LINE, fetch_near};
use super::isa::{Isa, Level, Vectorized};
use super::pool::{Base, Pool, check_apart};
#[cfg(target_arch = "x86_64")]
pub(super) use choices::Choices;
pub(super) use tiles::Tiles;
#[cfg(any(target_arch = "x86_64", test))]
pub(super) use tiles::{Group, TILE};

/// Tokens up to which vector instructions multiply faster than tiles, and what sparse weights read as rows.
pub(super) const FEW: usize = 6;

/// Columns that groups of tiles are a multiple of.
const STEP: usize = 32;

/// Columns that share an activation scale where the weights do not say: an outlier then spoils only its neighbours.
const DEFAULT_GROUP: usize = 128;

/// A group whose largest magnitude is below this counts as zero: `127 / max` would come near f32's limit.
const SMALLEST: f32 = f32::from_bits((127 - 100) << 23);

/// Columns that share an activation scale beside weights of this scheme: a divisor of the weights' group, at most 128,
/// so that a group's integer sum is exact in f32 (`255 · 127 · 128 < 2^24`).
///
/// One scale per row is used with every 128 columns. A weight group above 128 is cut into its largest part that the
/// vector kernels are made for (128, 96, 64 or 32 columns), else into its largest divisor.
pub fn activation_group(scheme: Scheme, cols: usize) -> usize {
    match scheme.group_size {
        Some(group) if group < cols && group <= DEFAULT_GROUP => group,
        Some(group) if group < cols => {
            let divides = |part: &usize| group.is_multiple_of(*part);
            let made_for = [128, 96, 64, 32].into_iter().find(divides);
            made_for
                .or_else(|| (1..DEFAULT_GROUP).rev().find(divides))
                .expect("one divides every group")
        }
        _ => DEFAULT_GROUP,
    }
}

/// int8 activations of some tokens: `x ≈ scale · code`, symmetric, one scale per token and group of columns.
///
/// With `max` the largest magnitude of a group: `scale = max / 127`, `code = round(x · (127 / max))`, ties to even. A
/// group below 2⁻¹⁰⁰ in magnitude has scale 0 and codes 0. A group with an infinity or NaN has the scale NaN and codes
/// 0, so that every output of that token becomes NaN.
///
/// They lie as the instruction set reads them: in rows, or more than a few tokens in tiles.
#[derive(Clone, Debug, Default)]
pub struct Activations {
    tokens: usize,
    cols: usize,
    /// Columns of a group; the last one may be short.
    group: usize,
    /// Whether they lie in tiles and not in the rows that follow.
    tiled: bool,
    tiles: Tiles,
    /// `[tokens, cols padded to 64]`, padding 0; as the following, with room left behind it.
    codes: Vec<i8>,
    /// `[tokens, groups]`.
    scales: Vec<f32>,
    /// Sum of the codes, `[tokens, groups]`.
    sums: Vec<i32>,
    /// The codes as two of four chooses from them, once it asked.
    #[cfg(target_arch = "x86_64")]
    choices: OnceLock<Vec<Choices>>,
}

impl Activations {
    /// Quantizes `x`, `[tokens, cols]` row major, for weights of `scheme` with `cols` columns that are multiplied with the
    /// instructions of `isa`.
    ///
    /// # Panics
    /// If `cols` is 0 or does not divide the length of `x`.
    #[track_caller]
    pub fn quantize(isa: Isa, x: &[f32], cols: usize, scheme: Scheme) -> Self {
        assert!(
            cols > 0 && x.len().is_multiple_of(cols),
            "{} values in rows of {cols}",
            x.len()
        );
        let mut activations = Self::default();
        activations.reset(isa, x.len() / cols, cols, scheme);
        activations.whole().fill(isa, 0..x.len() / cols, x);
        activations
    }

    /// Makes room for `tokens` rows of `cols` columns, keeping the buffers; what they hold is unspecified until every
    /// one of them is filled.
    ///
    /// # Panics
    /// If `cols` is 0.
    #[track_caller]
    pub(crate) fn reset(&mut self, isa: Isa, tokens: usize, cols: usize, scheme: Scheme) {
        let group = activation_group(scheme, cols);
        let tiled = isa.level() == Level::Amx && tokens > FEW && tiles::serve(group);
        self.reset_as(tiled, tokens, cols, group);
    }

    /// [`Self::quantize`] in tiles.
    #[cfg(test)]
    pub(super) fn quantize_in_tiles(isa: Isa, x: &[f32], cols: usize, scheme: Scheme) -> Self {
        let mut activations = Self::default();
        let tokens = x.len() / cols;
        activations.reset_as(true, tokens, cols, activation_group(scheme, cols));
        activations.whole().fill(isa, 0..tokens, x);
        activations
    }

    /// The same in tiles, or in rows.
    #[track_caller]
    fn reset_as(&mut self, tiled: bool, tokens: usize, cols: usize, group: usize) {
        assert!(cols > 0, "activations without columns");
        self.tokens = tokens;
        self.cols = cols;
        self.group = group;
        self.tiled = tiled;
        if tiled {
            self.tiles.reset(tokens, self.groups(), group);
        } else {
            let (codes, groups) = (tokens * self.stride(), tokens * self.groups());
            grow(&mut self.codes, codes);
            grow(&mut self.scales, groups);
            grow(&mut self.sums, groups);
        }
    }

    /// All of them, to be filled.
    fn whole(&mut self) -> ActivationCell<'_> {
        let (rows, columns) = (0..self.tokens, 0..self.cols);
        // SAFETY: the cell is all that is borrowed here, and the only one.
        unsafe { self.base().cell(rows, columns) }
    }

    /// Cuts them into the cells of a grid and calls `work(row number, column number, cell)` for each, on all threads.
    ///
    /// # Panics
    /// If ranges overlap, do not rise, leave the matrix, or, of columns, are not whole groups, or with the panic of a
    /// cell.
    pub(crate) fn grid(
        &mut self,
        pool: &Pool,
        rows: &[Range<usize>],
        columns: &[Range<usize>],
        work: impl Fn(usize, usize, ActivationCell<'_>) + Sync,
    ) {
        check_apart(rows, self.tokens);
        check_apart(columns, self.cols);
        assert!(
            whole_groups(columns, self.group, self.cols),
            "columns {columns:?} in groups of {}",
            self.group
        );
        let base = self.base();
        pool.run(rows.len() * columns.len(), |cell| {
            let (row, column) = (cell / columns.len(), cell % columns.len());
            // SAFETY: the buffers are borrowed until `run` returns and the cell lies inside. Ranges lie apart and
            // columns are whole groups, so cells do not overlap, and `run` gives each number to one call only.
            let cell = unsafe { base.cell(rows[row].clone(), columns[column].clone()) };
            work(row, column, cell);
        });
    }

    fn base(&mut self) -> Bases {
        #[cfg(target_arch = "x86_64")]
        self.choices.take();
        Bases {
            cols: self.cols,
            group: self.group,
            tiles: self.tiled.then(|| self.tiles.place()),
            codes: Base::of(&mut self.codes),
            scales: Base::of(&mut self.scales),
            sums: Base::of(&mut self.sums),
        }
    }

    /// Rows.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Columns, without padding.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Columns of a group; the last one may be shorter.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.cols.div_ceil(self.group)
    }

    /// Columns with padding.
    pub(crate) fn stride(&self) -> usize {
        self.cols.next_multiple_of(TILE_COLS)
    }

    /// These, if they lie in tiles.
    #[cfg(any(target_arch = "x86_64", test))]
    pub(super) fn tiles(&self) -> Option<&Tiles> {
        self.tiled.then_some(&self.tiles)
    }

    /// Codes, in rows of [`Self::stride`], scales and sums, in rows of [`Self::groups`], from a token on.
    ///
    /// # Panics
    /// If they lie in tiles.
    pub(crate) fn rows_from(&self, token: usize) -> (&[i8], &[f32], &[i32]) {
        assert!(!self.tiled, "these activations lie in tiles");
        (
            &self.codes[token * self.stride()..],
            &self.scales[token * self.groups()..],
            &self.sums[token * self.groups()..],
        )
    }

    /// Codes of one token, padded with 0 to a multiple of 64.
    ///
    /// # Panics
    /// If they lie in tiles; as the following.
    pub(super) fn codes(&self, token: usize) -> &[i8] {
        &self.rows_from(token).0[..self.stride()]
    }

    /// Scales of one token, one per group.
    pub(super) fn scales(&self, token: usize) -> &[f32] {
        &self.rows_from(token).1[..self.groups()]
    }

    /// Sums of the codes of one token, one per group.
    pub(super) fn sums(&self, token: usize) -> &[i32] {
        &self.rows_from(token).2[..self.groups()]
    }
}

/// Makes them at least `len`: what is longer is left, so that nothing is zeroed again when they grow again.
fn grow<T: Clone + Default>(values: &mut Vec<T>, len: usize) {
    values.resize(values.len().max(len), T::default());
}

/// Whether these columns of `cols` are whole groups.
pub(crate) fn whole_groups(columns: &[Range<usize>], group: usize, cols: usize) -> bool {
    let between = |column: usize| column == cols || column.is_multiple_of(group);
    columns
        .iter()
        .all(|columns| between(columns.start) && between(columns.end))
}

/// Where the parts of some activations begin.
struct Bases {
    cols: usize,
    group: usize,
    /// Where they lie in tiles.
    tiles: Option<tiles::Place>,
    codes: Base<i8>,
    scales: Base<f32>,
    sums: Base<i32>,
}

impl Bases {
    /// # Safety
    /// For `'a` the activations are borrowed mutably, and nothing else touches the cell, which lies inside and is whole
    /// groups wide.
    unsafe fn cell<'a>(&self, rows: Range<usize>, columns: Range<usize>) -> ActivationCell<'a> {
        let (stride, groups) = (
            self.cols.next_multiple_of(TILE_COLS),
            self.cols.div_ceil(self.group),
        );
        let padding = match columns.end == self.cols {
            true => stride - self.cols,
            false => 0,
        };
        let group = columns.start / self.group;
        let place = match self.tiles {
            Some(tiles) => Place::Tiles {
                tiles,
                token: rows.start,
                group,
            },
            None => Place::Rows(InRows {
                codes: self.codes.at(rows.start * stride + columns.start),
                scales: self.scales.at(rows.start * groups + group),
                sums: self.sums.at(rows.start * groups + group),
                padding,
                strides: [stride, groups],
            }),
        };
        ActivationCell {
            place,
            rows: rows.len(),
            width: columns.len(),
            group: self.group,
            borrow: PhantomData,
        }
    }
}

/// Where a cell is written.
#[derive(Clone, Copy, Debug)]
enum Place {
    Rows(InRows),
    Tiles {
        tiles: tiles::Place,
        /// The first.
        token: usize,
        group: usize,
    },
}

/// The first row of a cell.
#[derive(Clone, Copy, Debug)]
struct InRows {
    codes: *mut i8,
    scales: *mut f32,
    sums: *mut i32,
    /// Columns behind the last.
    padding: usize,
    /// From row to row, of the codes and of the others.
    strides: [usize; 2],
}

/// Whole groups of neighbouring columns of some rows of [`Activations`], to be filled by one thread while others fill
/// others.
#[derive(Debug)]
pub(crate) struct ActivationCell<'a> {
    place: Place,
    rows: usize,
    width: usize,
    group: usize,
    borrow: PhantomData<&'a mut f32>,
}

impl ActivationCell<'_> {
    /// Rows of this cell.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of this cell.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Quantizes rows of this cell, `x[rows, width]`.
    ///
    /// # Panics
    /// If there are no such rows, or `x` has another length.
    #[track_caller]
    pub(crate) fn fill(&mut self, isa: Isa, rows: Range<usize>, x: &[f32]) {
        assert!(
            rows.end <= self.rows && x.len() == rows.len() * self.width,
            "{} values for rows {rows:?} of {} of {}",
            x.len(),
            self.rows,
            self.width
        );
        isa.run(Fill {
            cell: self,
            rows,
            x,
        });
    }
}

struct Fill<'c, 'a> {
    cell: &'c mut ActivationCell<'a>,
    rows: Range<usize>,
    x: &'c [f32],
}

impl Vectorized for Fill<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { cell, rows, x } = self;
        for (row, x) in rows.zip(x.chunks_exact(cell.width)) {
            // SAFETY: whoever made this value had the activations borrowed mutably for its lifetime, and gives these groups
            // and the padding behind them to no one else; there are such rows, as the caller checked.
            unsafe {
                match cell.place {
                    Place::Rows(place) => place.fill(row, x, cell.group),
                    Place::Tiles {
                        tiles,
                        token,
                        group,
                    } => {
                        for (x, group) in x.chunks(cell.group).zip(group..) {
                            let mut codes = [[0; STEP]; 4];
                            let codes_now = &mut codes.as_flattened_mut()[..x.len()];
                            let (scale, sum) = quantize_group(x, codes_now);
                            tiles.put(token + row, group, &codes, scale, sum);
                        }
                    }
                }
            }
        }
    }
}

impl InRows {
    /// Writes a row in groups of `group` columns.
    ///
    /// # Safety
    /// The cell has this row, as wide as `x`, and nobody else touches it.
    #[inline(always)]
    unsafe fn fill(self, row: usize, x: &[f32], group: usize) {
        let [stride, groups] = self.strides;
        // Rows are far apart, and stores that wait for their lines would hold up all that follow.
        let ahead = row + AHEAD;
        let first = self.codes.wrapping_add(ahead * stride);
        for column in (0..x.len()).step_by(LINE).chain([x.len() - 1]) {
            fetch_near(first.wrapping_add(column));
        }
        fetch_near(self.scales.wrapping_add(ahead * groups));
        fetch_near(self.sums.wrapping_add(ahead * groups));
        let (len, count) = (x.len() + self.padding, x.len().div_ceil(group));
        // SAFETY: as the caller says.
        let (codes, scales, sums) = unsafe {
            (
                std::slice::from_raw_parts_mut(self.codes.add(row * stride), len),
                std::slice::from_raw_parts_mut(self.scales.add(row * groups), count),
                std::slice::from_raw_parts_mut(self.sums.add(row * groups), count),
            )
        };
        let (codes, padding) = codes.split_at_mut(x.len());
        padding.fill(0);
        let all = x.chunks(group).zip(codes.chunks_mut(group));
        for ((x, codes), (scale, sum)) in all.zip(scales.iter_mut().zip(sums)) {
            (*scale, *sum) = quantize_group(x, codes);
        }
    }
}

/// Writes the codes of one group; returns its scale and the sum of the codes.
#[inline(always)]
fn quantize_group(x: &[f32], codes: &mut [i8]) -> (f32, i32) {
    // Magnitudes compare like their bits, infinities above all numbers and NaN above those.
    let max = x
        .iter()
        .fold(0, |max, x| max.max(x.to_bits() & (u32::MAX >> 1)));
    let max = f32::from_bits(max);
    if !(SMALLEST..=f32::MAX).contains(&max) {
        codes.fill(0);
        return (if max < SMALLEST { 0.0 } else { f32::NAN }, 0);
    }
    /// Added to a small number, it leaves no bits for a fraction: the sum is rounded, ties to even, and its low bits
    /// are the integer.
    const ROUND: f32 = (3 << 22) as f32;
    let inverse = 127.0 / max;
    let mut sum = 0;
    for (code, x) in codes.iter_mut().zip(x) {
        let rounded = (x * inverse + ROUND)
            .to_bits()
            .wrapping_sub(ROUND.to_bits()) as i32;
        *code = rounded as i8;
        sum += rounded;
    }
    (max / 127.0, sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    const G32: Scheme = Scheme {
        bits: 4,
        group_size: Some(32),
        symmetric: true,
    };

    #[test]
    fn groups_follow_the_weights_and_stay_small() {
        let group = |group_size, cols| activation_group(Scheme { group_size, ..G32 }, cols);
        assert_eq!(
            [
                group(Some(32), 100),
                group(Some(6), 100),
                group(Some(100), 100)
            ],
            [32, 6, 128]
        );
        assert_eq!(
            [
                group(None, 1000),
                group(Some(256), 1000),
                group(Some(192), 1000)
            ],
            [128, 128, 96]
        );
        assert_eq!([group(Some(200), 1000), group(Some(131), 1000)], [100, 1]);
    }

    #[test]
    fn codes_are_rounded_to_even_and_padded() {
        let mut x = vec![0.0; 70];
        x[..5].copy_from_slice(&[127.0, 0.5, 1.5, -2.5, -126.6]);
        x[32..34].copy_from_slice(&[-2.0, 1.0]);
        for isa in Isa::available() {
            let rows = Activations::quantize(isa, &x, 70, G32);
            assert_eq!((rows.tokens(), rows.groups(), rows.stride()), (1, 3, 128));
            assert_eq!(rows.codes(0)[..5], [127, 0, 2, -2, -127]);
            assert_eq!(rows.codes(0)[32..35], [-127, 64, 0]);
            assert_eq!(rows.scales(0), [1.0, 2.0 / 127.0, 0.0]);
            assert_eq!(rows.sums(0), [0, -63, 0]);
            assert!(rows.codes(0)[70..].iter().all(|&code| code == 0));
        }
    }

    #[test]
    fn every_level_and_every_part_gives_the_same_bits() {
        let cols = 203;
        let x: Vec<f32> = (0..7 * cols)
            .map(|i| (i as f32 * 0.37).sin() * (i % 17) as f32)
            .collect();
        let expected = Activations::quantize(Isa::available()[0], &x, cols, G32);
        for isa in Isa::available() {
            let mut rows = Activations::quantize(isa, &vec![9.0; 600], 300, G32);
            rows.reset(isa, 7, cols, G32);
            let pool = Pool::new(2);
            let columns = [0..64, 64..96, 96..cols];
            rows.grid(&pool, &[0..3, 3..7], &columns, |row, column, mut cell| {
                // One row at a time in the first cells, all at once in the others.
                let at_once = if row == 0 { 1 } else { cell.rows() };
                for first in (0..cell.rows()).step_by(at_once) {
                    let rows = 3 * row + first..3 * row + first + at_once;
                    let x: Vec<f32> = rows
                        .flat_map(|row| &x[row * cols..][columns[column].clone()])
                        .copied()
                        .collect();
                    cell.fill(isa, first..first + at_once, &x);
                }
            });
            assert_eq!(all(&rows), all(&expected));
        }
        for group in [32, 64, 128] {
            let [rows, tiles] = [false, true].map(|tiled| {
                let mut made = Activations::default();
                // What was there before must not matter.
                for cols in [300, cols] {
                    made.reset_as(tiled, 7, cols, group);
                    let mut cell = made.whole();
                    cell.fill(Isa::detect(), 0..7, &vec![9.0; 7 * cols]);
                }
                made.whole().fill(Isa::detect(), 0..7, &x);
                made
            });
            assert_eq!(all(&tiles), all(&rows));
        }
    }

    /// Codes of each column, padding among them, with the bits of their scales and their sums.
    fn all(x: &Activations) -> Vec<Vec<(i8, u32, i32)>> {
        let column = |token: usize, col: usize| {
            let group = (col / x.group()).min(x.groups() - 1);
            let Some(tiles) = x.tiles() else {
                let (scale, sum) = (x.scales(token)[group], x.sums(token)[group]);
                return (x.codes(token)[col], scale.to_bits(), sum);
            };
            let (codes, groups) =
                tiles.groups(tiles.runs().next().expect("tokens"), group..group + 1);
            let within = col - group * x.group();
            let (step, depth) = (within / tiles.depth, within % tiles.depth);
            let codes = &codes[..tiles.steps * tiles.depth * TILE];
            let code = codes.get((step * TILE + token) * tiles.depth + depth);
            (
                code.copied().unwrap_or(0),
                groups[0].scales[token].to_bits(),
                groups[0].sums[token],
            )
        };
        let token = |token| (0..x.stride()).map(|col| column(token, col)).collect();
        (0..x.tokens()).map(token).collect()
    }

    #[test]
    fn non_finite_and_tiny_groups() {
        for isa in Isa::available() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let rows = Activations::quantize(isa, &[1.0, bad, 2.0], 3, G32);
                assert!(rows.scales(0)[0].is_nan() && rows.codes(0).iter().all(|&code| code == 0));
            }
            let rows = Activations::quantize(isa, &[f32::MAX, -1.0], 2, G32);
            assert_eq!(
                (rows.codes(0)[0], rows.scales(0)[0]),
                (127, f32::MAX / 127.0)
            );
            let rows = Activations::quantize(isa, &[f32::MIN_POSITIVE, 1e-40], 2, G32);
            assert_eq!((rows.codes(0)[0], rows.scales(0)[0]), (0, 0.0));
        }
    }
}
