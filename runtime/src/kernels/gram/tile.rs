//! Exact sums of products of codes, thirty-two features by thirty-two.

use crate::kernels::ahead;
#[cfg(target_arch = "x86_64")]
use crate::kernels::isa::Level;
use crate::kernels::isa::{Isa, Vectorized};

/// Features of a panel.
pub(super) const WIDTH: usize = 32;
/// Rows computed at once.
const ROWS: usize = 8;
/// Quads of tokens read again for each part of the rows: 64 KiB of each panel, long enough for the hardware to fetch ahead,
/// which is faster than less that would stay in the first cache.
const DEPTH: usize = 512;

/// One panel's code words of four tokens.
type Words = [u32; WIDTH];
/// The sums of two panels.
pub(super) type Sums = [[i32; WIDTH]; WIDTH];

/// `Σ (left + 128)·right` for all codes of two panels (`[quads][WIDTH]`). Meanwhile `ahead`, a row of a tile each, is
/// fetched, a few rows at a time.
pub(super) fn products(isa: Isa, left: &[u32], right: &[u32], ahead: &[&[f64]], sums: &mut Sums) {
    let ((left, rest), (right, other)) = (left.as_chunks(), right.as_chunks());
    assert!(
        left.len() == right.len() && rest.is_empty() && other.is_empty(),
        "panels of the same tokens"
    );
    *sums = [[0; WIDTH]; WIDTH];
    for (left, right) in left.chunks(DEPTH).zip(right.chunks(DEPTH)) {
        for (part, sums) in sums.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
            for row in ahead.iter().skip(part * ROWS).take(ROWS) {
                ahead::fetch(row);
            }
            match isa.level() {
                // SAFETY: an `Isa` of this level exists only where detection found these features.
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 | Level::Amx => unsafe {
                    x86::avx512(left, right, part * ROWS, sums)
                },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 | Level::AvxVnni => unsafe {
                    x86::avx2(left, right, part * ROWS, sums)
                },
                _ => isa.run(Portable {
                    left,
                    right,
                    first: part * ROWS,
                    sums,
                }),
            }
        }
    }
}

/// The definition.
struct Portable<'a> {
    left: &'a [Words],
    right: &'a [Words],
    /// First of the left features.
    first: usize,
    sums: &'a mut [[i32; WIDTH]; ROWS],
}

impl Vectorized for Portable<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (left, right) in self.left.iter().zip(self.right) {
            let right = right.map(|word| word ^ 0x8080_8080);
            for (sums, word) in self.sums.iter_mut().zip(&left[self.first..]) {
                for byte in [0, 8, 16, 24] {
                    let code = (word >> byte & 0xff) as i32;
                    for (sum, other) in sums.iter_mut().zip(right) {
                        *sum += code * i32::from((other >> byte) as i8);
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{ROWS, WIDTH, Words};

    /// # Safety
    /// The CPU has AVX-512F and VNNI.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) unsafe fn avx512(
        left: &[Words],
        right: &[Words],
        first: usize,
        out: &mut [[i32; WIDTH]; ROWS],
    ) {
        let signed = _mm512_set1_epi8(-128);
        // SAFETY: sixteen and again sixteen of a row's thirty-two sums.
        let mut sums = out.each_ref().map(|row| unsafe {
            [
                _mm512_loadu_si512(row.as_ptr().cast()),
                _mm512_loadu_si512(row.as_ptr().add(16).cast()),
            ]
        });
        for (left, right) in left.iter().zip(right) {
            // SAFETY: sixteen and again sixteen of thirty-two words.
            let right = unsafe {
                [
                    _mm512_loadu_si512(right.as_ptr().cast()),
                    _mm512_loadu_si512(right.as_ptr().add(16).cast()),
                ]
            }
            .map(|words| _mm512_xor_si512(words, signed));
            for (sums, &word) in sums.iter_mut().zip(&left[first..first + ROWS]) {
                let word = _mm512_set1_epi32(word as i32);
                sums[0] = _mm512_dpbusd_epi32(sums[0], word, right[0]);
                sums[1] = _mm512_dpbusd_epi32(sums[1], word, right[1]);
            }
        }
        for (row, sums) in out.iter_mut().zip(sums) {
            // SAFETY: as for the loads.
            unsafe {
                _mm512_storeu_si512(row.as_mut_ptr().cast(), sums[0]);
                _mm512_storeu_si512(row.as_mut_ptr().add(16).cast(), sums[1]);
            }
        }
    }

    /// Codes widened to 16 bits, since `vpmaddubsw` would saturate. Two rows by sixteen columns at a time.
    ///
    /// # Safety
    /// The CPU has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn avx2(
        left: &[Words],
        right: &[Words],
        first: usize,
        out: &mut [[i32; WIDTH]; ROWS],
    ) {
        let offset = _mm256_set1_epi16(128);
        for (pair, out) in out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let first = first + 2 * pair;
            for start in (0..WIDTH).step_by(16) {
                // Each sum of four tokens as two halves side by side.
                let mut sums = [[_mm256_setzero_si256(); 4]; 2];
                for (left, right) in left.iter().zip(right) {
                    let words = [left[first], left[first + 1]]
                        .map(|word| _mm256_cvtepu8_epi16(_mm_set1_epi32(word as i32)));
                    for part in 0..4 {
                        let at = start + 4 * part;
                        // SAFETY: four of thirty-two words, `at` being at most 28.
                        let codes = unsafe { _mm_loadu_si128(right.as_ptr().add(at).cast()) };
                        let codes = _mm256_sub_epi16(_mm256_cvtepu8_epi16(codes), offset);
                        for (sums, word) in sums.iter_mut().zip(words) {
                            sums[part] =
                                _mm256_add_epi32(sums[part], _mm256_madd_epi16(word, codes));
                        }
                    }
                }
                for (row, sums) in out.iter_mut().zip(sums) {
                    for (row, sums) in row[start..].as_chunks_mut::<4>().0.iter_mut().zip(sums) {
                        // SAFETY: eight halves, of 32 bytes like the register.
                        let halves: [i32; 8] = unsafe { std::mem::transmute(sums) };
                        for (sum, half) in row.iter_mut().zip(halves.as_chunks::<2>().0) {
                            *sum += half[0] + half[1];
                        }
                    }
                }
            }
        }
    }
}
