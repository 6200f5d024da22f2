//! The product by fused multiply-adds of f32.

use super::{COLS, Kernel, Panels, STEP};
use crate::kernels::bf16;
use crate::kernels::isa::{Isa, Level, Vectorized};

/// Rows of a panel.
const ROWS: usize = 8;
/// Terms of a chain.
const CHAIN: usize = STEP / 2;

/// For any instruction set.
pub(super) struct Values(pub(super) Isa);

impl Kernel for Values {
    const ROWS: usize = ROWS;
    const WIDTH: usize = COLS;
    const WORDS: usize = STEP;
    const PART: usize = 16;

    /// The bits of the even terms, then those of the odd ones.
    #[inline(always)]
    fn arrange(x: &[f32; STEP], words: &mut [u32]) {
        let (even, odd) = words.split_at_mut(CHAIN);
        for (i, (even, odd)) in even.iter_mut().zip(odd).enumerate() {
            *even = bf16::round(x[2 * i]);
            *odd = bf16::round(x[2 * i + 1]);
        }
    }

    fn multiply(&mut self, panels: Panels<'_>) {
        let Self(isa) = *self;
        // As many sums as there are registers for.
        match isa.level() >= Level::Avx512 {
            true => isa.run(Tiles::<ROWS, COLS>(panels)),
            false => isa.run(Tiles::<4, 16>(panels)),
        }
    }
}

/// The sums in tiles of `R` rows and `C` columns.
struct Tiles<'a, const R: usize, const C: usize>(Panels<'a>);

impl<const R: usize, const C: usize> Vectorized for Tiles<'_, R, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Panels { c, stride, .. } = self.0;
        // The two chains of each step.
        let a: &[[[[u32; ROWS]; CHAIN]; 2]] = self.0.a.as_chunks().0.as_chunks().0.as_chunks().0;
        let b: &[[[[u32; COLS]; CHAIN]; 2]] = self.0.b.as_chunks().0.as_chunks().0.as_chunks().0;
        assert_eq!(a.len(), b.len(), "panels of one depth");
        for left in (0..COLS).step_by(C) {
            for top in (0..ROWS).step_by(R) {
                let mut sums = [[0f32; C]; R];
                if !self.0.replace {
                    for (row, sums) in sums.iter_mut().enumerate() {
                        sums.copy_from_slice(&c[(top + row) * stride + left..][..C]);
                    }
                }
                for (a, b) in a.iter().zip(b) {
                    let even = chain::<R, C>(&a[0], &b[0], top, left);
                    let odd = chain::<R, C>(&a[1], &b[1], top, left);
                    // One flat loop: of two, the compiler takes the outer one for its vectors.
                    let chains = even.as_flattened().iter().zip(odd.as_flattened());
                    for (sum, (even, odd)) in sums.as_flattened_mut().iter_mut().zip(chains) {
                        *sum += even + odd;
                    }
                }
                for (row, sums) in sums.iter().enumerate() {
                    c[(top + row) * stride + left..][..C].copy_from_slice(sums);
                }
            }
        }
    }
}

/// The sums of a chain for `R` rows from `top` on and `C` columns from `left` on.
#[inline(always)]
fn chain<const R: usize, const C: usize>(
    a: &[[u32; ROWS]; CHAIN],
    b: &[[u32; COLS]; CHAIN],
    top: usize,
    left: usize,
) -> [[f32; C]; R] {
    let mut sums = [[0f32; C]; R];
    for (a, b) in a.iter().zip(b) {
        let b: &[u32; C] = b[left..][..C].try_into().expect("of this width");
        for (row, sums) in sums.iter_mut().enumerate() {
            let a = f32::from_bits(a[top + row]);
            for (sum, &b) in sums.iter_mut().zip(b) {
                *sum = a.mul_add(f32::from_bits(b), *sum);
            }
        }
    }
    sums
}
