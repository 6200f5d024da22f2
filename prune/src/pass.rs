//! The pruning pass of a walk: which statistics a method needs, and what it does to a block.

use std::collections::BTreeMap;

use qbin_format::{Dtype, TensorReport, TensorView, Weight, float_bytes};
use qbin_quant::{
    Factor, Fate, GptqParams, Granularity, Grid, Held, Metric, Moments, QuantError, QuantPass,
    ScaleSearch, Zeros, observe, relative_error,
};
use qbin_runtime::spec::{LinearKind, linears, weight_name};
use qbin_runtime::walk::{BlockPass, NewTensor, PassError, Rewritten, Site};
use qbin_runtime::{Block, Matrix, ModelConfig};

use crate::recipe::{PruneMethod, PruneRecipe};
use crate::{
    Curve, PruneError, Pruned, Sparsity, allocate, magnitude, mask, refit, sparsegpt, swap, wanda,
};

/// Steps of least squares after each round of exchanges.
const REFIT_STEPS: usize = 8;

/// A pruning pass over the blocks of one model.
pub struct PrunePass<'a> {
    recipe: &'a PruneRecipe,
    config: &'a ModelConfig,
    sparsities: BTreeMap<(usize, LinearKind), Sparsity>,
    as_stored: bool,
    moments: BTreeMap<Site, Moments>,
}

impl<'a> PrunePass<'a> {
    /// Resolves the recipe for every linear of the model.
    ///
    /// # Errors
    /// See [`PruneRecipe::resolve`].
    pub fn new(recipe: &'a PruneRecipe, config: &'a ModelConfig) -> Result<Self, QuantError> {
        let names: Vec<String> = linears(config)
            .map(|(block, kind)| weight_name(block, kind))
            .collect();
        let sparsities = linears(config).zip(recipe.resolve(&names)?);
        Ok(Self {
            recipe,
            config,
            sparsities: sparsities
                .filter_map(|(key, sparsity)| Some((key, sparsity?)))
                .collect(),
            as_stored: false,
            moments: BTreeMap::new(),
        })
    }

    /// The same pass, with every weight rounded to the type it has in the checkpoint: what follows, and the report,
    /// see what will be stored.
    #[must_use]
    pub fn as_stored(self) -> Self {
        Self {
            as_stored: true,
            ..self
        }
    }

    /// Deals a share out again: to every linear that has exactly the recipe's sparsity, by what `measured` says of it.
    ///
    /// # Panics
    /// If one of them was not measured.
    pub fn allocate(&mut self, measured: &BTreeMap<(usize, LinearKind), Curve>) {
        let Sparsity::Share(share) = self.recipe.sparsity else {
            return;
        };
        let free: Vec<(usize, LinearKind)> = (self.sparsities.iter())
            .filter(|(_, sparsity)| **sparsity == self.recipe.sparsity)
            .map(|(&key, _)| key)
            .collect();
        let curves: Vec<Curve> = free.iter().map(|key| measured[key].clone()).collect();
        for (key, share) in free.into_iter().zip(allocate(&curves, share)) {
            self.sparsities.insert(key, Sparsity::Share(share));
        }
    }

    /// How many zeros a linear gets; none where it is left alone.
    pub fn sparsity(&self, block: usize, kind: LinearKind) -> Option<Sparsity> {
        self.sparsities.get(&(block, kind)).copied()
    }

    /// Whether this pass itself writes a linear: a joint one leaves that to the pass that it chooses zeros for.
    pub fn rewrites(&self, block: usize, kind: LinearKind) -> bool {
        !self.recipe.joint && self.sparsity(block, kind).is_some()
    }

    /// Checks that the zeros of a joint pass can be chosen group by group of `quant`'s grids.
    ///
    /// # Errors
    /// [`PruneError::RunsAndGroups`].
    pub fn check_groups(&self, quant: &QuantPass<'_>) -> Result<(), PruneError> {
        for (&(block, kind), &sparsity) in &self.sparsities {
            let Fate::Quantize(grid) = quant.fate(block, kind) else {
                continue;
            };
            if let (Some(run), Granularity::Group(group_size)) = (sparsity.run(), grid.granularity)
                && !group_size.is_multiple_of(run)
            {
                let tensor = weight_name(block, kind);
                return Err(PruneError::RunsAndGroups {
                    tensor,
                    sparsity,
                    group_size,
                });
            }
        }
        Ok(())
    }

    /// Chooses the zeros of one linear and, where the method says so, changes its other weights.
    pub(crate) fn prune(
        &self,
        weight: &[f32],
        cols: usize,
        sparsity: Sparsity,
        metric: Option<&Metric>,
        factor: Option<&Factor>,
    ) -> Pruned {
        let zeros = match (self.recipe.method, metric, factor) {
            (PruneMethod::SparseGpt, Some(metric), Some(factor)) => {
                let mut pruned = sparsegpt(weight, factor, sparsity);
                let damping = factor.damping();
                for _ in 0..self.recipe.refine {
                    let zeros = &pruned.zeros;
                    refit(
                        weight,
                        &mut pruned.weight,
                        zeros,
                        metric,
                        damping,
                        REFIT_STEPS,
                    );
                    swap(weight, &mut pruned, sparsity, metric, damping);
                }
                if self.recipe.refine > 0 {
                    let zeros = &pruned.zeros;
                    refit(
                        weight,
                        &mut pruned.weight,
                        zeros,
                        metric,
                        damping,
                        REFIT_STEPS,
                    );
                }
                return pruned;
            }
            (PruneMethod::Wanda, Some(metric), _) => wanda(weight, &metric.diagonal(), sparsity),
            _ => magnitude(weight, cols, sparsity),
        };
        let mut weight = weight.to_vec();
        mask::apply(&mut weight, &zeros);
        Pruned { weight, zeros }
    }

    fn report(
        &self,
        sparsity: Sparsity,
        weight: &[f32],
        pruned: &Pruned,
        metric: Option<&Metric>,
        factor: Option<&Factor>,
    ) -> TensorReport {
        let zeros = pruned.weight.iter().filter(|w| **w == 0.0).count();
        let error = relative_error(weight, &pruned.weight, metric);
        let mut notes = vec![format!(
            "{} to {sparsity}: {zeros} of {} weights are zero, relative error {error:.3e}",
            self.recipe.method.name(),
            weight.len()
        )];
        if metric.is_none() {
            notes.push(qbin_quant::WEIGHTS_ALONE.into());
        }
        TensorReport {
            relative_error: Some(error),
            fallbacks: factor
                .and_then(Factor::fallback)
                .map(String::from)
                .into_iter()
                .collect(),
            damp: factor
                .map(Factor::damp_fraction)
                .filter(|&fraction| fraction != self.recipe.damp),
            notes,
            ..TensorReport::default()
        }
    }
}

impl BlockPass for PrunePass<'_> {
    fn wants(&self, site: Site) -> bool {
        let pruned = |&kind: &LinearKind| self.sparsity(site.block, kind).is_some();
        self.recipe.method.needs_calibration() && site.linears().iter().any(pruned)
    }

    fn observe(&mut self, site: Site, x: &[f32]) -> Result<(), PassError> {
        Ok(observe(&mut self.moments, self.config, site, x)?)
    }

    fn rewrite(
        &mut self,
        block: &mut Block<'_>,
        site: Site,
        out: &mut Rewritten,
    ) -> Result<(), PassError> {
        let mut targets: Vec<(LinearKind, Sparsity)> = site
            .linears()
            .iter()
            .filter_map(|&kind| Some((kind, self.sparsity(site.block, kind)?)))
            .collect();
        let mut moments = self.moments.remove(&site);
        let metric = moments.as_mut().map(Moments::metric);
        // Linears with the same runs share one factorization.
        while let Some(&(_, first)) = targets.first() {
            let (now, later): (Vec<_>, Vec<_>) = targets
                .into_iter()
                .partition(|(_, sparsity)| sparsity.run() == first.run());
            targets = later;
            let input = match targets.is_empty() {
                true => moments.take(),
                false => moments.clone(),
            };
            let factor = input
                .filter(|_| self.recipe.method == PruneMethod::SparseGpt)
                .map(|moments| factor(self.recipe, moments, first))
                .transpose()?;
            for (kind, sparsity) in now {
                let linear = block.linear_mut(kind);
                let (cols, name) = (linear.cols, linear.name.clone());
                let dtype = match &linear.weight {
                    Matrix::Stored(Weight::Dense(view)) if self.as_stored => view.dtype,
                    _ => Dtype::F32,
                };
                let weight = linear.own()?;
                let mut pruned =
                    self.prune(weight, cols, sparsity, metric.as_ref(), factor.as_ref());
                pruned.weight = rounded(pruned.weight, dtype);
                let report =
                    self.report(sparsity, weight, &pruned, metric.as_ref(), factor.as_ref());
                weight.copy_from_slice(&pruned.weight);
                out.insert(name, (NewTensor::Dense(pruned.weight), report));
            }
        }
        Ok(())
    }
}

impl Zeros for PrunePass<'_> {
    fn choose(
        &self,
        block: usize,
        kind: LinearKind,
        weight: &[f32],
        metric: &Metric,
        factor: &Factor,
    ) -> Result<Option<Held>, PassError> {
        let Some(sparsity) = self.sparsity(block, kind) else {
            return Ok(None);
        };
        let pruned = self.prune(weight, metric.n(), sparsity, Some(metric), Some(factor));
        Ok(Some(Held {
            // The plain method makes up for zeros and rounding in one sweep. Survivors refined against all zeros
            // at once are a better start than any single sweep would get to.
            start: match self.recipe.refine {
                0 => weight.to_vec(),
                _ => pruned.weight,
            },
            zeros: pruned.zeros,
        }))
    }
}

/// A factor whose blocks leave the pattern's runs whole. Nothing is put on a grid: of it only the granularity
/// counts, which is what the order of columns keeps together.
pub(crate) fn factor(
    recipe: &PruneRecipe,
    moments: Moments,
    sparsity: Sparsity,
) -> Result<Factor, QuantError> {
    let together = sparsity.run().unwrap_or(1).min(moments.n());
    let grid = Grid {
        bits: 8,
        symmetric: true,
        granularity: Granularity::Group(together),
        search: ScaleSearch::None,
    };
    let params = GptqParams {
        damp_fraction: recipe.damp,
        act_order: recipe.act_order,
        refine_sweeps: 0,
        ..GptqParams::new(grid)
    };
    Factor::new(moments, &params)
}

/// The values as a tensor of this type holds them.
fn rounded(values: Vec<f32>, dtype: Dtype) -> Vec<f32> {
    if dtype == Dtype::F32 {
        return values;
    }
    let view = TensorView {
        name: "",
        dtype,
        shape: &[values.len()],
        bytes: &float_bytes(&values, dtype),
    };
    view.to_f32()
}
