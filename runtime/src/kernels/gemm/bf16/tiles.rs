//! The product by the tiles of AMX: 32 rows by 32 columns in four tiles of sums.
//!
//! A tile of the left operand is 16 rows of a step, one of the right operand 16 pairs of terms by 16 columns. A pair is two terms
//! that follow each other, the even one in the low half.

use std::marker::PhantomData;

use super::{COLS, Kernel, Panels, STEP};
use crate::kernels::bf16;
use crate::kernels::isa::{Isa, Vectorized};

/// Rows, columns and words of a tile's row.
const TILE: usize = 16;
/// Rows of a panel.
const ROWS: usize = 2 * TILE;

/// The instructions. A value of an implementation is the proof that they may be executed.
pub(super) trait Tiles {
    /// Prepares whole tiles.
    fn configure(&mut self);

    /// [`Kernel::multiply`], of `[step][row][pair]` and `[half of the columns][step][pair][column]`.
    ///
    /// # Panics
    /// As that.
    fn multiply(&mut self, panels: Panels<'_>);

    /// Gives the tiles back, so that a switch of threads need not save them.
    fn release(&mut self);
}

impl<T: Tiles> Kernel for T {
    const ROWS: usize = ROWS;
    const WIDTH: usize = TILE;
    const WORDS: usize = TILE;
    const PART: usize = 64;

    #[inline(always)]
    fn arrange(x: &[f32; STEP], words: &mut [u32]) {
        for (word, &[even, odd]) in words.iter_mut().zip(x.as_chunks().0) {
            *word = bf16::pair(odd, even);
        }
    }

    fn pack_left(isa: Isa, x: &[f32], depth: usize, panel: &mut [u32]) {
        let kernel = PhantomData::<T>;
        isa.run(Rows {
            x,
            depth,
            panel,
            kernel,
        });
    }

    fn begin(&mut self) {
        self.configure();
    }

    fn end(&mut self) {
        self.release();
    }

    fn multiply(&mut self, panels: Panels<'_>) {
        Tiles::multiply(self, panels);
    }
}

/// Packs rows as `[step][row][pair]`.
struct Rows<'a, K> {
    x: &'a [f32],
    depth: usize,
    panel: &'a mut [u32],
    kernel: PhantomData<K>,
}

impl<K: Kernel> Vectorized for Rows<'_, K> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (row, x) in self.x.chunks_exact(self.depth).enumerate() {
            let steps = self.panel.chunks_exact_mut(ROWS * TILE);
            for (x, rows) in x.chunks(STEP).zip(steps) {
                K::arrange_part(x, &mut rows[row * TILE..][..TILE]);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use instructions::Amx;

#[cfg(target_arch = "x86_64")]
mod instructions {
    //! [`Tiles`] by AMX-BF16. Nothing lives in tiles between two blocks of assembly.

    use std::arch::asm;

    use super::{COLS, Isa, Panels, ROWS, TILE, Tiles};
    use crate::kernels::isa::Level;
    use crate::kernels::tile_config::TileConfig;

    /// Proof of AMX-BF16.
    pub(in super::super) struct Amx(());

    impl Amx {
        /// The proof, where `isa` gives it.
        pub(in super::super) fn of(isa: Isa) -> Option<Self> {
            (isa.level() == Level::Amx).then_some(Self(()))
        }
    }

    impl Tiles for Amx {
        fn configure(&mut self) {
            // SAFETY: an `Amx` exists only where detection found AMX and the operating system granted its tiles; the
            // instruction reads these 64 bytes.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) &TileConfig::WHOLE, options(nostack, readonly));
            }
        }

        fn multiply(&mut self, x: Panels<'_>) {
            let steps = x.a.len() / (ROWS * TILE);
            assert!(
                x.b.len() == steps * COLS * TILE && x.c.len() >= (ROWS - 1) * x.stride + COLS,
                "panels of {steps} steps, and room for their product"
            );
            let (b0, b1) = x.b.split_at(x.b.len() / 2);
            if steps == 0 {
                return;
            }
            let c = x.c.as_mut_ptr();
            // SAFETY: tiles as above, all whole, so that the loads stay inside the lengths just checked, and loads and stores
            // of sums inside the rows of `c`; a prefetch changes nothing, whatever its address.
            unsafe {
                asm!(
                    "test {replace:e}, {replace:e}",
                    "jz 2f",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "jmp 3f",
                    "2:",
                    "tileloadd tmm0, [{c0} + {row}]",
                    "tileloadd tmm1, [{c0} + {row} + 64]",
                    "tileloadd tmm2, [{c1} + {row}]",
                    "tileloadd tmm3, [{c1} + {row} + 64]",
                    "3:",
                    "tileloadd tmm6, [{b0} + {line}]",
                    "tileloadd tmm4, [{a} + {line}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "prefetcht1 [{ahead} + 0]",
                    "prefetcht1 [{ahead} + 64]",
                    "tileloadd tmm7, [{b1} + {line}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "prefetcht1 [{ahead} + 128]",
                    "prefetcht1 [{ahead} + 192]",
                    "tileloadd tmm5, [{a} + {line} + 1024]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "prefetcht1 [{ahead} + 256]",
                    "prefetcht1 [{ahead} + 320]",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "prefetcht1 [{ahead} + 384]",
                    "prefetcht1 [{ahead} + 448]",
                    "add {a}, 2048",
                    "add {b0}, 1024",
                    "add {b1}, 1024",
                    "add {ahead}, 512",
                    "dec {steps}",
                    "jnz 3b",
                    "tilestored [{c0} + {row}], tmm0",
                    "tilestored [{c0} + {row} + 64], tmm1",
                    "tilestored [{c1} + {row}], tmm2",
                    "tilestored [{c1} + {row} + 64], tmm3",
                    a = inout(reg) x.a.as_ptr() => _,
                    b0 = inout(reg) b0.as_ptr() => _,
                    b1 = inout(reg) b1.as_ptr() => _,
                    ahead = inout(reg) x.ahead.as_ptr() => _,
                    c0 = in(reg) c,
                    c1 = in(reg) c.add(TILE * x.stride),
                    row = in(reg) x.stride * size_of::<f32>(),
                    line = in(reg) TILE * size_of::<u32>(),
                    steps = inout(reg) steps => _,
                    replace = in(reg) u32::from(x.replace),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }

        fn release(&mut self) {
            // SAFETY: tiles as above.
            unsafe { asm!("tilerelease", options(nostack, nomem)) }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    //! The same panels on tiles in software.

    use super::*;

    /// Tiles as Intel's definition of `TDPBF16PS` has them (Instruction Set Reference, volume 2).
    pub(in super::super) struct Software;

    impl Tiles for Software {
        fn configure(&mut self) {}

        fn multiply(&mut self, x: Panels<'_>) {
            let halves = |word: u32| [word << 16, word & bf16::EARLY].map(f32::from_bits);
            for row in 0..ROWS {
                for col in 0..COLS {
                    let c = &mut x.c[row * x.stride + col];
                    let mut sum = if x.replace { 0.0 } else { *c };
                    let a = x.a.chunks_exact(ROWS * TILE);
                    for (a, b) in
                        a.zip(x.b[col / TILE * (x.b.len() / 2)..].chunks_exact(TILE * TILE))
                    {
                        let mut chains = [0f32; 2];
                        for pair in 0..TILE {
                            let a = halves(a[row * TILE + pair]);
                            let b = halves(b[pair * TILE + col % TILE]);
                            for i in 0..2 {
                                chains[i] = a[i].mul_add(b[i], chains[i]);
                            }
                        }
                        sum += chains[0] + chains[1];
                    }
                    *c = sum;
                }
            }
        }

        fn release(&mut self) {}
    }
}
