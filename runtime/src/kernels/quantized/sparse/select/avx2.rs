//! Selecting with AVX2: a multiplication spreads the six bits of a row's four codes to their bytes, `vpshufb` brings the
//! activations. Two registers hold the 16 rows.

use std::arch::x86_64::*;

use qbin_format::TILE_ROWS;

use super::super::VECTOR;
use super::{FIRST, PAIRS, Select, codes_of};
use crate::kernels::isa::Vectorized;
use crate::kernels::quantized::avx2::{Dot, Halves};
use crate::kernels::quantized::vectors::Vectors;

/// Of six bits `b0 b1 b2 c0 c1 c2` four copies, so that `b0 b1`, `b1 b2`, `c0 c1` and `c1 c2` begin at a byte each. No two
/// copies overlap.
const SPREAD: i32 = 1 | 1 << 7 | 1 << 13 | 1 << 20;

/// Products, and the activations in them, of eight rows each.
#[derive(Clone, Copy)]
pub(super) struct Sums<D: Dot> {
    products: [D::Sum; 2],
    selected: [<D::Ones as Dot>::Sum; 2],
}

// SAFETY of all blocks: the dot product in `self` proves AVX2, and an array reference may be read at its whole length.
impl<D: Dot> Select for Halves<D> {
    type Vectors = Self;
    /// The three vectors, and the twelve bits of the last pair of quads.
    type Columns = [[__m256i; 2]; 4];
    type Sums = Sums<D>;

    fn run<W: Vectorized>(self, work: W) -> W::Output {
        self.0.run(work)
    }

    #[inline(always)]
    fn vectors(self) -> Self {
        self
    }

    #[inline(always)]
    fn columns(self, [a, b, c]: [[__m256i; 2]; 3]) -> [[__m256i; 2]; 4] {
        let mut last = self.splat(0);
        for half in 0..2 {
            // SAFETY: as above.
            last[half] = unsafe {
                let first = _mm256_srli_epi64::<60>(a[half]);
                let second = _mm256_srli_epi64::<56>(b[half]);
                let second = _mm256_and_si256(second, _mm256_set1_epi64x(0xf0));
                let third = _mm256_srli_epi64::<52>(c[half]);
                let third = _mm256_and_si256(third, _mm256_set1_epi64x(0xf00));
                _mm256_or_si256(first, _mm256_or_si256(second, third))
            };
        }
        [a, b, c, last]
    }

    #[inline(always)]
    fn none(self) -> Self::Sums {
        Sums {
            products: self.start(self.splat(0)),
            selected: Halves(self.0.ones()).start(self.splat(0)),
        }
    }

    #[inline(always)]
    fn step<const BITS: u8, const BYTES: usize, const T: usize, const AT: usize>(
        self,
        mut sums: [Self::Sums; T],
        columns: Self::Columns,
        block: &[u8; BYTES],
        choices: [&[i8; VECTOR]; T],
    ) -> [Self::Sums; T] {
        // SAFETY: as above.
        let one = unsafe { _mm256_set1_epi8((D::Ones::CENTRE + 1) as i8) };
        let ones = Halves(self.0.ones());
        for pair in 0..PAIRS {
            let pair_of_block = AT * PAIRS + pair;
            let codes = codes_of::<_, BITS, BYTES, T>(self, block, pair_of_block);
            for half in 0..2 {
                // SAFETY: as above; 16 bytes are read of the 64 choices.
                unsafe {
                    let six = six(columns[pair_of_block / 5][half], pair_of_block % 5);
                    let spread = _mm256_mullo_epi32(six, _mm256_set1_epi32(SPREAD));
                    let at = _mm256_and_si256(spread, _mm256_set1_epi8(3));
                    let at = _mm256_or_si256(at, _mm256_set1_epi32(FIRST));
                    for t in 0..T {
                        let chosen = choices[t][16 * pair..][..16].as_ptr().cast();
                        let chosen = _mm256_broadcastsi128_si256(_mm_loadu_si128(chosen));
                        let a = _mm256_shuffle_epi8(chosen, at);
                        let Sums { products, selected } = &mut sums[t];
                        products[half] = self.0.dot(products[half], codes[half], a);
                        selected[half] = ones.0.dot(selected[half], one, a);
                    }
                }
            }
        }
        for sums in &mut sums {
            sums.products = self.carry(sums.products);
            sums.selected = ones.carry(sums.selected);
        }
        sums
    }

    #[inline(always)]
    fn centred<const BITS: u8>(
        self,
        sums: Self::Sums,
        zero_points: &[u8; TILE_ROWS],
    ) -> [__m256i; 2] {
        let z = self.zero_points(zero_points);
        let mut centred = self.total(sums.products);
        let selected = Halves(self.0.ones()).total(sums.selected);
        for half in 0..2 {
            // SAFETY: as above.
            centred[half] = unsafe {
                _mm256_sub_epi32(centred[half], _mm256_mullo_epi32(z[half], selected[half]))
            };
        }
        centred
    }
}

/// The six bits of each of eight rows, of a pair of quads among the five of a vector.
#[inline]
#[target_feature(enable = "avx2")]
fn six(numbers: __m256i, pair: usize) -> __m256i {
    // Each number twice, for its two rows.
    let (twice, first) = match pair {
        0 | 1 => (_mm256_shuffle_epi32::<0b10_10_00_00>(numbers), 12 * pair),
        // Across the halves of the number.
        2 => {
            let numbers = _mm256_srli_epi64::<24>(numbers);
            (_mm256_shuffle_epi32::<0b10_10_00_00>(numbers), 0)
        }
        _ => (
            _mm256_shuffle_epi32::<0b11_11_01_01>(numbers),
            12 * pair - 32,
        ),
    };
    let first = first as i64;
    let shifts = _mm256_set1_epi64x(first | (first + 6) << 32);
    _mm256_and_si256(_mm256_srlv_epi32(twice, shifts), _mm256_set1_epi32(63))
}
