//! The product on AMX: 32 tokens × 32 rows in four tiles of sums.
//!
//! A tile of activations is 16 tokens × 64 columns ([`tiles`](crate::kernels::activations)); a tile of weights is 16 quads ×
//! 16 rows, which is what a tile of the artifact is once its nibbles are split. Splitting takes off the zero points, too, so
//! that the sums of a group are only to be scaled. Vector instructions do that from memory while the tiles multiply the next
//! group. Everything but [`Tiles`] is portable.

use std::ops::Range;

use qbin_format::TILE_ROWS;

use super::Product;
use super::blocks::parts;
use super::panel::{Panel, VECTOR};
use crate::kernels::activations::{Group, TILE};
use crate::kernels::isa::{Isa, Vectorized};

/// Columns that are unpacked at a time: two panels of them, and 32 tokens, take two thirds of a 48 KiB first cache.
const COLS: usize = 512;
/// Columns of the smallest group.
const SMALLEST: usize = 32;
/// Bytes of activations that stay in the L2 cache while all panels pass by.
const CACHED: usize = 1 << 20;

/// Values for 32 tokens and two panels, `[tile of tokens, panel, token, row]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Block<T>(pub(super) [[[[T; TILE_ROWS]; TILE]; 2]; 2]);

/// What belongs to the codes of a group of two panels, `[panel][row]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Scales {
    pub(super) scales: [[f32; TILE_ROWS]; 2],
    /// What is still to be taken off each code, negative, in the low halves; the high halves are 0.
    pub(super) offsets: [[u32; TILE_ROWS]; 2],
}

/// The operands of a block.
pub(super) struct Operands<'a> {
    /// Two tiles of tokens, `[group][step][token][depth]`.
    pub(super) a: [&'a [i8]; 2],
    /// Their scales and sums.
    pub(super) a_groups: [&'a [Group]; 2],
    /// Two panels, `[group][step][quad][row][4]`.
    pub(super) b: [&'a [i8]; 2],
    /// Their scales, one for each group of the block.
    pub(super) b_groups: &'a [Scales],
    /// Whether there are offsets that are not 0.
    pub(super) offsets: bool,
}

/// The instructions. A value of an implementation is the proof that they may be executed.
pub(super) trait Tiles {
    /// Prepares for groups of so many `steps` of `depth` columns.
    fn configure(&mut self, depth: usize, steps: usize);

    /// Adds a block's product, group after group, to `y`; `sums` is room.
    ///
    /// # Panics
    /// If an operand is too short.
    fn multiply(&mut self, operands: Operands, sums: &mut Block<i32>, y: &mut Block<f32>);

    /// Gives the tiles back, so that a switch of threads need not save them.
    fn release(&mut self);
}

/// Computes a product, with vector instructions of `isa` beside the tiles.
pub(super) fn run<T: Tiles>(isa: Isa, mut tiles: T, mut product: Product) {
    let x = product.x;
    let arranged = x.tiles(isa);
    tiles.configure(arranged.depth, arranged.steps);
    let count = x.tokens().div_ceil(TILE);
    let at_once = (CACHED / (x.stride() * TILE)).next_multiple_of(2);
    let panels = product.panels.clone();
    let mut room = Room::new(at_once.min(count).div_ceil(2));
    for part in parts(0..count, at_once) {
        for first in panels.clone().step_by(2) {
            let pair = [first, (first + 1).min(panels.end - 1)];
            multiply_pair(isa, &mut tiles, &mut product, pair, part.clone(), &mut room);
        }
    }
    tiles.release();
}

/// What a pair of panels needs.
struct Room {
    weights: Weights,
    sums: Block<i32>,
    /// For each two tiles of tokens.
    y: Vec<Block<f32>>,
}

impl Room {
    fn new(blocks: usize) -> Self {
        Self {
            weights: Weights::empty(),
            sums: Block([[[[0; TILE_ROWS]; TILE]; 2]; 2]),
            y: vec![Block([[[[0.0; TILE_ROWS]; TILE]; 2]; 2]); blocks],
        }
    }
}

/// Two panels, which are the same where only one is left, for some tiles of tokens.
fn multiply_pair<T: Tiles>(
    isa: Isa,
    tiles: &mut T,
    product: &mut Product,
    pair: [usize; 2],
    part: Range<usize>,
    room: &mut Room,
) {
    let x = product.x;
    let arranged = x.tiles(isa);
    let blocks = part.clone().step_by(2);
    let blocks = || {
        blocks
            .clone()
            .map(|first| [first, (first + 1).min(part.end - 1)])
    };
    for y in &mut room.y {
        *y = Block([[[[0.0; TILE_ROWS]; TILE]; 2]; 2]);
    }
    for groups in parts(0..x.groups(), COLS / x.group()) {
        isa.run(Unpack {
            product,
            pair,
            groups: groups.clone(),
            weights: &mut room.weights,
        });
        let Weights {
            codes,
            groups: scales,
            offsets,
        } = &room.weights;
        for (block, y) in blocks().zip(&mut room.y) {
            let operands = Operands {
                a: block.map(|tile| arranged.codes(tile, groups.start)),
                a_groups: block.map(|tile| arranged.groups(tile, groups.start)),
                b: [codes[0].as_flattened(), codes[1].as_flattened()],
                b_groups: &scales[..groups.len()],
                offsets: *offsets,
            };
            tiles.multiply(operands, &mut room.sums, y);
        }
    }
    for (block, Block(y)) in blocks().zip(&room.y) {
        for (tile, y) in block.into_iter().zip(y) {
            for (panel, y) in pair.into_iter().zip(y) {
                for (token, y) in (tile * TILE..x.tokens()).zip(y) {
                    product.out.write(token, panel, y);
                }
            }
        }
    }
}

/// Some groups of two panels, ready for use.
#[repr(C, align(64))]
struct Weights {
    /// `[panel][quad][row, 4]`.
    codes: [[[i8; VECTOR]; COLS / 4]; 2],
    groups: [Scales; COLS / SMALLEST],
    /// Whether some offset is not 0.
    offsets: bool,
}

impl Weights {
    fn empty() -> Self {
        Self {
            codes: [[[0; VECTOR]; COLS / 4]; 2],
            groups: [Scales {
                scales: [[0.0; TILE_ROWS]; 2],
                offsets: [[0; TILE_ROWS]; 2],
            }; COLS / SMALLEST],
            offsets: false,
        }
    }
}

/// Fills [`Weights`].
struct Unpack<'a> {
    product: &'a Product<'a, 'a>,
    pair: [usize; 2],
    groups: Range<usize>,
    weights: &'a mut Weights,
}

impl Vectorized for Unpack<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Product { w, x, .. } = self.product;
        // A code of 8 bits less any zero point is no byte.
        let centred = w.scheme.bits == 4;
        self.weights.offsets = !centred && !w.scheme.symmetric;
        for (at, panel) in self.pair.into_iter().enumerate() {
            let panel = Panel::of(w, panel);
            let scales = self.weights.groups.iter_mut();
            let quads = self.weights.codes[at].chunks_exact_mut(x.group() / 4);
            for ((group, scales), quads) in self.groups.clone().zip(scales).zip(quads) {
                let weight_group = w.scheme.group_of(group * x.group());
                scales.scales[at] = panel.scales(weight_group);
                let zero_points = panel.zero_points(weight_group);
                let mut taken = [[128; 4]; TILE_ROWS];
                for row in 0..TILE_ROWS {
                    if centred {
                        taken[row] = [zero_points[row] as u8; 4];
                    }
                    let left = zero_points[row] - i32::from(taken[row][0]);
                    scales.offsets[at][row] = u32::from((-left) as u16);
                }
                let taken: [u8; VECTOR] = std::array::from_fn(|at| taken[at / 4][0]);
                let per_vector = if centred { 2 } else { 1 };
                let first = group * x.group() / 4 / per_vector;
                let (vectors, _) = panel.codes.as_chunks::<VECTOR>();
                for (codes, quads) in vectors[first..]
                    .iter()
                    .zip(quads.chunks_exact_mut(per_vector))
                {
                    match quads {
                        [low, high] => {
                            for i in 0..VECTOR {
                                low[i] = (codes[i] & 15).wrapping_sub(taken[i]).cast_signed();
                                high[i] = (codes[i] >> 4).wrapping_sub(taken[i]).cast_signed();
                            }
                        }
                        _ => {
                            for (quad, code) in quads[0].iter_mut().zip(codes) {
                                *quad = code.wrapping_sub(128).cast_signed();
                            }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use instructions::Amx;

#[cfg(target_arch = "x86_64")]
mod instructions {
    //! [`Tiles`] by AMX-INT8. Nothing lives in tiles between two blocks of assembly.

    use std::arch::asm;

    use super::{Block, Group, Operands, Scales, TILE, Tiles, VECTOR};
    use crate::kernels::isa::{Isa, Level};
    use crate::kernels::tile_config::TileConfig;

    /// Proof of AMX-INT8, and with it of AVX-512.
    pub(in super::super) struct Amx {
        depth: usize,
        steps: usize,
    }

    impl Amx {
        /// The proof, where `isa` gives it.
        pub(in super::super) fn of(isa: Isa) -> Option<Self> {
            (isa.level() == Level::Amx).then_some(Self { depth: 0, steps: 0 })
        }
    }

    /// One token's sums of two panels, scaled and added to the result. `t` is where its tile of tokens is in a block, `r`
    /// its number in that.
    macro_rules! scale {
        (none, $groups:literal, $t:literal, $r:literal) => {
            ""
        };
        (plain, $groups:literal, $t:literal, $r:literal) => {
            concat!(
                "vbroadcastss zmm4, dword ptr [",
                $groups,
                " + 4*",
                $r,
                "]\n",
                "vmulps zmm5, zmm4, zmm0\n",
                "vmulps zmm6, zmm4, zmm1\n",
                "vcvtdq2ps zmm7, zmmword ptr [{sums} + ",
                $t,
                " + 64*",
                $r,
                "]\n",
                "vcvtdq2ps zmm8, zmmword ptr [{sums} + ",
                $t,
                " + 1024 + 64*",
                $r,
                "]\n",
                "vfmadd213ps zmm7, zmm5, zmmword ptr [{y} + ",
                $t,
                " + 64*",
                $r,
                "]\n",
                "vfmadd213ps zmm8, zmm6, zmmword ptr [{y} + ",
                $t,
                " + 1024 + 64*",
                $r,
                "]\n",
                "vmovaps zmmword ptr [{y} + ",
                $t,
                " + 64*",
                $r,
                "], zmm7\n",
                "vmovaps zmmword ptr [{y} + ",
                $t,
                " + 1024 + 64*",
                $r,
                "], zmm8\n",
            )
        };
        (offsets, $groups:literal, $t:literal, $r:literal) => {
            concat!(
                "vbroadcastss zmm4, dword ptr [",
                $groups,
                " + 4*",
                $r,
                "]\n",
                "vmulps zmm5, zmm4, zmm0\n",
                "vmulps zmm6, zmm4, zmm1\n",
                "vmovdqa32 zmm7, zmmword ptr [{sums} + ",
                $t,
                " + 64*",
                $r,
                "]\n",
                "vmovdqa32 zmm8, zmmword ptr [{sums} + ",
                $t,
                " + 1024 + 64*",
                $r,
                "]\n",
                "vpbroadcastd zmm4, dword ptr [",
                $groups,
                " + 64 + 4*",
                $r,
                "]\n",
                "vpdpwssd zmm7, zmm2, zmm4\n",
                "vpdpwssd zmm8, zmm3, zmm4\n",
                "vcvtdq2ps zmm7, zmm7\n",
                "vcvtdq2ps zmm8, zmm8\n",
                "vfmadd213ps zmm7, zmm5, zmmword ptr [{y} + ",
                $t,
                " + 64*",
                $r,
                "]\n",
                "vfmadd213ps zmm8, zmm6, zmmword ptr [{y} + ",
                $t,
                " + 1024 + 64*",
                $r,
                "]\n",
                "vmovaps zmmword ptr [{y} + ",
                $t,
                " + 64*",
                $r,
                "], zmm7\n",
                "vmovaps zmmword ptr [{y} + ",
                $t,
                " + 1024 + 64*",
                $r,
                "], zmm8\n",
            )
        };
    }

    /// Some tokens of a tile.
    macro_rules! scales {
        ($kind:ident, $groups:literal, $t:literal, $($r:literal)*) => {
            concat!($(scale!($kind, $groups, $t, $r)),*)
        };
    }

    /// The four products of a step, with four pieces of other work between them.
    macro_rules! step {
        ($at:expr, $w0:expr, $w1:expr, $w2:expr, $w3:expr) => {
            concat!(
                "tileloadd tmm6, [{b0} + {line} + ",
                $at,
                "]\n",
                "tileloadd tmm4, [{a0} + {row} + ",
                $at,
                "]\n",
                "tdpbssd tmm0, tmm4, tmm6\n",
                $w0,
                "tileloadd tmm7, [{b1} + {line} + ",
                $at,
                "]\n",
                "tdpbssd tmm1, tmm4, tmm7\n",
                $w1,
                "tileloadd tmm5, [{a1} + {row} + ",
                $at,
                "]\n",
                "tdpbssd tmm2, tmm5, tmm6\n",
                $w2,
                "tdpbssd tmm3, tmm5, tmm7\n",
                $w3,
            )
        };
    }

    /// The products of a group, and meanwhile what is left of the group before.
    macro_rules! group {
        ($kind:ident, 1, $tile:literal) => {
            step!(
                "0",
                scales!($kind, "{s0}", "0", "0" "1" "2" "3" "4" "5" "6" "7"),
                scales!($kind, "{s0}", "0", "8" "9" "10" "11" "12" "13" "14" "15"),
                scales!($kind, "{s1}", "2048", "0" "1" "2" "3" "4" "5" "6" "7"),
                scales!($kind, "{s1}", "2048", "8" "9" "10" "11" "12" "13" "14" "15")
            )
        };
        ($kind:ident, 2, $tile:literal) => {
            concat!(
                step!(
                    "0",
                    scales!($kind, "{s0}", "0", "0" "1" "2" "3"),
                    scales!($kind, "{s0}", "0", "4" "5" "6" "7"),
                    scales!($kind, "{s0}", "0", "8" "9" "10" "11"),
                    scales!($kind, "{s0}", "0", "12" "13" "14" "15")
                ),
                step!(
                    $tile,
                    scales!($kind, "{s1}", "2048", "0" "1" "2" "3"),
                    scales!($kind, "{s1}", "2048", "4" "5" "6" "7"),
                    scales!($kind, "{s1}", "2048", "8" "9" "10" "11"),
                    scales!($kind, "{s1}", "2048", "12" "13" "14" "15")
                ),
            )
        };
        ($kind:ident, 3, $tile:literal) => {
            concat!(
                group!($kind, 2, $tile),
                step!(concat!("2*", $tile), "", "", "", "")
            )
        };
    }

    /// Reads the scales of two panels' rows.
    macro_rules! panels {
        (plain) => {
            "vmovaps zmm0, zmmword ptr [{scales}]
             vmovaps zmm1, zmmword ptr [{scales} + 64]"
        };
        (offsets) => {
            "vmovaps zmm0, zmmword ptr [{scales}]
             vmovaps zmm1, zmmword ptr [{scales} + 64]
             vmovdqa32 zmm2, zmmword ptr [{scales} + 128]
             vmovdqa32 zmm3, zmmword ptr [{scales} + 192]"
        };
    }

    /// All tokens of the last group.
    macro_rules! rest {
        ($kind:ident) => {
            concat!(
                scales!($kind, "{s0}", "0", "0" "1" "2" "3" "4" "5" "6" "7"),
                scales!($kind, "{s0}", "0", "8" "9" "10" "11" "12" "13" "14" "15"),
                scales!($kind, "{s1}", "2048", "0" "1" "2" "3" "4" "5" "6" "7"),
                scales!($kind, "{s1}", "2048", "8" "9" "10" "11" "12" "13" "14" "15"),
            )
        };
    }

    macro_rules! zero {
        () => {
            "tilezero tmm0
             tilezero tmm1
             tilezero tmm2
             tilezero tmm3"
        };
    }

    macro_rules! store {
        () => {
            "tilestored [{sums} + {line}], tmm0
             tilestored [{sums} + {line} + 1024], tmm1
             tilestored [{sums} + {line} + 2048], tmm2
             tilestored [{sums} + {line} + 3072], tmm3"
        };
    }

    macro_rules! advance {
        ($steps:literal, $tile:literal) => {
            concat!(
                "add {a0}, ",
                $steps,
                "*",
                $tile,
                "\n",
                "add {a1}, ",
                $steps,
                "*",
                $tile,
                "\n",
                "add {b0}, ",
                $steps,
                "*",
                $tile,
                "\n",
                "add {b1}, ",
                $steps,
                "*",
                $tile,
                "\n",
            )
        };
    }

    /// All groups of a block.
    macro_rules! multiply {
        ($kind:ident, $steps:tt, $depth:literal, $tile:literal, $x:expr, $sums:expr, $y:expr) => {
            asm!(
                zero!(),
                group!(none, $steps, $tile),
                advance!($steps, $tile),
                store!(),
                "dec {groups}",
                "jz 3f",
                "2:",
                panels!($kind),
                zero!(),
                group!($kind, $steps, $tile),
                advance!($steps, $tile),
                "add {scales}, 256",
                "add {s0}, 128",
                "add {s1}, 128",
                store!(),
                "dec {groups}",
                "jnz 2b",
                "3:",
                panels!($kind),
                rest!($kind),
                a0 = inout(reg) $x.a[0].as_ptr() => _,
                a1 = inout(reg) $x.a[1].as_ptr() => _,
                b0 = inout(reg) $x.b[0].as_ptr() => _,
                b1 = inout(reg) $x.b[1].as_ptr() => _,
                s0 = inout(reg) $x.a_groups[0].as_ptr() => _,
                s1 = inout(reg) $x.a_groups[1].as_ptr() => _,
                scales = inout(reg) $x.b_groups.as_ptr() => _,
                groups = inout(reg) $x.b_groups.len() => _,
                y = in(reg) $y,
                sums = in(reg) $sums,
                line = in(reg) VECTOR,
                row = in(reg) $depth as usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _,
                out("zmm5") _, out("zmm6") _, out("zmm7") _, out("zmm8") _,
                options(nostack),
            )
        };
    }

    impl Tiles for Amx {
        fn configure(&mut self, depth: usize, steps: usize) {
            assert!(depth == 32 || depth == 64, "depth {depth}");
            let mut config = TileConfig::WHOLE;
            config.row_bytes[4..6].fill(depth as u16);
            config.rows[6..8].fill(depth as u8 / 4);
            // SAFETY: an `Amx` exists only where detection found AMX and the operating system granted its tiles; the
            // instruction reads these 64 bytes.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly));
            }
            (self.depth, self.steps) = (depth, steps);
        }

        fn multiply(&mut self, x: Operands, sums: &mut Block<i32>, y: &mut Block<f32>) {
            const { assert!(size_of::<Group>() == 128 && size_of::<Scales>() == 256) };
            let groups = x.b_groups.len();
            let bytes = groups * self.steps * self.depth * TILE;
            assert!(
                groups > 0 && self.depth > 0,
                "configured for {groups} groups"
            );
            assert!(
                x.a.iter().all(|a| a.len() >= bytes)
                    && x.b.iter().all(|b| b.len() >= bytes)
                    && x.a_groups.iter().all(|a| a.len() >= groups),
                "operands of {groups} groups"
            );
            // SAFETY: tiles as above, and AVX-512 is part of the level. With the shapes of `configure` the loads stay inside
            // the lengths just checked; sums and results are whole blocks, aligned to vectors.
            unsafe {
                match (self.depth, self.steps, x.offsets) {
                    (64, 2, false) => multiply!(plain, 2, 64, "1024", x, sums, y),
                    (64, 2, true) => multiply!(offsets, 2, 64, "1024", x, sums, y),
                    (64, 1, false) => multiply!(plain, 1, 64, "1024", x, sums, y),
                    (64, 1, true) => multiply!(offsets, 1, 64, "1024", x, sums, y),
                    (32, 1, false) => multiply!(plain, 1, 32, "512", x, sums, y),
                    (32, 1, true) => multiply!(offsets, 1, 32, "512", x, sums, y),
                    (32, 3, false) => multiply!(plain, 3, 32, "512", x, sums, y),
                    (32, 3, true) => multiply!(offsets, 3, 32, "512", x, sums, y),
                    (depth, steps, _) => unreachable!("{steps} steps of {depth} columns"),
                }
            }
        }

        fn release(&mut self) {
            self.depth = 0;
            // SAFETY: tiles as above.
            unsafe { asm!("tilerelease", options(nostack, nomem)) }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    //! The same algorithm on tiles in software.

    use super::*;

    /// Tiles as Intel's definition of `TILELOADD`, `TDPBSSD` and `TILESTORED` has them (Instruction Set Reference,
    /// volume 2), and the scaling after them.
    pub(in super::super) struct Software {
        depth: usize,
        steps: usize,
    }

    impl Software {
        pub(in super::super) fn new() -> Self {
            Self { depth: 0, steps: 0 }
        }

        /// `TDPBSSD`: `c[m][n] += Σ_k Σ_i a[m][4k + i] · b[k][4n + i]`, both signed.
        fn dot(&self, c: &mut [[i32; TILE_ROWS]; TILE], a: &[i8], b: &[i8]) {
            for (m, c) in c.iter_mut().enumerate() {
                for k in 0..self.depth / 4 {
                    for (n, c) in c.iter_mut().enumerate() {
                        for i in 0..4 {
                            *c += i32::from(a[m * self.depth + 4 * k + i])
                                * i32::from(b[k * VECTOR + 4 * n + i]);
                        }
                    }
                }
            }
        }
    }

    impl Tiles for Software {
        fn configure(&mut self, depth: usize, steps: usize) {
            assert!(depth == 32 || depth == 64);
            (self.depth, self.steps) = (depth, steps);
        }

        fn multiply(
            &mut self,
            x: Operands,
            Block(sums): &mut Block<i32>,
            Block(y): &mut Block<f32>,
        ) {
            let bytes = self.depth * TILE;
            for (group, scales) in x.b_groups.iter().enumerate() {
                for tile in 0..2 {
                    for panel in 0..2 {
                        let sums = &mut sums[tile][panel];
                        *sums = [[0; TILE_ROWS]; TILE];
                        for step in group * self.steps..(group + 1) * self.steps {
                            self.dot(
                                sums,
                                &x.a[tile][step * bytes..],
                                &x.b[panel][step * bytes..],
                            );
                        }
                        let of_tokens = &x.a_groups[tile][group];
                        for (token, (y, sums)) in y[tile][panel].iter_mut().zip(sums).enumerate() {
                            for row in 0..TILE_ROWS {
                                let offset = i32::from(scales.offsets[panel][row] as u16 as i16);
                                assert!(x.offsets || offset == 0);
                                let sum = sums[row] + offset * of_tokens.sums[token];
                                let scale = scales.scales[panel][row] * of_tokens.scales[token];
                                y[row] = scale.mul_add(sum as f32, y[row]);
                            }
                        }
                    }
                }
            }
        }

        fn release(&mut self) {
            self.depth = 0;
        }
    }
}
