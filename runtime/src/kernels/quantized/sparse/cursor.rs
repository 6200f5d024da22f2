//! Walking through the bitmask and stored codes of a panel, 32 columns at a time.

use qbin_format::{QuantizedView, TILE_COLS};

use super::VECTOR;

/// Quads of a step.
pub(super) const QUADS: usize = super::STEP / 4;

/// Dense vectors of a step.
pub(super) const fn vectors_of(bits: u8) -> usize {
    QUADS * bits as usize / 8
}

/// How many steps ahead masks and codes are fetched.
const AHEAD: usize = 8;

/// A panel's stored codes and masks, and how far they are read.
pub(super) struct Cursor<'a> {
    codes: &'a [u8],
    /// Of each step.
    masks: &'a [[u8; 8 * QUADS]],
    /// Where the next codes are: of the low and of the high nibbles, or of the bytes (the first alone).
    at: [usize; 2],
}

impl<'a> Cursor<'a> {
    /// At the start of a panel of a matrix with these masks.
    pub(super) fn new(w: &QuantizedView<'a>, masks: &'a [u8], panel: usize) -> Self {
        let steps = 2 * w.cols.div_ceil(TILE_COLS);
        Self {
            codes: w.codes,
            masks: &masks.as_chunks().0[panel * steps..(panel + 1) * steps],
            at: [w.panel_offset(panel); 2],
        }
    }

    /// The masks of a step.
    ///
    /// # Panics
    /// If there is no such step.
    #[inline(always)]
    pub(super) fn masks(&self, step: usize) -> &'a [u8; 8 * QUADS] {
        &self.masks[step]
    }

    /// Fetches what comes some steps later into the cache.
    #[inline(always)]
    pub(super) fn prefetch(&self, step: usize, bits: u8, prefetch: impl Fn(*const u8)) {
        let masks = self.masks.as_ptr().cast::<u8>();
        prefetch(masks.wrapping_add((step + AHEAD) * 8 * QUADS));
        // Half of the codes are stored, or a little more.
        let codes = self.codes.as_ptr().wrapping_add(self.at[0]);
        let codes = codes.wrapping_add(AHEAD * vectors_of(bits) * VECTOR / 2);
        for line in 0..vectors_of(bits) / 2 + 1 {
            prefetch(codes.wrapping_add(line * VECTOR));
        }
    }

    /// What the next step can take of a stream: 64 bytes for each of its dense vectors. Opening an artifact checks the
    /// offsets but reads no mask, so that masks that name more codes than there are lead to the end of the codes: wrong
    /// numbers, but no read outside.
    #[inline(always)]
    pub(super) fn window(&mut self, stream: usize, bits: u8) -> &'a [u8] {
        let len = VECTOR * vectors_of(bits);
        let at = self.at[stream].min(self.codes.len() - len);
        self.at[stream] = at;
        &self.codes[at..][..len]
    }

    /// Goes on by this many codes.
    #[inline(always)]
    pub(super) fn advance(&mut self, stream: usize, codes: usize) {
        self.at[stream] += codes;
    }
}
