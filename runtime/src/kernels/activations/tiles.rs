//! Activations as the tiles of a matrix unit read them.

use std::ops::Range;

use super::Activations;
use crate::kernels::isa::{Isa, Vectorized};

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
#[derive(Clone, Debug)]
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
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([[i8; STEP]; 2]);

/// What belongs to the codes of a group, one value for each token of a tile.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(in crate::kernels) struct Group {
    pub(in crate::kernels) scales: [f32; TILE],
    pub(in crate::kernels) sums: [i32; TILE],
}

impl Group {
    const NONE: Self = Self {
        scales: [0.0; TILE],
        sums: [0; TILE],
    };
}

impl Tiles {
    /// Blocks of all tokens.
    pub(in crate::kernels) fn blocks(&self) -> usize {
        self.count.div_ceil(BLOCK)
    }

    /// Codes, scales and sums of the tiles of a block for a group.
    pub(in crate::kernels) fn group(&self, block: usize, group: usize) -> (&[i8], &[Group]) {
        let tiles = self.tiles(block, group);
        let lines = self.steps * self.depth * TILE / size_of::<Line>();
        let codes = &self.codes[tiles.start * lines..tiles.end * lines];
        // SAFETY: a line consists of its codes, without padding, and may be read as such.
        let codes =
            unsafe { std::slice::from_raw_parts(codes.as_ptr().cast(), size_of_val(codes)) };
        (codes, &self.groups[tiles])
    }

    /// Where the tiles of a block for a group are among all.
    fn tiles(&self, block: usize, group: usize) -> Range<usize> {
        let first = block * BLOCK;
        let tiles = BLOCK.min(self.count - first);
        let start = first * self.in_row + group * tiles;
        start..start + tiles
    }
}

impl Activations {
    /// These, in tiles; the first to ask makes them.
    ///
    /// # Panics
    /// If a group is not 32, 64, 96 or 128 columns wide.
    pub(in crate::kernels) fn tiles(&self, isa: Isa) -> &Tiles {
        self.tiles.get_or_init(|| isa.run(Arrange(self)))
    }
}

struct Arrange<'a>(&'a Activations);

impl Vectorized for Arrange<'_> {
    type Output = Tiles;

    #[inline(always)]
    fn run(self) -> Tiles {
        let Self(x) = self;
        let depth = if x.group().is_multiple_of(64) {
            64
        } else {
            STEP
        };
        assert!(x.group().is_multiple_of(depth), "groups of {}", x.group());
        let count = x.tokens().div_ceil(TILE);
        let mut tiles = Tiles {
            depth,
            steps: x.group() / depth,
            count,
            in_row: x.groups(),
            codes: vec![
                Line([[0; STEP]; 2]);
                count * x.groups() * x.group() * TILE / size_of::<Line>()
            ],
            groups: vec![Group::NONE; count * x.groups()],
        };
        let pieces = depth / STEP;
        for token in 0..x.tokens() {
            let (tile, row) = (token / TILE, token % TILE);
            let (codes, _) = x.codes(token).as_chunks::<STEP>();
            let scales = x.scales(token).iter().zip(x.sums(token));
            let codes = codes.chunks(x.group() / STEP);
            for (group, (codes, (&scale, &sum))) in codes.zip(scales).enumerate() {
                let place = tiles.tiles(tile / BLOCK, group).start + tile % BLOCK;
                tiles.groups[place].scales[row] = scale;
                tiles.groups[place].sums[row] = sum;
                for (step, codes) in codes.chunks(pieces).enumerate() {
                    // Sixteen rows of one piece or of two.
                    let first = ((place * tiles.steps + step) * TILE + row) * pieces;
                    for (at, codes) in (first..).zip(codes) {
                        tiles.codes[at / 2].0[at % 2] = *codes;
                    }
                }
            }
        }
        tiles
    }
}
