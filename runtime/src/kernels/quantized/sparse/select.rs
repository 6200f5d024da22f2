//! Two of four for a few tokens, with AVX-512: the codes stay as they are stored, and the activations that meet them are selected.
//!
//! `vpdpbusd` multiplies 64 codes: the two that are stored of a row in each of two quads, for 16 rows. The mask says which of a
//! quad's four activations they meet, so that `vpshufb` can bring these to the same places, and nothing is multiplied by zero:
//!
//! `Σ (code − zero point) · a = Σ code · a − zero point · Σ a`, over stored codes and selected activations alone.

use std::arch::x86_64::*;
use std::ops::Range;

use qbin_format::TILE_ROWS;

use super::avx512;
use super::cursor::{VECTOR, vectors_of};
use super::few::Steps;
use super::two_of_four::{MASKS, PAIR_MASKS, TwoOfFour};

/// How many steps ahead masks and codes are fetched.
const AHEAD: usize = 12;
/// Vectors of stored codes in a step.
const VECTORS: usize = 4;

/// The quads whose codes a vector has. INT4 has those of even quads in low nibbles and those of odd quads in high ones.
const fn quads_of(bits: u8) -> [[usize; 2]; VECTORS] {
    match bits {
        8 => [[0, 1], [2, 3], [4, 5], [6, 7]],
        _ => [[0, 2], [1, 3], [4, 6], [5, 7]],
    }
}

/// What selects the activations of a vector: for 64 bits of [`indices`], two rows, where the two bits of each of their codes
/// begin; and for each row where its quads' activations begin, among those of four quads.
const fn selection(quads: [usize; 2]) -> (i64, i32) {
    let [a, b] = [8 * quads[0] as u8, 8 * quads[1] as u8];
    let bits = [a, a + 2, b, b + 2, a + 4, a + 6, b + 4, b + 6];
    let [a, b] = [4 * (quads[0] as u8 % 4), 4 * (quads[1] as u8 % 4)];
    (i64::from_le_bytes(bits), i32::from_le_bytes([a, a, b, b]))
}

/// For INT8 and INT4, vector by vector.
const SELECTIONS: [[(i64, i32); VECTORS]; 2] = [selections(8), selections(4)];

const fn selections(bits: u8) -> [(i64, i32); VECTORS] {
    let [a, b, c, d] = quads_of(bits);
    [selection(a), selection(b), selection(c), selection(d)]
}

/// For two rows' masks as stored ([`PAIR_MASKS`]): two bits for each of the four codes, the column it is of.
const PAIR_INDICES: [u8; VECTOR] = {
    let mut table = [0; VECTOR];
    let mut stored = 0;
    while stored < VECTOR {
        let (mut bit, mut code) = (0, 0);
        while bit < 8 {
            if PAIR_MASKS[stored] >> bit & 1 == 1 {
                table[stored] |= (bit % 4) << code;
                code += 2;
            }
            bit += 1;
        }
        stored += 1;
    }
    table
};

/// Where codes are in their quads, for the step whose masks come first: in 64 bits those of two rows, a byte for each quad, as
/// [`PAIR_INDICES`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn indices(masks: &[u8]) -> __m512i {
    // SAFETY: 64 bytes are read of the table.
    let table = unsafe { _mm512_loadu_si512(PAIR_INDICES.as_ptr().cast()) };
    _mm512_permutexvar_epi8(avx512::pairs(masks), table)
}

/// `Σ (code − zero point) · a` of some steps, row by row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
pub(super) fn sums<const BITS: u8, const T: usize>(
    two: &TwoOfFour,
    steps: Range<usize>,
    activations: &Steps<T>,
    zero_points: &[u8; TILE_ROWS],
) -> [__m512i; T] {
    /// Truth table of `(a & b) | c`.
    const AND_OR: i32 = 0xea;
    let two_bits = _mm512_set1_epi8(3);
    let low = _mm512_set1_epi8(0x0f);
    // Sums of even and of odd vectors; one for all would wait for itself.
    let mut sums = [[_mm512_setzero_si512(); 2]; T];
    let mut selected_sums = sums;
    for step in steps {
        let masks = two.masks_from(step);
        let codes = two.codes::<BITS>(step);
        prefetch(masks.as_ptr(), MASKS);
        prefetch(codes.as_ptr(), VECTOR / 2 * vectors_of(BITS));
        let indices = indices(masks);
        let (codes, _) = codes.as_chunks::<VECTOR>();
        for v in 0..VECTORS {
            let codes = &codes[if BITS == 8 { v } else { v / 2 }];
            // SAFETY: 64 bytes are read of 64.
            let codes = unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) };
            let codes = match (BITS, v % 2) {
                (8, _) => codes,
                (_, 0) => _mm512_and_si512(codes, low),
                // Left where they are, they count sixteenfold.
                (_, _) => _mm512_andnot_si512(low, codes),
            };
            let (bits, starts) = SELECTIONS[usize::from(BITS == 4)][v];
            let at = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(bits), indices);
            let at = _mm512_ternarylogic_epi32::<AND_OR>(at, two_bits, _mm512_set1_epi32(starts));
            for t in 0..T {
                let a = activations[t][step].as_chunks::<16>().0[v / 2];
                // SAFETY: 16 bytes are read of 16.
                let a = unsafe { _mm_loadu_si128(a.as_ptr().cast()) };
                let a = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(a), at);
                sums[t][v % 2] = _mm512_dpbusd_epi32(sums[t][v % 2], codes, a);
                selected_sums[t][v % 2] =
                    _mm512_dpbusd_epi32(selected_sums[t][v % 2], _mm512_set1_epi8(1), a);
            }
        }
    }
    // At most 64 activations: their sum fits the lower half of its 32 bits.
    let z = avx512::widen(zero_points);
    let mut centred = [_mm512_setzero_si512(); T];
    for t in 0..T {
        let [even, odd] = selected_sums[t];
        let zeros = _mm512_madd_epi16(z, _mm512_add_epi32(even, odd));
        centred[t] = _mm512_sub_epi32(avx512::even_and_odd::<BITS>(sums[t]), zeros);
    }
    centred
}

/// Fetches what follows bytes of a step some steps later.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(bytes: *const u8, len: usize) {
    let ahead = bytes.wrapping_add(AHEAD * len);
    let mut line = 0;
    while line < len {
        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line).cast());
        line += VECTOR;
    }
}
