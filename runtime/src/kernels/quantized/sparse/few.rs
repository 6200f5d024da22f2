//! The product for a few tokens, with AVX-512: each step is expanded in registers and used for all tokens.

use std::arch::x86_64::*;

use qbin_format::{QuantizedView, TILE_ROWS};

use super::avx512::{self, Vbmi2};
use super::cursor::Cursor;
use super::{STEP, one_zero_per_step, zero_codes};
use crate::kernels::activations::Activations;
use crate::kernels::quantized::Product;

/// Most tokens of this kernel.
pub(super) const TOKENS: usize = 4;

/// Whether it serves this product: groups of whole steps.
pub(super) fn serves(product: &Product) -> bool {
    let groups = product.x.group().is_multiple_of(STEP) && one_zero_per_step(product.w);
    groups && product.x.tokens() <= TOKENS
}

/// The product for at most [`TOKENS`] tokens.
pub(super) fn run(_proof: Vbmi2, product: Product) {
    let Product {
        w,
        x,
        panels,
        mut out,
    } = product;
    for panel in panels {
        let cursor = Cursor::new(w, panel);
        // SAFETY: there is proof of the features.
        let y = unsafe {
            match (w.scheme.bits, cursor.two_of_four()) {
                (8, false) => of_tokens::<8, false>(w, panel, cursor, x),
                (8, true) => of_tokens::<8, true>(w, panel, cursor, x),
                (_, false) => of_tokens::<4, false>(w, panel, cursor, x),
                (_, true) => of_tokens::<4, true>(w, panel, cursor, x),
            }
        };
        for (token, y) in y.iter().enumerate().take(x.tokens()) {
            out.write(token, panel, y);
        }
    }
}

/// # Safety
/// The CPU has the features of [`panel`].
unsafe fn of_tokens<const VECTORS: usize, const TWO_OF_FOUR: bool>(
    w: &QuantizedView,
    at: usize,
    cursor: Cursor,
    x: &Activations,
) -> [[f32; TILE_ROWS]; TOKENS] {
    let mut out = [[0.0; TILE_ROWS]; TOKENS];
    // SAFETY: the caller's promise.
    unsafe {
        match x.tokens() {
            0 => {}
            1 => panel::<VECTORS, TWO_OF_FOUR, 1>(w, at, cursor, x, &mut out),
            2 => panel::<VECTORS, TWO_OF_FOUR, 2>(w, at, cursor, x, &mut out),
            3 => panel::<VECTORS, TWO_OF_FOUR, 3>(w, at, cursor, x, &mut out),
            _ => panel::<VECTORS, TWO_OF_FOUR, 4>(w, at, cursor, x, &mut out),
        }
    }
    out
}

/// One panel for `T` tokens; a step has `VECTORS` dense vectors.
// Loops by index over arrays of registers: closures would be compiled without these features.
#[expect(clippy::needless_range_loop)]
#[target_feature(
    enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt"
)]
fn panel<const VECTORS: usize, const TWO_OF_FOUR: bool, const T: usize>(
    w: &QuantizedView,
    panel: usize,
    mut cursor: Cursor,
    x: &Activations,
    out: &mut [[f32; TILE_ROWS]; TOKENS],
) {
    let steps = w.cols.div_ceil(STEP);
    let per_group = x.group() / STEP;
    let nibble = _mm512_set1_epi8(0x0f);
    let mut activations = [x.codes(0).as_chunks::<STEP>().0; T];
    for t in 1..T {
        activations[t] = x.codes(t).as_chunks::<STEP>().0;
    }
    let scales = w.scales.as_chunks::<{ 2 * TILE_ROWS }>().0;
    let mut y = [_mm512_setzero_ps(); T];
    for group in 0..x.groups() {
        let weight_group = w.scheme.group_of(group * x.group());
        let zero_points = zero_codes(w, panel, group * per_group);
        let zero = avx512::spread(&zero_points, VECTORS);
        // SAFETY: 16 bytes are read of 16.
        let z = unsafe { _mm_loadu_si128(zero_points.as_ptr().cast()) };
        let z = _mm512_cvtepu8_epi32(z);
        // Two sums for each token, because one would wait for itself.
        let mut sums = [[_mm512_setzero_si512(); 2]; T];
        for t in 0..T {
            sums[t][0] = _mm512_mullo_epi32(z, _mm512_set1_epi32(-x.sums(t)[group]));
        }
        for step in group * per_group..((group + 1) * per_group).min(steps) {
            cursor.prefetch(step, VECTORS, |at| _mm_prefetch::<_MM_HINT_T0>(at.cast()));
            let codes = avx512::step::<VECTORS, TWO_OF_FOUR>(&mut cursor, step, zero);
            for v in 0..VECTORS {
                for t in 0..T {
                    let (quads, _) = activations[t][step].as_chunks::<4>();
                    let quad = |at: usize| {
                        _mm512_set1_epi32(i32::from_le_bytes(quads[at].map(i8::cast_unsigned)))
                    };
                    if VECTORS == 8 {
                        sums[t][v % 2] = _mm512_dpbusd_epi32(sums[t][v % 2], codes[v], quad(v));
                    } else {
                        let low = _mm512_and_si512(codes[v], nibble);
                        let high = _mm512_and_si512(_mm512_srli_epi16::<4>(codes[v]), nibble);
                        sums[t][0] = _mm512_dpbusd_epi32(sums[t][0], low, quad(2 * v));
                        sums[t][1] = _mm512_dpbusd_epi32(sums[t][1], high, quad(2 * v + 1));
                    }
                }
            }
        }
        let at = panel * w.scheme.groups(w.cols) + weight_group;
        // SAFETY: 32 bytes are read of 32.
        let s_w = unsafe { _mm256_loadu_si256(scales[at].as_ptr().cast()) };
        let s_w = _mm512_cvtph_ps(s_w);
        for t in 0..T {
            let centred = _mm512_cvtepi32_ps(_mm512_add_epi32(sums[t][0], sums[t][1]));
            let scale = _mm512_mul_ps(s_w, _mm512_set1_ps(x.scales(t)[group]));
            y[t] = _mm512_fmadd_ps(scale, centred, y[t]);
        }
    }
    for t in 0..T {
        // SAFETY: 16 values are written into 16.
        unsafe { _mm512_storeu_ps(out[t].as_mut_ptr(), y[t]) };
    }
}
