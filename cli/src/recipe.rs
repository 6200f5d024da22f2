//! A recipe: the ordered passes over a model, from a TOML file or from the command line's short forms.

use crate::args::{HeadArg, RecipeArgs};
use crate::error::CliError;
use qbin_prune::{PruneMethod, PruneRecipe};
use qbin_quant::{Method, Override, QuantRecipe};
use serde::{Deserialize, Serialize};

/// What is to be done to a model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Recipe {
    /// The output head.
    pub(crate) head: HeadArg,
    /// Zeros first, if any are wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prune: Option<PruneRecipe>,
    /// Then the grid.
    pub(crate) quantize: QuantRecipe,
}

/// The file: `head`, then `[[pass]]` tables in order, each with its `method`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    head: HeadArg,
    pass: Vec<toml::Table>,
}

impl Recipe {
    /// # Errors
    /// A file that cannot be read or is no recipe, or passes that do not go together.
    pub(crate) fn from_args(args: &RecipeArgs) -> Result<Self, CliError> {
        if let Some(path) = &args.recipe {
            let text = std::fs::read_to_string(path).map_err(|source| CliError::Read {
                path: path.clone(),
                source,
            })?;
            return Self::from_toml(&text).map_err(|error| error.in_recipe(path));
        }
        let method = args.method.map_or(Method::Gptq, Method::from);
        let mut quantize = QuantRecipe::new(method);
        quantize.bits = args.bits;
        quantize.group_size = args.group_size;
        quantize.symmetric = (args.symmetric || args.asymmetric).then_some(args.symmetric);
        quantize.scale_search = args.scale_search.map(Into::into);
        if let Some(act_order) = args.act_order {
            quantize.act_order = act_order.into();
        }
        if let Some(refine) = args.refine {
            quantize.refine = refine;
        }
        if let Some(damp) = args.damp {
            quantize.damp = damp;
        }
        quantize.overrides = args.keep.iter().map(Override::keep).collect();
        if method != Method::Gptq {
            let given = [
                ("--act-order", args.act_order.is_some()),
                ("--damp", args.damp.is_some()),
                ("--refine", args.refine.is_some()),
            ];
            if let Some((option, _)) = given.into_iter().find(|(_, given)| *given) {
                return Err(CliError::OptionOfOtherMethod {
                    option,
                    of: Method::Gptq.name(),
                    method: method.name(),
                });
            }
        }
        // With GPTQ one sweep does both; the others round what is left.
        let prune = args.sparsity.map(|sparsity| PruneRecipe {
            joint: method == Method::Gptq,
            allocate: args.allocate,
            ..PruneRecipe::new(PruneMethod::SparseGpt, sparsity)
        });
        Ok(Self {
            head: args.head.unwrap_or_default(),
            prune,
            quantize: quantize.spelled_out(),
        })
    }

    /// Whether any of the passes reads calibration tokens.
    pub(crate) fn needs_calibration(&self) -> bool {
        self.quantize.method.needs_calibration()
            || (self.prune.as_ref()).is_some_and(PruneRecipe::needs_calibration)
    }

    fn from_toml(text: &str) -> Result<Self, CliError> {
        let file: File = toml::from_str(text).map_err(CliError::RecipeSyntax)?;
        let mut prune: Option<PruneRecipe> = None;
        let mut quantize: Option<QuantRecipe> = None;
        for pass in file.pass {
            let method = pass
                .get("method")
                .and_then(toml::Value::as_str)
                .unwrap_or("(none)")
                .to_string();
            match method.as_str() {
                "rtn" | "gptq" | "awq" if quantize.is_none() => {
                    quantize = Some(pass.try_into().map_err(CliError::RecipeSyntax)?)
                }
                "magnitude" | "wanda" | "sparsegpt" if prune.is_none() && quantize.is_none() => {
                    prune = Some(pass.try_into().map_err(CliError::RecipeSyntax)?)
                }
                "rtn" | "gptq" | "awq" | "magnitude" | "wanda" | "sparsegpt" => {
                    return Err(CliError::RecipeOrder { method });
                }
                _ => return Err(CliError::RecipeMethod { method }),
            }
        }
        let quantize = quantize.ok_or(CliError::RecipeWithoutGrid)?;
        if prune.as_ref().is_some_and(|prune| prune.joint) && quantize.method != Method::Gptq {
            return Err(CliError::JointWithout {
                method: quantize.method.name(),
            });
        }
        Ok(Self {
            head: file.head,
            prune,
            quantize: quantize.spelled_out(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gives_what_it_says() {
        let text = r#"
            head = "int8"
            [[pass]]
            method = "magnitude"
            sparsity = "2:4"
            [[pass]]
            method = "awq"
            group_size = "channel"
            [[pass.override]]
            pattern = "*.down_proj.weight"
            bits = 8
        "#;
        let recipe = Recipe::from_toml(text).expect("a valid recipe");
        assert_eq!(recipe.head, HeadArg::Int8);
        assert_eq!(
            recipe.prune.expect("a pruning pass").sparsity.to_string(),
            "2:4"
        );
        assert_eq!(
            (recipe.quantize.method, recipe.quantize.overrides[0].bits),
            (Method::Awq, Some(8))
        );
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let message = |text: &str| {
            let error = Recipe::from_toml(text).expect_err("must be refused");
            format!(
                "{error} {}",
                std::error::Error::source(&error)
                    .map(ToString::to_string)
                    .unwrap_or_default()
            )
        };
        assert!(message("[[pass]]\nmethod = \"gptq\"\nbitz = 4").contains("bitz"));
        assert!(message("[[pass]]\nmethod = \"squeeze\"").contains("squeeze"));
        assert!(
            message("[[pass]]\nmethod = \"rtn\"\n[[pass]]\nmethod = \"magnitude\"\nsparsity = 0.5")
                .contains("magnitude")
        );
        assert!(message("[[pass]]\nmethod = \"magnitude\"\nsparsity = 0.5").contains("grid"));
        assert!(
            message("[[pass]]\nmethod = \"magnitude\"\nsparsity = 1.5\n[[pass]]\nmethod=\"rtn\"")
                .contains("1.5")
        );
        assert!(message("[[pass]]\nmethod = \"rtn\"\ngroup_size = 48").contains("48"));
    }
}
