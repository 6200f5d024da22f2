//! Sparse encodings: which codes of a dense tile are stored, and where.
//!
//! A weight is zero if its code is its group's zero point. Both encodings store a mask for each quad of a tile (the
//! 64 codes that four columns of 16 rows have, in the order of the dense 8-bit vector) and the codes it names; every other
//! code is a zero point. A bitmask's codes follow one another in the order of its bits; those of two of four have places of
//! their own. `docs/format.md` has the bytes.

use crate::QuantizedView;
use crate::pack::{TILE_COLS, TILE_ROWS, VECTOR, tile_bytes};
use crate::quantized_view::Sparsity;

/// Quads of a tile, each with its own mask.
const QUADS: usize = TILE_COLS / 4;

/// How the codes of a matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Encoding {
    /// Every code, in tiles.
    Dense,
    /// A mask of one bit per code, and the codes that are not zero.
    Bitmask,
    /// A mask of three bits per four columns, and two codes of them; for weights with at most two of four not zero.
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

    /// Bytes of a tile's masks.
    pub(crate) fn mask_bytes(self) -> usize {
        [0, 8 * QUADS, 6 * QUADS][self as usize]
    }
}

/// What decides about a matrix's encoding; of parts of a matrix, their [`Census::add`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Census {
    tiles: usize,
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
        Self {
            tiles: view.cols.div_ceil(TILE_COLS),
            panels: 1,
            survivors: streams[0].max(streams[1]),
            two_of_four,
        }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.tiles += other.tiles;
        self.panels += other.panels;
        self.survivors += other.survivors;
        self.two_of_four &= other.two_of_four;
    }

    /// The smallest encoding, if it saves at least an eighth of the dense codes: a smaller saving would not pay
    /// for expanding them.
    pub(crate) fn smallest(&self, bits: u8) -> Encoding {
        let dense = self.tiles * tile_bytes(bits);
        let masks = |encoding: Encoding| self.tiles * encoding.mask_bytes();
        let bitmask =
            masks(Encoding::Bitmask) + self.survivors + tile_bytes(bits) + 8 * (self.panels + 1);
        let mut best = (dense - dense / 8, Encoding::Dense);
        if bitmask <= best.0 {
            best = (bitmask, Encoding::Bitmask);
        }
        if self.two_of_four && masks(Encoding::TwoOfFour) + dense / 2 <= best.0 {
            best.1 = Encoding::TwoOfFour;
        }
        best.1
    }
}

/// Encodes panels one after another.
#[derive(Debug)]
pub(crate) struct Encoder {
    encoding: Encoding,
    /// Masks of all panels so far.
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

    /// Appends the panel's masks and returns its stored codes; `None` if more than two of four columns are not
    /// zero where the encoding has only two.
    pub(crate) fn panel(&mut self, view: &QuantizedView<'_>, panel: usize) -> Option<Vec<u8>> {
        let codes = match self.encoding {
            Encoding::TwoOfFour => self.two_of_four(view, panel)?,
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

    fn two_of_four(&mut self, view: &QuantizedView<'_>, panel: usize) -> Option<Vec<u8>> {
        let bits = view.scheme.bits;
        let tiles = view.cols.div_ceil(TILE_COLS);
        let start = self.masks.len();
        self.masks
            .resize(start + tiles * self.encoding.mask_bytes(), 0);
        let masks = &mut self.masks[start..];
        let mut codes = vec![0; tiles * tile_bytes(bits) / 2];
        let mut fits = true;
        for_each_quad(view, panel, |quad, mask, quad_codes| {
            let kept = kept_of_four(mask);
            fits &= kept.is_some();
            let Some(kept) = kept else { return };
            for row in 0..TILE_ROWS {
                put_three(masks, quad, row, (kept >> (4 * row) & 7) as u8);
            }
            for (nth, bit) in set_bits(kept).enumerate() {
                let (byte, shift) = place_of_two(bits, quad, nth);
                codes[byte] |= quad_codes[bit] << shift;
            }
        });
        fits.then_some(codes)
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
                Sparsity::TwoOfFour { masks } => {
                    let mask = (0..TILE_ROWS).fold(0, |mask, row| {
                        mask | four_of(three(masks, QUADS * tiles_before + quad, row)) << (4 * row)
                    });
                    for (nth, bit) in set_bits(mask).enumerate() {
                        let (byte, shift) = place_of_two(bits, QUADS * tile + quad, nth);
                        put(bit, start + byte, shift);
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

/// Whether a panel is stored as the encoder would store it: survivors and masks fit, no stored code is a zero that
/// need not be stored, and nothing stands between or behind them.
pub(crate) fn panel_is_exact(view: &QuantizedView<'_>, panel: usize) -> bool {
    let encoding = view.sparsity.encoding();
    let (Sparsity::Bitmask { masks, .. } | Sparsity::TwoOfFour { masks }) = view.sparsity else {
        return true;
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
    let mask_bytes = tiles * encoding.mask_bytes();
    let stored = &view.codes[view.panel_offset(panel)..view.panel_offset(panel + 1)];
    codes.as_deref() == Some(stored) && encoder.masks == masks[panel * mask_bytes..][..mask_bytes]
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

/// Where two of four stores code `nth` of a quad, two for each row: its byte among the panel's and its lowest bit. Two quads share
/// 64 bytes (even quads the low nibbles, odd ones the high nibbles), so that a row's four codes are neighbours.
fn place_of_two(bits: u8, quad: usize, nth: usize) -> (usize, usize) {
    let stream = stream(bits, quad);
    let nth_of_stream = if bits == 8 { quad } else { quad / 2 };
    let in_vector = 4 * (nth / 2) + 2 * (nth_of_stream % 2) + nth % 2;
    (VECTOR * (nth_of_stream / 2) + in_vector, 4 * stream)
}

/// The first of the three bits that two of four stores of a quad's row. Eight quads have 48 bytes, six for two rows.
fn first_of_three(quad: usize, row: usize) -> usize {
    8 * (48 * (quad / 8) + 6 * (row / 2)) + 6 * (quad % 8) + 3 * (row % 2)
}

/// Three bits of the masks of two of four: whether a row's columns 0, 1 and 2 are stored.
fn three(masks: &[u8], quad: usize, row: usize) -> u8 {
    let first = first_of_three(quad, row);
    (0..3).fold(0, |three, i| {
        let bit = first + i;
        three | (masks[bit / 8] >> (bit % 8) & 1) << i
    })
}

/// Sets these three bits, which are 0.
fn put_three(masks: &mut [u8], quad: usize, row: usize, three: u8) {
    let first = first_of_three(quad, row);
    for i in 0..3 {
        let bit = first + i;
        masks[bit / 8] |= (three >> i & 1) << (bit % 8);
    }
}

/// The four bits of which three are stored: as two of them are set, the fourth is the parity of the others. What is no mask (none
/// or all three) counts as columns 0 and 1.
fn four_of(three: u8) -> u64 {
    u64::from(match three.count_ones() {
        1 => three | 8,
        2 => three,
        _ => 3,
    })
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
                    assert!((0..16).all(|row| {
                        let four = kept >> (4 * row) & 15;
                        four_of(four as u8 & 7) == four
                    }));
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
