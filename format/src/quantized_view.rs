//! Reading a packed matrix.

use std::ops::Range;

use half::f16;

use crate::pack::{TILE_COLS, TILE_ROWS, tile_bytes, unpack_row};
use crate::{QuantizedMatrix, Scheme};

/// A quantized matrix `W[rows, cols]` in the artifact's layout, `w = scale · (code − zero_point)`.
///
/// With `panels = ⌈rows/16⌉`, `tiles = ⌈cols/64⌉` and `groups = scheme.groups(cols)`; the reader checked
/// the lengths.
#[derive(Clone, Copy, Debug)]
pub struct QuantizedView<'a> {
    /// How to read the codes.
    pub scheme: Scheme,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Tiles, `[panels, tiles, 512]` with 4 bits and `[panels, tiles, 1024]` with 8.
    pub codes: &'a [u8],
    /// f16 little endian, `[panels, groups, 16]`.
    pub scales: &'a [u8],
    /// `[panels, groups, 16]`, or empty where the scheme is symmetric.
    pub zero_points: &'a [u8],
}

impl QuantizedView<'_> {
    /// Dequantizes whole rows into `out`, `[rows.len(), cols]` row major; the same values as
    /// [`QuantizedMatrix::dequantize`].
    ///
    /// # Panics
    /// If the rows are not in the matrix, or `out` has another length.
    #[track_caller]
    pub fn read_f32(&self, rows: Range<usize>, out: &mut [f32]) {
        assert!(
            rows.start <= rows.end && rows.end <= self.rows,
            "rows {rows:?} of {}",
            self.rows
        );
        assert_eq!(
            out.len(),
            rows.len() * self.cols,
            "rows {rows:?} of {} columns",
            self.cols
        );
        let width = self.scheme.group_size.unwrap_or(self.cols);
        let mut codes = self.code_buffer();
        for (row, out) in rows.zip(out.chunks_exact_mut(self.cols)) {
            self.read_codes(row, &mut codes);
            let codes = codes.as_flattened()[..self.cols].chunks(width);
            for (group, (codes, out)) in codes.zip(out.chunks_mut(width)).enumerate() {
                let scale = self.scale(row, group).to_f32();
                let zero_point = i32::from(self.zero_point(row, group));
                for (&code, out) in codes.iter().zip(out) {
                    *out = scale * (i32::from(code) - zero_point) as f32;
                }
            }
        }
    }

    /// The matrix in plain row-major form.
    pub fn unpack(&self) -> QuantizedMatrix {
        let groups = self.scheme.groups(self.cols);
        let mut matrix = QuantizedMatrix {
            scheme: self.scheme,
            rows: self.rows,
            cols: self.cols,
            codes: Vec::with_capacity(self.rows * self.cols),
            scales: Vec::with_capacity(self.rows * groups),
            zero_points: Vec::new(),
        };
        let mut codes = self.code_buffer();
        for row in 0..self.rows {
            self.read_codes(row, &mut codes);
            matrix.codes.extend(&codes.as_flattened()[..self.cols]);
            matrix
                .scales
                .extend((0..groups).map(|group| self.scale(row, group)));
            if !self.scheme.symmetric {
                let zero_points = (0..groups).map(|group| self.zero_point(row, group));
                matrix.zero_points.extend(zero_points);
            }
        }
        matrix
    }

    /// Room for the codes of one row, padding included.
    pub(crate) fn code_buffer(&self) -> Vec<[u8; TILE_COLS]> {
        vec![[0; TILE_COLS]; self.cols.div_ceil(TILE_COLS)]
    }

    /// Reads the codes of a row, which may be one of the padding rows of the last panel.
    pub(crate) fn read_codes(&self, row: usize, codes: &mut [[u8; TILE_COLS]]) {
        let tile = tile_bytes(self.scheme.bits);
        let panel = row / TILE_ROWS * codes.len() * tile;
        let tiles = self.codes[panel..].chunks_exact(tile);
        for (codes, tile) in codes.iter_mut().zip(tiles) {
            unpack_row(self.scheme.bits, tile, row % TILE_ROWS, codes);
        }
    }

    /// Position of a scale or zero point, counted in elements.
    pub(crate) fn group_at(&self, row: usize, group: usize) -> usize {
        let groups = self.scheme.groups(self.cols);
        (row / TILE_ROWS * groups + group) * TILE_ROWS + row % TILE_ROWS
    }

    pub(crate) fn scale(&self, row: usize, group: usize) -> f16 {
        let at = 2 * self.group_at(row, group);
        f16::from_le_bytes([self.scales[at], self.scales[at + 1]])
    }

    pub(crate) fn zero_point(&self, row: usize, group: usize) -> u8 {
        if self.scheme.symmetric {
            self.scheme.mid()
        } else {
            self.zero_points[self.group_at(row, group)]
        }
    }
}
