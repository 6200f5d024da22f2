//! Error feedback, block by block: what methods other than GPTQ need of a [`Factor`] to sweep over columns.
//!
//! A method goes through the blocks in order. In each it takes the corrected weights, decides column by column
//! what they become, and spreads what it changed over the block's later columns. All matrices here are column
//! major, `[rows, …]`, columns in sweep order.

use std::ops::Range;

use qbin_runtime::kernels::Isa;
use qbin_runtime::kernels::gemm::View;

use crate::factor::Factor;

impl Factor {
    /// Blocks of the sweep.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// The places of the sweep that make up a block.
    pub fn places(&self, block: usize) -> Range<usize> {
        self.blocks[block].places.clone()
    }

    /// The column of the weight at each place of the sweep.
    pub fn order(&self) -> &[usize] {
        &self.order
    }

    /// For the place of a live column: the inverse of the diagonal of the paper's `Cholesky(H⁻¹)ᵀ`, that is
    /// the root of what changing a corrected weight by 1 costs; 0 for a dead column.
    pub fn root(&self, place: usize) -> f32 {
        if self.dead[place] {
            0.0
        } else {
            self.root[place]
        }
    }

    /// What was added to the diagonal of the mean of `x·xᵀ`, live columns only.
    pub fn damping(&self) -> f64 {
        // The factor is that of twice the mean.
        self.damp / 2.0
    }

    /// The damping as a fraction of the mean diagonal.
    pub fn damp_fraction(&self) -> f64 {
        self.damp_fraction
    }

    /// What was done otherwise than asked, and why.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref()
    }

    /// The weights of a block as the errors `W − Q` of all earlier columns correct them.
    ///
    /// `weight` is `[rows, width]` of the block, `errors` is `[rows, start]`, everything before it.
    ///
    /// # Panics
    /// If a slice does not have the length its shape says.
    pub fn corrected(&self, block: usize, weight: &[f32], errors: &[f32], rows: usize) -> Vec<f32> {
        let block = &self.blocks[block];
        let (start, width) = (block.places.start, block.places.len());
        assert_eq!(weight.len(), rows * width, "weight is not [rows, width]");
        assert_eq!(errors.len(), rows * start, "errors is not [rows, start]");
        let mut current = weight.to_vec();
        let errors = View::row_major(errors, start, rows);
        block.correct(Isa::detect(), &mut current, errors, rows);
        current
    }

    /// Corrects the columns after column `j` of a block (`later`) for `change`, the corrected weights of
    /// column `j` less what they became.
    pub fn spread(&self, block: usize, j: usize, change: &[f32], later: &mut [f32]) {
        let block = &self.blocks[block];
        let width = block.places.len();
        let factors = &block.inverse[j * width..][j + 1..width];
        for (column, &factor) in later.chunks_mut(change.len()).zip(factors) {
            for (value, &change) in column.iter_mut().zip(change) {
                *value -= change * factor;
            }
        }
    }
}
