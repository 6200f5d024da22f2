//! Expansion by `vpexpandb` (AVX-512 VBMI2): a mask and the codes behind each other give a dense vector.

use std::arch::x86_64::*;

use qbin_format::{QuantizedView, TILE_ROWS};

use super::cursor::{Cursor, PAIR_MASKS, QUADS, VECTOR, vectors_of};
use super::{STEP, Zeros};
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
        let cursor = Cursor::new(w, panel);
        // SAFETY: `self` proves the features.
        unsafe {
            match (w.scheme.bits, cursor.two_of_four()) {
                (8, false) => expand::<8, false>(w, panel, cursor, tiles),
                (8, true) => expand::<8, true>(w, panel, cursor, tiles),
                (_, false) => expand::<4, false>(w, panel, cursor, tiles),
                (_, true) => expand::<4, true>(w, panel, cursor, tiles),
            }
        }
    }
}

/// Expands all steps of a panel.
#[target_feature(
    enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt"
)]
fn expand<const BITS: u8, const TWO_OF_FOUR: bool>(
    w: &QuantizedView,
    panel: usize,
    mut cursor: Cursor,
    tiles: &mut [u8],
) {
    let zeros = Zeros::new(w, panel);
    let mut ahead = MasksAhead::new(&cursor);
    let (vectors, _) = tiles.as_chunks_mut::<VECTOR>();
    for (at, out) in vectors.chunks_exact_mut(vectors_of(BITS)).enumerate() {
        cursor.prefetch(at, BITS, |at| _mm_prefetch::<_MM_HINT_T0>(at.cast()));
        let zero = spread(zeros.at(at * STEP), BITS);
        let quads = step::<BITS, TWO_OF_FOUR>(&mut cursor, &mut ahead, at, zero);
        for (v, out) in out.iter_mut().enumerate() {
            let codes = match BITS {
                8 => quads[v],
                _ => nibbles(quads[2 * v], quads[2 * v + 1]),
            };
            // SAFETY: 64 bytes are written into 64.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), codes) };
        }
    }
}

/// The dense vector of a code for each row: four times, and with 4 bits in both nibbles.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn spread(codes: &[u8; TILE_ROWS], bits: u8) -> __m512i {
    // SAFETY: 16 bytes are read of 16.
    let codes = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
    let lanes = _mm512_cvtepu8_epi32(codes);
    let first = _mm512_set4_epi32(0x0c0c_0c0c, 0x0808_0808, 0x0404_0404, 0);
    let fourfold = _mm512_shuffle_epi8(lanes, first);
    match bits {
        8 => fourfold,
        _ => _mm512_or_si512(fourfold, _mm512_slli_epi16::<4>(fourfold)),
    }
}

/// The codes of step `at`, quad by quad: bytes, or the low nibbles of even quads and the high nibbles of odd ones,
/// beside nibbles without meaning. `zero` has the codes of zero, as [`spread`]. Steps come in order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2,popcnt")]
pub(super) fn step<const BITS: u8, const TWO_OF_FOUR: bool>(
    cursor: &mut Cursor,
    ahead: &mut MasksAhead,
    at: usize,
    zero: __m512i,
) -> [__m512i; QUADS] {
    let mut out = [zero; QUADS];
    if TWO_OF_FOUR {
        ahead.fill(cursor, at + 1);
        // Mask registers are best loaded from memory: the compiler would take the vector apart.
        let Masks(masks) = std::hint::black_box(&*ahead).0[at % 2];
        let (codes, _) = cursor.window(0, BITS).as_chunks::<{ VECTOR / 2 }>();
        for (quad, out) in out.iter_mut().enumerate() {
            let codes = codes[if BITS == 8 { quad } else { quad / 2 }].as_ptr();
            // SAFETY: 32 bytes are read of 32.
            let codes = unsafe { _mm256_loadu_si256(codes.cast()) };
            *out = _mm512_mask_expand_epi8(zero, masks[quad], _mm512_zextsi256_si512(codes));
        }
        cursor.advance(0, VECTOR / 2 * vectors_of(BITS));
        return out;
    }
    let (masks, _) = cursor.bitmask(at).as_chunks::<8>();
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
pub(super) struct MasksAhead([Masks; 2]);

impl MasksAhead {
    /// With the masks of the first step, if there are any to be made.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    pub(super) fn new(cursor: &Cursor) -> Self {
        let mut ahead = Self([Masks([0; QUADS]); 2]);
        if cursor.two_of_four() {
            ahead.fill(cursor, 0);
        }
        ahead
    }

    /// Makes the masks of a step out of the 48 bits that are stored of each; of the last step, if there is no such.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn fill(&mut self, cursor: &Cursor, step: usize) {
        /// Six bytes of each quad into eight.
        const SPREAD: [u8; VECTOR] = {
            let mut at = [0; VECTOR];
            let mut i = 0;
            while i < VECTOR {
                at[i] = (i / 8 * 6 + if i % 8 < 6 { i % 8 } else { 0 }) as u8;
                i += 1;
            }
            at
        };
        /// Where the bits of two rows begin in a quad's 48.
        const PAIRS: [u8; 8] = [0, 6, 12, 18, 24, 30, 36, 42];
        let stored = cursor.two_of_four_masks(step);
        let Masks(out) = &mut self.0[step % 2];
        // SAFETY: 48 bytes are read of 48, 64 of each table, and 64 written into 64 that are aligned.
        unsafe {
            let stored = _mm512_maskz_loadu_epi8(u64::MAX >> 16, stored.as_ptr().cast());
            let quads = _mm512_permutexvar_epi8(_mm512_loadu_si512(SPREAD.as_ptr().cast()), stored);
            let pairs = _mm512_set1_epi64(i64::from_le_bytes(PAIRS));
            let pairs = _mm512_multishift_epi64_epi8(pairs, quads);
            // The two bits above each pair's six do not count in an index.
            let table = _mm512_loadu_si512(PAIR_MASKS.as_ptr().cast());
            let masks = _mm512_permutexvar_epi8(pairs, table);
            _mm512_store_si512(out.as_mut_ptr().cast(), masks);
        }
    }
}
