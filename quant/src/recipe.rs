//! What a quantization pass is asked to do, and what that means for each linear.

use crate::{ActOrder, Granularity, Grid, Patterns, QuantError, ScaleSearch};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bits where nothing is said.
const DEFAULT_BITS: u8 = 4;
/// Group size where nothing is said.
const DEFAULT_GROUP_SIZE: GroupSize = GroupSize(Granularity::Group(128));

/// A quantization method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Round to nearest.
    Rtn,
    /// Error feedback over columns.
    Gptq,
    /// Activation-aware scaling and clipping.
    Awq,
}

impl Method {
    /// Its name as it is written in recipes and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rtn => "rtn",
            Self::Gptq => "gptq",
            Self::Awq => "awq",
        }
    }

    /// Whether it needs calibration tokens.
    pub fn needs_calibration(self) -> bool {
        self != Self::Rtn
    }
}

/// Columns that share a scale, as written: a number, or `channel`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupSize(pub Granularity);

impl std::str::FromStr for GroupSize {
    type Err = QuantError;

    fn from_str(text: &str) -> Result<Self, QuantError> {
        let wrong = || QuantError::UnknownGroupSize { got: text.into() };
        match text {
            "channel" => Ok(Self(Granularity::Channel)),
            _ => match text.parse().map_err(|_| wrong())? {
                size @ (32 | 64 | 128) => Ok(Self(Granularity::Group(size))),
                _ => Err(wrong()),
            },
        }
    }
}

impl std::fmt::Display for GroupSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Granularity::Channel => f.write_str("channel"),
            Granularity::Group(size) => write!(f, "{size}"),
        }
    }
}

impl Serialize for GroupSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Granularity::Channel => serializer.serialize_str("channel"),
            Granularity::Group(size) => serializer.serialize_u64(size as u64),
        }
    }
}

impl<'de> Deserialize<'de> for GroupSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u64),
            Text(String),
        }
        let text = match Written::deserialize(deserializer)? {
            Written::Number(number) => number.to_string(),
            Written::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// An exception for the tensors that match a pattern.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Override {
    /// Glob over tensor names, for example `*.mlp.down_proj.weight`.
    pub pattern: String,
    /// Leave the tensor as it is stored.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep: bool,
    /// Bits of these tensors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<u8>,
    /// Group size of these tensors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_size: Option<GroupSize>,
    /// Symmetry of these tensors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symmetric: Option<bool>,
}

/// One quantization pass of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantRecipe {
    /// The method.
    pub method: Method,
    /// Bits; 4 where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<u8>,
    /// Group size; 128 where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_size: Option<GroupSize>,
    /// Symmetry; asymmetric for 4 bits and symmetric for 8 where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symmetric: Option<bool>,
    /// GPTQ's order of columns.
    #[serde(default)]
    pub act_order: ActOrder,
    /// GPTQ's damping, as a fraction of the mean of the Hessian's diagonal.
    #[serde(default = "default_damp")]
    pub damp: f64,
    /// GPTQ's rounds of refinement after the sweep; 0 is the plain method.
    #[serde(default = "default_refine")]
    pub refine: usize,
    /// How scales are chosen; the method's own way where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_search: Option<ScaleSearch>,
    /// Globs over tensor names; all linears of the blocks where nothing is said.
    #[serde(default = "default_targets")]
    pub targets: Vec<String>,
    /// Exceptions; the last one that matches a tensor counts.
    #[serde(default, rename = "override", skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<Override>,
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

impl Override {
    /// Leaves what matches `pattern` as it is stored.
    pub fn keep(pattern: impl Into<String>) -> Self {
        Self {
            pattern: pattern.into(),
            keep: true,
            bits: None,
            group_size: None,
            symmetric: None,
        }
    }
}

/// What becomes of one linear in one pass.
#[derive(Clone, Debug, PartialEq)]
pub enum Fate {
    /// Put on a grid.
    Quantize(Grid),
    /// Left alone, and why.
    Keep(String),
}

impl QuantRecipe {
    /// A recipe with nothing said but the method.
    pub fn new(method: Method) -> Self {
        Self {
            method,
            bits: None,
            group_size: None,
            symmetric: None,
            act_order: ActOrder::default(),
            damp: default_damp(),
            refine: default_refine(),
            scale_search: None,
            targets: default_targets(),
            overrides: Vec::new(),
        }
    }

    /// The same recipe with the method's defaults written out, as it is to be recorded. Symmetry stays unsaid
    /// where it follows from the bits of each tensor.
    #[must_use]
    pub fn spelled_out(self) -> Self {
        Self {
            bits: self.bits.or(Some(DEFAULT_BITS)),
            group_size: self.group_size.or(Some(DEFAULT_GROUP_SIZE)),
            scale_search: Some(self.search()),
            ..self
        }
    }

    /// The scale search in use.
    fn search(&self) -> ScaleSearch {
        self.scale_search.unwrap_or(match self.method {
            Method::Gptq => ScaleSearch::Weighted,
            Method::Rtn | Method::Awq => ScaleSearch::None,
        })
    }

    /// Resolves the recipe for linears given by name and shape.
    ///
    /// # Errors
    /// A value out of range, a pattern that is not a glob or matches nothing, or a group larger than a row.
    pub fn resolve(&self, linears: &[(String, [usize; 2])]) -> Result<Vec<Fate>, QuantError> {
        if !(self.damp.is_finite() && self.damp > 0.0) {
            return Err(QuantError::DampFraction {
                damp_fraction: self.damp,
            });
        }
        let names: Vec<String> = linears.iter().map(|(name, _)| name.clone()).collect();
        let targets = Patterns::new(&self.targets, &names)?;
        let exceptions = self.overrides.iter().map(|exception| &exception.pattern);
        let exceptions = Patterns::new(exceptions, &names)?;
        linears
            .iter()
            .map(|(name, shape)| {
                if targets.last_match(name).is_none() {
                    return Ok(Fate::Keep("no target of the recipe matches it".into()));
                }
                let exception = exceptions.last_match(name).map(|at| &self.overrides[at]);
                match exception {
                    Some(exception) if exception.keep => {
                        Ok(Fate::Keep(format!("override `{}`", exception.pattern)))
                    }
                    _ => self.grid(name, *shape, exception).map(Fate::Quantize),
                }
            })
            .collect()
    }

    fn grid(
        &self,
        name: &str,
        [_, cols]: [usize; 2],
        exception: Option<&Override>,
    ) -> Result<Grid, QuantError> {
        // What an exception does not say is inherited.
        let bits = exception
            .and_then(|e| e.bits)
            .or(self.bits)
            .unwrap_or(DEFAULT_BITS);
        let group_size = exception.and_then(|e| e.group_size).or(self.group_size);
        let symmetric = exception.and_then(|e| e.symmetric).or(self.symmetric);
        let GroupSize(granularity) = group_size.unwrap_or(DEFAULT_GROUP_SIZE);
        let search = self.search();
        let grid = Grid {
            bits,
            symmetric: symmetric.unwrap_or(bits == 8),
            granularity,
            search,
        };
        grid.check(cols).map_err(|error| error.in_tensor(name))?;
        Ok(grid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linears() -> Vec<(String, [usize; 2])> {
        vec![
            ("model.layers.0.self_attn.q_proj.weight".into(), [64, 64]),
            ("model.layers.0.mlp.down_proj.weight".into(), [64, 160]),
        ]
    }

    #[test]
    fn overrides_inherit_and_the_last_match_counts() {
        let mut recipe = QuantRecipe {
            group_size: Some("64".parse().expect("valid")),
            ..QuantRecipe::new(Method::Rtn)
        };
        let change = |pattern: &str, bits| Override {
            pattern: pattern.into(),
            keep: false,
            bits,
            group_size: None,
            symmetric: None,
        };
        recipe.overrides = vec![change("*", Some(8)), change("*down_proj*", Some(4))];
        let grids = recipe.resolve(&linears()).expect("valid");
        let expected = |bits, symmetric| {
            Fate::Quantize(Grid {
                bits,
                symmetric,
                granularity: Granularity::Group(64),
                search: ScaleSearch::None,
            })
        };
        assert_eq!(grids, [expected(8, true), expected(4, false)]);
        recipe.overrides.push(Override {
            keep: true,
            ..change("*q_proj*", None)
        });
        assert!(
            matches!(&recipe.resolve(&linears()).expect("valid")[0], Fate::Keep(reason) if reason.contains("*q_proj*"))
        );
    }

    #[test]
    fn what_cannot_work_is_refused_before_any_work() {
        let recipe = QuantRecipe::new(Method::Gptq);
        let message = |recipe: &QuantRecipe| {
            recipe
                .resolve(&linears())
                .expect_err("must be refused")
                .to_string()
        };
        // 128 columns do not fit into the 64 of q_proj.
        assert!(message(&recipe).contains("q_proj") && message(&recipe).contains("128"));
        assert!(
            message(&QuantRecipe {
                bits: Some(5),
                ..recipe.clone()
            })
            .contains('5')
        );
        assert!(
            message(&QuantRecipe {
                damp: 0.0,
                ..recipe.clone()
            })
            .contains("damp")
        );
        assert!(
            message(&QuantRecipe {
                targets: vec!["*.qproj".into()],
                ..recipe.clone()
            })
            .contains("*.qproj")
        );
        assert!(
            message(&QuantRecipe {
                targets: vec!["[".into()],
                ..recipe
            })
            .contains('[')
        );
        for bad in ["0", "48", "-1", "row"] {
            assert!(bad.parse::<GroupSize>().is_err(), "{bad}");
        }
    }
}
