//! Walking through the masks and stored codes of a panel, 32 columns at a time.

use qbin_format::{QuantizedView, Sparsity, TILE_COLS};

/// Quads of a step.
pub(super) const QUADS: usize = super::STEP / 4;
/// Bytes of a vector of dense codes.
pub(super) const VECTOR: usize = 64;

/// Dense vectors of a step.
pub(super) const fn vectors_of(bits: u8) -> usize {
    QUADS * bits as usize / 8
}

/// How many steps ahead masks and codes are fetched.
const AHEAD: usize = 8;

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

/// A panel's stored codes and masks, and how far they are read.
pub(super) struct Cursor<'a> {
    codes: &'a [u8],
    masks: Masks<'a>,
    /// Where the next codes are: of the low and of the high nibbles, or of the bytes (the first alone).
    at: [usize; 2],
}

/// The masks of each step.
enum Masks<'a> {
    Bitmask(&'a [[u8; 8 * QUADS]]),
    TwoOfFour(&'a [[u8; 6 * QUADS]]),
}

impl<'a> Cursor<'a> {
    /// At the start of a panel.
    ///
    /// # Panics
    /// If the matrix is dense.
    pub(super) fn new(w: &QuantizedView<'a>, panel: usize) -> Self {
        let steps = 2 * w.cols.div_ceil(TILE_COLS);
        let range = panel * steps..(panel + 1) * steps;
        let masks = match w.sparsity {
            Sparsity::Bitmask { masks, .. } => Masks::Bitmask(&masks.as_chunks().0[range]),
            Sparsity::TwoOfFour { masks } => Masks::TwoOfFour(&masks.as_chunks().0[range]),
            Sparsity::Dense => panic!("a dense matrix has no masks"),
        };
        Self {
            codes: w.codes,
            masks,
            at: [w.panel_offset(panel); 2],
        }
    }

    /// Whether exactly two of each four columns are stored.
    #[inline(always)]
    pub(super) fn two_of_four(&self) -> bool {
        matches!(self.masks, Masks::TwoOfFour(_))
    }

    /// The masks of a step of a bitmask.
    ///
    /// # Panics
    /// If it has other masks, or no such step.
    #[inline(always)]
    pub(super) fn bitmask(&self, step: usize) -> &'a [u8; 8 * QUADS] {
        match self.masks {
            Masks::Bitmask(masks) => &masks[step],
            Masks::TwoOfFour(_) => unreachable!("asked after looking"),
        }
    }

    /// The masks of a step of two of four; of the last step, if there is no such.
    ///
    /// # Panics
    /// If it has other masks.
    #[inline(always)]
    pub(super) fn two_of_four_masks(&self, step: usize) -> &'a [u8; 6 * QUADS] {
        match self.masks {
            Masks::TwoOfFour(masks) => &masks[step.min(masks.len() - 1)],
            Masks::Bitmask(_) => unreachable!("asked after looking"),
        }
    }

    /// The masks of a step, of whatever kind.
    ///
    /// # Panics
    /// If there is no such step.
    #[inline(always)]
    pub(super) fn masks(&self, step: usize) -> [u64; QUADS] {
        match self.masks {
            Masks::Bitmask(masks) => {
                let (masks, _) = masks[step].as_chunks();
                std::array::from_fn(|quad| u64::from_le_bytes(masks[quad]))
            }
            Masks::TwoOfFour(masks) => std::array::from_fn(|quad| {
                let mut stored = [0; 8];
                stored[..6].copy_from_slice(&masks[step][6 * quad..][..6]);
                let stored = u64::from_le_bytes(stored);
                let pair = |at: usize| PAIR_MASKS[(stored >> (6 * at) & 63) as usize];
                u64::from_le_bytes(std::array::from_fn(pair))
            }),
        }
    }

    /// Fetches what comes some steps later into the cache.
    #[inline(always)]
    pub(super) fn prefetch(&self, step: usize, bits: u8, prefetch: impl Fn(*const u8)) {
        let (masks, mask_bytes) = match self.masks {
            Masks::Bitmask(masks) => (masks.as_ptr().cast::<u8>(), 8 * QUADS),
            Masks::TwoOfFour(masks) => (masks.as_ptr().cast::<u8>(), 6 * QUADS),
        };
        prefetch(masks.wrapping_add((step + AHEAD) * mask_bytes));
        // Half of the codes are stored, or a little more.
        let codes = self.codes.as_ptr().wrapping_add(self.at[0]);
        let codes = codes.wrapping_add(AHEAD * vectors_of(bits) * VECTOR / 2);
        for line in 0..vectors_of(bits) / 2 + 1 {
            prefetch(codes.wrapping_add(line * VECTOR));
        }
    }

    /// What the next step can take of a stream: 64 bytes for each of its dense vectors, and of two of four half of
    /// that. Opening an artifact checks the offsets but reads no mask, so that masks that name more
    /// codes than there are lead to the end of the codes: wrong numbers, but no read outside.
    #[inline(always)]
    pub(super) fn window(&mut self, stream: usize, bits: u8) -> &'a [u8] {
        let len = match self.masks {
            Masks::Bitmask(_) => VECTOR * vectors_of(bits),
            Masks::TwoOfFour(_) => VECTOR / 2 * vectors_of(bits),
        };
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
