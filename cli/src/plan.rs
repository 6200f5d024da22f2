//! Every tensor's fate, from the headers alone: what is stored, in which form, and why.

use crate::args::HeadArg;
use crate::error::CliError;
use crate::recipe::Recipe;
use qbin_format::{
    Dtype, Fate, Layout, LayoutEntry, Manifest, Model, Planned, SIDE_FILES, TensorEntry,
    TensorReport, Weight, artifact_layout,
};
use qbin_prune::PrunePass;
use qbin_quant::{Granularity, Grid, QuantPass, ScaleSearch};
use qbin_runtime::ModelConfig;
use qbin_runtime::spec::{self, EMBEDDING, HEAD, Role, TensorSpec};

/// What becomes of one tensor.
pub(crate) struct PlanEntry {
    /// The tensor.
    pub(crate) spec: TensorSpec,
    /// Its fate, as it will stand in the manifest.
    pub(crate) fate: Fate,
    /// How it is stored, if it is.
    pub(crate) planned: Option<Planned>,
    /// Its bytes in the checkpoint.
    pub(crate) source_bytes: u64,
    /// Its bytes in the artifact, at most before the work and exactly after it.
    pub(crate) bytes: u64,
}

/// The whole model's.
pub(crate) struct Plan {
    /// One for each tensor of the checkpoint, and for a head that gets a copy of its own.
    pub(crate) entries: Vec<PlanEntry>,
    /// Files that travel inside.
    pub(crate) files: Vec<&'static str>,
    /// What the writer has to place, in order.
    pub(crate) planned: Vec<Planned>,
    /// Where it will stand.
    pub(crate) layout: Layout,
    /// The manifest as far as it is known before any work.
    pub(crate) manifest: Manifest,
}

/// The grid of a quantized head: nearest values, in groups of 128 where a row has that many columns.
pub(crate) fn head_grid(head: HeadArg, config: &ModelConfig) -> Option<Grid> {
    let bits = match head {
        HeadArg::Keep => return None,
        HeadArg::Int8 => 8,
        HeadArg::Int4 => 4,
    };
    let granularity = if config.hidden_size >= 128 {
        Granularity::Group(128)
    } else {
        Granularity::Channel
    };
    Some(Grid {
        bits,
        symmetric: bits == 8,
        granularity,
        search: ScaleSearch::None,
    })
}

impl Plan {
    /// # Errors
    /// A tensor that does not fit the config, or a recipe that does not fit the tensors.
    pub(crate) fn new(
        model: &Model,
        config: &ModelConfig,
        recipe: &Recipe,
        seed: u64,
    ) -> Result<Self, CliError> {
        let pass = QuantPass::new(&recipe.quantize, config)?;
        let prune = recipe
            .prune
            .as_ref()
            .map(|prune| PrunePass::new(prune, config))
            .transpose()?;
        if let (Some(prune), Some(true)) = (&prune, recipe.prune.as_ref().map(|prune| prune.joint))
        {
            prune.check_groups(&pass)?;
        }
        let head = head_grid(recipe.head, config);
        let mut entries = Vec::new();
        for spec in spec::account(config, model)? {
            let Some(Weight::Dense(view)) = model.weight(&spec.name) else {
                unreachable!("a checkpoint holds dense tensors, and `account` saw this one");
            };
            let (dtype, source_bytes) = (view.dtype, view.bytes.len() as u64);
            let (fate, planned) = match spec.role {
                Role::Linear { block, kind } => match pass.fate(block, kind) {
                    qbin_quant::Fate::Quantize(grid) => {
                        quantized(&spec, grid, recipe.quantize.method.name())
                    }
                    qbin_quant::Fate::Keep(reason)
                        if prune
                            .as_ref()
                            .is_some_and(|prune| prune.rewrites(block, kind)) =>
                    {
                        dense(
                            &spec,
                            Dtype::F32,
                            &format!("pruned, not quantized: {reason}"),
                        )
                    }
                    qbin_quant::Fate::Keep(reason) => dense(&spec, dtype, reason),
                },
                Role::Norm { block: Some(block) } | Role::Bias { block, .. }
                    if pass.folded(block).contains(&spec.name) =>
                {
                    dense(&spec, Dtype::F32, "takes up the channel scales of awq")
                }
                Role::Norm { .. } => dense(&spec, dtype, "norms are not quantized"),
                Role::Bias { .. } => dense(&spec, dtype, "biases are not quantized"),
                Role::Embedding => dense(&spec, dtype, "the embedding is kept as stored"),
                Role::Head => match &head {
                    Some(grid) => quantized(&spec, grid, "rtn"),
                    None => dense(&spec, dtype, "the head is kept as stored (`--head`)"),
                },
                Role::Unused { reason } => (
                    Fate::Dropped {
                        reason: reason.into(),
                    },
                    None,
                ),
            };
            entries.push(PlanEntry {
                spec,
                fate,
                planned,
                source_bytes,
                bytes: 0,
            });
        }
        if config.tie_word_embeddings {
            tie_head(&mut entries, config, head.as_ref());
        }
        let files: Vec<&str> = SIDE_FILES
            .into_iter()
            .filter(|name| model.file(name).is_some())
            .collect();
        let sizes = files
            .iter()
            .map(|&name| (name, model.file(name).map_or(0, <[u8]>::len)));
        let stored = entries.iter().filter_map(|entry| entry.planned.clone());
        let planned: Vec<Planned> = stored
            .chain(sizes.map(|(name, bytes)| Planned::File {
                name: name.into(),
                bytes,
            }))
            .collect();
        let manifest = draft(model, recipe, seed, &entries);
        let layout = artifact_layout(&planned, manifest.planned_bytes())?;
        let sizes = layout.entries.clone();
        let mut plan = Self {
            entries,
            files,
            planned,
            layout,
            manifest,
        };
        plan.set_sizes(&sizes);
        Ok(plan)
    }

    /// Says what each planned tensor takes: before the work with every code, and after it as it was stored, because
    /// sparse tensors take less.
    pub(crate) fn set_sizes(&mut self, sizes: &[LayoutEntry]) {
        let stored = self.entries.iter_mut().filter(|e| e.planned.is_some());
        for (entry, size) in stored.zip(sizes) {
            assert_eq!(entry.spec.name, size.name, "sizes come in the plan's order");
            entry.bytes = size.bytes;
        }
    }
}

/// The manifest without digests, reports and calibration.
fn draft(model: &Model, recipe: &Recipe, seed: u64, entries: &[PlanEntry]) -> Manifest {
    let config = model.file("config.json").expect("the config was read");
    let entry = |entry: &PlanEntry| {
        let (fate, shape) = (entry.fate.clone(), entry.spec.shape.clone());
        (
            entry.spec.name.clone(),
            TensorEntry {
                fate,
                shape,
                sha256: String::new(),
                report: TensorReport::default(),
            },
        )
    };
    Manifest {
        tool_version: env!("CARGO_PKG_VERSION").into(),
        config: serde_json::from_slice(config).expect("the config was parsed"),
        recipe: serde_json::to_value(recipe).expect("a recipe is plain data"),
        seed,
        tensors: entries.iter().map(entry).collect(),
        ..Manifest::default()
    }
}

/// A tied head is the embedding by another name, or a quantized copy of it.
fn tie_head(entries: &mut Vec<PlanEntry>, config: &ModelConfig, head: Option<&Grid>) {
    let spec = TensorSpec {
        name: HEAD.into(),
        shape: vec![config.vocab_size, config.hidden_size],
        role: Role::Head,
    };
    let (fate, planned) = match head {
        Some(grid) => quantized(&spec, grid, "rtn"),
        None => (
            Fate::Alias {
                of: EMBEDDING.into(),
                reason: "the head is tied to the embedding".into(),
            },
            None,
        ),
    };
    // A head stored although tied is replaced, not listed twice.
    let stored = entries
        .iter()
        .position(|entry| entry.spec.name == HEAD)
        .map(|at| entries.remove(at));
    let source_bytes = stored.map_or(0, |entry| entry.source_bytes);
    entries.push(PlanEntry {
        spec,
        fate,
        planned,
        source_bytes,
        bytes: 0,
    });
}

fn quantized(spec: &TensorSpec, grid: &Grid, method: &str) -> (Fate, Option<Planned>) {
    let planned = Planned::Quantized {
        name: spec.name.clone(),
        scheme: grid.scheme(),
        rows: spec.shape[0],
        cols: spec.shape[1],
    };
    (Fate::quantized(grid.scheme(), method), Some(planned))
}

fn dense(spec: &TensorSpec, dtype: Dtype, reason: &str) -> (Fate, Option<Planned>) {
    let planned = Planned::Dense {
        name: spec.name.clone(),
        dtype,
        shape: spec.shape.clone(),
    };
    (
        Fate::Kept {
            dtype,
            reason: reason.into(),
        },
        Some(planned),
    )
}
