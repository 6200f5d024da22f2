//! AArch64 with `dotprod`: four registers hold the 16 rows of a panel.
//!
//! `sdot` is written in assembly because its intrinsic is unstable in Rust 1.95.

use std::arch::aarch64::*;
use std::arch::asm;

use super::reads::Reads;
use super::vectors::Vectors;
use crate::kernels::isa::{Isa, Level, Vectorized};

/// Proof of NEON and `dotprod`. `sdot` multiplies signed bytes: `CENTRE` is 0 for codes of 4 bits, which are
/// nonnegative as such, and 128 for codes of 8.
#[derive(Clone, Copy)]
pub(super) struct Neon<const CENTRE: i32>(());

impl<const CENTRE: i32> Neon<CENTRE> {
    /// The proof, where `isa` gives it.
    pub(super) fn of(isa: Isa) -> Option<Self> {
        (isa.level() == Level::Neon).then_some(Self(()))
    }
}

/// # Safety
/// The CPU has these features.
#[target_feature(enable = "neon,dotprod")]
unsafe fn run_dotprod<W: Vectorized>(work: W) -> W::Output {
    work.run()
}

#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(sum: int32x4_t, codes: int8x16_t, quad: int8x16_t) -> int32x4_t {
    let out;
    // SAFETY: the instruction touches these registers only.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {codes:v}.16b, {quad:v}.16b",
            sum = inout(vreg) sum => out,
            codes = in(vreg) codes,
            quad = in(vreg) quad,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    out
}

/// Four f16 as f32.
#[inline]
#[target_feature(enable = "neon")]
fn widen(halves: uint16x4_t) -> float32x4_t {
    let out;
    // SAFETY: the instruction touches these registers only.
    unsafe {
        asm!(
            "fcvtl {out:v}.4s, {halves:v}.4h",
            out = lateout(vreg) out,
            halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    out
}

// SAFETY of all blocks: `self` proves the features, and an array reference may be read or written at its whole length.
impl<const CENTRE: i32> Vectors for Neon<CENTRE> {
    type Codes = [int8x16_t; 4];
    type Quad = int8x16_t;
    type Sum = [int32x4_t; 4];
    type Int = [int32x4_t; 4];
    type Float = [float32x4_t; 4];

    const CENTRE: i32 = CENTRE;
    const PANELS: usize = 1;
    /// 24 sums, 4 vectors of codes and one of activations, of 32 registers.
    const TOKENS: usize = 6;
    const SUMS: usize = Self::PANELS * Self::TOKENS;
    const READS: [Reads; 2] = [Reads::ALONE, Reads::AHEAD];
    const READS_BUSY: usize = 4;

    fn run<W: Vectorized>(self, work: W) -> W::Output {
        // SAFETY: as above.
        unsafe { run_dotprod(work) }
    }

    #[inline(always)]
    fn codes(self, bytes: &[u8; 64]) -> [int8x16_t; 4] {
        let mut codes = [self.quad(&[0; 4]); 4];
        for (part, codes) in codes.iter_mut().enumerate() {
            // SAFETY: as above.
            unsafe {
                let bytes = vld1q_u8(bytes.as_ptr().add(16 * part));
                *codes = vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(128)));
            }
        }
        codes
    }

    #[inline(always)]
    fn low(self, bytes: &[u8; 64]) -> [int8x16_t; 4] {
        let mut codes = [self.quad(&[0; 4]); 4];
        for (part, codes) in codes.iter_mut().enumerate() {
            // SAFETY: as above.
            unsafe {
                let bytes = vld1q_u8(bytes.as_ptr().add(16 * part));
                *codes = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
            }
        }
        codes
    }

    #[inline(always)]
    fn high(self, bytes: &[u8; 64]) -> [int8x16_t; 4] {
        let mut codes = [self.quad(&[0; 4]); 4];
        for (part, codes) in codes.iter_mut().enumerate() {
            // SAFETY: as above.
            unsafe {
                let bytes = vld1q_u8(bytes.as_ptr().add(16 * part));
                *codes = vreinterpretq_s8_u8(vshrq_n_u8::<4>(bytes));
            }
        }
        codes
    }

    #[inline(always)]
    fn quad(self, activations: &[i8; 4]) -> int8x16_t {
        let quad = i32::from_le_bytes(activations.map(i8::cast_unsigned));
        // SAFETY: as above.
        unsafe { vreinterpretq_s8_s32(vdupq_n_s32(quad)) }
    }

    #[inline(always)]
    fn start(self, start: [int32x4_t; 4]) -> [int32x4_t; 4] {
        start
    }

    #[inline(always)]
    fn dot(
        self,
        mut sum: [int32x4_t; 4],
        codes: [int8x16_t; 4],
        quad: int8x16_t,
    ) -> [int32x4_t; 4] {
        for part in 0..4 {
            // SAFETY: as above.
            sum[part] = unsafe { sdot(sum[part], codes[part], quad) };
        }
        sum
    }

    #[inline(always)]
    fn carry(self, sum: [int32x4_t; 4]) -> [int32x4_t; 4] {
        sum
    }

    #[inline(always)]
    fn total(self, sum: [int32x4_t; 4]) -> [int32x4_t; 4] {
        sum
    }

    #[inline(always)]
    fn splat(self, value: i32) -> [int32x4_t; 4] {
        // SAFETY: as above.
        [unsafe { vdupq_n_s32(value) }; 4]
    }

    #[inline(always)]
    fn plus(self, mut a: [int32x4_t; 4], b: [int32x4_t; 4]) -> [int32x4_t; 4] {
        for part in 0..4 {
            // SAFETY: as above.
            a[part] = unsafe { vaddq_s32(a[part], b[part]) };
        }
        a
    }

    #[inline(always)]
    fn times(self, mut zero_points: [int32x4_t; 4], sum: i32) -> [int32x4_t; 4] {
        for part in &mut zero_points {
            // SAFETY: as above.
            *part = unsafe { vmulq_n_s32(*part, sum) };
        }
        zero_points
    }

    #[inline(always)]
    fn zero_points(self, bytes: &[u8; 16]) -> [int32x4_t; 4] {
        // SAFETY: as above.
        unsafe {
            let bytes = vld1q_u8(bytes.as_ptr());
            let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
            let parts = [
                vmovl_u16(vget_low_u16(low)),
                vmovl_high_u16(low),
                vmovl_u16(vget_low_u16(high)),
                vmovl_high_u16(high),
            ];
            let mut zero_points = self.splat(-CENTRE);
            for part in 0..4 {
                zero_points[part] =
                    vaddq_s32(zero_points[part], vreinterpretq_s32_u32(parts[part]));
            }
            zero_points
        }
    }

    #[inline(always)]
    fn scales(self, bytes: &[u8; 32]) -> [float32x4_t; 4] {
        let mut scales = self.zero();
        for (part, scales) in scales.iter_mut().enumerate() {
            // SAFETY: as above.
            *scales = unsafe { widen(vreinterpret_u16_u8(vld1_u8(bytes.as_ptr().add(8 * part)))) };
        }
        scales
    }

    #[inline(always)]
    fn zero(self) -> [float32x4_t; 4] {
        // SAFETY: as above.
        [unsafe { vdupq_n_f32(0.0) }; 4]
    }

    #[inline(always)]
    fn add(
        self,
        mut y: [float32x4_t; 4],
        scales: [float32x4_t; 4],
        scale: f32,
        sums: [int32x4_t; 4],
    ) -> [float32x4_t; 4] {
        for part in 0..4 {
            // SAFETY: as above.
            unsafe {
                let scale = vmulq_n_f32(scales[part], scale);
                y[part] = vfmaq_f32(y[part], scale, vcvtq_f32_s32(sums[part]));
            }
        }
        y
    }

    #[inline(always)]
    fn values(self, rows: &[f32; 16]) -> [float32x4_t; 4] {
        let mut y = self.zero();
        for (part, y) in y.iter_mut().enumerate() {
            // SAFETY: as above.
            *y = unsafe { vld1q_f32(rows.as_ptr().add(4 * part)) };
        }
        y
    }

    #[inline(always)]
    fn rows(self, y: [float32x4_t; 4]) -> [f32; 16] {
        let mut rows = [0.0; 16];
        for (part, y) in y.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { vst1q_f32(rows.as_mut_ptr().add(4 * part), y) };
        }
        rows
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: a prefetch reads nothing, at any address.
        unsafe {
            asm!("prfm pldl2keep, [{}]", in(reg) address, options(nostack, readonly, preserves_flags));
        }
    }

    #[inline(always)]
    fn prefetch_near(self, address: *const u8) {
        // SAFETY: a prefetch reads nothing, at any address.
        unsafe {
            asm!("prfm pldl1keep, [{}]", in(reg) address, options(nostack, readonly, preserves_flags));
        }
    }
}
