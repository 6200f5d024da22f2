//! Expansion by a table: a byte of a mask gives the shuffle that puts its codes into their places.

use std::arch::x86_64::*;

use qbin_format::{QuantizedView, TILE_ROWS};

use super::cursor::{Cursor, vectors_of};
use super::{STEP, VECTOR, Zeros};
use crate::kernels::isa::{Isa, Level};

/// For each byte of a mask where each of its eight places finds its code, or 0x80 where it keeps its zero.
static SHUFFLES: [[u8; 8]; 256] = {
    let mut table = [[0x80; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut bit, mut code) = (0, 0);
        while bit < 8 {
            if mask >> bit & 1 == 1 {
                table[mask][bit] = code;
                code += 1;
            }
            bit += 1;
        }
        mask += 1;
    }
    table
};

/// Proof of AVX2 and `popcnt`.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    /// The proof, where `isa` gives it.
    pub(super) fn of(isa: Isa) -> Option<Self> {
        let there = isa.level() >= Level::Avx2 && is_x86_feature_detected!("popcnt");
        there.then_some(Self(()))
    }

    /// Expands one panel of a bitmask into dense tiles.
    pub(super) fn expand(self, w: &QuantizedView, masks: &[u8], panel: usize, tiles: &mut [u8]) {
        // SAFETY: `self` proves the features.
        unsafe { expand(w, masks, panel, tiles) }
    }
}

/// The quarters of a dense vector.
type Vector = [__m128i; 4];

#[target_feature(enable = "avx2,popcnt")]
fn expand(w: &QuantizedView, masks: &[u8], panel: usize, tiles: &mut [u8]) {
    let bits = w.scheme.bits;
    let zeros = Zeros::new(w, panel);
    let (vectors, _) = tiles.as_chunks_mut::<VECTOR>();
    let steps = vectors.chunks_exact_mut(vectors_of(bits)).enumerate();
    let mut cursor = Cursor::new(w, masks, panel);
    for (at, out) in steps {
        let zeros = spread(zeros.at(at * STEP), bits);
        let masks = cursor.masks(at).as_chunks().0.iter();
        let mut masks = masks.map(|mask| u64::from_le_bytes(*mask));
        let low = cursor.window(0, bits);
        let high = if bits == 8 {
            low
        } else {
            cursor.window(1, bits)
        };
        let mut used = [0, 0];
        for out in out {
            let mut next = |window, stream: usize| {
                let mask = masks.next().expect("a mask for each quad");
                quad(window, &mut used[stream], mask, &zeros)
            };
            let codes = match bits {
                8 => next(low, 0),
                _ => nibbles(next(low, 0), next(high, 1)),
            };
            store(codes, out);
        }
        cursor.advance(0, used[0]);
        cursor.advance(1, used[1]);
    }
}

/// Each row's code four times, and with 4 bits in both nibbles.
#[inline]
#[target_feature(enable = "avx2")]
fn spread(codes: &[u8; TILE_ROWS], bits: u8) -> Vector {
    let mut zeros = [_mm_setzero_si128(); 4];
    for (zeros, codes) in zeros.iter_mut().zip(codes.as_chunks::<4>().0) {
        let four = _mm_cvtsi32_si128(i32::from_le_bytes(*codes));
        let fourfold = _mm_shuffle_epi8(
            four,
            _mm_set_epi32(0x0303_0303, 0x0202_0202, 0x0101_0101, 0),
        );
        *zeros = match bits {
            8 => fourfold,
            _ => _mm_or_si128(fourfold, _mm_slli_epi16::<4>(fourfold)),
        };
    }
    zeros
}

/// One quad, `used` codes after the window's start.
#[inline]
#[target_feature(enable = "avx2,popcnt")]
fn quad(window: &[u8], used: &mut usize, mask: u64, zeros: &Vector) -> Vector {
    let mut out = *zeros;
    for (out, bytes) in out.iter_mut().zip(mask.to_le_bytes().as_chunks::<2>().0) {
        let counts = bytes.map(|byte| byte.count_ones() as usize);
        let [low, high] = [0, counts[0]].map(|at| window[*used + at..].first_chunk());
        let loaded = low
            .zip(high)
            .map(|(low, high)| _mm_unpacklo_epi64(eight(low), eight(high)));
        let codes = loaded.expect("a window has eight codes for each byte");
        *out = put(codes, *bytes, 8, *out);
        *used += counts[0] + counts[1];
    }
    out
}

/// Codes put into their places among zeros; those of the mask's second byte begin at `behind`.
#[inline]
#[target_feature(enable = "avx2")]
fn put(codes: __m128i, mask: [u8; 2], behind: i8, zeros: __m128i) -> __m128i {
    let [first, second] = mask.map(|byte| eight(&SHUFFLES[usize::from(byte)]));
    let second = _mm_add_epi8(second, _mm_set1_epi8(behind));
    let shuffle = _mm_unpacklo_epi64(first, second);
    _mm_blendv_epi8(_mm_shuffle_epi8(codes, shuffle), zeros, shuffle)
}

/// The low nibbles of one vector and the high nibbles of another.
#[inline]
#[target_feature(enable = "avx2")]
fn nibbles(mut even: Vector, odd: Vector) -> Vector {
    let low = _mm_set1_epi8(0x0f);
    for (even, odd) in even.iter_mut().zip(odd) {
        *even = _mm_or_si128(_mm_and_si128(low, *even), _mm_andnot_si128(low, odd));
    }
    even
}

#[inline]
#[target_feature(enable = "avx2")]
fn eight(bytes: &[u8; 8]) -> __m128i {
    _mm_cvtsi64_si128(i64::from_le_bytes(*bytes))
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(vector: Vector, out: &mut [u8; VECTOR]) {
    for (part, out) in vector.into_iter().zip(out.as_chunks_mut::<16>().0) {
        // SAFETY: 16 bytes are written into 16.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), part) };
    }
}
