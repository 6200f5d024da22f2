//! The sweep of GPTQ over the columns of some rows.

use std::ops::Range;

use qbin_runtime::kernels::gemm::{COLS, Operand, Right, Store, View, product, transpose};
use qbin_runtime::kernels::{Isa, Vectorized};

use crate::factor::{Block, Factor};
use crate::grid::{Grid, Rounder};
use crate::rtn::{Panel, kept};

/// Accumulators of a sum over rows; fixed, because the order of additions is part of the result.
const LANES: usize = 16;

/// Sums over the rows of a panel.
#[derive(Default)]
pub(crate) struct Tally {
    /// `Σ r²·(target − q)²`: the loss under the damped Hessian.
    pub(crate) loss: f64,
    /// `‖W − Q‖²` of live columns.
    pub(crate) error: f64,
    /// Weights whose corrected value lay beyond the grid.
    pub(crate) clipped: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Self) {
        self.loss += other.loss;
        self.error += other.error;
        self.clipped += other.clipped;
    }
}

/// One panel of rows on its way through the blocks. Matrices have one row per column of the weight, so that the inner
/// loops run over the panel's rows.
pub(crate) struct Sweep<'a, 'b> {
    isa: Isa,
    factor: &'a Factor,
    grid: &'a Grid,
    /// Weight of each place of the sweep in the scale search.
    importance: &'a [f32],
    /// `[rows, n]`, columns as in the file.
    weight: View<'a, f32>,
    /// Weights held at zero, `[rows, n]`.
    zeros: Option<&'a [bool]>,
    /// The errors `W − Q` of finished blocks, `[rows, n]` in sweep order.
    errors: Right<f32>,
    out: &'a mut Panel<'b>,
    tally: Tally,
}

impl<'a, 'b> Sweep<'a, 'b> {
    /// A sweep over the rows `weight` (`[rows, n]`), of which `zeros` are held at zero.
    pub(crate) fn new(
        factor: &'a Factor,
        grid: &'a Grid,
        importance: &'a [f32],
        weight: &'a [f32],
        zeros: Option<&'a [bool]>,
        out: &'a mut Panel<'b>,
    ) -> Self {
        let rows = weight.len() / factor.n();
        Self {
            isa: Isa::detect(),
            factor,
            grid,
            importance,
            weight: View::row_major(weight, rows, factor.n()),
            zeros,
            errors: Right::zeros(rows, factor.n()),
            out,
            tally: Tally::default(),
        }
    }

    pub(crate) fn run(mut self) -> Tally {
        let rows = self.weight.rows();
        for block in &self.factor.blocks {
            let weights = self.gather(block);
            let mut current = weights.clone();
            let start = block.places.start;
            block.correct(self.isa, &mut current, self.errors.head(start), rows);
            let mut errors = vec![0f32; weights.len()];
            for (group, places) in &block.groups {
                let inside = places.start - start..places.end - start;
                let order = &self.factor.order[places.clone()];
                let kept = kept(self.zeros, self.factor.n(), rows, order);
                let rounders = self.group(*group, places, &current[rows * inside.start..], &kept);
                let mut codes = vec![0u8; inside.len() * rows];
                self.isa.run(Columns {
                    factor: self.factor,
                    block,
                    inside,
                    rounders: &rounders,
                    kept: &kept,
                    weights: &weights,
                    errors: &mut errors,
                    current: &mut current,
                    codes: &mut codes,
                    tally: &mut self.tally,
                });
                let rows_out = self.out.codes.chunks_mut(self.factor.n());
                for (row, out) in rows_out.enumerate() {
                    for (column, &col) in codes.chunks(rows).zip(order) {
                        out[col] = column[row];
                    }
                }
            }
            self.errors.set(start, &errors);
        }
        self.tally
    }

    /// The weights of a block, `[width, rows]` in sweep order.
    fn gather(&self, block: &Block) -> Vec<f32> {
        let rows = self.weight.rows();
        let mut weights = Vec::with_capacity(block.places.len() * rows);
        for (group, places) in &block.groups {
            // The group's columns lie side by side in the file, in another order.
            let columns = self.grid.columns(*group, self.factor.n());
            let mut group = vec![0f32; columns.len() * rows];
            let source = self.weight.subcols(columns.start, columns.len());
            transpose(self.isa, source, &mut group);
            for &col in &self.factor.order[places.clone()] {
                weights.extend_from_slice(&group[(col - columns.start) * rows..][..rows]);
            }
        }
        weights
    }

    /// Chooses and stores every row's parameters of a group, whose columns `current` begins with. Zero is on every grid,
    /// so what is held there has no say in the choice.
    fn group(
        &mut self,
        group: usize,
        places: &Range<usize>,
        current: &[f32],
        kept: &[f32],
    ) -> Vec<Rounder> {
        let (rows, len) = (self.weight.rows(), places.len());
        let groups = self.out.scales.len() / rows;
        let importance = &self.importance[places.clone()];
        let mut weights = vec![0f32; rows * len];
        let current: Vec<f32> = current.iter().zip(kept).map(|(w, kept)| w * kept).collect();
        let columns = View::row_major(&current, len, rows);
        transpose(self.isa, columns, &mut weights);
        let mut choose = |(row, weights): (usize, &[f32])| {
            let params = self.grid.params_at(self.isa, weights, Some(importance));
            self.out.set(row * groups + group, params);
            self.grid.rounder(params)
        };
        weights.chunks(len).enumerate().map(&mut choose).collect()
    }
}

impl Block {
    /// Corrects the weights of the block, `[width, rows]`, to what they are before its first column is decided. `errors`
    /// are the errors `W − Q` of all columns before the block, `[start, rows]` in sweep order.
    pub(crate) fn correct(
        &self,
        isa: Isa,
        weights: &mut [f32],
        errors: impl Operand<f32, COLS>,
        rows: usize,
    ) {
        let width = self.places.len();
        let mut feedback = vec![0f32; rows * width];
        let before = self.before.all();
        product(isa, &mut feedback, rows, Store::Replace, before, errors);
        let inverse = View::row_major(&self.inverse, width, width).transpose();
        let feedback = View::row_major(&feedback, width, rows);
        product(isa, weights, rows, Store::Add, inverse, feedback);
    }
}

/// `Σ x²`.
#[inline(always)]
fn squares(values: &[f32]) -> f64 {
    let mut sums = [0f64; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (sum, &x) in sums.iter_mut().zip(chunk) {
            *sum += f64::from(x) * f64::from(x);
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum += f64::from(x) * f64::from(x);
    }
    sums.iter().sum()
}

/// Rounds the columns `inside` of a block one after the other and corrects the columns after each.
struct Columns<'a> {
    factor: &'a Factor,
    block: &'a Block,
    inside: Range<usize>,
    /// Of every row.
    rounders: &'a [Rounder],
    /// `[inside, rows]`, 0 for what is held at zero and 1 for the rest.
    kept: &'a [f32],
    /// `[width, rows]`.
    weights: &'a [f32],
    /// `[width, rows]`.
    errors: &'a mut [f32],
    /// `[width, rows]`.
    current: &'a mut [f32],
    /// `[inside, rows]`.
    codes: &'a mut [u8],
    tally: &'a mut Tally,
}

impl Vectorized for Columns<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let (rows, width) = (self.rounders.len(), self.block.places.len());
        let cells = self.codes.chunks_mut(rows).zip(self.kept.chunks(rows));
        for (j, (codes, kept)) in self.inside.zip(cells) {
            let place = self.block.places.start + j;
            let (column, later) = self.current[j * rows..].split_at_mut(rows);
            let errors = &mut self.errors[j * rows..][..rows];
            let weights = &self.weights[j * rows..][..rows];
            let mut clipped = 0;
            let cells = column.iter_mut().zip(errors.iter_mut().zip(weights));
            for (((rounder, code), &kept), (target, (error, &weight))) in
                self.rounders.iter().zip(codes).zip(kept).zip(cells)
            {
                let steps = rounder.steps(*target) * kept;
                let value = rounder.value(steps);
                *code = rounder.code(steps);
                clipped += u32::from(kept != 0.0 && rounder.clips(*target, steps));
                *error = weight - value;
                // From here on the column holds what the later ones must make up for.
                *target -= value;
            }
            self.tally.clipped += u64::from(clipped);
            if !self.factor.dead[place] {
                let root = f64::from(self.factor.root[place]);
                self.tally.loss += squares(column) * root * root;
                self.tally.error += squares(errors);
            }
            let spread = &self.block.inverse[j * width..][j + 1..width];
            for (other, &factor) in later.chunks_mut(rows).zip(spread) {
                for (value, &error) in other.iter_mut().zip(&*column) {
                    *value = error.mul_add(-factor, *value);
                }
            }
        }
    }
}
