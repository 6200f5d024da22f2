//! Expansion by `vpexpandb` (AVX-512 VBMI2): a mask and the codes behind each other give a dense vector.

use std::arch::x86_64::*;

use qbin_format::{QuantizedView, TILE_ROWS};

use super::cursor::{Cursor, QUADS, vectors_of};
use super::{STEP, VECTOR, Zeros};
use crate::kernels::isa::Isa;
use crate::kernels::quantized::avx512::Avx512;

/// Proof of AVX-512 F, BW, DQ, VL, VNNI, VBMI and VBMI2, and of `popcnt`.
#[derive(Clone, Copy)]
pub(super) struct Vbmi2(pub(super) Avx512);

impl Vbmi2 {
    /// The proof, where `isa` gives it.
    pub(super) fn of(isa: Isa) -> Option<Self> {
        let there = isa.has_vbmi2() && is_x86_feature_detected!("popcnt");
        Avx512::of(isa).filter(|_| there).map(Self)
    }

    /// Expands one panel of a bitmask into dense tiles.
    pub(super) fn expand(self, w: &QuantizedView, masks: &[u8], panel: usize, tiles: &mut [u8]) {
        // SAFETY: `self` proves the features.
        unsafe {
            match w.scheme.bits {
                8 => expand::<8>(w, masks, panel, tiles),
                _ => expand::<4>(w, masks, panel, tiles),
            }
        }
    }
}

/// Expands all steps of a panel.
#[target_feature(
    enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt"
)]
fn expand<const BITS: u8>(w: &QuantizedView, masks: &[u8], panel: usize, tiles: &mut [u8]) {
    let zeros = Zeros::new(w, panel);
    let (vectors, _) = tiles.as_chunks_mut::<VECTOR>();
    let steps = vectors.chunks_exact_mut(vectors_of(BITS)).enumerate();
    let mut cursor = Cursor::new(w, masks, panel);
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
