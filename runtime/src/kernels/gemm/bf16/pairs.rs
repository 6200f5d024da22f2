//! The product by `vdpbf16ps`.
//!
//! It adds two products to a sum, that of the high halves first, each as a fused multiply-add rounded to nearest even (Intel's
//! manual at `VDPBF16PS`; Zen 4 was found to do the same). So a pair is two terms of one chain that follow each other, the
//! earlier one in the high half.

use std::arch::x86_64::*;

use super::{COLS, Kernel, Panels, STEP};
use crate::kernels::bf16;
use crate::kernels::isa::Isa;

/// Rows of a panel.
const ROWS: usize = 8;
/// Pairs of a chain.
const CHAIN: usize = STEP / 4;

/// Proof that the instruction may be executed.
pub(super) struct Pairs(());

impl Pairs {
    /// The proof, where `isa` gives it.
    pub(super) fn of(isa: Isa) -> Option<Self> {
        isa.has_bf16().then_some(Self(()))
    }
}

impl Kernel for Pairs {
    const ROWS: usize = ROWS;
    const WIDTH: usize = COLS;
    const WORDS: usize = STEP / 2;
    const PART: usize = 16;

    /// The pairs of the even terms, then those of the odd ones.
    #[inline(always)]
    fn arrange(x: &[f32; STEP], words: &mut [u32]) {
        let (even, odd) = words.split_at_mut(CHAIN);
        for (i, (even, odd)) in even.iter_mut().zip(odd).enumerate() {
            *even = bf16::pair(x[4 * i], x[4 * i + 2]);
            *odd = bf16::pair(x[4 * i + 1], x[4 * i + 3]);
        }
    }

    fn multiply(&mut self, panels: Panels<'_>) {
        // SAFETY: `self` exists, so detection found the features.
        unsafe { multiply(panels) }
    }
}

/// Sums of a panel.
type Sums = [[__m512; 2]; ROWS];

/// # Safety
/// The CPU has these features.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn multiply(panels: Panels<'_>) {
    let Panels { c, stride, .. } = panels;
    // The two chains of each step.
    let a: &[[[[u32; ROWS]; CHAIN]; 2]] = panels.a.as_chunks().0.as_chunks().0.as_chunks().0;
    let b: &[[[[u32; COLS]; CHAIN]; 2]] = panels.b.as_chunks().0.as_chunks().0.as_chunks().0;
    assert!(
        a.len() == b.len() && c.len() >= (ROWS - 1) * stride + COLS,
        "panels of one depth, and room for their product"
    );
    let mut sums: Sums = [[_mm512_setzero_ps(); 2]; ROWS];
    for (row, sums) in sums.iter_mut().enumerate().filter(|_| !panels.replace) {
        for (half, sums) in sums.iter_mut().enumerate() {
            // SAFETY: rows of 32 elements, for which there is room.
            *sums = unsafe { _mm512_loadu_ps(c.as_ptr().add(row * stride + 16 * half)) };
        }
    }
    for (a, b) in a.iter().zip(b) {
        let (even, odd) = (chain(&a[0], &b[0]), chain(&a[1], &b[1]));
        for (sums, (even, odd)) in sums.iter_mut().zip(even.iter().zip(odd)) {
            for half in 0..2 {
                sums[half] = _mm512_add_ps(sums[half], _mm512_add_ps(even[half], odd[half]));
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        for (half, &sums) in sums.iter().enumerate() {
            // SAFETY: as for the loads.
            unsafe { _mm512_storeu_ps(c.as_mut_ptr().add(row * stride + 16 * half), sums) };
        }
    }
}

/// The sums of one chain of a step.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn chain(a: &[[u32; ROWS]; CHAIN], b: &[[u32; COLS]; CHAIN]) -> Sums {
    let mut sums: Sums = [[_mm512_setzero_ps(); 2]; ROWS];
    for (a, b) in a.iter().zip(b) {
        // SAFETY: the first and the second half of `b`.
        let b = unsafe {
            [
                pairs(_mm512_loadu_si512(b.as_ptr().cast())),
                pairs(_mm512_loadu_si512(b.as_ptr().add(16).cast())),
            ]
        };
        for (sums, &a) in sums.iter_mut().zip(a) {
            let a = pairs(_mm512_set1_epi32(a.cast_signed()));
            sums[0] = _mm512_dpbf16_ps(sums[0], a, b[0]);
            sums[1] = _mm512_dpbf16_ps(sums[1], a, b[1]);
        }
    }
    sums
}

#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits, and any bits are pairs of bf16.
    unsafe { std::mem::transmute(bits) }
}
