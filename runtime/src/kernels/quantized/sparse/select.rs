//! Two of four for a few tokens, with AVX-512: the codes stay as they are stored, and the activations that meet them are selected.
//!
//! `vpdpbusd` multiplies 64 codes: the two that are stored of a row in each of two quads, for 16 rows. Two bits say which of its
//! quad's activations a code meets: `vpmultishiftqb` brings them to the code's place, `vpermb` brings the activation, and nothing
//! is multiplied by zero:
//!
//! `Σ (code − zero point) · a = Σ code · a − zero point · Σ a`, over stored codes and selected activations alone.
//!
//! A panel is one stream of bytes, read in the order of the file as the dense kernel does it ([`few`](super::super::few)): software
//! prefetches help only where the products of several tokens hide the next loads.

use std::arch::x86_64::*;
use std::sync::atomic::{Ordering, compiler_fence};

use qbin_format::TILE_ROWS;

use super::avx512::{self, Vbmi2};
use super::two_of_four::{BYTES_4, BYTES_8, COLS, WHICH, blocks};
use super::{STEP, VECTOR, Zeros};
use crate::kernels::activations::Activations;
use crate::kernels::quantized::Product;

/// Most tokens of this kernel: their sums stay in registers.
pub(super) const TOKENS: usize = 6;

/// Products of a vector of the file above which a core sees the next loads too late.
const LATE: usize = 4;
/// How far ahead the file is then fetched, in bytes.
const AHEAD: usize = 2048;

/// Steps of a block.
const STEPS: usize = COLS / STEP;

/// Pairs of quads of a step; each has a vector of codes.
const PAIRS: usize = STEP / 8;

/// Truth table of `(a & b) | c`.
const AND_OR: i32 = 0xea;

/// For every step of a block the activations that two bits choose from: of each quad four for its first code, then four for its
/// second. They are in the order that `docs/format.md` gives these bits.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(crate) struct Choices([[i8; VECTOR]; STEPS]);

/// The product for at most [`TOKENS`] tokens.
pub(super) fn run(_proof: Vbmi2, mut product: Product) {
    // SAFETY: there is proof of the features.
    let choices = product.x.choices(|| unsafe { choices_of(product.x) });
    for panel in product.panels.clone() {
        // SAFETY: as above.
        unsafe {
            match product.w.scheme.bits {
                8 => of_tokens::<8, BYTES_8>(&mut product, choices, panel),
                _ => of_tokens::<4, BYTES_4>(&mut product, choices, panel),
            }
        }
    }
}

/// # Safety
/// The CPU has the features of [`panel`].
unsafe fn of_tokens<const BITS: u8, const BYTES: usize>(
    product: &mut Product,
    choices: &[Choices],
    at: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match product.x.tokens() {
            0 => {}
            1 => panel::<BITS, BYTES, 1>(product, choices, at),
            2 => panel::<BITS, BYTES, 2>(product, choices, at),
            3 => panel::<BITS, BYTES, 3>(product, choices, at),
            4 => panel::<BITS, BYTES, 4>(product, choices, at),
            _ => panel::<BITS, BYTES, TOKENS>(product, choices, at),
        }
    }
}

/// What codes choose from, `[tokens, blocks]`, with 0 right of the last tile.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
fn choices_of(x: &Activations) -> Vec<Choices> {
    /// Where the eight choices of each quad are among a step's activations.
    const FROM: [u8; VECTOR] = {
        let of_quad = [0, 1, 0, 2, 2, 1, 3, 3];
        let mut from = [0; VECTOR];
        let mut i = 0;
        while i < VECTOR {
            from[i] = (i / 8 * 4) as u8 + of_quad[i % 8];
            i += 1;
        }
        from
    };
    let blocks = x.cols().div_ceil(COLS);
    let mut choices = vec![Choices([[0; VECTOR]; STEPS]); x.tokens() * blocks];
    for (token, choices) in choices.chunks_exact_mut(blocks).enumerate() {
        let (steps, _) = x.codes(token).as_chunks::<STEP>();
        for (Choices(choices), steps) in choices.iter_mut().zip(steps.chunks(STEPS)) {
            for (choices, step) in choices.iter_mut().zip(steps) {
                // SAFETY: 64 bytes are read of the table, 32 of a step; 64 are written into 64.
                unsafe {
                    let from = _mm512_loadu_si512(FROM.as_ptr().cast());
                    let step = _mm256_loadu_si256(step.as_ptr().cast());
                    let chosen = _mm512_permutexvar_epi8(from, _mm512_castsi256_si512(step));
                    _mm512_storeu_si512(choices.as_mut_ptr().cast(), chosen);
                }
            }
        }
    }
    choices
}

/// Sums of a group: of products, and of the activations in them. One register for each would wait for itself, so that even and
/// odd pairs of quads have their own; with 4 bits the products of odd ones count sixteenfold.
#[derive(Clone, Copy)]
struct Sums<const T: usize> {
    products: [[__m512i; 2]; T],
    selected: [[__m512i; 2]; T],
}

impl<const T: usize> Sums<T> {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn none() -> Self {
        let none = [[_mm512_setzero_si512(); 2]; T];
        Self {
            products: none,
            selected: none,
        }
    }

    /// `Σ (code − zero point) · a` of each row.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn centred<const BITS: u8>(&self, zero_points: &[u8; TILE_ROWS]) -> [__m512i; T] {
        let z = avx512::widen(zero_points);
        let mut centred = [_mm512_setzero_si512(); T];
        for (t, centred) in centred.iter_mut().enumerate() {
            let [even, odd] = self.selected[t];
            // At most 64 activations: their sum fits the lower half of its 32 bits.
            let zeros = _mm512_madd_epi16(z, _mm512_add_epi32(even, odd));
            let products = avx512::even_and_odd::<BITS>(self.products[t]);
            *centred = _mm512_sub_epi32(products, zeros);
        }
        centred
    }
}

/// One panel for `T` tokens; where there are fewer, the last one is computed again.
#[target_feature(
    enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt"
)]
fn panel<const BITS: u8, const BYTES: usize, const T: usize>(
    product: &mut Product,
    choices: &[Choices],
    panel: usize,
) {
    let Product { w, x, .. } = *product;
    let blocks = blocks::<BYTES>(w, panel);
    let mut choices = [choices; T];
    let mut scales = [x.scales(0); T];
    for t in 0..T {
        let token = t.min(x.tokens() - 1);
        choices[t] = &choices[t][token * blocks.len()..][..blocks.len()];
        scales[t] = x.scales(token);
    }
    let zeros = Zeros::new(w, panel);
    let weight_groups = w.scheme.groups(w.cols);
    let (scales_of_weights, _) = w.scales.as_chunks::<{ 2 * TILE_ROWS }>();
    let scales_of_weights = &scales_of_weights[panel * weight_groups..][..weight_groups];
    let mut y = [_mm512_setzero_ps(); T];
    let mut sums = Sums::none();
    let (steps, per_group) = (w.cols.div_ceil(STEP), x.group() / STEP);
    let (mut group, mut steps_left) = (0, per_group.min(steps));
    'groups: for (at, block) in blocks.iter().enumerate() {
        let mut of_block = [&choices[0][at]; T];
        for t in 1..T {
            of_block[t] = &choices[t][at];
        }
        let which = columns_of::<BITS, T>(block);
        // Constants make a step fast, so that each is code of its own.
        macro_rules! step {
            ($step:literal) => {
                sums = step::<BITS, BYTES, T, $step>(sums, which, block, of_block);
                steps_left -= 1;
                if steps_left == 0 {
                    let weight_group = w.scheme.group_of(group * x.group());
                    let centred = sums.centred::<BITS>(zeros.of_group(weight_group));
                    let s_w = &scales_of_weights[weight_group];
                    // SAFETY: 32 bytes are read of 32.
                    let s_w = _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(s_w.as_ptr().cast()) });
                    for t in 0..T {
                        let scale = _mm512_mul_ps(s_w, _mm512_set1_ps(scales[t][group]));
                        y[t] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(centred[t]), y[t]);
                    }
                    sums = Sums::none();
                    group += 1;
                    steps_left = per_group.min(steps.saturating_sub(group * per_group));
                    if steps_left == 0 {
                        break 'groups;
                    }
                }
            };
        }
        step!(0);
        step!(1);
        step!(2);
        step!(3);
    }
    for (token, y) in y.iter().enumerate().take(x.tokens()) {
        let mut values = [0.0; TILE_ROWS];
        // SAFETY: 16 values are written into 16.
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), *y) };
        product.out.write(token, panel, &values);
    }
}

/// What says which columns of a block are stored, and last the twelve bits of its last quads.
#[inline]
#[target_feature(enable = "avx512f")]
fn columns_of<const BITS: u8, const T: usize>(block: &[u8]) -> [__m512i; 4] {
    let mut which = [_mm512_setzero_si512(); 4];
    for (vector, bytes) in which.iter_mut().zip(block[..WHICH].as_chunks::<VECTOR>().0) {
        prefetch::<BITS, T>(bytes);
        // SAFETY: 64 bytes are read of 64.
        *vector = unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) };
    }
    let [a, b, c, last] = &mut which;
    *last = _mm512_srli_epi64::<60>(*a);
    let (second, third) = (_mm512_set1_epi64(0xf0), _mm512_set1_epi64(0xf00));
    *last = _mm512_ternarylogic_epi64::<AND_OR>(_mm512_srli_epi64::<56>(*b), second, *last);
    *last = _mm512_ternarylogic_epi64::<AND_OR>(_mm512_srli_epi64::<52>(*c), third, *last);
    which
}

/// Adds one of the four steps of a block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512vbmi")]
fn step<const BITS: u8, const BYTES: usize, const T: usize, const STEP_OF_BLOCK: usize>(
    mut sums: Sums<T>,
    which: [__m512i; 4],
    block: &[u8; BYTES],
    choices: [&Choices; T],
) -> Sums<T> {
    /// Where the choices of a row's four codes begin among those of two quads.
    const FIRST: i32 = i32::from_le_bytes([0, 4, 8, 12]);
    let (codes, _) = block[WHICH..].as_chunks::<VECTOR>();
    let low = _mm512_set1_epi8(0x0f);
    let mut chosen = [_mm512_setzero_si512(); T];
    for (chosen, Choices(steps)) in chosen.iter_mut().zip(choices) {
        // SAFETY: 64 bytes are read of 64.
        *chosen = unsafe { _mm512_loadu_si512(steps[STEP_OF_BLOCK].as_ptr().cast()) };
    }
    for pair in 0..PAIRS {
        let pair_of_block = STEP_OF_BLOCK * PAIRS + pair;
        let codes = &codes[pair_of_block * usize::from(BITS) / 8];
        if BITS == 8 || pair % 2 == 0 {
            prefetch::<BITS, T>(codes);
        }
        // SAFETY: 64 bytes are read of 64.
        let codes = unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) };
        let codes = match (BITS, pair % 2) {
            (8, _) => codes,
            (_, 0) => _mm512_and_si512(codes, low),
            // Left where they are, they count sixteenfold.
            (_, _) => _mm512_andnot_si512(low, codes),
        };
        let (which, first_bit) = match pair_of_block {
            15 => (which[3], 0),
            _ => (which[pair_of_block / 5], 12 * (pair_of_block % 5)),
        };
        let bits = _mm512_set1_epi64(bits_of_codes(first_bit as u8));
        let at = _mm512_multishift_epi64_epi8(bits, which);
        let first = _mm512_set1_epi32(FIRST + 0x1010_1010 * pair as i32);
        let at = _mm512_ternarylogic_epi32::<AND_OR>(at, _mm512_set1_epi8(3), first);
        for (t, chosen) in chosen.iter().enumerate() {
            let a = _mm512_permutexvar_epi8(at, *chosen);
            let [products, selected] = [&mut sums.products[t], &mut sums.selected[t]];
            products[pair % 2] = _mm512_dpbusd_epi32(products[pair % 2], codes, a);
            selected[pair % 2] = _mm512_dpbusd_epi32(selected[pair % 2], _mm512_set1_epi8(1), a);
        }
        // The compiler would gather the loads of several vectors.
        compiler_fence(Ordering::SeqCst);
    }
    sums
}

/// Fetches what follows a vector of the file some way ahead, where `T` tokens' products make it late.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch<const BITS: u8, const T: usize>(vector: &[u8; VECTOR]) {
    if 2 * T * 8 / usize::from(BITS) > LATE {
        _mm_prefetch::<_MM_HINT_T0>(vector.as_ptr().wrapping_add(AHEAD).cast());
    }
}

/// Where the two bits of each of eight codes begin, those of two rows and two quads, if theirs begin with `first`: of each three
/// the first two are the first code's, the last two the second's.
const fn bits_of_codes(first: u8) -> i64 {
    let mut bits = [0; 8];
    let mut code = 0;
    while code < 8 {
        bits[code] = first + (code / 2 * 3 + code % 2) as u8;
        code += 1;
    }
    i64::from_le_bytes(bits)
}
