//! The products on AMX: thirty-two features by thirty-two in four tiles of sums.
//!
//! A panel is a tile of the right operand as it lies: a row of it is a quad of tokens. A left operand is turned first, once for
//! all panels that it meets. Codes of both carry 128 too much, and the right one's is not wanted: sums start from what makes up
//! for it.

use std::arch::asm;

use super::tile::{Sums, WIDTH};
use crate::kernels::isa::{Isa, Level, Vectorized};
use crate::kernels::tile_config::TileConfig;

/// Quads of a tile.
const QUADS: usize = 16;

/// Features by quads of tokens: two tiles.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Step([[u32; QUADS]; WIDTH]);

/// A panel that is multiplied from the left.
pub(super) struct Left {
    steps: Vec<Step>,
    /// For each feature, less what the excess of a right panel adds.
    start: Box<Sums>,
}

impl Left {
    /// Turns a panel (`[quads][WIDTH]`). Beyond its last quad are zeros, whatever they are multiplied with.
    pub(super) fn new(isa: Isa, panel: &[u32]) -> Self {
        let mut left = Self {
            steps: vec![Step([[0; QUADS]; WIDTH]); panel.len().div_ceil(QUADS * WIDTH)],
            start: Box::new([[0; WIDTH]; WIDTH]),
        };
        isa.run(Turn {
            panel,
            left: &mut left,
        });
        left
    }
}

struct Turn<'a> {
    panel: &'a [u32],
    left: &'a mut Left,
}

impl Vectorized for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let mut sums = [0u32; WIDTH];
        let parts = self.panel.chunks(QUADS * WIDTH);
        for (Step(step), part) in self.left.steps.iter_mut().zip(parts) {
            for (at, quad) in part.as_chunks::<WIDTH>().0.iter().enumerate() {
                for (row, &word) in step.iter_mut().zip(quad) {
                    row[at] = word;
                }
                for (sum, word) in sums.iter_mut().zip(quad) {
                    *sum += (word & 0xff) + (word >> 8 & 0xff) + (word >> 16 & 0xff) + (word >> 24);
                }
            }
        }
        for (start, sum) in self.left.start.iter_mut().zip(sums) {
            *start = [sum.wrapping_mul(128).wrapping_neg().cast_signed(); WIDTH];
        }
    }
}

/// Proof of AMX-INT8. This thread's tiles are set up while it lives, and given back after that, so that a switch of threads need
/// not save them.
pub(super) struct Amx(());

impl Amx {
    /// The proof, where `isa` gives it. Nothing else may use the tiles of this thread meanwhile.
    pub(super) fn of(isa: Isa) -> Option<Self> {
        (isa.level() == Level::Amx).then(|| {
            // SAFETY: a level of AMX exists only where detection found it and the operating system granted its tiles; the
            // instruction reads these 64 bytes.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) &TileConfig::WHOLE, options(nostack, readonly))
            };
            Self(())
        })
    }

    /// [`products`](super::tile::products) of two panels of the same tokens.
    pub(super) fn products(&self, left: &Left, right: &[u32], sums: &mut Sums) {
        assert_eq!(
            left.steps.len(),
            right.len().div_ceil(QUADS * WIDTH),
            "panels of the same tokens"
        );
        *sums = *left.start;
        let (whole, rest) = right.as_chunks::<{ QUADS * WIDTH }>();
        let (steps, last) = left.steps.split_at(whole.len());
        self.add(steps, whole, sums);
        if !last.is_empty() {
            let mut padded = [0; QUADS * WIDTH];
            padded[..rest.len()].copy_from_slice(rest);
            self.add(last, &[padded], sums);
        }
    }

    /// Adds the products of whole tiles.
    fn add(&self, left: &[Step], right: &[[u32; QUADS * WIDTH]], sums: &mut Sums) {
        assert_eq!(left.len(), right.len(), "panels of the same tokens");
        if left.is_empty() {
            return;
        }
        // SAFETY: tiles as above, all whole, so that the loads stay inside as many steps of both panels, and loads and
        // stores of sums inside `sums`.
        unsafe {
            asm!(
                "tileloadd tmm0, [{c0} + {row}]",
                "tileloadd tmm1, [{c0} + {row} + 64]",
                "tileloadd tmm2, [{c1} + {row}]",
                "tileloadd tmm3, [{c1} + {row} + 64]",
                "2:",
                "tileloadd tmm6, [{b} + {row}]",
                "tileloadd tmm4, [{a} + {line}]",
                "tdpbuud tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {row} + 64]",
                "tdpbuud tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a} + {line} + 1024]",
                "tdpbuud tmm2, tmm5, tmm6",
                "tdpbuud tmm3, tmm5, tmm7",
                "add {a}, 2048",
                "add {b}, 2048",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{c0} + {row}], tmm0",
                "tilestored [{c0} + {row} + 64], tmm1",
                "tilestored [{c1} + {row}], tmm2",
                "tilestored [{c1} + {row} + 64], tmm3",
                a = inout(reg) left.as_ptr() => _,
                b = inout(reg) right.as_ptr() => _,
                c0 = in(reg) sums.as_mut_ptr(),
                c1 = in(reg) sums.as_mut_ptr().add(16),
                row = in(reg) WIDTH * size_of::<u32>(),
                line = in(reg) QUADS * size_of::<u32>(),
                steps = inout(reg) left.len() => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

impl Drop for Amx {
    fn drop(&mut self) {
        // SAFETY: tiles as above.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }
}
