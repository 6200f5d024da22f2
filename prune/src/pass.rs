//! The pruning pass of a walk.

use crate::{Sparsity, magnitude};
use qbin_format::TensorReport;
use qbin_quant::{Patterns, QuantError};
use qbin_runtime::spec::{LinearKind, weight_name};
use qbin_runtime::walk::{BlockPass, NewTensor, PassError, Rewritten, Site};
use qbin_runtime::{Block, ModelConfig};
use serde::{Deserialize, Serialize};

/// A pruning method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PruneMethod {
    /// The smallest weights.
    Magnitude,
}

/// One pruning pass of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PruneRecipe {
    /// The method.
    pub method: PruneMethod,
    /// How many zeros.
    pub sparsity: Sparsity,
    /// Globs over tensor names; all linears of the blocks where nothing is said.
    #[serde(default = "all")]
    pub targets: Vec<String>,
}

fn all() -> Vec<String> {
    vec!["*".into()]
}

/// A pruning pass over the blocks of one model.
pub struct PrunePass<'a> {
    recipe: &'a PruneRecipe,
    targets: Patterns,
}

impl<'a> PrunePass<'a> {
    /// # Errors
    /// A target that is no glob or matches no linear of the model.
    pub fn new(recipe: &'a PruneRecipe, config: &ModelConfig) -> Result<Self, QuantError> {
        let blocks = 0..config.num_blocks;
        let names: Vec<String> = blocks
            .flat_map(|block| LinearKind::ALL.map(|kind| weight_name(block, kind)))
            .collect();
        let targets = Patterns::new(&recipe.targets, &names)?;
        Ok(Self { recipe, targets })
    }

    /// Whether a linear is pruned.
    pub fn touches(&self, block: usize, kind: LinearKind) -> bool {
        self.targets.last_match(&weight_name(block, kind)).is_some()
    }
}

impl BlockPass for PrunePass<'_> {
    fn rewrite(
        &mut self,
        block: &mut Block<'_>,
        site: Site,
        out: &mut Rewritten,
    ) -> Result<(), PassError> {
        for &kind in site
            .linears()
            .iter()
            .filter(|&&kind| self.touches(site.block, kind))
        {
            let linear = block.linear_mut(kind);
            let (cols, name) = (linear.cols, linear.name.clone());
            let weight = linear.own()?;
            let zeros = magnitude(weight, cols, self.recipe.sparsity);
            let report = TensorReport {
                notes: vec![format!("{zeros} weights pruned to zero")],
                ..TensorReport::default()
            };
            out.insert(name, (NewTensor::Dense(weight.clone()), report));
        }
        Ok(())
    }
}
