//! The sweep of GPTQ over the columns of some rows.

use std::ops::Range;

use qbin_runtime::kernels::gemm::{Store, View, product};
use qbin_runtime::kernels::{Isa, Vectorized};

use crate::factor::{Block, Factor};
use crate::grid::{Grid, GroupParams, Rounder};
use crate::rtn::Panel;

/// Accumulators of a sum over rows; fixed, because the order of additions is part of the result.
const LANES: usize = 16;

/// Sums over the rows of a panel.
#[derive(Default)]
pub(crate) struct Tally {
    /// `Σ r²·(target − q)²`: the loss under the damped Hessian.
    pub(crate) loss: f64,
    /// `‖W − Q‖²` of live columns.
    pub(crate) error: f64,
    /// `W·H·Wᵀ` under the damped Hessian.
    signal: f64,
    /// `‖W‖²` of live columns.
    weight: f64,
    pub(crate) clipped: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Self) {
        self.loss += other.loss;
        self.error += other.error;
        self.signal += other.signal;
        self.weight += other.weight;
        self.clipped += other.clipped;
    }

    /// Takes the damping out of both sides again.
    pub(crate) fn relative_error(&self, damp: f64) -> f64 {
        let signal = self.signal - damp * self.weight;
        if signal > 0.0 {
            (self.loss - damp * self.error).max(0.0) / signal
        } else {
            0.0
        }
    }
}

/// One panel of rows on its way through the blocks. Matrices are column major, so that a column of the
/// panel is contiguous and the inner loop runs over rows.
pub(crate) struct Sweep<'a, 'b> {
    isa: Isa,
    factor: &'a Factor,
    grid: &'a Grid,
    /// Weight of each place of the sweep in the scale search.
    importance: &'a [f32],
    rows: usize,
    /// `[2·rows, n]` in sweep order: the errors `W − Q` of finished columns above the weights, stacked so
    /// that the feedback and the signal's norm cost one product.
    stacked: Vec<f32>,
    out: &'a mut Panel<'b>,
    tally: Tally,
}

impl<'a, 'b> Sweep<'a, 'b> {
    pub(crate) fn new(
        factor: &'a Factor,
        grid: &'a Grid,
        importance: &'a [f32],
        weight: &[f32],
        out: &'a mut Panel<'b>,
    ) -> Self {
        let n = factor.n();
        let rows = weight.len() / n;
        let mut stacked = vec![0f32; 2 * rows * n];
        for (column, &col) in stacked.chunks_mut(2 * rows).zip(&factor.order) {
            for (row, value) in column[rows..].iter_mut().enumerate() {
                *value = weight[row * n + col];
            }
        }
        Self {
            isa: Isa::detect(),
            factor,
            grid,
            importance,
            rows,
            stacked,
            out,
            tally: Tally::default(),
        }
    }

    pub(crate) fn run(mut self) -> Tally {
        let factor = self.factor;
        for block in &factor.blocks {
            let mut current = self.enter(block);
            let mut codes = vec![0u8; current.len()];
            for (group, places) in &block.groups {
                let start = block.places.start;
                let inside = places.start - start..places.end - start;
                let rounders = self.group(*group, places.start, &inside, &current);
                let stacked = &mut self.stacked[block.places.start * 2 * self.rows..];
                self.isa.run(Columns {
                    factor,
                    block,
                    inside,
                    rows: self.rows,
                    rounders: &rounders,
                    stacked,
                    current: &mut current,
                    codes: &mut codes,
                    tally: &mut self.tally,
                });
            }
            for (column, place) in codes.chunks(self.rows).zip(block.places.clone()) {
                let col = factor.order[place];
                for (codes, &code) in self.out.codes.chunks_mut(factor.n()).zip(column) {
                    codes[col] = code;
                }
            }
        }
        self.tally
    }

    /// The corrected weights of a block, `[rows, width]`, as they stand before its first column is rounded.
    fn enter(&mut self, block: &Block) -> Vec<f32> {
        let (rows, start, width) = (self.rows, block.places.start, block.places.len());
        // Row major with rows and columns swapped: `[width, 2·rows]`.
        let mut feedback = vec![0f32; 2 * rows * width];
        let (done, rest) = self.stacked.split_at(2 * rows * start);
        let done = View::row_major(done, start, 2 * rows);
        let before = View::row_major(&block.before, width, start);
        product(
            self.isa,
            &mut feedback,
            2 * rows,
            Store::Replace,
            before,
            done,
        );

        let stacked = &rest[..2 * rows * width];
        let weight = View::row_major(stacked, width, 2 * rows).subcols(rows, rows);
        let inside = View::row_major(&block.inside, width, width);
        let signal = &mut feedback[rows..];
        product(self.isa, signal, 2 * rows, Store::Add, inside, weight);
        self.isa.run(Signal {
            factor: self.factor,
            places: block.places.clone(),
            rows,
            feedback: &feedback,
            stacked,
            tally: &mut self.tally,
        });

        let mut current: Vec<f32> = Vec::with_capacity(rows * width);
        stacked
            .chunks(2 * rows)
            .for_each(|column| current.extend_from_slice(&column[rows..]));
        let inverse = View::row_major(&block.inverse, width, width).transpose();
        let feedback = View::row_major(&feedback, width, 2 * rows).subcols(0, rows);
        product(self.isa, &mut current, rows, Store::Add, inverse, feedback);
        current
    }

    /// Chooses and stores every row's parameters of a group, the columns `inside` of `current`.
    fn group(
        &mut self,
        group: usize,
        place: usize,
        inside: &Range<usize>,
        current: &[f32],
    ) -> Vec<Rounder> {
        let rows = self.rows;
        let groups = self.out.scales.len() / rows;
        let importance = &self.importance[place..][..inside.len()];
        let current = &current[rows * inside.start..];
        let mut weights = vec![0f32; inside.len()];
        let mut choose = |row: usize| -> GroupParams {
            for (weight, column) in weights.iter_mut().zip(current.chunks(rows)) {
                *weight = column[row];
            }
            self.grid.params_at(self.isa, &weights, Some(importance))
        };
        (0..rows)
            .map(|row| {
                let params = choose(row);
                self.out.set(row * groups + group, params);
                self.grid.rounder(params)
            })
            .collect()
    }
}

/// `W·H·Wᵀ` of a block's columns.
struct Signal<'a> {
    factor: &'a Factor,
    places: Range<usize>,
    rows: usize,
    /// `[width, 2·rows]`, `W·(I + U)` in the second half.
    feedback: &'a [f32],
    stacked: &'a [f32],
    tally: &'a mut Tally,
}

impl Vectorized for Signal<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let columns = self.feedback.chunks(2 * self.rows);
        let weights = self.stacked.chunks(2 * self.rows);
        for ((place, signal), weight) in self.places.zip(columns).zip(weights) {
            if !self.factor.dead[place] {
                let root = f64::from(self.factor.root[place]);
                self.tally.signal += squares(&signal[self.rows..]) * (root * root);
                self.tally.weight += squares(&weight[self.rows..]);
            }
        }
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
    rows: usize,
    rounders: &'a [Rounder],
    /// From the block on.
    stacked: &'a mut [f32],
    /// `[rows, width]`.
    current: &'a mut [f32],
    /// `[rows, width]`.
    codes: &'a mut [u8],
    tally: &'a mut Tally,
}

impl Vectorized for Columns<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let (rows, width) = (self.rows, self.block.places.len());
        for j in self.inside {
            let place = self.block.places.start + j;
            let (column, later) = self.current[j * rows..].split_at_mut(rows);
            let (errors, weights) = self.stacked[j * 2 * rows..][..2 * rows].split_at_mut(rows);
            let codes = &mut self.codes[j * rows..][..rows];
            let mut clipped = 0;
            let cells = column.iter_mut().zip(errors.iter_mut().zip(&*weights));
            for ((rounder, code), (target, (error, &weight))) in
                self.rounders.iter().zip(codes).zip(cells)
            {
                let steps = rounder.steps(*target);
                let value = rounder.value(steps);
                *code = rounder.code(steps);
                clipped += u32::from(rounder.clips(*target, steps));
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
