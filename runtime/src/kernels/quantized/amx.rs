//! The product on AMX: 32 tokens × 32 rows in four tiles of sums.
//!
//! A tile of activations is 16 tokens × 64 columns as they stand; a tile of weights is 16 quads × 16 rows, which is
//! what a tile of the artifact is once its nibbles are split. The sums of a group are stored and added to the result by
//! vector instructions while the tiles multiply the next group. Everything but [`Tiles`] is portable.

use std::ops::Range;

use qbin_format::TILE_ROWS;

use super::Product;
use super::blocks::parts;
use super::panel::{Panel, VECTOR};
use crate::kernels::activations::Activations;
use crate::kernels::isa::{Isa, Vectorized};

/// Columns of the smallest piece of a group.
const STEP: usize = 32;
/// Steps that are unpacked at a time: two panels of them take 16 KiB, half of an L1 cache.
const STEPS: usize = 16;
/// Tokens of a block.
const TOKENS: usize = 32;
/// Tokens or rows of a tile.
const TILE: usize = 16;
/// Bytes of activations that stay in the L2 cache while all panels pass by; not tuned.
const CACHED: usize = 512 << 10;

/// Sums over a group, `[tile of tokens, panel, token, row]`.
#[repr(C, align(64))]
pub(super) struct Sums(pub(super) [[[[i32; TILE]; TILE]; 2]; 2]);

/// Unpacked codes of 32 columns of a panel, `[quad, row, 4]`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Step([u8; STEP * TILE_ROWS]);

/// The instructions. A value of an implementation is the proof that they may be executed.
pub(super) trait Tiles {
    /// Sets the tiles' shapes: activations `rows` × `depth` bytes, weights `depth / 4` × 64 bytes, sums `rows` × 16.
    fn configure(&mut self, rows: usize, depth: usize);

    /// For every pair of `a` and `b`: `sums[i][j] = Σ a[i] · b[j]` over `slices` of `depth` columns, of which those of
    /// `a[i]` follow each other within rows that begin every `stride` bytes, and those of `b[j]` follow each other.
    ///
    /// # Panics
    /// If a slice is too short.
    fn multiply(
        &mut self,
        a: [&[i8]; 2],
        stride: usize,
        b: [&[u8]; 2],
        slices: usize,
        sums: &mut Sums,
    );

    /// Gives the tiles back, so that a switch of threads need not save them.
    fn release(&mut self);
}

/// Computes a product, with vector instructions of `isa` beside the tiles.
pub(super) fn run<T: Tiles>(isa: Isa, mut tiles: T, mut product: Product) {
    let Product { x, ref panels, .. } = product;
    let depth = if x.group().is_multiple_of(64) { 64 } else { 32 };
    let tokens_at_once = (CACHED / x.stride()).max(TOKENS);
    let panels = panels.clone();
    for tokens in parts(0..x.tokens(), tokens_at_once) {
        // Blocks of about equal size have at least a tile of tokens, if there are so many.
        tiles.configure(tokens.len().min(TILE), depth);
        for first in panels.clone().step_by(2) {
            let pair = [first, (first + 1).min(panels.end - 1)];
            multiply_pair(isa, &mut tiles, &mut product, pair, tokens.clone(), depth);
        }
    }
    tiles.release();
}

/// Two panels, which are the same where only one is left, for some tokens.
fn multiply_pair<T: Tiles>(
    isa: Isa,
    tiles: &mut T,
    product: &mut Product,
    pair: [usize; 2],
    tokens: Range<usize>,
    depth: usize,
) {
    let x = product.x;
    let mut y = vec![[[0.0; TILE_ROWS]; 2]; tokens.len()];
    let mut weights = Weights::empty();
    let per_group = x.group() / STEP;
    for groups in parts(0..x.groups(), STEPS / per_group) {
        isa.run(Unpack {
            product,
            pair,
            groups: groups.clone(),
            weights: &mut weights,
        });
        for block in parts(tokens.clone(), TOKENS) {
            let y = &mut y[block.start - tokens.start..][..block.len()];
            Block {
                isa,
                x,
                weights: &weights,
                tokens: block,
                groups: groups.clone(),
                depth,
            }
            .multiply(tiles, y);
        }
    }
    for (token, y) in tokens.zip(&y) {
        for (panel, y) in pair.into_iter().zip(y) {
            product.out.write(token, panel, y);
        }
    }
}

/// Some groups of two panels, ready for use.
struct Weights {
    steps: [[Step; STEPS]; 2],
    /// `[group, panel, row]`.
    scales: [[[f32; TILE_ROWS]; 2]; STEPS],
    zero_points: [[[i32; TILE_ROWS]; 2]; STEPS],
}

impl Weights {
    fn empty() -> Self {
        Self {
            steps: [[Step([0; STEP * TILE_ROWS]); STEPS]; 2],
            scales: [[[0.0; TILE_ROWS]; 2]; STEPS],
            zero_points: [[[0; TILE_ROWS]; 2]; STEPS],
        }
    }

    /// Codes of a panel from a step on.
    fn codes(&self, panel: usize, step: usize) -> &[u8] {
        let steps = &self.steps[panel][step..];
        // SAFETY: a step consists of its bytes, without padding, and may be read as such.
        unsafe { std::slice::from_raw_parts(steps.as_ptr().cast(), size_of_val(steps)) }
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
        for (at, panel) in self.pair.into_iter().enumerate() {
            let panel = Panel::of(w, panel);
            for (to, group) in self.groups.clone().enumerate() {
                let group = w.scheme.group_of(group * x.group());
                self.weights.scales[to][at] = panel.scales(group);
                self.weights.zero_points[to][at] = panel.zero_points(group);
            }
            let steps = self.groups.start * x.group() / STEP
                ..(self.groups.end * x.group()).min(x.stride()) / STEP;
            let bytes = panel.codes.len() / (x.stride() / STEP);
            let codes = panel.codes[steps.start * bytes..steps.end * bytes].chunks_exact(bytes);
            for (step, codes) in self.weights.steps[at].iter_mut().zip(codes) {
                unpack_step(codes, &mut step.0);
            }
        }
    }
}

/// Writes the codes of a step byte by byte.
#[inline(always)]
fn unpack_step(codes: &[u8], out: &mut [u8; STEP * TILE_ROWS]) {
    if codes.len() == out.len() {
        out.copy_from_slice(codes);
        return;
    }
    let (codes, _) = codes.as_chunks::<VECTOR>();
    for (codes, out) in codes.iter().zip(out.chunks_exact_mut(2 * VECTOR)) {
        let (low, high) = out.split_at_mut(VECTOR);
        for ((low, high), code) in low.iter_mut().zip(high).zip(codes) {
            *low = code & 15;
            *high = code >> 4;
        }
    }
}

/// At most 32 tokens of some groups of two panels.
struct Block<'a> {
    isa: Isa,
    x: &'a Activations,
    weights: &'a Weights,
    tokens: Range<usize>,
    groups: Range<usize>,
    depth: usize,
}

impl Block<'_> {
    /// Adds the block to `y`, `[tokens, panel, row]`.
    fn multiply<T: Tiles>(&self, tiles: &mut T, y: &mut [[[f32; TILE_ROWS]; 2]]) {
        let Self { x, ref groups, .. } = *self;
        let mut sums = [const { Sums([[[[0; TILE]; TILE]; 2]; 2]) }; 2];
        let [now, before] = &mut sums;
        let (mut now, mut before) = (now, before);
        for group in groups.clone() {
            let cols = group * x.group()..((group + 1) * x.group()).min(x.stride());
            let step = (group - groups.start) * x.group() / STEP;
            let b = [0, 1].map(|panel| self.weights.codes(panel, step));
            let a =
                [0, self.second()].map(|token| &x.rows(self.tokens.start + token)[cols.start..]);
            tiles.multiply(a, x.stride(), b, cols.len() / self.depth, now);
            if group > groups.start {
                self.flush(group - 1, before, y);
            }
            std::mem::swap(&mut now, &mut before);
        }
        self.flush(groups.end - 1, before, y);
    }

    /// Token of the block where the second tile begins; it may overlap the first.
    fn second(&self) -> usize {
        self.tokens.len() - self.tokens.len().min(TILE)
    }

    fn flush(&self, group: usize, sums: &Sums, y: &mut [[[f32; TILE_ROWS]; 2]]) {
        self.isa.run(Flush {
            block: self,
            group,
            sums,
            y,
        });
    }
}

/// Adds the sums of one group to the result.
struct Flush<'a> {
    block: &'a Block<'a>,
    group: usize,
    sums: &'a Sums,
    y: &'a mut [[[f32; TILE_ROWS]; 2]],
}

impl Vectorized for Flush<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Block {
            x,
            weights,
            ref tokens,
            ref groups,
            ..
        } = *self.block;
        let s_w = &weights.scales[self.group - groups.start];
        let z = &weights.zero_points[self.group - groups.start];
        for (at, (token, y)) in tokens.clone().zip(self.y).enumerate() {
            let (s_a, sum_a) = (x.scales(token)[self.group], x.sums(token)[self.group]);
            let (tile, row) = if at < TILE {
                (0, at)
            } else {
                (1, at - self.block.second())
            };
            for panel in 0..2 {
                let sum_qa = &self.sums.0[tile][panel][row];
                for row in 0..TILE_ROWS {
                    let centred = (sum_qa[row] - z[panel][row] * sum_a) as f32;
                    y[panel][row] = (s_w[panel][row] * s_a).mul_add(centred, y[panel][row]);
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

    use super::{Sums, TILE, Tiles, VECTOR};
    use crate::kernels::isa::{Isa, Level};

    /// Proof of AMX-INT8.
    pub(in super::super) struct Amx {
        rows: usize,
        depth: usize,
    }

    impl Amx {
        /// The proof, where `isa` gives it.
        pub(in super::super) fn of(isa: Isa) -> Option<Self> {
            (isa.level() == Level::Amx).then_some(Self { rows: 0, depth: 0 })
        }
    }

    /// What `ldtilecfg` reads, palette 1.
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        /// Bytes of a row, per tile.
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    impl Tiles for Amx {
        fn configure(&mut self, rows: usize, depth: usize) {
            assert!(
                (1..=TILE).contains(&rows) && (depth == 32 || depth == 64),
                "{rows} rows, depth {depth}"
            );
            let (r, d) = (rows as u8, depth as u8);
            let config = Config {
                palette: 1,
                start_row: 0,
                reserved: [0; 14],
                row_bytes: [
                    64,
                    64,
                    64,
                    64,
                    d.into(),
                    d.into(),
                    64,
                    64,
                    0,
                    0,
                    0,
                    0,
                    0,
                    0,
                    0,
                    0,
                ],
                rows: [r, r, r, r, r, r, d / 4, d / 4, 0, 0, 0, 0, 0, 0, 0, 0],
            };
            // SAFETY: an `Amx` exists only where detection found AMX and the operating system granted its tiles; the
            // instruction reads these 64 bytes.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly));
            }
            (self.rows, self.depth) = (rows, depth);
        }

        fn multiply(
            &mut self,
            a: [&[i8]; 2],
            stride: usize,
            b: [&[u8]; 2],
            slices: usize,
            sums: &mut Sums,
        ) {
            let Self { rows, depth } = *self;
            assert!(slices > 0 && rows > 0, "{slices} slices of {rows} rows");
            let a_len = (rows - 1) * stride + slices * depth;
            assert!(
                a.iter().all(|a| a.len() >= a_len)
                    && b.iter().all(|b| b.len() >= slices * depth * TILE)
            );
            // SAFETY: tiles as above; with the shapes of `configure` the loads stay inside the lengths just checked,
            // and the stores write at most 16 rows of 64 bytes into each of the four parts of `sums`.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    "tileloadd tmm6, [{b0} + {line}]",
                    "tileloadd tmm4, [{a0} + {stride}]",
                    "tdpbsud tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{b1} + {line}]",
                    "tdpbsud tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{a1} + {stride}]",
                    "tdpbsud tmm2, tmm5, tmm6",
                    "tdpbsud tmm3, tmm5, tmm7",
                    "add {a0}, {depth}",
                    "add {a1}, {depth}",
                    "add {b0}, {b_bytes}",
                    "add {b1}, {b_bytes}",
                    "dec {slices}",
                    "jnz 2b",
                    "tilestored [{sums} + {line}], tmm0",
                    "tilestored [{sums} + {line} + 1024], tmm1",
                    "tilestored [{sums} + {line} + 2048], tmm2",
                    "tilestored [{sums} + {line} + 3072], tmm3",
                    a0 = inout(reg) a[0].as_ptr() => _,
                    a1 = inout(reg) a[1].as_ptr() => _,
                    b0 = inout(reg) b[0].as_ptr() => _,
                    b1 = inout(reg) b[1].as_ptr() => _,
                    slices = inout(reg) slices => _,
                    stride = in(reg) stride,
                    line = in(reg) VECTOR,
                    depth = in(reg) depth,
                    b_bytes = in(reg) depth * TILE,
                    sums = in(reg) sums,
                    out("tmm0") _,
                    out("tmm1") _,
                    out("tmm2") _,
                    out("tmm3") _,
                    out("tmm4") _,
                    out("tmm5") _,
                    out("tmm6") _,
                    out("tmm7") _,
                    options(nostack),
                );
            }
        }

        fn release(&mut self) {
            self.rows = 0;
            // SAFETY: tiles as above.
            unsafe { asm!("tilerelease", options(nostack, nomem)) }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    //! The same algorithm on tiles in software.

    use super::*;

    /// Tiles as Intel's definition of `TILELOADD`, `TDPBSUD` and `TILESTORED` has them (Instruction Set Reference,
    /// volume 2).
    pub(in super::super) struct Software {
        rows: usize,
        depth: usize,
    }

    impl Software {
        pub(in super::super) fn new() -> Self {
            Self { rows: 0, depth: 0 }
        }

        /// `TDPBSUD`: `c[m][n] += Σ_k Σ_i a[m][4k + i] · b[k][4n + i]`, `a` signed and `b` unsigned.
        fn dot(&self, c: &mut [[i32; TILE]; TILE], a: &[i8], stride: usize, b: &[u8]) {
            for (m, c) in c.iter_mut().enumerate().take(self.rows) {
                for k in 0..self.depth / 4 {
                    for (n, c) in c.iter_mut().enumerate() {
                        for i in 0..4 {
                            *c += i32::from(a[m * stride + 4 * k + i])
                                * i32::from(b[k * VECTOR + 4 * n + i]);
                        }
                    }
                }
            }
        }
    }

    impl Tiles for Software {
        fn configure(&mut self, rows: usize, depth: usize) {
            assert!((1..=TILE).contains(&rows) && (depth == 32 || depth == 64));
            (self.rows, self.depth) = (rows, depth);
        }

        fn multiply(
            &mut self,
            a: [&[i8]; 2],
            stride: usize,
            b: [&[u8]; 2],
            slices: usize,
            sums: &mut Sums,
        ) {
            assert!(slices > 0 && self.rows > 0);
            for (a, sums) in a.iter().zip(&mut sums.0) {
                for (b, sums) in b.iter().zip(sums) {
                    sums[..self.rows].fill([0; TILE]);
                    for slice in 0..slices {
                        let (a, b) = (&a[slice * self.depth..], &b[slice * self.depth * TILE..]);
                        self.dot(sums, a, stride, b);
                    }
                }
            }
        }

        fn release(&mut self) {
            self.rows = 0;
        }
    }
}
