//! Where a panel's masks and codes of two of four are: each step of 32 columns has places of its own.

use qbin_format::{QuantizedView, TILE_COLS, TILE_ROWS};

use super::cursor::{QUADS, VECTOR, vectors_of};

/// Bytes of a step's masks: six for each pair of rows.
pub(super) const MASKS: usize = 6 * QUADS;

/// The mask of two rows out of the six bits that are stored of it: of each row's four bits two are set, and the fourth is
/// the parity of the three that are stored. Damaged bits give some two of four.
pub(super) static PAIR_MASKS: [u8; 64] = {
    let mut table = [0; 64];
    let mut stored = 0;
    while stored < 64 {
        table[stored] = four_bits(stored as u8 & 7) | four_bits(stored as u8 >> 3) << 4;
        stored += 1;
    }
    table
};

const fn four_bits(three: u8) -> u8 {
    match three.count_ones() {
        1 => three | 8,
        2 => three,
        _ => 3,
    }
}

/// A panel's masks and codes.
pub(super) struct TwoOfFour<'a> {
    masks: &'a [[u8; MASKS]],
    codes: &'a [u8],
}

impl<'a> TwoOfFour<'a> {
    /// Those of a panel of a matrix with these masks.
    pub(super) fn new(w: &QuantizedView<'a>, masks: &'a [u8], panel: usize) -> Self {
        let steps = 2 * w.cols.div_ceil(TILE_COLS);
        Self {
            masks: &masks.as_chunks().0[panel * steps..(panel + 1) * steps],
            codes: &w.codes[w.panel_offset(panel)..w.panel_offset(panel + 1)],
        }
    }

    /// Masks of a step, with those of all steps behind it; of the last step, if there is no such.
    #[inline(always)]
    pub(super) fn masks_from(&self, step: usize) -> &'a [u8] {
        self.masks[step.min(self.masks.len() - 1)..].as_flattened()
    }

    /// Codes of a step, of a matrix with so many bits.
    ///
    /// # Panics
    /// If there is no such step.
    #[inline(always)]
    pub(super) fn codes<const BITS: u8>(&self, step: usize) -> &'a [u8] {
        let len = VECTOR / 2 * vectors_of(BITS);
        &self.codes[step * len..][..len]
    }

    /// The masks of a step, quad by quad as those of a bitmask.
    ///
    /// # Panics
    /// If there is no such step.
    pub(super) fn quad_masks(&self, step: usize) -> [u64; QUADS] {
        let mut quads = [[0; 8]; QUADS];
        for (pair, &[a, b, c, d, e, f]) in self.masks[step].as_chunks().0.iter().enumerate() {
            let stored = u64::from_le_bytes([a, b, c, d, e, f, 0, 0]);
            for (quad, mask) in quads.iter_mut().enumerate() {
                mask[pair] = PAIR_MASKS[(stored >> (6 * quad) & 63) as usize];
            }
        }
        quads.map(u64::from_le_bytes)
    }
}

/// The codes of both quads of a vector, each row by row.
#[inline(always)]
pub(super) fn both_quads(codes: &[u8; VECTOR]) -> [[u8; VECTOR / 2]; 2] {
    let mut quads = [[[0; 2]; TILE_ROWS]; 2];
    let (rows, _) = codes.as_chunks::<4>();
    for (row, &[a, b, c, d]) in rows.iter().enumerate() {
        quads[0][row] = [a, b];
        quads[1][row] = [c, d];
    }
    quads.map(|quad| {
        let mut codes = [0; VECTOR / 2];
        codes.copy_from_slice(quad.as_flattened());
        codes
    })
}
