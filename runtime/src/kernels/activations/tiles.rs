//! Activations as the tiles of a matrix unit read them.

use qbin_format::TILE_COLS;

use super::{STEP, grow};
use crate::kernels::pool::Base;

/// Tokens of a tile.
pub(in crate::kernels) const TILE: usize = 16;

/// Tiles of a block: what these tokens add to two panels' rows for one group stays in the first cache.
const BLOCK: usize = 8;

/// The codes of 16 tokens each, in blocks of 8 tiles; columns right of the last one are 0, and rows of tokens that are not there
/// whatever they were: nobody reads what becomes of them.
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
    pub(in crate::kernels) in_row: usize,
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
pub(super) fn serve(group: usize) -> bool {
    matches!(group, 32 | 64 | 128)
}

impl Tiles {
    /// Makes room for `tokens` rows of groups of `group` columns; what is there is unspecified until it is written.
    ///
    /// # Panics
    /// If no tile serves such groups.
    pub(super) fn reset(&mut self, tokens: usize, groups: usize, group: usize) {
        assert!(serve(group), "groups of {group}");
        self.depth = group.min(TILE_COLS);
        self.steps = group / self.depth;
        self.count = tokens.div_ceil(TILE);
        self.in_row = groups;
        let all = self.count * self.in_row;
        // What is behind a tile may be read.
        let lines = (all + 1) * self.lines();
        grow(&mut self.codes, lines);
        grow(&mut self.groups, all);
    }

    /// Where they are written.
    pub(super) fn place(&mut self) -> Place {
        Place {
            codes: Base::of(&mut self.codes),
            groups: Base::of(&mut self.groups),
            depth: self.depth,
            lines: self.lines(),
            count: self.count,
            in_row: self.in_row,
        }
    }

    /// Lines of a tile and group.
    fn lines(&self) -> usize {
        self.steps * self.depth * TILE / size_of::<Line>()
    }
}

/// Blocks of the same number of tiles, one after the other.
#[cfg(any(target_arch = "x86_64", test))]
#[derive(Clone, Copy, Debug)]
pub(in crate::kernels) struct Run {
    /// The first tile.
    pub(in crate::kernels) first: usize,
    pub(in crate::kernels) blocks: usize,
    /// Tiles of a block.
    pub(in crate::kernels) tiles: usize,
}

#[cfg(any(target_arch = "x86_64", test))]
impl Tiles {
    /// All blocks: those that are full, and one that is not.
    pub(in crate::kernels) fn runs(&self) -> impl Iterator<Item = Run> + use<> {
        let (blocks, rest) = (self.count / BLOCK, self.count % BLOCK);
        let full = Run {
            first: 0,
            blocks,
            tiles: BLOCK,
        };
        let last = Run {
            first: blocks * BLOCK,
            blocks: 1,
            tiles: rest,
        };
        [full, last]
            .into_iter()
            .filter(|run| run.blocks > 0 && run.tiles > 0)
    }

    /// Codes, scales and sums of some groups in all blocks of a run, with the groups between those of one block and the next, and
    /// the codes of a tile behind them.
    pub(in crate::kernels) fn groups(
        &self,
        run: Run,
        groups: std::ops::Range<usize>,
    ) -> (&[i8], &[Group]) {
        let first = run.first * self.in_row;
        let last = first + (run.blocks - 1) * run.tiles * self.in_row;
        let tiles = first + groups.start * run.tiles..last + groups.end * run.tiles;
        let lines = self.lines();
        let codes = &self.codes[tiles.start * lines..(tiles.end + 1) * lines];
        // SAFETY: a line consists of its codes, without padding, and may be read as such.
        let codes =
            unsafe { std::slice::from_raw_parts(codes.as_ptr().cast(), size_of_val(codes)) };
        (codes, &self.groups[tiles])
    }
}

/// Where tiles are written, by several threads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    codes: Base<Line>,
    groups: Base<Group>,
    depth: usize,
    lines: usize,
    count: usize,
    in_row: usize,
}

impl Place {
    /// Writes a group of a token, with 0 right of its columns.
    ///
    /// # Safety
    /// The tiles are borrowed mutably and have this token and group, which nobody else touches meanwhile.
    #[inline(always)]
    pub(super) unsafe fn put(
        &self,
        token: usize,
        group: usize,
        codes: &[[i8; STEP]; 4],
        scale: f32,
        sum: i32,
    ) {
        let (tile, row) = (token / TILE, token % TILE);
        let first = tile / BLOCK * BLOCK;
        let tiles = BLOCK.min(self.count - first);
        let at = first * self.in_row + group * tiles + tile - first;
        let first = self.codes.at(at * self.lines).cast::<i8>();
        let pieces = self.lines * size_of::<Line>() / TILE / STEP;
        for (piece, codes) in codes.iter().enumerate().take(pieces) {
            // Sixteen rows of one piece or of two.
            let (step, within) = (piece * STEP / self.depth, piece * STEP % self.depth);
            // SAFETY: inside the lines of this tile and group, and of this token alone.
            unsafe {
                let to = first.add((step * TILE + row) * self.depth + within);
                to.cast::<[i8; STEP]>().write_unaligned(*codes);
            }
        }
        // SAFETY: these two values are of this token alone.
        unsafe {
            let group = self.groups.at(at);
            (&raw mut (*group).scales[row]).write(scale);
            (&raw mut (*group).sums[row]).write(sum);
        }
    }
}
