//! One panel of a packed matrix: 16 output rows with all their columns.

use half::f16;
use half::slice::HalfFloatSliceExt;
use qbin_format::{QuantizedView, Sparsity, TILE_COLS, TILE_ROWS};

use super::vectors::Vectors;

/// Bytes of one vector of codes: 16 rows × 4 columns.
pub(super) const VECTOR: usize = 64;

/// Bytes of one panel: codes, scales, zero points.
fn panel_bytes(w: &QuantizedView) -> [usize; 3] {
    let tiles = w.cols.div_ceil(TILE_COLS);
    let parameters = w.scheme.groups(w.cols) * TILE_ROWS;
    let zero_points = if w.scheme.symmetric { 0 } else { parameters };
    [
        tiles * TILE_ROWS * TILE_COLS * usize::from(w.scheme.bits) / 8,
        2 * parameters,
        zero_points,
    ]
}

/// Whether the matrix has the bytes that its shape needs.
pub(super) fn fits(w: &QuantizedView) -> bool {
    let panels = w.rows.div_ceil(TILE_ROWS);
    let tiles = panels * w.cols.div_ceil(TILE_COLS);
    let [codes, scales, zero_points] = panel_bytes(w).map(|bytes| bytes * panels);
    let codes_fit = match w.sparsity {
        Sparsity::Dense => w.codes.len() == codes,
        // How many codes there are, the offsets say; a kernel looks where it reads.
        Sparsity::Bitmask { masks, offsets } => {
            [masks.len(), offsets.len()] == [128 * tiles, 8 * (panels + 1)]
                && w.codes.len() * tiles >= codes
        }
        Sparsity::TwoOfFour => w.codes.len() == w.panel_offset(panels),
    };
    codes_fit && [w.scales.len(), w.zero_points.len()] == [scales, zero_points]
}

/// A panel of a [`QuantizedView`].
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    pub(super) bits: u8,
    /// The code of zero where the scheme is symmetric.
    mid: u8,
    /// `[tiles, 512]` or `[tiles, 1024]`.
    pub(super) codes: &'a [u8],
    /// f16 little endian, `[groups, 16]`.
    pub(super) scales: &'a [u8],
    /// `[groups, 16]` or empty.
    pub(super) zero_points: &'a [u8],
}

impl<'a> Panel<'a> {
    #[inline(always)]
    pub(super) fn of(w: &QuantizedView<'a>, panel: usize) -> Self {
        let [codes, scales, zero_points] = panel_bytes(w);
        Self {
            bits: w.scheme.bits,
            mid: w.scheme.mid(),
            codes: &w.codes[panel * codes..][..codes],
            scales: &w.scales[panel * scales..][..scales],
            zero_points: &w.zero_points[panel * zero_points..][..zero_points],
        }
    }

    /// The codes of four columns, `[16 rows, 4]`.
    #[inline(always)]
    pub(super) fn quad(&self, quad: usize) -> [[u8; 4]; TILE_ROWS] {
        let (vector, shift, mask) = if self.bits == 8 {
            (quad, 0, 0xff)
        } else {
            (quad / 2, quad % 2 * 4, 0x0f)
        };
        let (codes, _) = self.codes[vector * VECTOR..][..VECTOR].as_chunks::<4>();
        std::array::from_fn(|row| codes[row].map(|code| code >> shift & mask))
    }

    /// Stored scales of a weight group, f16.
    #[inline(always)]
    pub(super) fn stored_scales(&self, group: usize) -> &'a [u8; 2 * TILE_ROWS] {
        &self.scales.as_chunks().0[group]
    }

    /// Fetches the scales and zero points of a weight group some groups ahead, if any.
    #[inline(always)]
    pub(super) fn fetch<V: Vectors>(&self, v: V, group: usize, ahead: usize) {
        if ahead > 0 {
            v.prefetch_near(
                self.stored_scales(group)
                    .as_ptr()
                    .wrapping_add(ahead * 2 * TILE_ROWS),
            );
            if !self.zero_points.is_empty() {
                v.prefetch_near(
                    self.stored_zero_points(group)
                        .as_ptr()
                        .wrapping_add(ahead * TILE_ROWS),
                );
            }
        }
    }

    /// Stored zero points of a weight group of an asymmetric scheme.
    #[inline(always)]
    pub(super) fn stored_zero_points(&self, group: usize) -> &'a [u8; TILE_ROWS] {
        &self.zero_points.as_chunks().0[group]
    }

    /// Scales of a weight group, one per row.
    #[inline(always)]
    pub(super) fn scales(&self, group: usize) -> [f32; TILE_ROWS] {
        let (scales, _) = self.scales[group * 2 * TILE_ROWS..][..2 * TILE_ROWS].as_chunks::<2>();
        let halves: [f16; TILE_ROWS] = std::array::from_fn(|row| f16::from_le_bytes(scales[row]));
        let mut out = [0.0; TILE_ROWS];
        halves.convert_to_f32_slice(&mut out);
        out
    }

    /// Zero points of a weight group, one per row.
    #[inline(always)]
    pub(super) fn zero_points(&self, group: usize) -> [i32; TILE_ROWS] {
        match self
            .zero_points
            .get(group * TILE_ROWS..(group + 1) * TILE_ROWS)
        {
            Some(stored) => std::array::from_fn(|row| i32::from(stored[row])),
            None => [i32::from(self.mid); TILE_ROWS],
        }
    }
}
