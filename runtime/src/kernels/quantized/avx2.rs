//! AVX2, with and without the 256-bit byte dot product of AVX-VNNI: two registers hold the 16 rows of a panel.

use std::arch::asm;
use std::arch::x86_64::*;

use super::reads::Reads;
use super::vectors::Vectors;
use crate::kernels::isa::{Isa, Level, Vectorized};

/// [`Vectors`] of two halves, 8 rows each, that differ in their dot product.
#[derive(Clone, Copy)]
pub(super) struct Halves<D>(pub(super) D);

/// A dot product of 8 rows. A value of an implementation proves the features of [`Dot::run`], among them AVX2, FMA and
/// F16C.
pub(super) trait Dot: Copy {
    type Sum: Copy;
    /// What adds activations with the fewest instructions, as products with codes of 1.
    type Ones: Dot;
    const CENTRE: i32;
    const TOKENS: usize;
    const SUMS: usize;
    fn run<W: Vectorized>(self, work: W) -> W::Output;
    fn start(self, start: __m256i) -> Self::Sum;
    fn dot(self, sum: Self::Sum, codes: __m256i, quad: __m256i) -> Self::Sum;
    fn carry(self, sum: Self::Sum) -> Self::Sum;
    fn total(self, sum: Self::Sum) -> __m256i;
    fn ones(self) -> Self::Ones;
    /// [`Vectors::in_turn`].
    #[inline(always)]
    fn in_turn(self, sum: Self::Sum) -> Self::Sum {
        sum
    }
    /// [`Vectors::anew`].
    #[inline(always)]
    fn anew(self, bytes: &[u8; 64]) -> &[u8; 64] {
        bytes
    }
}

/// # Safety
/// The CPU has these features.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<W: Vectorized>(work: W) -> W::Output {
    work.run()
}

/// # Safety
/// The CPU has these features.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
unsafe fn run_avx_vnni<W: Vectorized>(work: W) -> W::Output {
    work.run()
}

/// Codes of 4 bits: `vpmaddubsw` gives at most 2·15·127 in magnitude, so that eight fit an i16.
#[derive(Clone, Copy)]
pub(super) struct Nibbles(());

impl Halves<Nibbles> {
    /// The proof, where `isa` gives it.
    pub(super) fn of(isa: Isa) -> Option<Self> {
        (isa.level() >= Level::Avx2).then_some(Self(Nibbles(())))
    }
}

/// A value of which the compiler knows nothing.
#[inline]
#[target_feature(enable = "avx2")]
fn opaque(mut value: __m256i) -> __m256i {
    // SAFETY: no instruction.
    unsafe {
        asm!("/* {0} */", inout(ymm_reg) value, options(pure, nomem, nostack, preserves_flags));
    }
    value
}

/// Sums of the last columns in i16, and those before in i32.
#[derive(Clone, Copy)]
pub(super) struct NibbleSum {
    last: __m256i,
    before: __m256i,
}

impl Dot for Nibbles {
    type Sum = NibbleSum;
    type Ones = Self;
    const CENTRE: i32 = 0;
    /// 12 sums in i16, 2 vectors of codes, one of activations and one of products; sums in i32 are in memory meanwhile.
    const TOKENS: usize = 6;
    const SUMS: usize = 3;

    fn run<W: Vectorized>(self, work: W) -> W::Output {
        // SAFETY: `self` proves the features.
        unsafe { run_avx2(work) }
    }

    #[inline(always)]
    fn start(self, before: __m256i) -> NibbleSum {
        // SAFETY: `self` proves AVX2.
        let last = unsafe { _mm256_setzero_si256() };
        NibbleSum { last, before }
    }

    #[inline(always)]
    fn dot(self, sum: NibbleSum, codes: __m256i, quad: __m256i) -> NibbleSum {
        // SAFETY: `self` proves AVX2.
        let last = unsafe { _mm256_add_epi16(sum.last, _mm256_maddubs_epi16(codes, quad)) };
        NibbleSum { last, ..sum }
    }

    #[inline(always)]
    fn carry(self, sum: NibbleSum) -> NibbleSum {
        // SAFETY: `self` proves AVX2.
        self.start(unsafe {
            _mm256_add_epi32(
                sum.before,
                _mm256_madd_epi16(sum.last, _mm256_set1_epi16(1)),
            )
        })
    }

    #[inline(always)]
    fn total(self, sum: NibbleSum) -> __m256i {
        sum.before
    }

    #[inline(always)]
    fn ones(self) -> Self {
        self
    }

    #[inline(always)]
    fn in_turn(self, sum: NibbleSum) -> NibbleSum {
        // SAFETY: `self` proves AVX2.
        let last = unsafe { opaque(sum.last) };
        NibbleSum { last, ..sum }
    }

    #[inline(always)]
    fn anew(self, bytes: &[u8; 64]) -> &[u8; 64] {
        let mut at: *const [u8; 64] = bytes;
        // SAFETY: no instruction; the pointer stays what it was.
        unsafe {
            asm!("/* {0} */", inout(reg) at, options(pure, readonly, nostack, preserves_flags));
            &*at
        }
    }
}

/// Codes of 8 bits, centred: `vpmaddubsw` of magnitude and signed activation gives at most 2·128·127, which fits i16,
/// where codes as they are would saturate.
#[derive(Clone, Copy)]
pub(super) struct Bytes(());

impl Halves<Bytes> {
    /// The proof, where `isa` gives it.
    pub(super) fn of(isa: Isa) -> Option<Self> {
        (isa.level() >= Level::Avx2).then_some(Self(Bytes(())))
    }
}

impl Dot for Bytes {
    type Sum = __m256i;
    type Ones = Nibbles;
    const CENTRE: i32 = 128;
    const TOKENS: usize = 3;
    const SUMS: usize = 3;

    fn run<W: Vectorized>(self, work: W) -> W::Output {
        // SAFETY: `self` proves the features.
        unsafe { run_avx2(work) }
    }

    #[inline(always)]
    fn start(self, start: __m256i) -> __m256i {
        start
    }

    #[inline(always)]
    fn dot(self, sum: __m256i, codes: __m256i, quad: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX2.
        unsafe {
            let centred = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
            let pairs =
                _mm256_maddubs_epi16(_mm256_abs_epi8(centred), _mm256_sign_epi8(quad, centred));
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    fn carry(self, sum: __m256i) -> __m256i {
        sum
    }

    #[inline(always)]
    fn total(self, sum: __m256i) -> __m256i {
        sum
    }

    #[inline(always)]
    fn ones(self) -> Nibbles {
        Nibbles(())
    }
}

/// Codes of either width, by `vpdpbusd` of AVX-VNNI.
#[derive(Clone, Copy)]
pub(super) struct Vnni(());

impl Halves<Vnni> {
    /// The proof, where `isa` gives it.
    pub(super) fn of(isa: Isa) -> Option<Self> {
        (isa.level() == Level::AvxVnni).then_some(Self(Vnni(())))
    }
}

impl Dot for Vnni {
    type Sum = __m256i;
    type Ones = Self;
    const CENTRE: i32 = 0;
    /// 10 sums, 2 vectors of codes, one of activations and the nibble mask, of 16 registers.
    const TOKENS: usize = 5;
    const SUMS: usize = 5;

    fn run<W: Vectorized>(self, work: W) -> W::Output {
        // SAFETY: `self` proves the features.
        unsafe { run_avx_vnni(work) }
    }

    #[inline(always)]
    fn start(self, start: __m256i) -> __m256i {
        start
    }

    #[inline(always)]
    fn dot(self, sum: __m256i, codes: __m256i, quad: __m256i) -> __m256i {
        // SAFETY: `self` proves AVX-VNNI.
        unsafe { _mm256_dpbusd_avx_epi32(sum, codes, quad) }
    }

    #[inline(always)]
    fn carry(self, sum: __m256i) -> __m256i {
        sum
    }

    #[inline(always)]
    fn total(self, sum: __m256i) -> __m256i {
        sum
    }

    #[inline(always)]
    fn ones(self) -> Self {
        self
    }
}

// SAFETY of all blocks: the dot product in `self` proves the features, and an array reference may be read at its whole
// length.
impl<D: Dot> Vectors for Halves<D> {
    type Codes = [__m256i; 2];
    type Quad = __m256i;
    type Sum = [D::Sum; 2];
    type Int = [__m256i; 2];
    type Float = [__m256; 2];

    const CENTRE: i32 = D::CENTRE;
    const PANELS: usize = 1;
    const TOKENS: usize = D::TOKENS;
    const SUMS: usize = D::SUMS;
    const READS: [Reads; 2] = [Reads::SIDE_BY_SIDE, Reads::AHEAD];
    const READS_BUSY: usize = 2;

    fn run<W: Vectorized>(self, work: W) -> W::Output {
        self.0.run(work)
    }

    #[inline(always)]
    fn codes(self, bytes: &[u8; 64]) -> [__m256i; 2] {
        let at = bytes.as_ptr().cast::<__m256i>();
        // SAFETY: as above.
        unsafe { [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))] }
    }

    #[inline(always)]
    fn low(self, bytes: &[u8; 64]) -> [__m256i; 2] {
        let [a, b] = self.codes(bytes);
        // SAFETY: as above.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            [_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)]
        }
    }

    #[inline(always)]
    fn high(self, bytes: &[u8; 64]) -> [__m256i; 2] {
        let [a, b] = self.codes(bytes);
        // SAFETY: as above.
        unsafe {
            let mask = _mm256_set1_epi8(15);
            [
                _mm256_and_si256(_mm256_srli_epi16(a, 4), mask),
                _mm256_and_si256(_mm256_srli_epi16(b, 4), mask),
            ]
        }
    }

    #[inline(always)]
    fn quad(self, activations: &[i8; 4]) -> __m256i {
        // SAFETY: as above.
        unsafe { _mm256_set1_epi32(i32::from_le_bytes(activations.map(i8::cast_unsigned))) }
    }

    #[inline(always)]
    fn start(self, start: [__m256i; 2]) -> [D::Sum; 2] {
        [self.0.start(start[0]), self.0.start(start[1])]
    }

    #[inline(always)]
    fn dot(self, sum: [D::Sum; 2], codes: [__m256i; 2], quad: __m256i) -> [D::Sum; 2] {
        [
            self.0.dot(sum[0], codes[0], quad),
            self.0.dot(sum[1], codes[1], quad),
        ]
    }

    #[inline(always)]
    fn carry(self, sum: [D::Sum; 2]) -> [D::Sum; 2] {
        [self.0.carry(sum[0]), self.0.carry(sum[1])]
    }

    #[inline(always)]
    fn total(self, sum: [D::Sum; 2]) -> [__m256i; 2] {
        [self.0.total(sum[0]), self.0.total(sum[1])]
    }

    #[inline(always)]
    fn in_turn(self, sum: [D::Sum; 2]) -> [D::Sum; 2] {
        [self.0.in_turn(sum[0]), self.0.in_turn(sum[1])]
    }

    #[inline(always)]
    fn anew(self, bytes: &[u8; 64]) -> &[u8; 64] {
        self.0.anew(bytes)
    }

    #[inline(always)]
    fn splat(self, value: i32) -> [__m256i; 2] {
        // SAFETY: as above.
        [unsafe { _mm256_set1_epi32(value) }; 2]
    }

    #[inline(always)]
    fn plus(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: as above.
        unsafe { [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])] }
    }

    #[inline(always)]
    fn times(self, zero_points: [__m256i; 2], sum: i32) -> [__m256i; 2] {
        // SAFETY: as above.
        unsafe {
            let sum = _mm256_set1_epi32(sum);
            [
                _mm256_mullo_epi32(zero_points[0], sum),
                _mm256_mullo_epi32(zero_points[1], sum),
            ]
        }
    }

    #[inline(always)]
    fn zero_points(self, bytes: &[u8; 16]) -> [__m256i; 2] {
        // SAFETY: as above.
        unsafe {
            let bytes = _mm_loadu_si128(bytes.as_ptr().cast());
            let centre = _mm256_set1_epi32(D::CENTRE);
            let low = _mm256_cvtepu8_epi32(bytes);
            let high = _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes));
            [
                _mm256_sub_epi32(low, centre),
                _mm256_sub_epi32(high, centre),
            ]
        }
    }

    #[inline(always)]
    fn scales(self, bytes: &[u8; 32]) -> [__m256; 2] {
        let at = bytes.as_ptr().cast::<__m128i>();
        // SAFETY: as above.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(at)),
                _mm256_cvtph_ps(_mm_loadu_si128(at.add(1))),
            ]
        }
    }

    #[inline(always)]
    fn zero(self) -> [__m256; 2] {
        // SAFETY: as above.
        [unsafe { _mm256_setzero_ps() }; 2]
    }

    #[inline(always)]
    fn add(
        self,
        y: [__m256; 2],
        scales: [__m256; 2],
        scale: f32,
        sums: [__m256i; 2],
    ) -> [__m256; 2] {
        // SAFETY: as above.
        unsafe {
            let scale = _mm256_set1_ps(scale);
            let low = _mm256_fmadd_ps(
                _mm256_mul_ps(scales[0], scale),
                _mm256_cvtepi32_ps(sums[0]),
                y[0],
            );
            let high = _mm256_fmadd_ps(
                _mm256_mul_ps(scales[1], scale),
                _mm256_cvtepi32_ps(sums[1]),
                y[1],
            );
            [low, high]
        }
    }

    #[inline(always)]
    fn values(self, rows: &[f32; 16]) -> [__m256; 2] {
        // SAFETY: as above.
        unsafe {
            [
                _mm256_loadu_ps(rows.as_ptr()),
                _mm256_loadu_ps(rows.as_ptr().add(8)),
            ]
        }
    }

    #[inline(always)]
    fn rows(self, y: [__m256; 2]) -> [f32; 16] {
        let mut rows = [0.0; 16];
        // SAFETY: as above; twice 8 values are written into 16.
        unsafe {
            _mm256_storeu_ps(rows.as_mut_ptr(), y[0]);
            _mm256_storeu_ps(rows.as_mut_ptr().add(8), y[1]);
        }
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
