//! `qbin prune`: checkpoint in, checkpoint with zeros out.

use crate::args::PruneArgs;
use crate::commands::Show;
use crate::error::CliError;
use crate::host::Resident;
use crate::machine::Machine;
use crate::progress::Progress;
use crate::source::read_source;
use crate::{calibration, loaded, render};
use qbin_calib_data::Windows;
use qbin_format::{
    CalibrationInfo, Model, SIDE_FILES, SafetensorsWriter, TensorReport, Weight, float_bytes,
};
use qbin_prune::{Curve, MeasurePass, PruneMethod, PrunePass, PruneRecipe, SparsityOverride};
use qbin_runtime::Parts;
use qbin_runtime::spec::{self, LinearKind, Role, TensorSpec};
use qbin_runtime::walk::{self, NewTensor, PassError, Rewritten};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// What `--json` prints.
#[derive(Serialize)]
struct Summary {
    recipe: PruneRecipe,
    weights: u64,
    zeros: u64,
    sparsity: f64,
    relative_error_mean: f64,
    seconds: f64,
    peak_rss_bytes: Option<u64>,
    fallbacks: Vec<String>,
    calibration: Option<CalibrationInfo>,
    tensors: Vec<Pruned>,
}

/// One pruned tensor.
#[derive(Serialize)]
struct Pruned {
    name: String,
    weights: u64,
    zeros: u64,
    #[serde(flatten)]
    report: TensorReport,
}

pub(crate) fn run(args: &PruneArgs, machine: Machine, show: Show) -> Result<ExitCode, CliError> {
    let start = Instant::now();
    let recipe = recipe(args)?;
    let model = Model::open(&args.input)?;
    let Model::Checkpoint(checkpoint) = &model else {
        return Err(CliError::AlreadyQuantized {
            path: args.input.clone(),
        });
    };
    let cpu = machine.cpu(qbin_runtime::Path::Reference);
    let parts = Parts::new(&model, &cpu)?;
    loaded::tokenizer(&model, &parts.config)?;
    // What cannot be done is refused before any work.
    PrunePass::new(&recipe, &parts.config)?;
    let folder = Folder::create(&args.output)?;
    read_source(checkpoint, show)?;
    let windows = match recipe.needs_calibration() {
        true => Some(calibration::windows(
            &args.calibration,
            &args.input,
            &parts,
            show,
        )?),
        false => None,
    };
    let pass = pass(&recipe, &parts, windows.as_ref(), show)?.as_stored();
    let mut output = Output::create(&model, &parts, &folder.partial)?;
    output.walk(&parts, pass, windows.as_ref(), show)?;
    let tensors = output.finish()?;
    folder.finish(&model)?;

    let (weights, zeros) = tensors.iter().fold((0, 0), |(weights, zeros), tensor| {
        (weights + tensor.weights, zeros + tensor.zeros)
    });
    let errors = tensors
        .iter()
        .filter_map(|tensor| tensor.report.relative_error);
    let fallbacks = tensors.iter().flat_map(|tensor| {
        let named = |text| format!("{}: {text}", tensor.name);
        tensor.report.fallbacks.iter().map(named)
    });
    let summary = Summary {
        weights,
        zeros,
        sparsity: zeros as f64 / weights.max(1) as f64,
        relative_error_mean: errors.sum::<f64>() / tensors.len().max(1) as f64,
        seconds: start.elapsed().as_secs_f64(),
        peak_rss_bytes: Resident::read().peak_bytes,
        fallbacks: fallbacks.collect(),
        calibration: windows.as_ref().map(calibration::info),
        recipe,
        tensors,
    };
    show.print(&summary, |summary| describe(summary, &args.output))?;
    Ok(ExitCode::SUCCESS)
}

/// The pass that was typed.
fn recipe(args: &PruneArgs) -> Result<PruneRecipe, CliError> {
    let method = PruneMethod::from(args.method);
    let given = [
        ("--act-order", args.act_order.is_some()),
        ("--damp", args.damp.is_some()),
        ("--refine", args.refine.is_some()),
    ];
    if let Some((option, _)) = given.into_iter().find(|(_, given)| *given)
        && method != PruneMethod::SparseGpt
    {
        return Err(CliError::OptionOfOtherMethod {
            option,
            of: PruneMethod::SparseGpt.name(),
            method: method.name(),
        });
    }
    let mut recipe = PruneRecipe::new(method, args.sparsity);
    if let Some(act_order) = args.act_order {
        recipe.act_order = act_order.into();
    }
    recipe.allocate = args.allocate;
    recipe.damp = args.damp.unwrap_or(recipe.damp);
    recipe.refine = args.refine.unwrap_or(recipe.refine);
    for given in &args.layer {
        let (pattern, sparsity) = given
            .rsplit_once('=')
            .ok_or_else(|| CliError::LayerSyntax {
                given: given.clone(),
            })?;
        recipe.overrides.push(SparsityOverride {
            pattern: pattern.into(),
            sparsity: sparsity.parse()?,
        });
    }
    Ok(recipe)
}

/// The pass of a recipe, its zeros dealt out where the recipe says so.
pub(crate) fn pass<'a>(
    recipe: &'a PruneRecipe,
    parts: &'a Parts<'_>,
    windows: Option<&Windows>,
    show: Show,
) -> Result<PrunePass<'a>, CliError> {
    let mut pass = PrunePass::new(recipe, &parts.config)?;
    if recipe.allocate {
        pass.allocate(&measure(recipe, parts, windows, show)?);
    }
    Ok(pass)
}

/// What zeros cost in each linear of the model as it is.
fn measure(
    recipe: &PruneRecipe,
    parts: &Parts<'_>,
    windows: Option<&Windows>,
    show: Show,
) -> Result<BTreeMap<(usize, LinearKind), Curve>, CliError> {
    // Refinement lowers all errors alike and takes most of the time.
    let plain = PruneRecipe {
        refine: 0,
        ..recipe.clone()
    };
    let mut pass = MeasurePass::new(&plain, &parts.config)?;
    let (ids, window_tokens) =
        windows.map_or((&[][..], 1), |windows| (windows.ids(), windows.tokens()));
    let mut progress = Progress::new("measuring", show.quiet);
    let mut tick = |at: walk::Progress| progress.set(at.done, at.total, "");
    let mut sink = |_: usize, _: Rewritten| Ok(());
    walk::walk(
        parts,
        ids,
        window_tokens,
        &mut [&mut pass],
        &mut sink,
        &mut tick,
    )?;
    progress.finish();
    Ok(pass.finish())
}

/// A folder under construction: it has another name until it is whole, and goes if it never is.
struct Folder {
    partial: PathBuf,
    target: PathBuf,
    done: bool,
}

impl Folder {
    fn create(target: &Path) -> Result<Self, CliError> {
        // Without a slash at its end, which would put the folder under construction into the target.
        let target: PathBuf = target.components().collect();
        let mut partial = target.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        for path in [&target, &partial] {
            if path.exists() {
                return Err(CliError::FolderExists { path: path.clone() });
            }
        }
        std::fs::create_dir_all(&partial).map_err(write_error(&partial))?;
        Ok(Self {
            partial,
            target,
            done: false,
        })
    }

    /// Copies the files beside the weights and gives the folder its name.
    fn finish(mut self, model: &Model) -> Result<(), CliError> {
        for name in SIDE_FILES {
            if let Some(text) = model.file(name) {
                let path = self.partial.join(name);
                std::fs::write(&path, text).map_err(write_error(&path))?;
                let written = std::fs::File::open(&path).and_then(|file| file.sync_all());
                written.map_err(write_error(&path))?;
            }
        }
        let named = std::fs::rename(&self.partial, &self.target);
        named.map_err(write_error(&self.target))?;
        self.done = true;
        let beside = match self.target.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let synced = std::fs::File::open(beside).and_then(|folder| folder.sync_all());
        synced.map_err(write_error(beside))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.done {
            // There is nobody left to tell.
            std::fs::remove_dir_all(&self.partial).ok();
        }
    }
}

fn write_error(path: &Path) -> impl FnOnce(std::io::Error) -> CliError {
    let path = path.to_path_buf();
    |source| CliError::Write { path, source }
}

/// The new weights being written: the tensors of each block as the walk leaves it, then all others.
struct Output<'m> {
    model: &'m Model,
    writer: SafetensorsWriter,
    /// Names by block, in the order of the file; those of no block last.
    blocks: Vec<Vec<String>>,
    pruned: Vec<Pruned>,
}

impl<'m> Output<'m> {
    fn create(model: &'m Model, parts: &Parts<'_>, folder: &Path) -> Result<Self, CliError> {
        let num_blocks = parts.config.num_blocks;
        let mut blocks = vec![Vec::new(); num_blocks + 1];
        for TensorSpec { name, role, .. } in spec::account(&parts.config, model)? {
            let block = match role {
                Role::Linear { block, .. } | Role::Bias { block, .. } => block,
                Role::Norm { block } => block.unwrap_or(num_blocks),
                Role::Embedding | Role::Head | Role::Unused { .. } => num_blocks,
            };
            blocks[block].push(name);
        }
        let entries = blocks.iter().flatten().map(|name| {
            let view = dense(model, name);
            (name.clone(), view.dtype, view.shape.to_vec())
        });
        let metadata = [("format".to_string(), "pt".to_string())].into();
        let path = folder.join("model.safetensors");
        Ok(Self {
            model,
            writer: SafetensorsWriter::create(&path, entries.collect(), metadata)?,
            blocks,
            pruned: Vec::new(),
        })
    }

    fn walk(
        &mut self,
        parts: &Parts<'_>,
        mut pass: PrunePass<'_>,
        windows: Option<&Windows>,
        show: Show,
    ) -> Result<(), CliError> {
        let (ids, window_tokens) =
            windows.map_or((&[][..], 1), |windows| (windows.ids(), windows.tokens()));
        let blocks = parts.config.num_blocks;
        let mut progress = Progress::new("pruning", show.quiet);
        let mut tick = |at: walk::Progress| {
            let message = format!("block {} of {blocks}", at.block + 1);
            progress.set(at.done, at.total, &message);
        };
        let mut sink = |block: usize, new: Rewritten| self.write(block, new);
        walk::walk(
            parts,
            ids,
            window_tokens,
            &mut [&mut pass],
            &mut sink,
            &mut tick,
        )?;
        progress.finish();
        Ok(())
    }

    fn write(&mut self, block: usize, mut new: Rewritten) -> Result<(), PassError> {
        for name in &self.blocks[block] {
            let view = dense(self.model, name);
            match new.remove(name) {
                Some((NewTensor::Dense(values), report)) => {
                    self.writer.write(name, &float_bytes(&values, view.dtype))?;
                    self.pruned.push(Pruned {
                        name: name.clone(),
                        weights: values.len() as u64,
                        zeros: values.iter().filter(|value| **value == 0.0).count() as u64,
                        report,
                    });
                }
                Some((NewTensor::Quantized(_), _)) => unreachable!("pruning makes dense tensors"),
                None => self.writer.write(name, view.bytes)?,
            }
            self.model.release(name);
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<Pruned>, CliError> {
        let rest = self.blocks.last().expect("never empty");
        for name in rest {
            self.writer.write(name, dense(self.model, name).bytes)?;
            self.model.release(name);
        }
        self.writer.finish()?;
        Ok(self.pruned)
    }
}

fn dense<'m>(model: &'m Model, name: &str) -> qbin_format::TensorView<'m> {
    match model.weight(name) {
        Some(Weight::Dense(view)) => view,
        _ => unreachable!("a checkpoint holds dense tensors, and this one is accounted for"),
    }
}

fn describe(summary: &Summary, output: &Path) -> String {
    let row = |tensor: &Pruned| {
        let error = tensor.report.relative_error;
        vec![
            tensor.name.clone(),
            format!(
                "{:.4}%",
                100.0 * tensor.zeros as f64 / tensor.weights as f64
            ),
            error.map_or(String::new(), |error| format!("{error:.2e}")),
        ]
    };
    let rows: Vec<Vec<String>> = summary.tensors.iter().map(row).collect();
    let mut text = render::table(&["tensor", "zeros", "relative error"], &rows);
    text += &format!(
        "\n{} of {} weights of these are zero ({:.4}%), mean relative error {:.2e}, {:.1} s\n",
        summary.zeros,
        summary.weights,
        100.0 * summary.sparsity,
        summary.relative_error_mean,
        summary.seconds
    );
    for fallback in &summary.fallbacks {
        text += &format!("fallback: {fallback}\n");
    }
    text + &format!("written to {}\n", output.display())
}
