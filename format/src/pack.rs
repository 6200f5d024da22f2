//! Tiles: where in the packed bytes the code of one weight stands.
//!
//! A tile holds 16 rows × 64 columns. It is a sequence of 64-byte vectors, and lane `r` of a vector, four
//! bytes, belongs to row `r` of the tile and holds four consecutive columns (a quad). With 8 bits
//! vector `v` holds quad `v`; with 4 bits it holds quad `2v` in the low nibbles and quad `2v + 1` in
//! the high ones. `docs/format.md` has a worked example.

use std::ops::Range;

use half::f16;

use crate::quantized_view::Sparsity;
use crate::sparse::{Census, Encoder, Encoding};
use crate::{FormatError, QuantizedMatrix, QuantizedView, Scheme};

/// Output rows of a tile.
pub const TILE_ROWS: usize = 16;
/// Input columns of a tile.
pub const TILE_COLS: usize = 64;

/// Bytes of a vector of codes.
pub(crate) const VECTOR: usize = 64;

/// Bytes of a tile of codes.
pub(crate) fn tile_bytes(bits: u8) -> usize {
    TILE_ROWS * TILE_COLS * usize::from(bits) / 8
}

/// The sizes of a packed matrix, all checked not to overflow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PackedSize {
    /// Panels of 16 rows.
    pub(crate) panels: usize,
    /// Tiles in a panel.
    pub(crate) tiles: usize,
    /// Groups in a row.
    pub(crate) groups: usize,
}

impl PackedSize {
    /// # Errors
    /// If the scheme is none that can be stored, or the sizes overflow.
    pub(crate) fn new(
        tensor: &str,
        scheme: Scheme,
        rows: usize,
        cols: usize,
    ) -> Result<Self, FormatError> {
        let storable = matches!(scheme.bits, 4 | 8) && scheme.group_size != Some(0);
        if !storable || rows == 0 || cols == 0 {
            return Err(FormatError::Scheme {
                tensor: tensor.to_owned(),
                scheme,
                rows,
                cols,
            });
        }
        // One code takes at most a byte, one scale and zero point three: with this bound neither the
        // padded codes nor the scales overflow.
        let padded = (rows.checked_next_multiple_of(TILE_ROWS))
            .and_then(|rows| rows.checked_mul(cols.checked_next_multiple_of(TILE_COLS)?))
            .filter(|&codes| codes <= usize::MAX / 4);
        if padded.is_none() {
            return Err(FormatError::TooLarge {
                name: tensor.to_owned(),
            });
        }
        Ok(Self {
            panels: rows.div_ceil(TILE_ROWS),
            tiles: cols.div_ceil(TILE_COLS),
            groups: scheme.groups(cols),
        })
    }
}

/// Puts 64 codes of row `row` of a tile in their places; a place is written once.
fn pack_row(bits: u8, codes: &[u8; TILE_COLS], row: usize, tile: &mut [u8]) {
    let (quads, _) = codes.as_chunks::<4>();
    if bits == 8 {
        for (vector, quad) in tile.chunks_exact_mut(VECTOR).zip(quads) {
            vector[4 * row..4 * row + 4].copy_from_slice(quad);
        }
    } else {
        for (vector, pair) in tile.chunks_exact_mut(VECTOR).zip(quads.chunks_exact(2)) {
            for lane in 0..4 {
                vector[4 * row + lane] = pair[0][lane] | pair[1][lane] << 4;
            }
        }
    }
}

/// Takes the 64 codes of row `row` out of a tile.
pub(crate) fn unpack_row(bits: u8, tile: &[u8], row: usize, codes: &mut [u8; TILE_COLS]) {
    let (quads, _) = codes.as_chunks_mut::<4>();
    if bits == 8 {
        for (vector, quad) in tile.chunks_exact(VECTOR).zip(quads) {
            quad.copy_from_slice(&vector[4 * row..4 * row + 4]);
        }
    } else {
        for (vector, pair) in tile.chunks_exact(VECTOR).zip(quads.chunks_exact_mut(2)) {
            for lane in 0..4 {
                let byte = vector[4 * row + lane];
                pair[0][lane] = byte & 15;
                pair[1][lane] = byte >> 4;
            }
        }
    }
}

/// A quantized matrix in the artifact's layout, held in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedMatrix {
    scheme: Scheme,
    rows: usize,
    cols: usize,
    encoding: Encoding,
    codes: Vec<u8>,
    masks: Vec<u8>,
    offsets: Vec<u8>,
    scales: Vec<u8>,
    zero_points: Vec<u8>,
}

impl PackedMatrix {
    /// Packs a whole matrix densely.
    ///
    /// # Panics
    /// If the matrix contradicts itself: lengths, or a code or zero point of more than `bits` bits.
    #[track_caller]
    pub fn pack(matrix: &QuantizedMatrix) -> Self {
        check_matrix(matrix);
        Self::pack_panels(matrix, 0..matrix.rows.div_ceil(TILE_ROWS))
    }

    /// Packs a whole matrix in the encoding that an artifact would give it: the smallest, if it saves an eighth.
    ///
    /// # Panics
    /// As [`PackedMatrix::pack`].
    #[track_caller]
    pub fn pack_smallest(matrix: &QuantizedMatrix) -> Self {
        let dense = Self::pack(matrix);
        let mut census = Census::none();
        for panel in 0..matrix.rows.div_ceil(TILE_ROWS) {
            census.add(Census::of_panel(&dense.view(), panel));
        }
        let encoding = census.smallest(matrix.scheme.bits);
        dense
            .encoded(encoding)
            .expect("the census saw that it can be stored so")
    }

    /// Packs a whole matrix in this encoding; `None` if that is two of four and some four columns have more.
    ///
    /// # Panics
    /// As [`PackedMatrix::pack`].
    #[track_caller]
    pub fn pack_as(matrix: &QuantizedMatrix, encoding: Encoding) -> Option<Self> {
        Self::pack(matrix).encoded(encoding)
    }

    /// A dense matrix in another encoding.
    fn encoded(mut self, encoding: Encoding) -> Option<Self> {
        if encoding == Encoding::Dense {
            return Some(self);
        }
        let mut encoder = Encoder::new(encoding);
        let mut codes = Vec::new();
        for panel in 0..self.rows.div_ceil(TILE_ROWS) {
            codes.extend(encoder.panel(&self.view(), panel)?);
        }
        codes.resize(codes.len() + encoder.tail(self.scheme.bits), 0);
        self.encoding = encoding;
        self.offsets = encoder.offset_bytes();
        (self.codes, self.masks) = (codes, encoder.masks);
        Some(self)
    }

    /// Packs some panels of 16 rows of a matrix that passed [`check_matrix`].
    pub(crate) fn pack_panels(matrix: &QuantizedMatrix, panels: Range<usize>) -> Self {
        let first = panels.start * TILE_ROWS;
        let last = (panels.end * TILE_ROWS).min(matrix.rows);
        let mut packed = Self {
            scheme: matrix.scheme,
            rows: last - first,
            cols: matrix.cols,
            encoding: Encoding::Dense,
            codes: Vec::new(),
            masks: Vec::new(),
            offsets: Vec::new(),
            scales: Vec::new(),
            zero_points: Vec::new(),
        };
        let panel_bytes = matrix.cols.div_ceil(TILE_COLS) * tile_bytes(matrix.scheme.bits);
        packed.codes.resize(panels.len() * panel_bytes, 0);
        let codes = packed.codes.chunks_exact_mut(panel_bytes);
        for (panel, codes) in panels.clone().zip(codes) {
            pack_codes(matrix, panel, codes);
        }
        for panel in panels {
            packed.push_scales(matrix, panel);
        }
        packed
    }

    fn push_scales(&mut self, matrix: &QuantizedMatrix, panel: usize) {
        let groups = matrix.scheme.groups(matrix.cols);
        for group in 0..groups {
            for row in panel * TILE_ROWS..(panel + 1) * TILE_ROWS {
                let at = row * groups + group;
                let inside = row < matrix.rows;
                let scale = if inside { matrix.scales[at] } else { f16::ZERO };
                self.scales.extend(scale.to_le_bytes());
                if !matrix.scheme.symmetric {
                    let mid = matrix.scheme.mid();
                    self.zero_points
                        .push(if inside { matrix.zero_points[at] } else { mid });
                }
            }
        }
    }

    /// The bytes as they stand in an artifact.
    pub fn view(&self) -> QuantizedView<'_> {
        QuantizedView {
            scheme: self.scheme,
            rows: self.rows,
            cols: self.cols,
            codes: &self.codes,
            sparsity: Sparsity::new(self.encoding, &self.masks, &self.offsets),
            scales: &self.scales,
            zero_points: &self.zero_points,
        }
    }
}

/// Packs the codes of one panel. What lies outside the matrix gets the code of zero: the group's zero
/// point right of the last column (which is in the last group), the middle below the last row.
fn pack_codes(matrix: &QuantizedMatrix, panel: usize, out: &mut [u8]) {
    let scheme = matrix.scheme;
    let groups = scheme.groups(matrix.cols);
    for row_in_tile in 0..TILE_ROWS {
        let row = panel * TILE_ROWS + row_in_tile;
        let inside = row < matrix.rows;
        let fill = match matrix.zero_points.get(row * groups + groups - 1) {
            Some(&zero_point) if inside => zero_point,
            _ => scheme.mid(),
        };
        for (at, tile) in out.chunks_exact_mut(tile_bytes(scheme.bits)).enumerate() {
            let mut codes = [fill; TILE_COLS];
            if inside {
                let from = at * TILE_COLS;
                let len = TILE_COLS.min(matrix.cols - from);
                let start = row * matrix.cols + from;
                codes[..len].copy_from_slice(&matrix.codes[start..start + len]);
            }
            pack_row(scheme.bits, &codes, row_in_tile, tile);
        }
    }
}

/// # Panics
/// If the matrix contradicts itself.
#[track_caller]
pub(crate) fn check_matrix(matrix: &QuantizedMatrix) {
    let QuantizedMatrix {
        scheme, rows, cols, ..
    } = *matrix;
    assert!(matches!(scheme.bits, 4 | 8), "bits are {}", scheme.bits);
    assert!(scheme.group_size != Some(0) && rows > 0 && cols > 0);
    let groups = rows * scheme.groups(cols);
    let zero_points = if scheme.symmetric { 0 } else { groups };
    assert_eq!(matrix.codes.len(), rows * cols, "codes of [{rows}, {cols}]");
    assert_eq!(matrix.scales.len(), groups, "scales");
    assert_eq!(matrix.zero_points.len(), zero_points, "zero points");
    let max = u8::MAX >> (8 - scheme.bits);
    assert!(
        matrix.codes.iter().all(|&code| code <= max),
        "a code is above {max}"
    );
    let fits = matrix.zero_points.iter().all(|&zero| zero <= max);
    assert!(fits, "a zero point is above {max}");
}
