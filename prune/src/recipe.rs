//! What a pruning pass is asked to do, and what that means for each linear.

use qbin_quant::{ActOrder, Patterns, QuantError};
use serde::{Deserialize, Serialize};

use crate::Sparsity;

/// A pruning method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PruneMethod {
    /// The smallest weights go.
    Magnitude,
    /// The smallest products of weight and input go.
    Wanda,
    /// What costs least goes, and the other weights make up for it.
    SparseGpt,
}

impl PruneMethod {
    /// Its name as it is written in recipes and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Magnitude => "magnitude",
            Self::Wanda => "wanda",
            Self::SparseGpt => "sparsegpt",
        }
    }

    /// Whether it needs calibration tokens.
    pub fn needs_calibration(self) -> bool {
        self != Self::Magnitude
    }
}

/// An exception for the tensors that match a pattern.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SparsityOverride {
    /// Glob over tensor names, for example `*.mlp.down_proj.weight`.
    pub pattern: String,
    /// The sparsity of these tensors; `0` leaves them alone.
    pub sparsity: Sparsity,
}

/// One pruning pass of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PruneRecipe {
    /// The method.
    pub method: PruneMethod,
    /// How many zeros.
    pub sparsity: Sparsity,
    /// Whether a share is that of all targets together, dealt out by what zeros cost in each; see [`crate::allocate`].
    /// Takes a walk over the model of its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allocate: bool,
    /// Whether the zeros are chosen while the next pass, `gptq`, puts the other weights on their grid: one sweep makes
    /// up for both.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub joint: bool,
    /// SparseGPT's order of columns.
    #[serde(default = "default_order")]
    pub act_order: ActOrder,
    /// SparseGPT's damping, as a fraction of the mean of the Hessian's diagonal.
    #[serde(default = "default_damp")]
    pub damp: f64,
    /// SparseGPT's rounds of exchange and least squares after the sweep; 0 is the plain method.
    #[serde(default = "default_refine")]
    pub refine: usize,
    /// Globs over tensor names; all linears of the blocks where nothing is said.
    #[serde(default = "default_targets")]
    pub targets: Vec<String>,
    /// Exceptions; the last one that matches a tensor counts.
    #[serde(default, rename = "override", skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<SparsityOverride>,
}

fn default_order() -> ActOrder {
    ActOrder::None
}

fn default_damp() -> f64 {
    0.01
}

fn default_refine() -> usize {
    3
}

fn default_targets() -> Vec<String> {
    vec!["*".into()]
}

impl PruneRecipe {
    /// A recipe with nothing said but the method and how many zeros.
    pub fn new(method: PruneMethod, sparsity: Sparsity) -> Self {
        Self {
            method,
            sparsity,
            allocate: false,
            joint: false,
            act_order: default_order(),
            damp: default_damp(),
            refine: default_refine(),
            targets: default_targets(),
            overrides: Vec::new(),
        }
    }

    /// Whether it needs calibration tokens.
    pub fn needs_calibration(&self) -> bool {
        self.allocate || self.method.needs_calibration()
    }

    /// Resolves the recipe for linears given by name: the sparsity of each, none where it is left alone.
    ///
    /// # Errors
    /// A damping out of range, or a pattern that is no glob or matches nothing.
    pub fn resolve(&self, names: &[String]) -> Result<Vec<Option<Sparsity>>, QuantError> {
        if !(self.damp.is_finite() && self.damp > 0.0) {
            return Err(QuantError::DampFraction {
                damp_fraction: self.damp,
            });
        }
        let targets = Patterns::new(&self.targets, names)?;
        let exceptions = self.overrides.iter().map(|exception| &exception.pattern);
        let exceptions = Patterns::new(exceptions, names)?;
        let resolve = |name: &String| {
            targets.last_match(name)?;
            let exception = exceptions
                .last_match(name)
                .map(|at| self.overrides[at].sparsity);
            Some(exception.unwrap_or(self.sparsity))
                .filter(|&sparsity| sparsity != Sparsity::Share(0.0))
        };
        Ok(names.iter().map(resolve).collect())
    }
}
