//! SparseGPT: chooses zeros block by block on corrected weights and lets later columns make up for them.

use std::ops::Range;

use qbin_quant::Factor;
use rayon::prelude::*;

use crate::{Sparsity, magnitude, mask};

/// Columns whose zeros are chosen at once; 128 in the paper.
const MASK_COLUMNS: usize = 128;
/// Rows of a panel.
const PANEL_ROWS: usize = 64;

/// A pruned matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Pruned {
    /// The weights, `[rows, cols]`, zeros in place.
    pub weight: Vec<f32>,
    /// Which of them were chosen to be zero.
    pub zeros: Vec<bool>,
}

/// Prunes `weight` (`[rows, n]`, row major): of a share, exactly so many weights in every 128 columns over all
/// rows; of a pattern, so many in every run of a row, chosen when the sweep reaches the run.
///
/// The order of the columns is the factor's. Weights of inputs that were always zero go first; where all
/// were, magnitudes decide.
///
/// # Source
/// Frantar, Alistarh, SparseGPT, arXiv 2301.00774, Algorithm 1, in the left-looking form of [`qbin_quant::gptq`].
/// Differences: counts are exact where scores tie, and dead columns keep their surviving weights.
///
/// # Panics
/// If `weight` is not whole rows, or a block of the factor cuts a run of the pattern in two.
pub fn sparsegpt(weight: &[f32], factor: &Factor, sparsity: Sparsity) -> Pruned {
    let n = factor.n();
    assert!(weight.len().is_multiple_of(n), "weight is not [rows, n]");
    if factor.dead_columns() == n {
        let zeros = magnitude(weight, n, sparsity);
        let mut weight = weight.to_vec();
        mask::apply(&mut weight, &zeros);
        return Pruned { weight, zeros };
    }
    let mut panels: Vec<Panel> = weight
        .par_chunks(PANEL_ROWS * n)
        .map(|weight| Panel::new(factor, weight))
        .collect();
    let rows = weight.len() / n;
    let mut done = 0;
    for block in 0..factor.num_blocks() {
        let places = factor.places(block);
        panels
            .par_iter_mut()
            .for_each(|panel| panel.enter(factor, block));
        // A pattern's runs are chosen one by one; nothing is to cut them.
        let step = sparsity.run().map_or(MASK_COLUMNS, |_| places.len());
        for start in places.clone().step_by(step) {
            let part = start..places.end.min(start + step);
            if let Sparsity::Share(_) = sparsity {
                let zeros = sparsity.zeros_in(rows * part.end) - done;
                done += zeros;
                choose(&mut panels, factor, &part, zeros);
            }
            panels
                .par_iter_mut()
                .for_each(|panel| panel.sweep(factor, block, &part, sparsity));
        }
    }
    let mut pruned = Pruned {
        weight: Vec::with_capacity(weight.len()),
        zeros: Vec::with_capacity(weight.len()),
    };
    for panel in panels {
        pruned.weight.extend(panel.values);
        pruned.zeros.extend(panel.zeros);
    }
    pruned
}

/// Marks the `zeros` cheapest weights at the places `part`, over all rows.
fn choose(panels: &mut [Panel], factor: &Factor, part: &Range<usize>, zeros: usize) {
    let scores: Vec<f32> = panels
        .par_iter()
        .flat_map_iter(|panel| {
            (0..panel.rows).flat_map(move |row| {
                part.clone()
                    .map(move |place| panel.score(factor, place, row))
            })
        })
        .collect();
    let (n, width) = (factor.n(), part.len());
    mask::mark_smallest(&scores, zeros, |at| {
        let (row, place) = (at / width, part.start + at % width);
        panels[row / PANEL_ROWS].zeros[row % PANEL_ROWS * n + factor.order()[place]] = true;
    });
}

/// Some rows on their way through the blocks.
struct Panel {
    rows: usize,
    /// The weights, `[rows, n]`, column major in sweep order.
    weight: Vec<f32>,
    /// `W − Q` of finished columns, likewise.
    errors: Vec<f32>,
    /// The corrected weights of the block at hand, `[rows, width]`, column major.
    current: Vec<f32>,
    /// Where that block starts.
    start: usize,
    /// `[rows, n]`, row major, columns as in the file.
    zeros: Vec<bool>,
    /// The result, likewise.
    values: Vec<f32>,
}

impl Panel {
    fn new(factor: &Factor, weight: &[f32]) -> Self {
        let (n, len) = (factor.n(), weight.len());
        let rows = len / n;
        let column = |&col: &usize| (0..rows).map(move |row| weight[row * n + col]);
        Self {
            rows,
            weight: factor.order().iter().flat_map(column).collect(),
            errors: vec![0.0; len],
            current: Vec::new(),
            start: 0,
            zeros: vec![false; len],
            values: vec![0.0; len],
        }
    }

    fn enter(&mut self, factor: &Factor, block: usize) {
        let places = factor.places(block);
        let (start, end) = (places.start * self.rows, places.end * self.rows);
        let (weight, errors) = (&self.weight[start..end], &self.errors[..start]);
        self.current = factor.corrected(block, weight, errors, self.rows);
        self.start = places.start;
    }

    /// What setting the corrected weight to zero costs, given the columns before it.
    fn score(&self, factor: &Factor, place: usize, row: usize) -> f32 {
        let cost = self.current[(place - self.start) * self.rows + row] * factor.root(place);
        cost * cost
    }

    /// Goes over the columns at the places `part` of the block.
    fn sweep(&mut self, factor: &Factor, block: usize, part: &Range<usize>, sparsity: Sparsity) {
        let (rows, n) = (self.rows, factor.n());
        let mut run_reached = vec![false; sparsity.run().map_or(0, |run| n.div_ceil(run))];
        for place in part.clone() {
            let col = factor.order()[place];
            if let Some(run) = sparsity.run()
                && !std::mem::replace(&mut run_reached[col / run], true)
            {
                self.choose_run(factor, part, col / run, sparsity);
            }
            let j = place - self.start;
            let (column, later) = self.current[j * rows..].split_at_mut(rows);
            for (row, target) in column.iter_mut().enumerate() {
                let at = row * n + col;
                let value = if self.zeros[at] { 0.0 } else { *target };
                self.values[at] = value;
                self.errors[place * rows + row] = self.weight[place * rows + row] - value;
                // From here on the column holds what the later ones must make up for.
                *target -= value;
            }
            factor.spread(block, j, column, later);
        }
    }

    /// Marks the cheapest weights of one run in every row.
    fn choose_run(&mut self, factor: &Factor, part: &Range<usize>, run: usize, sparsity: Sparsity) {
        let of = sparsity.run().expect("a pattern has runs");
        let n = factor.n();
        let members: Vec<usize> = part
            .clone()
            .filter(|&place| factor.order()[place] / of == run)
            .collect();
        assert_eq!(
            members.len(),
            of.min(n - run * of),
            "a block cuts a run in two"
        );
        for row in 0..self.rows {
            let scores: Vec<f32> = members
                .iter()
                .map(|&place| self.score(factor, place, row))
                .collect();
            let zeros = &mut self.zeros[row * n..][..n];
            mask::mark_smallest(&scores, sparsity.zeros_in(members.len()), |at| {
                zeros[factor.order()[members[at]]] = true;
            });
        }
    }
}
