//! The moments of slabs, added to a matrix.
//!
//! A block of the matrix is fetched once for all slabs. In between it lies in the second cache as tiles: the rows of the
//! matrix itself are often a power of two apart and would drive each other out.

use rayon::prelude::*;

use super::Slab;
use super::tile::{self, Sums, WIDTH};
use crate::kernels::gemm::{Store, View, product};
use crate::kernels::isa::{Isa, Vectorized};

/// Panels of rows of a block: those of a slab stay in a 1 MiB second cache, together with the tiles.
const ROWS: usize = 4;
/// Panels of columns of a block.
const COLS: usize = 8;

/// A piece of the matrix.
type Tile = [[f64; WIDTH]; WIDTH];

/// Adds `Σ x·xᵀ` of all slabs to `second` (`[features, features]`, row major), columns at and before each row's own only;
/// slab after slab for each element.
///
/// # Panics
/// If `second` has another shape.
pub fn add(isa: Isa, slabs: &[Slab], second: &mut [f64]) {
    let Some(n) = slabs.first().map(|slab| slab.features) else {
        return;
    };
    assert!(
        second.len() == n * n && slabs.iter().all(|slab| slab.features == n),
        "second is not [features, features]"
    );
    let slabs: Vec<Addend<'_>> = slabs
        .iter()
        .filter(|slab| !slab.words.is_empty())
        .map(Addend::new)
        .collect();
    // The lower rows are longer and come first, so that the last tasks are short.
    second
        .par_chunks_mut(ROWS * WIDTH * n)
        .enumerate()
        .rev()
        .for_each(|(task, rows)| add_rows(isa, &slabs, task * ROWS, n, rows));
}

/// A slab, and its massive tokens in f64.
struct Addend<'a> {
    slab: &'a Slab,
    /// `[massive tokens, features]`.
    massive: Vec<f64>,
}

impl<'a> Addend<'a> {
    fn new(slab: &'a Slab) -> Self {
        let massive = slab.massive.iter().map(|&x| f64::from(x)).collect();
        Self { slab, massive }
    }

    /// Adds to the tiles of the panels of rows from `first` and of columns from `start` on, at and before the diagonal.
    fn add(
        &self,
        isa: Isa,
        first: usize,
        start: usize,
        tiles: &mut [[Tile; ROWS]; COLS],
        last: usize,
    ) {
        let slab = self.slab;
        let mut sums: Sums = [[0; WIDTH]; WIDTH];
        for (right, tiles) in (start..last).zip(tiles) {
            for (left, tile) in (first..last).zip(tiles).skip(right.saturating_sub(first)) {
                tile::products(isa, slab.panel(left), slab.panel(right), &mut sums);
                isa.run(AddSums {
                    slab,
                    left,
                    right,
                    sums: &sums,
                    tile,
                });
                self.add_massive(isa, left, right, tile);
            }
        }
    }

    /// Adds the massive tokens' products.
    fn add_massive(&self, isa: Isa, left: usize, right: usize, tile: &mut Tile) {
        if self.massive.is_empty() {
            return;
        }
        let n = self.slab.features;
        let massive = View::row_major(&self.massive, self.massive.len() / n, n);
        let [left, right] = [left, right].map(|panel| {
            let first = panel * WIDTH;
            massive.subcols(first, WIDTH.min(n - first))
        });
        let tile = tile.as_flattened_mut();
        product(isa, tile, WIDTH, Store::Add, left.transpose(), right);
    }
}

/// The rows from panel `first` on.
fn add_rows(isa: Isa, slabs: &[Addend<'_>], first: usize, n: usize, rows: &mut [f64]) {
    let last = first + (rows.len() / n).div_ceil(WIDTH);
    let mut tiles = vec![[[[0f64; WIDTH]; WIDTH]; ROWS]; COLS];
    let tiles: &mut [[Tile; ROWS]; COLS] = tiles.as_mut_array().expect("as many");
    for start in (0..last).step_by(COLS) {
        for (at, row) in rows.chunks(n).enumerate() {
            let row = &row[..=first * WIDTH + at];
            for (values, tiles) in row[(start * WIDTH).min(row.len())..]
                .chunks(WIDTH)
                .zip(&mut *tiles)
            {
                tiles[at / WIDTH][at % WIDTH][..values.len()].copy_from_slice(values);
            }
        }
        for slab in slabs {
            slab.add(isa, first, start, tiles, last);
        }
        for (at, row) in rows.chunks_mut(n).enumerate() {
            let row = &mut row[..=first * WIDTH + at];
            let from = (start * WIDTH).min(row.len());
            for (values, tiles) in row[from..].chunks_mut(WIDTH).zip(&*tiles) {
                values.copy_from_slice(&tiles[at / WIDTH][at % WIDTH][..values.len()]);
            }
        }
    }
}

/// Adds the sums of panels `left` and `right`, of which the left codes carry 128 too much, to their tile.
struct AddSums<'a> {
    slab: &'a Slab,
    left: usize,
    right: usize,
    sums: &'a Sums,
    tile: &'a mut Tile,
}

impl Vectorized for AddSums<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let (slab, right) = (self.slab, self.right * WIDTH);
        let scales = &slab.scales[self.left * WIDTH..][..WIDTH];
        let others: [f64; WIDTH] = std::array::from_fn(|i| f64::from(slab.scales[right + i]));
        let excess: [i32; WIDTH] = std::array::from_fn(|i| 128 * slab.sums[right + i]);
        for ((values, sums), &scale) in self.tile.iter_mut().zip(self.sums).zip(scales) {
            for (i, value) in values.iter_mut().enumerate() {
                *value += f64::from(scale) * others[i] * f64::from(sums[i] - excess[i]);
            }
        }
    }
}
