//! How GPTQ is run.

use serde::{Deserialize, Serialize};

use crate::error::QuantError;
use crate::grid::Grid;

/// The order in which columns are rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActOrder {
    #[default]
    /// By falling diagonal of the Hessian inside each group, then the groups likewise; costs the runtime
    /// nothing, because groups stay whole and in place in the file.
    Group,
    /// As in the file.
    None,
}

/// How GPTQ is run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GptqParams {
    /// The grid to round to.
    pub grid: Grid,
    /// Part of the mean diagonal of the Hessian that is added to its diagonal; 0.01 in the paper.
    pub damp_fraction: f64,
    /// The order of the columns.
    pub act_order: ActOrder,
    /// Columns corrected at once, rounded up to whole groups. Speed only, up to rounding; 128 in the paper.
    pub update_block: usize,
    /// How often, at most, scales and codes are moved again after the sweep; 0 in the paper. Costs about as
    /// much as the sweep each time.
    pub refine_sweeps: usize,
}

impl GptqParams {
    /// The usual setting on `grid`: damping 0.01, group-aware order, blocks of 128 columns, three sweeps of
    /// refinement.
    pub fn new(grid: Grid) -> Self {
        Self {
            grid,
            damp_fraction: 0.01,
            act_order: ActOrder::Group,
            update_block: 128,
            refine_sweeps: 3,
        }
    }

    pub(crate) fn check(&self, cols: usize) -> Result<(), QuantError> {
        self.grid.check(cols)?;
        if !(self.damp_fraction >= 0.0 && self.damp_fraction.is_finite()) {
            return Err(QuantError::DampFraction {
                damp_fraction: self.damp_fraction,
            });
        }
        if self.update_block == 0 {
            return Err(QuantError::UpdateBlock);
        }
        Ok(())
    }
}
