//! Sparse encodings: which codes of a dense tile are stored, and where.
//!
//! A weight is zero if its code is its group's zero point. Both encodings say for each quad (the 64 codes that four columns
//! of 16 rows have, in the order of the dense 8-bit vector) which codes are stored; every other code is a zero point. A
//! bitmask's codes follow one another in the order of its bits; those of two of four have places of their own.
//! `docs/format.md` has the bytes.

use crate::QuantizedView;
use crate::pack::{TILE_COLS, TILE_ROWS, VECTOR, tile_bytes};
use crate::quantized_view::Sparsity;

/// Quads of a tile.
const QUADS: usize = TILE_COLS / 4;

/// Tiles of a block of two of four.
const BLOCK_TILES: usize = 2;
/// Bytes that say which columns a block of two of four stores: three vectors, before its codes.
const PAIR_BYTES: usize = 3 * VECTOR;

/// How the codes of a matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Encoding {
    /// Every code, in tiles.
    Dense,
    /// A mask of one bit per code, and the codes that are not zero.
    Bitmask,
    /// Three bits for each four columns, and two codes of them; for weights with at most two of four not zero.
    TwoOfFour,
}

impl Encoding {
    /// All of them, the plainest first.
    pub const ALL: [Self; 3] = [Self::Dense, Self::Bitmask, Self::TwoOfFour];

    /// Its name in the manifest.
    pub fn name(self, bits: u8) -> String {
        let suffix = ["", ".bitmask", ".2of4"][self as usize];
        format!("int{bits}.t16x64{suffix}")
    }

    /// What an artifact that uses it requires of its reader.
    pub(crate) fn feature(self) -> Option<&'static str> {
        [None, Some("sparse.bitmask"), Some("sparse.2of4")][self as usize]
    }
}

/// Bytes of a bitmask's masks for a tile.
pub(crate) const MASK_BYTES: usize = 8 * QUADS;

/// Blocks of two of four that so many tiles make: the last may have one that is not there, with bytes 0.
pub(crate) fn blocks_of(tiles: usize) -> usize {
    tiles.div_ceil(BLOCK_TILES)
}

/// Bytes of a block of two of four.
pub(crate) fn block_bytes(bits: u8) -> usize {
    PAIR_BYTES + BLOCK_TILES * tile_bytes(bits) / 2
}

/// What decides about a matrix's encoding; of parts of a matrix, their [`Census::add`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Census {
    tiles: usize,
    blocks: usize,
    panels: usize,
    /// Bytes of all panels' survivors.
    survivors: usize,
    two_of_four: bool,
}

impl Census {
    /// Of no panel.
    pub(crate) fn none() -> Self {
        Self {
            tiles: 0,
            blocks: 0,
            panels: 0,
            survivors: 0,
            two_of_four: true,
        }
    }

    /// Of one panel of a dense view.
    pub(crate) fn of_panel(view: &QuantizedView<'_>, panel: usize) -> Self {
        let mut streams = [0; 2];
        let mut two_of_four = true;
        for_each_quad(view, panel, |quad, mask, _| {
            streams[stream(view.scheme.bits, quad)] += mask.count_ones() as usize;
            two_of_four &= kept_of_four(mask).is_some();
        });
        let tiles = view.cols.div_ceil(TILE_COLS);
        Self {
            tiles,
            blocks: blocks_of(tiles),
            panels: 1,
            survivors: streams[0].max(streams[1]),
            two_of_four,
        }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.tiles += other.tiles;
        self.blocks += other.blocks;
        self.panels += other.panels;
        self.survivors += other.survivors;
        self.two_of_four &= other.two_of_four;
    }

    /// The smallest encoding, if it saves at least an eighth of the dense codes: a smaller saving would not pay
    /// for expanding them.
    pub(crate) fn smallest(&self, bits: u8) -> Encoding {
        let dense = self.tiles * tile_bytes(bits);
        let masks_and_offsets = self.tiles * MASK_BYTES + 8 * (self.panels + 1);
        let bitmask = masks_and_offsets + self.survivors + tile_bytes(bits);
        let mut best = (dense - dense / 8, Encoding::Dense);
        if bitmask <= best.0 {
            best = (bitmask, Encoding::Bitmask);
        }
        if self.two_of_four && self.blocks * block_bytes(bits) <= best.0 {
            best.1 = Encoding::TwoOfFour;
        }
        best.1
    }
}

/// Encodes panels one after another.
#[derive(Debug)]
pub(crate) struct Encoder {
    encoding: Encoding,
    /// Masks of all panels so far; only of a bitmask.
    pub(crate) masks: Vec<u8>,
    /// Where each panel's survivors start; only of a bitmask.
    pub(crate) offsets: Vec<u64>,
}

impl Encoder {
    /// # Panics
    /// If the encoding is dense.
    pub(crate) fn new(encoding: Encoding) -> Self {
        assert_ne!(encoding, Encoding::Dense, "nothing to encode");
        let offsets = match encoding {
            Encoding::Bitmask => vec![0],
            _ => Vec::new(),
        };
        Self {
            encoding,
            masks: Vec::new(),
            offsets,
        }
    }

    /// Appends the panel's masks and returns what `codes` has of it; `None` if more than two of four columns are not
    /// zero where the encoding has only two.
    pub(crate) fn panel(&mut self, view: &QuantizedView<'_>, panel: usize) -> Option<Vec<u8>> {
        let codes = match self.encoding {
            Encoding::TwoOfFour => two_of_four(view, panel)?,
            _ => self.bitmask(view, panel),
        };
        if let Some(&end) = self.offsets.last() {
            self.offsets.push(end + codes.len() as u64);
        }
        Some(codes)
    }

    fn bitmask(&mut self, view: &QuantizedView<'_>, panel: usize) -> Vec<u8> {
        let bits = view.scheme.bits;
        let mut streams = [Vec::new(), Vec::new()];
        for_each_quad(view, panel, |quad, mask, quad_codes| {
            self.masks.extend(mask.to_le_bytes());
            streams[stream(bits, quad)].extend(set_bits(mask).map(|bit| quad_codes[bit]));
        });
        let [mut codes, high] = streams;
        codes.resize(codes.len().max(high.len()), 0);
        for (code, high) in codes.iter_mut().zip(high) {
            *code |= high << 4;
        }
        codes
    }

    /// The zeros behind the last panel's codes, over which a kernel may read.
    pub(crate) fn tail(&self, bits: u8) -> usize {
        match self.encoding {
            Encoding::Bitmask => tile_bytes(bits),
            _ => 0,
        }
    }

    pub(crate) fn offset_bytes(&self) -> Vec<u8> {
        let bytes = self.offsets.iter().flat_map(|offset| offset.to_le_bytes());
        bytes.collect()
    }
}

/// The blocks of a panel; `None` if more than two of four columns are not zero.
fn two_of_four(view: &QuantizedView<'_>, panel: usize) -> Option<Vec<u8>> {
    let bits = view.scheme.bits;
    let mut blocks = vec![0; blocks_of(view.cols.div_ceil(TILE_COLS)) * block_bytes(bits)];
    let mut fits = true;
    for_each_quad(view, panel, |quad, mask, quad_codes| {
        let kept = kept_of_four(mask);
        fits &= kept.is_some();
        let Some(kept) = kept else { return };
        for row in 0..TILE_ROWS {
            let pair = pair_of(kept >> (4 * row) & 15);
            for bit in 0..3 {
                let (byte, shift) = place_of_pair(bits, quad, row, bit);
                blocks[byte] |= (pair >> bit & 1) << shift;
            }
        }
        for (nth, bit) in set_bits(kept).enumerate() {
            let (byte, shift) = place_of_two(bits, quad, nth);
            blocks[byte] |= quad_codes[bit] << shift;
        }
    });
    fits.then_some(blocks)
}

/// Calls `each` with the number, the mask of codes that are not zero, and the codes of every quad of a panel of a dense view.
fn for_each_quad(
    view: &QuantizedView<'_>,
    panel: usize,
    mut each: impl FnMut(usize, u64, &[u8; VECTOR]),
) {
    let bits = view.scheme.bits;
    let tiles = view.cols.div_ceil(TILE_COLS);
    let codes = &view.codes[panel * tiles * tile_bytes(bits)..];
    for (at, tile) in codes.chunks_exact(tile_bytes(bits)).take(tiles).enumerate() {
        for quad in 0..QUADS {
            let codes = quad_codes(bits, tile, quad);
            let zeros = zero_codes(view, panel, at * TILE_COLS + 4 * quad);
            let mask = (0..VECTOR).fold(0, |mask, bit| {
                mask | u64::from(codes[bit] != zeros[bit]) << bit
            });
            each(QUADS * at + quad, mask, &codes);
        }
    }
}

/// Expands the masks and codes of one panel into dense tiles, `[tiles, tile bytes]`.
///
/// A damaged matrix gives some codes, whatever its masks say.
pub(crate) fn expand_panel(view: &QuantizedView<'_>, panel: usize, out: &mut [u8]) {
    let bits = view.scheme.bits;
    let start = view.panel_offset(panel);
    // Where the next codes of a bitmask are.
    let mut at = [start; 2];
    for (tile, out) in out.chunks_exact_mut(tile_bytes(bits)).enumerate() {
        let tiles_before = panel * view.cols.div_ceil(TILE_COLS) + tile;
        for quad in 0..QUADS {
            let mut codes = zero_codes(view, panel, tile * TILE_COLS + 4 * quad);
            let mut put = |bit: usize, byte: usize, shift: usize| {
                let byte = view.codes.get(byte).copied().unwrap_or(0);
                codes[bit] = byte >> shift & (0xff >> (8 - bits));
            };
            match view.sparsity {
                Sparsity::Dense => panic!("a dense matrix needs no expansion"),
                Sparsity::Bitmask { masks, .. } => {
                    let stream = stream(bits, quad);
                    for bit in set_bits(le_u64(masks, 8 * (QUADS * tiles_before + quad))) {
                        put(bit, at[stream], 4 * stream);
                        at[stream] += 1;
                    }
                }
                Sparsity::TwoOfFour => {
                    let quad = QUADS * tile + quad;
                    for row in 0..TILE_ROWS {
                        let columns = columns_of(view.codes, start, bits, quad, row);
                        for (nth, column) in columns.into_iter().enumerate() {
                            let (byte, shift) = place_of_two(bits, quad, 2 * row + nth);
                            put(4 * row + column, start + byte, shift);
                        }
                    }
                }
            }
            put_quad(bits, out, quad, &codes);
        }
    }
}

/// An offset that no kernel may use.
#[derive(Debug)]
pub(crate) struct WrongOffset {
    pub(crate) panel: usize,
    pub(crate) expected: String,
    pub(crate) got: u64,
}

/// Checks what kernels rely on: panels lie one behind the other, none longer than its dense tiles, and the zeros
/// follow the last.
pub(crate) fn check_offsets(view: &QuantizedView<'_>) -> Result<(), WrongOffset> {
    let Sparsity::Bitmask { offsets, .. } = view.sparsity else {
        return Ok(());
    };
    let tile = tile_bytes(view.scheme.bits);
    let longest = (view.cols.div_ceil(TILE_COLS) * tile) as u64;
    let end = view.codes.len().checked_sub(tile);
    let (offsets, _) = offsets.as_chunks();
    let last = offsets.len() - 1;
    let mut before = 0u64;
    for (panel, &offset) in offsets.iter().enumerate() {
        let got = u64::from_le_bytes(offset);
        let expected = match panel {
            0 => 0..=0,
            _ => before..=before.saturating_add(longest),
        };
        let ends = panel < last || end.map(|end| end as u64) == Some(got);
        if !expected.contains(&got) || !ends {
            let expected = match panel == last {
                true => format!("{expected:?} and {tile} bytes before the end of the codes"),
                false => format!("{expected:?}"),
            };
            return Err(WrongOffset {
                panel,
                expected,
                got,
            });
        }
        before = got;
    }
    Ok(())
}

/// Whether a panel is stored as the encoder would store it: codes and what says where they belong fit, no stored code is a zero
/// that need not be stored, and nothing stands between or behind them.
pub(crate) fn panel_is_exact(view: &QuantizedView<'_>, panel: usize) -> bool {
    let encoding = view.sparsity.encoding();
    let masks = match view.sparsity {
        Sparsity::Dense => return true,
        Sparsity::Bitmask { masks, .. } => {
            let len = view.cols.div_ceil(TILE_COLS) * MASK_BYTES;
            &masks[panel * len..][..len]
        }
        Sparsity::TwoOfFour => &[],
    };
    let bits = view.scheme.bits;
    let tiles = view.cols.div_ceil(TILE_COLS);
    let mut dense = vec![0; tiles * tile_bytes(bits)];
    expand_panel(view, panel, &mut dense);
    let groups = view.scheme.groups(view.cols) * 16;
    let zero_points = view.zero_points.chunks_exact(groups).nth(panel);
    let dense = QuantizedView {
        rows: 16,
        codes: &dense,
        sparsity: Sparsity::Dense,
        zero_points: zero_points.unwrap_or(&[]),
        ..*view
    };
    let mut encoder = Encoder::new(encoding);
    let codes = encoder.panel(&dense, 0);
    let stored = &view.codes[view.panel_offset(panel)..view.panel_offset(panel + 1)];
    codes.as_deref() == Some(stored) && encoder.masks == masks
}

/// Which nibbles hold a quad: with 4 bits the high ones for the odd quads.
fn stream(bits: u8, quad: usize) -> usize {
    if bits == 8 { 0 } else { quad % 2 }
}

fn quad_codes(bits: u8, tile: &[u8], quad: usize) -> [u8; VECTOR] {
    let vector = quad * usize::from(bits) / 8;
    let vector = &tile[VECTOR * vector..][..VECTOR];
    let mut codes = [0; VECTOR];
    codes.copy_from_slice(vector);
    if bits == 4 {
        codes
            .iter_mut()
            .for_each(|code| *code = *code >> (4 * (quad % 2)) & 15);
    }
    codes
}

/// Puts a quad's codes in its places; even quads before odd ones.
fn put_quad(bits: u8, tile: &mut [u8], quad: usize, codes: &[u8; VECTOR]) {
    let vector = &mut tile[VECTOR * (quad * usize::from(bits) / 8)..][..VECTOR];
    if stream(bits, quad) == 0 {
        vector.copy_from_slice(codes);
    } else {
        vector
            .iter_mut()
            .zip(codes)
            .for_each(|(byte, code)| *byte |= code << 4);
    }
}

/// The codes of zero in four columns from `col` on of a panel's rows; right of the matrix those of its last column.
fn zero_codes(view: &QuantizedView<'_>, panel: usize, col: usize) -> [u8; VECTOR] {
    let mut codes = [view.scheme.mid(); VECTOR];
    if !view.scheme.symmetric {
        for (at, code) in codes.iter_mut().enumerate() {
            let group = view.scheme.group_of((col + at % 4).min(view.cols - 1));
            *code = view.zero_point(16 * panel + at / 4, group);
        }
    }
    codes
}

fn set_bits(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = mask.trailing_zeros() as usize;
        mask &= mask.wrapping_sub(1);
        (bit < 64).then_some(bit)
    })
}

/// Exactly two of each four bits: those that are set, filled up with the lowest others; `None` if more are set.
fn kept_of_four(mask: u64) -> Option<u64> {
    (0..64).step_by(4).try_fold(0, |kept, at| {
        let mut four = mask >> at & 15;
        for bit in [1, 2] {
            if four.count_ones() < 2 {
                four |= bit;
            }
        }
        if four.count_ones() < 2 {
            four |= 4;
        }
        (four.count_ones() == 2).then_some(kept | four << at)
    })
}

/// Where two of four stores code `nth` of a quad, two for each row: its byte among the panel's and its lowest bit. Two neighbouring
/// quads share 64 bytes, so that a row's four codes are neighbours; with 4 bits the next two quads have the high nibbles.
fn place_of_two(bits: u8, quad: usize, nth: usize) -> (usize, usize) {
    let (block, quad) = (quad / (BLOCK_TILES * QUADS), quad % (BLOCK_TILES * QUADS));
    let (vector, shift) = match bits {
        8 => (quad / 2, 0),
        _ => (quad / 4, 4 * (quad / 2 % 2)),
    };
    let in_vector = 4 * (nth / 2) + 2 * (quad % 2) + nth % 2;
    let byte = block * block_bytes(bits) + PAIR_BYTES + VECTOR * vector + in_vector;
    (byte, shift)
}

/// Where one of the three bits stands that say which columns of a quad's row are stored: its byte among the panel's, and which bit
/// of that. A 64-bit number of each of three vectors belongs to two rows, and twelve bits of it to two quads; of the last
/// two quads of a block each vector has four.
fn place_of_pair(bits: u8, quad: usize, row: usize, bit: usize) -> (usize, usize) {
    let (block, quad) = (quad / (BLOCK_TILES * QUADS), quad % (BLOCK_TILES * QUADS));
    let (two_quads, of_twelve) = (quad / 2, 6 * (row % 2) + 3 * (quad % 2) + bit);
    let (vector, at) = match two_quads {
        15 => (of_twelve / 4, 60 + of_twelve % 4),
        _ => (two_quads / 5, 12 * (two_quads % 5) + of_twelve),
    };
    let byte = block * block_bytes(bits) + VECTOR * vector + 8 * (row / 2) + at / 8;
    (byte, at % 8)
}

/// The columns of a quad's row that are stored, the first code's and the second's, in the panel that starts at `start`.
fn columns_of(codes: &[u8], start: usize, bits: u8, quad: usize, row: usize) -> [usize; 2] {
    let [a, b, c] = [0, 1, 2].map(|bit| {
        let (byte, shift) = place_of_pair(bits, quad, row, bit);
        let byte = codes.get(start + byte).copied().unwrap_or(0);
        usize::from(byte >> shift & 1)
    });
    match b {
        0 => [a, 2 + c],
        _ => [2 * a, 1 + 2 * c],
    }
}

/// The three bits for a mask of two columns, as [`columns_of`] reads them; columns 0 and 3 could also be 6, and 3 would be 2 and 1.
fn pair_of(mask: u64) -> u8 {
    match mask {
        0b0101 => 0,
        0b0110 => 1,
        0b0011 => 2,
        0b1001 => 4,
        0b1010 => 5,
        0b1100 => 7,
        _ => unreachable!("two of four columns"),
    }
}

fn le_u64(bytes: &[u8], at: usize) -> u64 {
    let (words, _) = bytes[at..].as_chunks();
    u64::from_le_bytes(words[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_of_four_bits_survive_three() {
        for a in 0..16u64 {
            let mask = a << 60 | a << 20 | 0b0011_0000;
            match kept_of_four(mask) {
                None => assert!(a.count_ones() > 2),
                Some(kept) => {
                    assert_eq!(kept & mask, mask);
                    assert!((0..16).all(|row| (kept >> (4 * row) & 15).count_ones() == 2));
                }
            }
        }
        assert_eq!(kept_of_four(0), Some(0x3333_3333_3333_3333));
    }

    #[test]
    fn bits_come_in_rising_order() {
        assert_eq!(set_bits(0).count(), 0);
        assert!(set_bits(1 << 63 | 1 << 5 | 1).eq([0, 5, 63]));
        assert!(set_bits(u64::MAX).eq(0..64));
    }
}
