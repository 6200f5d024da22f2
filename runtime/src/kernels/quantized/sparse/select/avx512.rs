//! Selecting with AVX-512: `vpmultishiftqb` brings the bits of 64 codes to their places, `vpermb` their activations.

use std::arch::x86_64::*;
use std::sync::atomic::{Ordering, compiler_fence};

use qbin_format::TILE_ROWS;

use super::super::VECTOR;
use super::super::avx512::{self, Vbmi2};
use super::{FIRST, PAIRS, Select, codes_of};
use crate::kernels::isa::Vectorized;
use crate::kernels::quantized::avx512::Avx512;
use crate::kernels::quantized::vectors::Vectors;

/// Truth table of `(a & b) | c`.
const AND_OR: i32 = 0xea;

/// One register for each would wait for itself, so that even and odd pairs of quads have their own; with 4 bits the products of
/// odd ones count sixteenfold.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    products: [__m512i; 2],
    selected: [__m512i; 2],
}

// SAFETY of all blocks: `self` proves the features, and an array reference may be read at its whole length.
impl Select for Vbmi2 {
    type Vectors = Avx512;
    /// The three vectors, and the twelve bits of the last pair of quads.
    type Columns = [__m512i; 4];
    type Sums = Sums;

    fn run<W: Vectorized>(self, work: W) -> W::Output {
        /// # Safety
        /// The CPU has these features.
        #[target_feature(
            enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt"
        )]
        #[inline(never)]
        unsafe fn run<W: Vectorized>(work: W) -> W::Output {
            work.run()
        }
        // SAFETY: as above.
        unsafe { run(work) }
    }

    #[inline(always)]
    fn vectors(self) -> Avx512 {
        self.0
    }

    #[inline(always)]
    fn columns(self, [a, b, c]: [__m512i; 3]) -> [__m512i; 4] {
        // SAFETY: as above.
        unsafe {
            let last = _mm512_srli_epi64::<60>(a);
            let (second, third) = (_mm512_set1_epi64(0xf0), _mm512_set1_epi64(0xf00));
            let last =
                _mm512_ternarylogic_epi64::<AND_OR>(_mm512_srli_epi64::<56>(b), second, last);
            let last = _mm512_ternarylogic_epi64::<AND_OR>(_mm512_srli_epi64::<52>(c), third, last);
            [a, b, c, last]
        }
    }

    #[inline(always)]
    fn none(self) -> Sums {
        let none = [self.vectors().splat(0); 2];
        Sums {
            products: none,
            selected: none,
        }
    }

    #[inline(always)]
    fn step<const BITS: u8, const BYTES: usize, const T: usize, const AT: usize>(
        self,
        mut sums: [Sums; T],
        columns: [__m512i; 4],
        block: &[u8; BYTES],
        choices: [&[i8; VECTOR]; T],
    ) -> [Sums; T] {
        let v = self.vectors();
        // SAFETY: as above.
        unsafe {
            let mut chosen = [_mm512_setzero_si512(); T];
            for (chosen, choices) in chosen.iter_mut().zip(choices) {
                *chosen = _mm512_loadu_si512(choices.as_ptr().cast());
            }
            for pair in 0..PAIRS {
                let pair_of_block = AT * PAIRS + pair;
                let codes = codes_of::<_, BITS, BYTES, T>(v, block, pair_of_block);
                let bits = _mm512_set1_epi64(bits_of_codes(12 * (pair_of_block % 5) as u8));
                let at = _mm512_multishift_epi64_epi8(bits, columns[pair_of_block / 5]);
                let first = _mm512_set1_epi32(FIRST + 0x1010_1010 * pair as i32);
                let at = _mm512_ternarylogic_epi32::<AND_OR>(at, _mm512_set1_epi8(3), first);
                for (sums, chosen) in sums.iter_mut().zip(chosen) {
                    let a = _mm512_permutexvar_epi8(at, chosen);
                    let Sums { products, selected } = sums;
                    products[pair % 2] = v.dot(products[pair % 2], codes, a);
                    selected[pair % 2] = v.dot(selected[pair % 2], _mm512_set1_epi8(1), a);
                }
                // The compiler would gather the loads of several vectors.
                compiler_fence(Ordering::SeqCst);
            }
        }
        sums
    }

    #[inline(always)]
    fn centred<const BITS: u8>(self, sums: Sums, zero_points: &[u8; TILE_ROWS]) -> __m512i {
        let [even, odd] = sums.selected;
        // SAFETY: as above.
        unsafe {
            // At most 64 activations: their sum fits the lower half of its 32 bits.
            let zeros = _mm512_madd_epi16(avx512::widen(zero_points), _mm512_add_epi32(even, odd));
            _mm512_sub_epi32(avx512::even_and_odd::<BITS>(sums.products), zeros)
        }
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
