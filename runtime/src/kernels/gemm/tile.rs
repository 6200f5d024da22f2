//! Eight by thirty-two sums of products at once.
//!
//! Every sum is one chain of fused multiply-adds over its terms in order, so all instruction sets give the same
//! bits.

use std::ops::{AddAssign, SubAssign};

use super::columns;
#[cfg(target_arch = "x86_64")]
use crate::kernels::isa::Level;
use crate::kernels::isa::{Isa, Vectorized};

/// Rows of a tile, and of a panel of a left operand.
pub const ROWS: usize = 8;
/// Columns of a tile, and of a panel of a right operand.
pub const COLS: usize = 32;

/// The sums of a tile.
pub(super) type Tile<T> = [[T; COLS]; ROWS];

/// What matrices are made of: `f32` or `f64`.
pub trait Element: Copy + Default + Send + Sync + AddAssign + SubAssign {
    /// `a·b + c`, rounded once.
    #[doc(hidden)]
    fn multiply_add(a: Self, b: Self, c: Self) -> Self;

    /// `Σ a[k][row] · b[k][col]` over panels of the same depth.
    #[doc(hidden)]
    fn tile(isa: Isa, a: &[[Self; ROWS]], b: &[[Self; COLS]], out: &mut Tile<Self>);

    /// `out[col · stride + i] = rows[i][col]`.
    #[doc(hidden)]
    fn columns(isa: Isa, rows: [&[Self]; ROWS], out: &mut [Self], stride: usize);
}

/// The definition.
struct Portable<'a, T> {
    a: &'a [[T; ROWS]],
    b: &'a [[T; COLS]],
    out: &'a mut Tile<T>,
}

impl<T: Element> Vectorized for Portable<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (row, out) in self.out.iter_mut().enumerate() {
            let mut sums = [T::default(); COLS];
            for (a, b) in self.a.iter().zip(self.b) {
                for (sum, &b) in sums.iter_mut().zip(b) {
                    *sum = T::multiply_add(a[row], b, *sum);
                }
            }
            *out = sums;
        }
    }
}

macro_rules! element {
    ($type:ident, $avx512:ident, $avx2:ident, $columns:ident) => {
        impl Element for $type {
            #[inline(always)]
            fn multiply_add(a: Self, b: Self, c: Self) -> Self {
                a.mul_add(b, c)
            }

            fn tile(isa: Isa, a: &[[Self; ROWS]], b: &[[Self; COLS]], out: &mut Tile<Self>) {
                assert_eq!(a.len(), b.len(), "panels of one depth");
                match isa.level() {
                    // SAFETY: an `Isa` of this level exists only where detection found these features.
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx512 | Level::Amx => unsafe { x86::$avx512(a, b, out) },
                    // SAFETY: as above.
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx2 | Level::AvxVnni => unsafe { x86::$avx2(a, b, out) },
                    _ => isa.run(Portable { a, b, out }),
                }
            }

            fn columns(isa: Isa, rows: [&[Self]; ROWS], out: &mut [Self], stride: usize) {
                columns::$columns(isa, rows, out, stride);
            }
        }
    };
}

element!(f32, avx512_f32, avx2_f32, single);
element!(f64, avx512_f64, avx2_f64, portable);

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{COLS, ROWS, Tile};

    /// The tile in pieces of `$rows` by two vectors of `$lanes`: as many sums as there are registers for, and more
    /// than the latency of a multiply-add asks for.
    macro_rules! tile {
        ($name:ident, $features:literal, $type:ident, $rows:literal, $lanes:literal,
         $zero:ident, $load:ident, $splat:ident, $multiply_add:ident, $store:ident) => {
            /// # Safety
            /// The CPU has these features.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name(
                a: &[[$type; ROWS]],
                b: &[[$type; COLS]],
                out: &mut Tile<$type>,
            ) {
                for left in (0..COLS).step_by(2 * $lanes) {
                    for top in (0..ROWS).step_by($rows) {
                        let mut sums = [[$zero(); 2]; $rows];
                        for (a, b) in a.iter().zip(b) {
                            let a: &[$type; $rows] = a[top..].first_chunk().expect("whole pieces");
                            let b: &[$type; 2 * $lanes] =
                                b[left..].first_chunk().expect("whole pieces");
                            // SAFETY: the first and the second half of `b`.
                            let b = unsafe { [$load(b.as_ptr()), $load(b.as_ptr().add($lanes))] };
                            for (sums, &a) in sums.iter_mut().zip(a) {
                                let a = $splat(a);
                                sums[0] = $multiply_add(a, b[0], sums[0]);
                                sums[1] = $multiply_add(a, b[1], sums[1]);
                            }
                        }
                        for (out, sums) in out[top..].iter_mut().zip(sums) {
                            let out: &mut [$type; 2 * $lanes] =
                                out[left..].first_chunk_mut().expect("whole pieces");
                            // SAFETY: the first and the second half of `out`.
                            unsafe {
                                $store(out.as_mut_ptr(), sums[0]);
                                $store(out.as_mut_ptr().add($lanes), sums[1]);
                            }
                        }
                    }
                }
            }
        };
    }

    tile!(
        avx512_f32,
        "avx512f",
        f32,
        8,
        16,
        _mm512_setzero_ps,
        _mm512_loadu_ps,
        _mm512_set1_ps,
        _mm512_fmadd_ps,
        _mm512_storeu_ps
    );
    tile!(
        avx512_f64,
        "avx512f",
        f64,
        8,
        8,
        _mm512_setzero_pd,
        _mm512_loadu_pd,
        _mm512_set1_pd,
        _mm512_fmadd_pd,
        _mm512_storeu_pd
    );
    tile!(
        avx2_f32,
        "avx2,fma",
        f32,
        4,
        8,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_set1_ps,
        _mm256_fmadd_ps,
        _mm256_storeu_ps
    );
    tile!(
        avx2_f64,
        "avx2,fma",
        f64,
        4,
        4,
        _mm256_setzero_pd,
        _mm256_loadu_pd,
        _mm256_set1_pd,
        _mm256_fmadd_pd,
        _mm256_storeu_pd
    );
}
