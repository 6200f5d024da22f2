//! What zeros cost in each linear of the model as it is: the measurement behind [`crate::allocate`].

use std::collections::BTreeMap;

use qbin_quant::{Moments, QuantError, observe};
use qbin_runtime::spec::LinearKind;
use qbin_runtime::walk::{BlockPass, PassError, Rewritten, Site, Stream};
use qbin_runtime::{Block, Matrix, ModelConfig, Side, Sublayer};

use crate::pass::factor;
use crate::{Curve, PruneMethod, PrunePass, PruneRecipe, Sparsity};

/// Shares at which errors are measured, relative to the one asked for.
const OFFSETS: [f64; 5] = [-0.2, -0.1, 0.0, 0.1, 0.2];
/// Tokens on which outputs are compared.
const SAMPLE_TOKENS: usize = 4096;
/// No linear gets more zeros than this.
const MOST: f64 = 0.95;

/// A pass that changes nothing and measures every linear that a recipe prunes to a share.
pub struct MeasurePass<'a> {
    recipe: &'a PruneRecipe,
    config: &'a ModelConfig,
    pruning: PrunePass<'a>,
    moments: BTreeMap<Site, Moments>,
    curves: BTreeMap<(usize, LinearKind), Curve>,
}

impl<'a> MeasurePass<'a> {
    /// `recipe` should be plain (`refine` 0): refinement lowers all errors alike and costs most of the time.
    ///
    /// # Errors
    /// See [`PruneRecipe::resolve`].
    pub fn new(recipe: &'a PruneRecipe, config: &'a ModelConfig) -> Result<Self, QuantError> {
        Ok(Self {
            recipe,
            config,
            pruning: PrunePass::new(recipe, config)?,
            moments: BTreeMap::new(),
            curves: BTreeMap::new(),
        })
    }

    /// What was measured.
    pub fn finish(self) -> BTreeMap<(usize, LinearKind), Curve> {
        self.curves
    }

    /// The share asked of a linear that takes part.
    fn asked(&self, block: usize, kind: LinearKind) -> Option<f64> {
        match self.recipe.sparsity {
            Sparsity::Share(share) => {
                (self.pruning.sparsity(block, kind) == Some(self.recipe.sparsity)).then_some(share)
            }
            Sparsity::Pattern { .. } => None,
        }
    }

    fn measures(&self, block: usize, kind: LinearKind) -> bool {
        self.asked(block, kind).is_some()
    }
}

impl BlockPass for MeasurePass<'_> {
    fn prepares(&self, block: usize, sublayer: Sublayer) -> bool {
        Side::ALL
            .into_iter()
            .flat_map(|side| LinearKind::at(sublayer, side))
            .any(|&kind| self.measures(block, kind))
    }

    fn observe(&mut self, site: Site, x: &[f32]) -> Result<(), PassError> {
        Ok(observe(&mut self.moments, self.config, site, x)?)
    }

    fn prepare(
        &mut self,
        block: &mut Block<'_>,
        sublayer: Sublayer,
        stream: &Stream,
        _out: &mut Rewritten,
    ) -> Result<(), PassError> {
        let sample = stream.sample(SAMPLE_TOKENS);
        let normed = block.normed(sublayer, &sample);
        let target = block.output(sublayer, &normed, stream.window_tokens);
        let after = sample.iter().zip(&target).map(|(x, y)| x + y);
        let signal: f64 = after.map(|x| f64::from(x).powi(2)).sum();
        for side in Side::ALL {
            let site = Site {
                block: block.index,
                sublayer,
                side,
            };
            let mut moments = self.moments.remove(&site).expect("observed");
            let metric = moments.metric();
            let factor = (self.recipe.method == PruneMethod::SparseGpt)
                .then(|| factor(self.recipe, moments, self.recipe.sparsity))
                .transpose()?;
            for &kind in site.linears() {
                let Some(asked) = self.asked(site.block, kind) else {
                    continue;
                };
                let weight = block.linear_mut(kind).own()?.clone();
                let mut points = Vec::new();
                for share in shares(asked) {
                    let sparsity = Sparsity::Share(share);
                    let pruned = self.pruning.prune(
                        &weight,
                        metric.n(),
                        sparsity,
                        Some(&metric),
                        factor.as_ref(),
                    );
                    block.linear_mut(kind).weight = Matrix::Owned(pruned.weight);
                    let output = block.output(sublayer, &normed, stream.window_tokens);
                    let change = target
                        .iter()
                        .zip(&output)
                        .map(|(a, b)| f64::from(a - b).powi(2));
                    points.push((share, change.sum::<f64>() / signal));
                }
                let weights = weight.len();
                block.linear_mut(kind).weight = Matrix::Owned(weight);
                self.curves
                    .insert((site.block, kind), Curve { weights, points });
            }
        }
        Ok(())
    }

    fn rewrite(
        &mut self,
        _block: &mut Block<'_>,
        _site: Site,
        _out: &mut Rewritten,
    ) -> Result<(), PassError> {
        Ok(())
    }
}

/// The shares at which errors are measured.
fn shares(asked: f64) -> Vec<f64> {
    let mut shares = OFFSETS
        .map(|offset| (asked + offset).clamp(0.0, asked.max(MOST)))
        .to_vec();
    shares.dedup();
    shares
}
