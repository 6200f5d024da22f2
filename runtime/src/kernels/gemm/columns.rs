//! Eight rows read as columns: what packing and transposing are made of.

#[cfg(target_arch = "x86_64")]
use crate::kernels::isa::Level;
use crate::kernels::isa::{Isa, Vectorized};

/// Rows read together.
pub(super) const ROWS: usize = 8;

/// Writes `out[col · stride + i] = rows[i][col]`; `out` ends with the last of them.
pub(super) fn portable<T: Copy>(isa: Isa, rows: [&[T]; ROWS], out: &mut [T], stride: usize) {
    isa.run(Portable { rows, out, stride });
}

struct Portable<'a, 'b, T> {
    rows: [&'a [T]; ROWS],
    out: &'b mut [T],
    stride: usize,
}

impl<T: Copy> Vectorized for Portable<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (col, out) in self.out.chunks_mut(self.stride).enumerate() {
            for (out, row) in out.iter_mut().zip(self.rows) {
                *out = row[col];
            }
        }
    }
}

/// [`portable`] for elements of four bytes, in squares that are turned in registers.
pub(super) fn single<T: Copy>(isa: Isa, rows: [&[T]; ROWS], out: &mut [T], stride: usize) {
    const { assert!(size_of::<T>() == 4, "elements of four bytes") };
    #[cfg(target_arch = "x86_64")]
    if isa.level() >= Level::Avx2 {
        let cols = rows[0].len();
        assert!(
            rows.iter().all(|row| row.len() == cols),
            "rows of one length"
        );
        let whole = cols / ROWS * ROWS;
        if whole > 0 {
            assert!(
                stride >= ROWS && out.len() >= (whole - 1) * stride + ROWS,
                "out is too short"
            );
            // SAFETY: an `Isa` of this level exists only where detection found AVX2; the rows have `whole` columns,
            // and `out` has room for them, as just asserted.
            unsafe { x86::squares(rows, whole, out, stride) };
        }
        if whole < cols {
            let rest = rows.map(|row| &row[whole..]);
            portable(isa, rest, &mut out[whole * stride..], stride);
        }
        return;
    }
    portable(isa, rows, out, stride);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::ROWS;

    /// # Safety
    /// The CPU has AVX2, elements have four bytes, each row has at least `cols` of them, a multiple of eight, and `out` at
    /// least `(cols − 1) · stride + 8`.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn squares<T: Copy>(
        rows: [&[T]; ROWS],
        cols: usize,
        out: &mut [T],
        stride: usize,
    ) {
        for col in (0..cols).step_by(ROWS) {
            // SAFETY: `col + 8 <= cols`.
            let r = rows.map(|row| unsafe { _mm256_loadu_ps(row.as_ptr().add(col).cast()) });
            let pairs = |a, b| (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let ((a0, a1), (a2, a3)) = (pairs(r[0], r[1]), pairs(r[2], r[3]));
            let ((a4, a5), (a6, a7)) = (pairs(r[4], r[5]), pairs(r[6], r[7]));
            let quads = |a, b| {
                (
                    _mm256_shuffle_ps::<0x44>(a, b),
                    _mm256_shuffle_ps::<0xee>(a, b),
                )
            };
            let ((b0, b1), (b2, b3)) = (quads(a0, a2), quads(a1, a3));
            let ((b4, b5), (b6, b7)) = (quads(a4, a6), quads(a5, a7));
            let low = |a, b| _mm256_permute2f128_ps::<0x20>(a, b);
            let high = |a, b| _mm256_permute2f128_ps::<0x31>(a, b);
            let columns = [
                low(b0, b4),
                low(b1, b5),
                low(b2, b6),
                low(b3, b7),
                high(b0, b4),
                high(b1, b5),
                high(b2, b6),
                high(b3, b7),
            ];
            for (i, column) in columns.into_iter().enumerate() {
                // SAFETY: `col + i < cols`, so eight elements fit there.
                unsafe {
                    _mm256_storeu_ps(out.as_mut_ptr().add((col + i) * stride).cast(), column)
                };
            }
        }
    }
}
