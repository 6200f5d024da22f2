//! A bitmask for a few tokens, with AVX-512: its codes are expanded to dense ones in registers, step by step for all tokens.

use std::arch::x86_64::*;
use std::ops::Range;

use qbin_format::TILE_ROWS;

use super::avx512::{self, Vbmi2};
use super::cursor::{Cursor, QUADS};
use super::{STEP, Zeros};
use crate::kernels::isa::Isa;
use crate::kernels::quantized::Product;

/// Most tokens of this kernel: their sums, twice for even and odd quads, stay in registers beside eight quads of codes.
pub(super) const TOKENS: usize = 6;

/// The product for at most [`TOKENS`] tokens, if this level can expand in registers.
pub(super) fn run(isa: Isa, masks: &[u8], product: &mut Product) -> bool {
    if Vbmi2::of(isa).is_none() {
        return false;
    }
    for panel in product.panels.clone() {
        // SAFETY: there is proof of the features.
        unsafe {
            match product.w.scheme.bits {
                8 => of_tokens::<8>(product, masks, panel),
                _ => of_tokens::<4>(product, masks, panel),
            }
        }
    }
    true
}

/// # Safety
/// The CPU has the features of [`panel`].
unsafe fn of_tokens<const BITS: u8>(product: &mut Product, masks: &[u8], at: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match product.x.tokens() {
            0 => {}
            1 => panel::<BITS, 1>(product, masks, at),
            2 => panel::<BITS, 2>(product, masks, at),
            3 => panel::<BITS, 3>(product, masks, at),
            4 => panel::<BITS, 4>(product, masks, at),
            _ => panel::<BITS, TOKENS>(product, masks, at),
        }
    }
}

/// The int8 activations of some tokens, step by step.
type Steps<'a, const T: usize> = [&'a [[i8; STEP]]; T];

/// How far ahead scales are fetched, in weight groups.
const SCALES_AHEAD: usize = 16;

/// One panel for `T` tokens; where there are fewer, the last one is computed again.
#[target_feature(
    enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt"
)]
fn panel<const BITS: u8, const T: usize>(product: &mut Product, masks: &[u8], panel: usize) {
    let Product { w, x, .. } = *product;
    let mut cursor = Cursor::new(w, masks, panel);
    let steps = w.cols.div_ceil(STEP);
    let per_group = x.group() / STEP;
    let mut activations: Steps<T> = [x.codes(0).as_chunks().0; T];
    let zeros = Zeros::new(w, panel);
    let weight_groups = w.scheme.groups(w.cols);
    let (scales_of_weights, _) = w.scales.as_chunks::<{ 2 * TILE_ROWS }>();
    let mut scales = [x.scales(0); T];
    let mut code_sums = [x.sums(0); T];
    for t in 1..T {
        let token = t.min(x.tokens() - 1);
        activations[t] = x.codes(token).as_chunks().0;
        scales[t] = x.scales(token);
        code_sums[t] = x.sums(token);
    }
    let mut y = [_mm512_setzero_ps(); T];
    let per_weight_group = zeros.width.div_ceil(x.group());
    for weight_group in 0..weight_groups {
        let zero_points = zeros.of_group(weight_group);
        let s_w = &scales_of_weights[panel * weight_groups + weight_group];
        _mm_prefetch::<_MM_HINT_T0>(
            s_w.as_ptr()
                .wrapping_add(SCALES_AHEAD * 2 * TILE_ROWS)
                .cast(),
        );
        // SAFETY: 32 bytes are read of 32.
        let s_w = _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(s_w.as_ptr().cast()) });
        let first = weight_group * per_weight_group;
        for group in first..(first + per_weight_group).min(x.groups()) {
            let range = group * per_group..((group + 1) * per_group).min(steps);
            let code_sums = code_sums.map(|sums| sums[group]);
            let centred =
                expanded::<BITS, T>(&mut cursor, range, &activations, zero_points, code_sums);
            for t in 0..T {
                let scale = _mm512_mul_ps(s_w, _mm512_set1_ps(scales[t][group]));
                y[t] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(centred[t]), y[t]);
            }
        }
    }
    for (token, y) in y.iter().enumerate().take(x.tokens()) {
        let mut values = [0.0; TILE_ROWS];
        // SAFETY: 16 values are written into 16.
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), *y) };
        product.out.write(token, panel, &values);
    }
}

/// `Σ (code − zero point) · a` of some steps of a bitmask, row by row; `code_sums` are `Σ a`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi,avx512vbmi2,popcnt")]
fn expanded<const BITS: u8, const T: usize>(
    cursor: &mut Cursor,
    steps: Range<usize>,
    activations: &Steps<T>,
    zero_points: &[u8; TILE_ROWS],
    code_sums: [i32; T],
) -> [__m512i; T] {
    let low = _mm512_set1_epi8(0x0f);
    let zero = avx512::spread(zero_points, BITS);
    let z = avx512::widen(zero_points);
    // Sums of even and of odd quads; one for all would wait for itself.
    let mut sums = [[_mm512_setzero_si512(); 2]; T];
    for t in 0..T {
        sums[t][0] = _mm512_mullo_epi32(z, _mm512_set1_epi32(-code_sums[t]));
    }
    for step in steps {
        cursor.prefetch(step, BITS, |at| _mm_prefetch::<_MM_HINT_T0>(at.cast()));
        let codes = avx512::step::<BITS>(cursor, step, zero);
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
    let mut both = [_mm512_setzero_si512(); T];
    for t in 0..T {
        both[t] = avx512::even_and_odd::<BITS>(sums[t]);
    }
    both
}
