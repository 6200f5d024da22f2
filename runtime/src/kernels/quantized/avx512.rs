//! AVX-512 with VNNI: one register holds the 16 rows of a panel.

use std::arch::x86_64::*;

use super::reads::Reads;
use super::vectors::Vectors;
use crate::kernels::isa::{Isa, Level, Vectorized};

/// Proof of AVX-512 F, BW, DQ, VL and VNNI.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

impl Avx512 {
    /// The proof, where `isa` gives it.
    pub(super) fn of(isa: Isa) -> Option<Self> {
        matches!(isa.level(), Level::Avx512 | Level::Amx).then_some(Self(()))
    }
}

// SAFETY of all blocks: `self` proves the features, and an array reference may be read at its whole length.
impl Vectors for Avx512 {
    type Codes = __m512i;
    type Quad = __m512i;
    type Sum = __m512i;
    type Int = __m512i;
    type Float = __m512;

    const CENTRE: i32 = 0;
    /// 24 sums, 4 vectors of codes, one of activations and the nibble mask leave two registers of 32.
    const PANELS: usize = 4;
    const TOKENS: usize = 6;
    const SUMS: usize = Self::PANELS * Self::TOKENS;
    const READS: [Reads; 2] = [Reads::ALONE, Reads::AHEAD];
    const READS_BUSY: usize = 4;

    fn run<W: Vectorized>(self, work: W) -> W::Output {
        /// # Safety
        /// The CPU has these features.
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
        #[inline(never)]
        unsafe fn run<W: Vectorized>(work: W) -> W::Output {
            work.run()
        }
        // SAFETY: as above.
        unsafe { run(work) }
    }

    #[inline(always)]
    fn codes(self, bytes: &[u8; 64]) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn low(self, bytes: &[u8; 64]) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_and_si512(self.codes(bytes), _mm512_set1_epi8(15)) }
    }

    #[inline(always)]
    fn high(self, bytes: &[u8; 64]) -> __m512i {
        // SAFETY: as above.
        unsafe {
            _mm512_and_si512(
                _mm512_srli_epi16(self.codes(bytes), 4),
                _mm512_set1_epi8(15),
            )
        }
    }

    #[inline(always)]
    fn high_in_place(self, bytes: &[u8; 64]) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_andnot_si512(_mm512_set1_epi8(15), self.codes(bytes)) }
    }

    #[inline(always)]
    fn of_high_in_place(self, sums: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_srai_epi32::<4>(sums) }
    }

    #[inline(always)]
    fn quad(self, activations: &[i8; 4]) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_set1_epi32(i32::from_le_bytes(activations.map(i8::cast_unsigned))) }
    }

    #[inline(always)]
    fn start(self, start: __m512i) -> __m512i {
        start
    }

    #[inline(always)]
    fn dot(self, sum: __m512i, codes: __m512i, quad: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_dpbusd_epi32(sum, codes, quad) }
    }

    #[inline(always)]
    fn carry(self, sum: __m512i) -> __m512i {
        sum
    }

    #[inline(always)]
    fn total(self, sum: __m512i) -> __m512i {
        sum
    }

    #[inline(always)]
    fn splat(self, value: i32) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_set1_epi32(value) }
    }

    #[inline(always)]
    fn plus(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    fn times(self, zero_points: __m512i, sum: i32) -> __m512i {
        // A zero point is below 2^15, so the upper half of its lane is 0 and what stands there in `sum` is ignored.
        // SAFETY: as above.
        unsafe { _mm512_madd_epi16(zero_points, _mm512_set1_epi32(sum)) }
    }

    #[inline(always)]
    fn zero_points(self, bytes: &[u8; 16]) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.as_ptr().cast())) }
    }

    #[inline(always)]
    fn scales(self, bytes: &[u8; 32]) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())) }
    }

    #[inline(always)]
    fn zero(self) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    fn add(self, y: __m512, scales: __m512, scale: f32, sums: __m512i) -> __m512 {
        // SAFETY: as above.
        unsafe {
            let scale = _mm512_mul_ps(scales, _mm512_set1_ps(scale));
            _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sums), y)
        }
    }

    #[inline(always)]
    fn values(self, rows: &[f32; 16]) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_loadu_ps(rows.as_ptr()) }
    }

    #[inline(always)]
    fn rows(self, y: __m512) -> [f32; 16] {
        let mut rows = [0.0; 16];
        // SAFETY: as above; 16 values are written into 16.
        unsafe { _mm512_storeu_ps(rows.as_mut_ptr(), y) };
        rows
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: as above; a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }

    #[inline(always)]
    fn prefetch_near(self, address: *const u8) {
        // SAFETY: as above; a prefetch reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
}
