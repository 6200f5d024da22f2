//! The moments of slabs, added to a matrix.
//!
//! A block of the matrix is fetched once for all slabs. In between it lies in the second cache as tiles: the rows of the
//! matrix itself are often a power of two apart and would drive each other out.

use std::ops::Range;

use rayon::prelude::*;

use super::Slab;
#[cfg(target_arch = "x86_64")]
use super::amx::{self, Amx};
use super::tile::{self, Sums, WIDTH};
#[cfg(target_arch = "x86_64")]
use crate::kernels::ahead;
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

    /// Adds the products of the panels `left` and `right` to their tile.
    fn add(
        &self,
        isa: Isa,
        lefts: &Lefts<'_>,
        [left, right]: [usize; 2],
        ahead: &[&[f64]],
        tile: &mut Tile,
    ) {
        let slab = self.slab;
        let mut sums: Sums = [[0; WIDTH]; WIDTH];
        lefts.products(isa, left, slab.panel(right), ahead, &mut sums);
        isa.run(AddSums {
            slab,
            left,
            right,
            sums: &sums,
            tile,
        });
        self.add_massive(isa, left, right, tile);
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

/// A slab's panels that are multiplied from the left, from panel `first` on, in the form that is multiplied fastest.
struct Lefts<'a> {
    first: usize,
    panels: Vec<&'a [u32]>,
    #[cfg(target_arch = "x86_64")]
    turned: Option<(&'a Amx, Vec<amx::Left>)>,
}

impl Lefts<'_> {
    /// The products of panel `left` and `right`; [`tile::products`] says more.
    fn products(&self, isa: Isa, left: usize, right: &[u32], ahead: &[&[f64]], sums: &mut Sums) {
        let left = left - self.first;
        #[cfg(target_arch = "x86_64")]
        if let Some((amx, turned)) = &self.turned {
            ahead.iter().for_each(|row| ahead::fetch(row));
            return amx.products(&turned[left], right, sums);
        }
        tile::products(isa, self.panels[left], right, ahead, sums);
    }
}

/// The rows from panel `first` on. A tile is copied from the matrix when the first slab comes to it, and back after the
/// last one; its lines are on their way since the tile before.
fn add_rows(isa: Isa, slabs: &[Addend<'_>], first: usize, n: usize, rows: &mut [f64]) {
    let last = first + (rows.len() / n).div_ceil(WIDTH);
    #[cfg(target_arch = "x86_64")]
    let amx = Amx::of(isa);
    let lefts: Vec<Lefts<'_>> = slabs
        .iter()
        .map(|addend| {
            let panels: Vec<&[u32]> = (first..last).map(|at| addend.slab.panel(at)).collect();
            Lefts {
                first,
                #[cfg(target_arch = "x86_64")]
                turned: amx.as_ref().map(|amx| {
                    let turned = panels.iter().map(|panel| amx::Left::new(isa, panel));
                    (amx, turned.collect())
                }),
                panels,
            }
        })
        .collect();
    let mut tiles: Vec<Tile> = vec![[[0.0; WIDTH]; WIDTH]; ROWS * COLS];
    for start in (0..last).step_by(COLS) {
        let pairs: Vec<[usize; 2]> = (start..last.min(start + COLS))
            .flat_map(|right| (first.max(right)..last).map(move |left| [left, right]))
            .collect();
        for (at, (slab, lefts)) in slabs.iter().zip(&lefts).enumerate() {
            let (begins, ends) = (at == 0, at + 1 == slabs.len());
            for (at, (tile, &pair)) in tiles.iter_mut().zip(&pairs).enumerate() {
                if begins {
                    for (values, line) in tile.iter_mut().zip(lines(rows.len(), n, first, pair)) {
                        values[..line.len()].copy_from_slice(&rows[line]);
                    }
                }
                let mut ahead = Vec::new();
                if let Some(&next) = pairs.get(at + 1).filter(|_| begins || ends) {
                    // One more line of the cache, since a row of the tile need not begin with one.
                    let line = |line: Range<usize>| &rows[line.start..rows.len().min(line.end + 8)];
                    ahead.extend(lines(rows.len(), n, first, next).map(line));
                }
                slab.add(isa, lefts, pair, &ahead, tile);
                if ends {
                    for (values, line) in tile.iter().zip(lines(rows.len(), n, first, pair)) {
                        let width = line.len();
                        rows[line].copy_from_slice(&values[..width]);
                    }
                }
            }
        }
    }
}

/// Where the rows of a tile lie in the rows from panel `first` on, `len` values, as far as they are at or before the
/// diagonal.
fn lines(
    len: usize,
    n: usize,
    first: usize,
    [left, right]: [usize; 2],
) -> impl Iterator<Item = Range<usize>> {
    let top = (left - first) * WIDTH;
    (top..(len / n).min(top + WIDTH)).map(move |row| {
        let start = row * n + right * WIDTH;
        start..start + WIDTH.min(first * WIDTH + row + 1 - right * WIDTH)
    })
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
