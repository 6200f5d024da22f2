//! Two of four: blocks of 128 columns, and their expansion to dense tiles.
//!
//! The expansion is plain integer arithmetic, sixteen rows at a time, that the compiler makes vectors of.

use qbin_format::{QuantizedView, TILE_ROWS};

use super::{STEP, VECTOR, Zeros};
use crate::kernels::isa::{Isa, Vectorized};

/// Columns of a block.
pub(super) const COLS: usize = 128;
/// Bytes of a block that say which columns are stored; its codes follow.
pub(super) const WHICH: usize = 3 * VECTOR;
/// Bytes of a block with 4 bits.
pub(super) const BYTES_4: usize = WHICH + COLS / 2 * TILE_ROWS / 2;
/// Bytes of a block with 8 bits.
pub(super) const BYTES_8: usize = WHICH + COLS / 2 * TILE_ROWS;

/// Pairs of quads of a block: each has twelve bits for two rows, and 64 codes.
const PAIRS: usize = COLS / 8;

/// The blocks of a panel.
pub(super) fn blocks<'a, const BYTES: usize>(
    w: &QuantizedView<'a>,
    panel: usize,
) -> &'a [[u8; BYTES]] {
    let codes = &w.codes[w.panel_offset(panel)..w.panel_offset(panel + 1)];
    codes.as_chunks().0
}

/// Expands one panel into dense tiles. Zero points are the same for all columns of a step.
pub(super) fn expand(isa: Isa, w: &QuantizedView, panel: usize, tiles: &mut [u8]) {
    isa.run(Expansion { w, panel, tiles });
}

struct Expansion<'a, 'w> {
    w: &'a QuantizedView<'w>,
    panel: usize,
    tiles: &'a mut [u8],
}

impl Vectorized for Expansion<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { w, panel, tiles } = self;
        let (vectors, _) = tiles.as_chunks_mut();
        let zeros = Zeros::new(w, panel);
        match w.scheme.bits {
            8 => expand_blocks::<8, BYTES_8>(blocks(w, panel), &zeros, vectors),
            _ => expand_blocks::<4, BYTES_4>(blocks(w, panel), &zeros, vectors),
        }
    }
}

#[inline(always)]
fn expand_blocks<const BITS: u8, const BYTES: usize>(
    blocks: &[[u8; BYTES]],
    zeros: &Zeros,
    vectors: &mut [[u8; VECTOR]],
) {
    // Two quads are two dense vectors, or one of nibbles; of the last block there may be half.
    let each = 2 * usize::from(BITS) / 8;
    for (pair, out) in vectors.chunks_exact_mut(each).enumerate() {
        let (block, step) = (&blocks[pair / PAIRS], pair * 8 / STEP);
        let zeros = zeros.at(step * STEP);
        let pair = pair % PAIRS;
        let (which, codes) = block.split_at(WHICH);
        let which = columns_of(which, pair);
        let codes = codes_of::<BITS>(codes, pair);
        let mut quads = [[0_u32; TILE_ROWS]; 2];
        for row in 0..TILE_ROWS {
            for (half, quad) in quads.iter_mut().enumerate() {
                let bits = which[row] >> (3 * half);
                let codes = codes[row] >> (16 * half);
                quad[row] = four(bits, codes, zeros[row]);
            }
        }
        let [first, second] = &mut quads;
        if BITS == 4 {
            for (low, high) in first.iter_mut().zip(&*second) {
                *low |= high << 4;
            }
        }
        for (quad, out) in [first, second].into_iter().zip(out) {
            for (four, out) in quad.iter().zip(out.as_chunks_mut().0) {
                *out = four.to_le_bytes();
            }
        }
    }
}

/// The six bits of each row that say which columns of two quads are stored, below bits of others.
#[inline(always)]
fn columns_of(which: &[u8], pair: usize) -> [u32; TILE_ROWS] {
    let (words, _) = which.as_chunks::<8>();
    let word = |vector: usize, rows: usize| u64::from_le_bytes(words[8 * vector + rows]);
    let mut six = [0; TILE_ROWS];
    for (rows, six) in six.as_chunks_mut().0.iter_mut().enumerate() {
        let twelve = match pair {
            // What is left of each of the three vectors.
            15 => word(0, rows) >> 60 | word(1, rows) >> 60 << 4 | word(2, rows) >> 60 << 8,
            _ => word(pair / 5, rows) >> (12 * (pair % 5)),
        };
        *six = [twelve as u32, (twelve >> 6) as u32];
    }
    six
}

/// The four codes of each row that two quads store, a byte each.
#[inline(always)]
fn codes_of<const BITS: u8>(codes: &[u8], pair: usize) -> [u32; TILE_ROWS] {
    let (vector, shift) = match BITS {
        8 => (pair, 0),
        _ => (pair / 2, 4 * (pair % 2)),
    };
    let (rows, _) = codes[VECTOR * vector..][..VECTOR].as_chunks();
    let mut four = [0; TILE_ROWS];
    for (four, bytes) in four.iter_mut().zip(rows) {
        *four = u32::from_le_bytes(*bytes) >> shift & (0x0101_0101 * (0xff >> (8 - BITS)));
    }
    four
}

/// A quad's row: the lower two bytes of `codes` in the columns that the lower three bits of `bits` say, the code of zero in
/// the others.
#[inline(always)]
fn four(bits: u32, codes: u32, zero: u8) -> u32 {
    let [a, b, c] = [bits & 1, bits >> 1 & 1, bits >> 2 & 1];
    let first = 8 * (a << b);
    let second = 8 * (2 - b + (c << b));
    let stored = (codes & 0xff) << first | (codes >> 8 & 0xff) << second;
    let zeros = 0x0101_0101 * u32::from(zero);
    stored | zeros & !(0xff << first | 0xff << second)
}
