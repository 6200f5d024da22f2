//! Expansion by `vpexpandb` (AVX-512 VBMI2): a mask and the codes behind each other give a dense vector.

use std::arch::x86_64::*;

use qbin_format::{QuantizedView, TILE_ROWS};

use super::cursor::{Cursor, PAIR_MASKS, QUADS, VECTOR};
use super::zero_codes;
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

/// Expands all steps of a panel; a step has `VECTORS` dense vectors.
#[target_feature(
    enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt"
)]
fn expand<const VECTORS: usize, const TWO_OF_FOUR: bool>(
    w: &QuantizedView,
    panel: usize,
    mut cursor: Cursor,
    tiles: &mut [u8],
) {
    let (vectors, _) = tiles.as_chunks_mut::<VECTOR>();
    for (at, out) in vectors.chunks_exact_mut(VECTORS).enumerate() {
        let zero = spread(&zero_codes(w, panel, at), VECTORS);
        let codes = step::<VECTORS, TWO_OF_FOUR>(&mut cursor, at, zero);
        for (out, codes) in out.iter_mut().zip(codes) {
            // SAFETY: 64 bytes are written into 64.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), codes) };
        }
    }
}

/// The dense vector of a code for each row: four times, and with 4 bits in both nibbles.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn spread(codes: &[u8; TILE_ROWS], vectors: usize) -> __m512i {
    // SAFETY: 16 bytes are read of 16.
    let codes = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
    let lanes = _mm512_cvtepu8_epi32(codes);
    let fourfold = _mm512_shuffle_epi8(
        lanes,
        _mm512_set4_epi32(0x0c0c_0c0c, 0x0808_0808, 0x0404_0404, 0),
    );
    match vectors {
        8 => fourfold,
        _ => _mm512_or_si512(fourfold, _mm512_slli_epi16::<4>(fourfold)),
    }
}

/// The dense vectors of step `at`: eight of bytes, or four of nibbles. `zero` has the codes of zero, as [`spread`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vbmi2,popcnt")]
pub(super) fn step<const VECTORS: usize, const TWO_OF_FOUR: bool>(
    cursor: &mut Cursor,
    at: usize,
    zero: __m512i,
) -> [__m512i; VECTORS] {
    let mut out = [zero; VECTORS];
    if TWO_OF_FOUR {
        let masks = two_of_four_masks(cursor.two_of_four_masks(at));
        let (codes, _) = cursor.window(0, VECTORS).as_chunks::<{ VECTOR / 2 }>();
        for (v, out) in out.iter_mut().enumerate() {
            // SAFETY: 32 bytes are read of 32.
            let codes = unsafe { _mm256_loadu_si256(codes[v].as_ptr().cast()) };
            let codes = _mm512_zextsi256_si512(codes);
            *out = match VECTORS {
                8 => _mm512_mask_expand_epi8(zero, masks[v], codes),
                _ => nibbles(
                    _mm512_mask_expand_epi8(zero, masks[2 * v], codes),
                    _mm512_mask_expand_epi8(zero, masks[2 * v + 1], codes),
                ),
            };
        }
        cursor.advance(0, VECTOR / 2 * VECTORS);
        return out;
    }
    let (masks, _) = cursor.bitmask(at).as_chunks::<8>();
    let mask = |quad: usize| u64::from_le_bytes(masks[quad]);
    let low = cursor.window(0, VECTORS);
    let (mut low_at, mut high_at) = (0, 0);
    if VECTORS == 8 {
        for (v, out) in out.iter_mut().enumerate() {
            // SAFETY: `low_at` is the number of bits of at most seven masks, and the window has 8 · 64 bytes.
            *out = unsafe { expand_at(zero, mask(v), low, low_at) };
            low_at += mask(v).count_ones() as usize;
        }
    } else {
        let high = cursor.window(1, VECTORS);
        for (v, out) in out.iter_mut().enumerate() {
            // SAFETY: each position is the number of bits of at most three masks, and a window has 4 · 64 bytes.
            *out = unsafe {
                nibbles(
                    expand_at(zero, mask(2 * v), low, low_at),
                    expand_at(zero, mask(2 * v + 1), high, high_at),
                )
            };
            low_at += mask(2 * v).count_ones() as usize;
            high_at += mask(2 * v + 1).count_ones() as usize;
        }
        cursor.advance(1, high_at);
    }
    cursor.advance(0, low_at);
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

/// The 64-bit masks of a step out of its 48-bit ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn two_of_four_masks(stored: &[u8; 6 * QUADS]) -> [u64; QUADS] {
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
    // SAFETY: 48 bytes are read of 48, and 64 of each table.
    unsafe {
        let stored = _mm512_maskz_loadu_epi8(u64::MAX >> 16, stored.as_ptr().cast());
        let quads = _mm512_permutexvar_epi8(_mm512_loadu_si512(SPREAD.as_ptr().cast()), stored);
        let pairs = _mm512_set1_epi64(i64::from_le_bytes(PAIRS));
        let pairs = _mm512_multishift_epi64_epi8(pairs, quads);
        // The two bits above each pair's six do not count in an index.
        let table = _mm512_loadu_si512(PAIR_MASKS.as_ptr().cast());
        let masks = _mm512_permutexvar_epi8(pairs, table);
        let mut out = [0; QUADS];
        _mm512_storeu_si512(out.as_mut_ptr().cast(), masks);
        out
    }
}
