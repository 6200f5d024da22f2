//! Activations as the tiles of a matrix unit read them.

use super::Activations;
use crate::kernels::isa::{Isa, Vectorized};

/// Tokens of a tile.
pub(in crate::kernels) const TILE: usize = 16;

/// Columns that every group is a multiple of.
const STEP: usize = 32;

/// The codes of 16 tokens each, group after group and step after step; rows of 16 tokens that are not there, and columns
/// right of the last one, are 0.
///
/// A step is the 64 columns of a tile, or 32 where groups are not whole tiles. Steps follow each other without a gap: rows
/// as they stand are often a power of two apart and would drive each other out of the first cache.
#[derive(Clone, Debug)]
pub(in crate::kernels) struct Tiles {
    /// Bytes of a row of a tile.
    pub(in crate::kernels) depth: usize,
    /// Steps of a group.
    pub(in crate::kernels) steps: usize,
    /// `[tile of tokens][group][step][token][depth]`.
    codes: Vec<Line>,
    /// `[tile of tokens][group]`.
    groups: Vec<Group>,
    per_tile: usize,
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
    /// Columns of a group that is filled up to whole steps.
    fn width(&self) -> usize {
        self.steps * self.depth
    }

    /// Codes of a tile of tokens from a group on.
    pub(in crate::kernels) fn codes(&self, tile: usize, group: usize) -> &[i8] {
        let first = (tile * self.per_tile + group) * self.width() * TILE / size_of::<Line>();
        let lines = &self.codes[first..];
        // SAFETY: a line consists of its codes, without padding, and may be read as such.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), size_of_val(lines)) }
    }

    /// Scales and sums of a tile of tokens from a group on.
    pub(in crate::kernels) fn groups(&self, tile: usize, group: usize) -> &[Group] {
        &self.groups[tile * self.per_tile + group..(tile + 1) * self.per_tile]
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
        let lines = x.groups() * x.group() * TILE / size_of::<Line>();
        let mut codes = vec![Line([[0; STEP]; 2]); count * lines];
        let mut groups = vec![Group::NONE; count * x.groups()];
        for token in 0..x.tokens() {
            let (tile, row) = (token / TILE, token % TILE);
            let lines = &mut codes[tile * lines..][..lines];
            let (from, _) = x.codes(token).as_chunks::<STEP>();
            // What stands right of the last group is padding.
            let from = from
                .chunks(depth / STEP)
                .take(x.groups() * x.group() / depth);
            for (step, from) in from.enumerate() {
                // Sixteen rows of one piece or of two.
                let place = (step * TILE + row) * (depth / STEP);
                for (at, from) in (place..).zip(from) {
                    lines[at / 2].0[at % 2] = *from;
                }
            }
            let groups = &mut groups[tile * x.groups()..];
            let from = x.scales(token).iter().zip(x.sums(token));
            for (group, (&scale, &sum)) in groups.iter_mut().zip(from) {
                (group.scales[row], group.sums[row]) = (scale, sum);
            }
        }
        Tiles {
            depth,
            steps: x.group() / depth,
            codes,
            groups,
            per_tile: x.groups(),
        }
    }
}
