//! Expansion by `vpexpandb` (AVX-512 VBMI2): a mask and the codes behind each other give a dense vector.

use std::arch::x86_64::*;

use qbin_format::{QuantizedView, TILE_ROWS};

use super::cursor::{Cursor, QUADS, VECTOR, vectors_of};
use super::two_of_four::{MASKS, PAIR_MASKS, TwoOfFour};
use super::{STEP, Stored, Zeros};
use crate::kernels::isa::Isa;

/// Proof of AVX-512 F, BW, DQ, VL, VNNI, VBMI and VBMI2, and of `popcnt`.
#[derive(Clone, Copy)]
pub(super) struct Vbmi2(());

impl Vbmi2 {
    /// The proof, where `isa` gives it.
    pub(super) fn of(isa: Isa) -> Option<Self> {
        (isa.has_vbmi2() && is_x86_feature_detected!("popcnt")).then_some(Self(()))
    }

    /// Expands one panel into dense tiles.
    pub(super) fn expand(self, w: &QuantizedView, panel: usize, tiles: &mut [u8]) {
        // SAFETY: `self` proves the features.
        unsafe {
            match w.scheme.bits {
                8 => expand::<8>(w, panel, tiles),
                _ => expand::<4>(w, panel, tiles),
            }
        }
    }
}

/// Expands all steps of a panel.
#[target_feature(
    enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt"
)]
fn expand<const BITS: u8>(w: &QuantizedView, panel: usize, tiles: &mut [u8]) {
    let zeros = Zeros::new(w, panel);
    let (vectors, _) = tiles.as_chunks_mut::<VECTOR>();
    let steps = vectors.chunks_exact_mut(vectors_of(BITS)).enumerate();
    let mut cursor = match Stored::new(w, panel) {
        Stored::Bitmask(cursor) => cursor,
        Stored::TwoOfFour(two) => {
            let mut ahead = MasksAhead::new(&two);
            for (at, out) in steps {
                let zero = spread(zeros.at(at * STEP), BITS);
                store::<BITS>(step_of_two::<BITS>(&two, &mut ahead, at, zero), out);
            }
            return;
        }
    };
    for (at, out) in steps {
        cursor.prefetch(at, BITS, |at| _mm_prefetch::<_MM_HINT_T0>(at.cast()));
        let zero = spread(zeros.at(at * STEP), BITS);
        store::<BITS>(step::<BITS>(&mut cursor, at, zero), out);
    }
}

/// Writes the quads of a step as dense vectors.
#[inline]
#[target_feature(enable = "avx512f")]
fn store<const BITS: u8>(quads: [__m512i; QUADS], out: &mut [[u8; VECTOR]]) {
    for (v, out) in out.iter_mut().enumerate() {
        let codes = match BITS {
            8 => quads[v],
            _ => nibbles(quads[2 * v], quads[2 * v + 1]),
        };
        // SAFETY: 64 bytes are written into 64.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), codes) };
    }
}

/// The dense vector of a code for each row: four times, and with 4 bits in both nibbles.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn spread(codes: &[u8; TILE_ROWS], bits: u8) -> __m512i {
    let lanes = widen(codes);
    let first = _mm512_set4_epi32(0x0c0c_0c0c, 0x0808_0808, 0x0404_0404, 0);
    let fourfold = _mm512_shuffle_epi8(lanes, first);
    match bits {
        8 => fourfold,
        _ => _mm512_or_si512(fourfold, _mm512_slli_epi16::<4>(fourfold)),
    }
}

/// The codes of step `at` of a bitmask, quad by quad: bytes, or the low nibbles of even quads and the high nibbles of odd
/// ones, beside nibbles without meaning. `zero` has the codes of zero, as [`spread`]. Steps come in order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
pub(super) fn step<const BITS: u8>(
    cursor: &mut Cursor,
    at: usize,
    zero: __m512i,
) -> [__m512i; QUADS] {
    let mut out = [zero; QUADS];
    let (masks, _) = cursor.masks(at).as_chunks::<8>();
    let low = cursor.window(0, BITS);
    let windows = match BITS {
        8 => [low, low],
        _ => [low, cursor.window(1, BITS)],
    };
    let mut used = [0, 0];
    for (quad, out) in out.iter_mut().enumerate() {
        let stream = if BITS == 8 { 0 } else { quad % 2 };
        let mask = u64::from_le_bytes(masks[quad]);
        // SAFETY: these are the bits of at most seven masks in a window of 8 · 64 bytes, or of three in one of 4 · 64.
        *out = unsafe { expand_at(zero, mask, windows[stream], used[stream]) };
        used[stream] += mask.count_ones() as usize;
    }
    cursor.advance(0, used[0]);
    cursor.advance(1, used[1]);
    out
}

/// The same of two of four.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2")]
fn step_of_two<const BITS: u8>(
    two: &TwoOfFour,
    ahead: &mut MasksAhead,
    at: usize,
    zero: __m512i,
) -> [__m512i; QUADS] {
    /// The first quad's codes of each row, then the second's.
    const APART: [u16; VECTOR / 2] = {
        let mut at = [0; VECTOR / 2];
        let mut i = 0;
        while i < VECTOR / 2 {
            at[i] = (i % 16 * 2 + i / 16) as u16;
            i += 1;
        }
        at
    };
    let mut out = [zero; QUADS];
    ahead.fill(two, at + 1);
    // Mask registers are best loaded from memory: the compiler would take the vector apart.
    let Masks(masks) = std::hint::black_box(&*ahead).0[at % 2];
    let (codes, _) = two.codes::<BITS>(at).as_chunks::<VECTOR>();
    for (quad, out) in out.iter_mut().enumerate() {
        // Of bytes or of byte pairs of nibbles, two for each vector.
        let nth = if BITS == 8 { quad } else { quad / 2 };
        // SAFETY: 64 bytes are read of each.
        let (codes, apart) = unsafe {
            (
                _mm512_loadu_si512(codes[nth / 2].as_ptr().cast()),
                _mm512_loadu_si512(APART.as_ptr().cast()),
            )
        };
        let both = _mm512_permutexvar_epi16(apart, codes);
        let codes = match nth % 2 {
            0 => both,
            _ => _mm512_zextsi256_si512(_mm512_extracti64x4_epi64::<1>(both)),
        };
        *out = _mm512_mask_expand_epi8(zero, masks[quad], codes);
    }
    out
}

/// # Safety
/// 64 bytes can be read from `at` on.
#[inline]
#[target_feature(enable = "avx512f,avx512vbmi2")]
unsafe fn expand_at(zero: __m512i, mask: u64, codes: &[u8], at: usize) -> __m512i {
    debug_assert!(at + VECTOR <= codes.len(), "{at} of {}", codes.len());
    // SAFETY: the caller's promise.
    let codes = unsafe { _mm512_loadu_si512(codes.as_ptr().add(at).cast()) };
    _mm512_mask_expand_epi8(zero, mask, codes)
}

/// The low nibbles of one vector and the high nibbles of another.
#[inline]
#[target_feature(enable = "avx512f")]
fn nibbles(low: __m512i, high: __m512i) -> __m512i {
    /// Truth table of "where the first is set the second, else the third".
    const SELECT: i32 = 0xca;
    _mm512_ternarylogic_epi32::<SELECT>(_mm512_set1_epi8(0x0f), low, high)
}

/// 64-bit masks of a step, where they can be written at once and read one by one.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Masks([u64; QUADS]);

/// Masks of two of four, made a step before they are used: a mask that is loaded right after the vector it is part of
/// was stored would wait (1.2 instead of 1.0 ns per quad on Zen 4).
struct MasksAhead([Masks; 2]);

impl MasksAhead {
    /// With the masks of the first step.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn new(two: &TwoOfFour) -> Self {
        let mut ahead = Self([Masks([0; QUADS]); 2]);
        ahead.fill(two, 0);
        ahead
    }

    /// Makes the masks of a step; of the last one, if there is no such.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn fill(&mut self, two: &TwoOfFour, step: usize) {
        /// Byte `8i + j` from byte `8j + i`: quads of pairs of rows become pairs of rows of quads.
        const TRANSPOSED: [u8; VECTOR] = {
            let mut at = [0; VECTOR];
            let mut i = 0;
            while i < VECTOR {
                at[i] = (i % 8 * 8 + i / 8) as u8;
                i += 1;
            }
            at
        };
        let Masks(out) = &mut self.0[step % 2];
        let pairs = pairs(two.masks_from(step));
        // SAFETY: 64 bytes are read of each table, and 64 written into 64 that are aligned.
        unsafe {
            let table = _mm512_loadu_si512(PAIR_MASKS.as_ptr().cast());
            let transposed = _mm512_loadu_si512(TRANSPOSED.as_ptr().cast());
            let masks = _mm512_permutexvar_epi8(pairs, table);
            let masks = _mm512_permutexvar_epi8(transposed, masks);
            _mm512_store_si512(out.as_mut_ptr().cast(), masks);
        }
    }
}

/// The six bits that are stored of two rows and a quad, for the step whose masks come first: a byte for each quad, pair of rows by
/// pair; the two bits above them are another's and do not count in an index of 64.
///
/// # Panics
/// If there are no masks of a whole step.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
pub(super) fn pairs(masks: &[u8]) -> __m512i {
    /// Six bytes of each pair of rows into eight.
    const SPREAD: [u8; VECTOR] = {
        let mut at = [0; VECTOR];
        let mut i = 0;
        while i < VECTOR {
            at[i] = (i / 8 * 6 + if i % 8 < 6 { i % 8 } else { 0 }) as u8;
            i += 1;
        }
        at
    };
    /// Where the bits of each quad begin in 48.
    const STARTS: [u8; QUADS] = [0, 6, 12, 18, 24, 30, 36, 42];
    // A masked load takes more time, so that only the last step of a panel has one.
    let stored = match masks.first_chunk::<VECTOR>() {
        // SAFETY: 64 bytes are read of 64.
        Some(masks) => unsafe { _mm512_loadu_si512(masks.as_ptr().cast()) },
        None => {
            let first = &masks[..MASKS];
            // SAFETY: as many bytes are read as there are.
            unsafe { _mm512_maskz_loadu_epi8(!0 >> (VECTOR - MASKS), first.as_ptr().cast()) }
        }
    };
    // SAFETY: 64 bytes are read of the table.
    let spread = unsafe { _mm512_loadu_si512(SPREAD.as_ptr().cast()) };
    let rows = _mm512_permutexvar_epi8(spread, stored);
    _mm512_multishift_epi64_epi8(_mm512_set1_epi64(i64::from_le_bytes(STARTS)), rows)
}

/// A row's byte as 32 bits, row by row.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn widen(bytes: &[u8; TILE_ROWS]) -> __m512i {
    // SAFETY: 16 bytes are read of 16.
    _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

/// The sum of two halves, of which with 4 bits the second counts sixteenfold.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn even_and_odd<const BITS: u8>([even, odd]: [__m512i; 2]) -> __m512i {
    match BITS {
        8 => _mm512_add_epi32(even, odd),
        _ => _mm512_add_epi32(even, _mm512_srai_epi32::<4>(odd)),
    }
}
