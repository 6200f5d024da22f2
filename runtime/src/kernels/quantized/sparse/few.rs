//! The product for a few tokens, with AVX-512: each step is expanded in registers and used for all tokens.

use std::arch::x86_64::*;

use qbin_format::{QuantizedView, TILE_ROWS};

use super::avx512::{self, MasksAhead, Vbmi2};
use super::cursor::{Cursor, QUADS};
use super::{STEP, Zeros, one_zero_per_step};
use crate::kernels::activations::Activations;
use crate::kernels::quantized::Product;

/// Most tokens of this kernel: their sums, twice for even and odd quads, stay in registers beside eight quads of codes.
const TOKENS: usize = 6;

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
unsafe fn of_tokens<const BITS: u8, const TWO_OF_FOUR: bool>(
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
            1 => panel::<BITS, TWO_OF_FOUR, 1>(w, at, cursor, x, &mut out),
            2 => panel::<BITS, TWO_OF_FOUR, 2>(w, at, cursor, x, &mut out),
            3 => panel::<BITS, TWO_OF_FOUR, 3>(w, at, cursor, x, &mut out),
            4 => panel::<BITS, TWO_OF_FOUR, 4>(w, at, cursor, x, &mut out),
            _ => panel::<BITS, TWO_OF_FOUR, 6>(w, at, cursor, x, &mut out),
        }
    }
    out
}

/// One panel for `T` tokens; where there are fewer, the last one is computed again.
// Loops by index over arrays of registers: closures would be compiled without these features.
#[expect(clippy::needless_range_loop)]
#[target_feature(
    enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt"
)]
fn panel<const BITS: u8, const TWO_OF_FOUR: bool, const T: usize>(
    w: &QuantizedView,
    panel: usize,
    mut cursor: Cursor,
    x: &Activations,
    out: &mut [[f32; TILE_ROWS]; TOKENS],
) {
    let steps = w.cols.div_ceil(STEP);
    let per_group = x.group() / STEP;
    let low = _mm512_set1_epi8(0x0f);
    let mut activations = [x.codes(0).as_chunks::<STEP>().0; T];
    let zeros = Zeros::new(w, panel);
    let mut ahead = MasksAhead::new(&cursor);
    let weight_groups = w.scheme.groups(w.cols);
    let weight_scales = &w.scales.as_chunks::<{ 2 * TILE_ROWS }>().0[panel * weight_groups..];
    let mut scales = [x.scales(0); T];
    let mut code_sums = [x.sums(0); T];
    for t in 1..T {
        let token = t.min(x.tokens() - 1);
        activations[t] = x.codes(token).as_chunks::<STEP>().0;
        scales[t] = x.scales(token);
        code_sums[t] = x.sums(token);
    }
    let mut y = [_mm512_setzero_ps(); T];
    for group in 0..x.groups() {
        let zero_points = zeros.at(group * per_group * STEP);
        let zero = avx512::spread(zero_points, BITS);
        // SAFETY: 16 bytes are read of 16.
        let z = unsafe { _mm_loadu_si128(zero_points.as_ptr().cast()) };
        let z = _mm512_cvtepu8_epi32(z);
        // Sums of even and of odd quads; one for all would wait for itself.
        let mut sums = [[_mm512_setzero_si512(); 2]; T];
        for t in 0..T {
            sums[t][0] = _mm512_mullo_epi32(z, _mm512_set1_epi32(-code_sums[t][group]));
        }
        for step in group * per_group..((group + 1) * per_group).min(steps) {
            cursor.prefetch(step, BITS, |at| _mm_prefetch::<_MM_HINT_T0>(at.cast()));
            let codes = avx512::step::<BITS, TWO_OF_FOUR>(&mut cursor, &mut ahead, step, zero);
            for quad in 0..QUADS {
                let codes = match (BITS, quad % 2) {
                    (8, _) => codes[quad],
                    (_, 0) => _mm512_and_si512(codes[quad], low),
                    // Left where they are, they count sixteenfold.
                    (_, _) => _mm512_andnot_si512(low, codes[quad]),
                };
                for t in 0..T {
                    let a = activations[t][step].as_chunks::<4>().0[quad];
                    let a = _mm512_set1_epi32(i32::from_le_bytes(a.map(i8::cast_unsigned)));
                    sums[t][quad % 2] = _mm512_dpbusd_epi32(sums[t][quad % 2], codes, a);
                }
            }
        }
        let weight_scales = &weight_scales[group * per_group * STEP / zeros.width];
        // SAFETY: 32 bytes are read of 32.
        let s_w = unsafe { _mm256_loadu_si256(weight_scales.as_ptr().cast()) };
        let s_w = _mm512_cvtph_ps(s_w);
        for t in 0..T {
            let [even, odd] = sums[t];
            let odd = match BITS {
                8 => odd,
                _ => _mm512_srai_epi32::<4>(odd),
            };
            let centred = _mm512_cvtepi32_ps(_mm512_add_epi32(even, odd));
            let scale = _mm512_mul_ps(s_w, _mm512_set1_ps(scales[t][group]));
            y[t] = _mm512_fmadd_ps(scale, centred, y[t]);
        }
    }
    for t in 0..T {
        // SAFETY: 16 values are written into 16.
        unsafe { _mm512_storeu_ps(out[t].as_mut_ptr(), y[t]) };
    }
}
