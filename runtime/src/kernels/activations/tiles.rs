//! Activations as the tiles of a matrix unit read them.

use std::ops::Range;

use qbin_format::TILE_COLS;

use super::{Activations, grow};
use crate::kernels::isa::{Isa, Level, Vectorized};
use crate::kernels::pool::Pool;

/// Tokens up to which vector instructions are faster.
const FEW: usize = 4;

/// Tokens of a tile.
pub(in crate::kernels) const TILE: usize = 16;

/// Columns that every group is a multiple of.
const STEP: usize = 32;

/// Tiles of a block: what these tokens add to two panels' rows for one group stays in the first cache.
pub(in crate::kernels) const BLOCK: usize = 8;

/// The codes of 16 tokens each, in blocks of 8 tiles; rows of tokens that are not there, and columns right of the last one, are
/// 0.
///
/// A step is the 64 columns of a tile, or 32 where groups are not whole tiles. What is read together lies together: rows as they
/// stand are often a power of two apart and would drive each other out of the first cache.
#[derive(Clone, Debug, Default)]
pub(in crate::kernels) struct Tiles {
    /// Bytes of a row of a tile.
    pub(in crate::kernels) depth: usize,
    /// Steps of a group.
    pub(in crate::kernels) steps: usize,
    /// Tiles of all tokens.
    count: usize,
    /// Groups of a row.
    in_row: usize,
    /// `[block][group][tile][step][token][depth]`.
    codes: Vec<Line>,
    /// `[block][group][tile]`.
    groups: Vec<Group>,
}

/// A cache line of codes: one row of a tile, or two.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
struct Line([[i8; STEP]; 2]);

/// What belongs to the codes of a group, one value for each token of a tile.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
pub(in crate::kernels) struct Group {
    pub(in crate::kernels) scales: [f32; TILE],
    pub(in crate::kernels) sums: [i32; TILE],
}

/// Whether there are tiles for groups of this many columns.
fn serves(group: usize) -> bool {
    matches!(group, 32 | 64 | 128)
}

impl Tiles {
    /// Blocks of all tokens.
    pub(in crate::kernels) fn blocks(&self) -> usize {
        self.count.div_ceil(BLOCK)
    }

    /// Codes, scales and sums of the tiles of a block for some groups.
    pub(in crate::kernels) fn groups(
        &self,
        block: usize,
        groups: Range<usize>,
    ) -> (&[i8], &[Group]) {
        let first = block * BLOCK;
        let tiles = BLOCK.min(self.count - first);
        let tiles =
            first * self.in_row + groups.start * tiles..first * self.in_row + groups.end * tiles;
        let lines = self.lines();
        let codes = &self.codes[tiles.start * lines..tiles.end * lines];
        // SAFETY: a line consists of its codes, without padding, and may be read as such.
        let codes =
            unsafe { std::slice::from_raw_parts(codes.as_ptr().cast(), size_of_val(codes)) };
        (codes, &self.groups[tiles])
    }

    /// Lines of a tile and group.
    fn lines(&self) -> usize {
        self.steps * self.depth * TILE / size_of::<Line>()
    }
}

impl Activations {
    /// Arranges them in tiles, too, on all threads, if `isa` multiplies tiles and there are tokens enough for it.
    pub(crate) fn arrange(&mut self, isa: Isa, pool: &Pool) {
        if isa.level() == Level::Amx && self.tokens > FEW && serves(self.group) {
            self.arrange_in_tiles(isa, pool);
        }
    }

    /// Arranges them in tiles, too.
    ///
    /// # Panics
    /// If no tile serves their groups.
    pub(in crate::kernels) fn arrange_in_tiles(&mut self, isa: Isa, pool: &Pool) {
        assert!(serves(self.group), "groups of {}", self.group);
        let mut tiles = self.spare.take().unwrap_or_default();
        tiles.depth = self.group.min(TILE_COLS);
        tiles.steps = self.group / tiles.depth;
        tiles.count = self.tokens.div_ceil(TILE);
        tiles.in_row = self.groups();
        let lines = tiles.lines();
        let (of_tile, of_block) = (tiles.in_row * lines, BLOCK * tiles.in_row);
        let (all_lines, all_groups) = (tiles.count * of_tile, tiles.count * tiles.in_row);
        grow(&mut tiles.codes, all_lines);
        grow(&mut tiles.groups, all_groups);
        let (depth, x) = (tiles.depth, &*self);
        pool.parts(
            &mut tiles.codes[..all_lines],
            of_block * lines,
            |block, lines| {
                isa.run(Arrange {
                    x,
                    depth,
                    block,
                    lines,
                });
            },
        );
        pool.parts(
            &mut tiles.groups[..all_groups],
            of_block,
            |block, groups| {
                let count = groups.len() / x.groups();
                for (at, of_tokens) in groups.iter_mut().enumerate() {
                    let (group, tile) = (at / count, block * BLOCK + at % count);
                    *of_tokens = Group::default();
                    for (row, token) in (tile * TILE..x.tokens().min((tile + 1) * TILE)).enumerate()
                    {
                        of_tokens.scales[row] = x.scales(token)[group];
                        of_tokens.sums[row] = x.sums(token)[group];
                    }
                }
            },
        );
        self.tiles = Some(tiles);
    }

    /// These in tiles, if they were arranged so.
    pub(in crate::kernels) fn tiles(&self) -> Option<&Tiles> {
        self.tiles.as_ref()
    }
}

/// Writes the tiles of a block.
struct Arrange<'a> {
    x: &'a Activations,
    depth: usize,
    block: usize,
    lines: &'a mut [Line],
}

impl Vectorized for Arrange<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { x, depth, .. } = self;
        let tile_lines = x.group() * TILE / size_of::<Line>();
        let count = self.lines.len() / tile_lines / x.groups();
        for (at, lines) in self.lines.chunks_exact_mut(tile_lines).enumerate() {
            let (group, tile) = (at / count, self.block * BLOCK + at % count);
            for row in 0..TILE {
                let token = tile * TILE + row;
                let (codes, _) = match token < x.tokens() {
                    true => x.codes(token)[group * x.group()..].as_chunks::<STEP>(),
                    false => (&[][..], &[][..]),
                };
                for piece in 0..x.group() / STEP {
                    // Sixteen rows of one piece or of two.
                    let (step, half) = (piece * STEP / depth, piece * STEP % depth / STEP);
                    let to = (step * TILE + row) * depth / STEP + half;
                    lines[to / 2].0[to % 2] = codes.get(piece).copied().unwrap_or([0; STEP]);
                }
            }
        }
    }
}
