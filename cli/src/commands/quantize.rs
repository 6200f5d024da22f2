//! `qbin quantize`: checkpoint in, measured artifact out.

use crate::args::QuantizeArgs;
use crate::commands::plan::{Group, groups};
use crate::commands::{Show, prune};
use crate::error::CliError;
use crate::host::Resident;
use crate::machine::Machine;
use crate::plan::{Plan, head_grid};
use crate::progress::Progress;
use crate::recipe::Recipe;
use crate::source::read_source;
use crate::{calibration, loaded, render};
use qbin_calib_data::Windows;
use qbin_format::{
    ArtifactWriter, CalibrationInfo, Dtype, Model, Planned, TensorReport, Weight, check_output,
    float_bytes,
};
use qbin_quant::{Found, Grid, QuantPass, WEIGHTS_ALONE, Zeros, rtn};
use qbin_runtime::Parts;
use qbin_runtime::spec::{EMBEDDING, HEAD};
use qbin_runtime::times::Times;
use qbin_runtime::walk::{self, BlockPass, NewTensor, PassError, Rewritten};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

/// Rows of the head in memory at once; a multiple of the artifact's tile height.
const HEAD_ROWS: usize = 4096;

/// What `--json` prints.
#[derive(Serialize)]
struct Summary {
    method: &'static str,
    bits_per_weight: f64,
    bits_per_parameter: f64,
    bytes: u64,
    source_bytes: u64,
    ratio: f64,
    seconds: f64,
    stages: Times,
    peak_rss_bytes: Option<u64>,
    activation_bytes: u64,
    relative_error_mean: Option<f64>,
    relative_error_max: Option<WorstTensor>,
    fallbacks: Vec<String>,
    calibration: Option<CalibrationInfo>,
    sha256: String,
    groups: Vec<Group>,
}

#[derive(Serialize)]
struct WorstTensor {
    tensor: String,
    relative_error: f64,
}

pub(crate) fn run(args: &QuantizeArgs, machine: Machine, show: Show) -> Result<ExitCode, CliError> {
    let start = Instant::now();
    let recipe = Recipe::from_args(&args.recipe)?;
    let model = Model::open(&args.input)?;
    let Model::Checkpoint(checkpoint) = &model else {
        return Err(CliError::AlreadyQuantized {
            path: args.input.clone(),
        });
    };
    check_output(&args.output, checkpoint.input_paths())?;
    let cpu = machine.cpu(qbin_runtime::Path::Reference);
    let parts = Parts::new(&model, &cpu)?;
    // Methods that need no calibration need no tokenizer, but the artifact carries it.
    loaded::tokenizer(&model, &parts.config)?;
    let mut plan = Plan::new(&model, &parts.config, &recipe, args.calibration.seed)?;
    plan.manifest.source = read_source(checkpoint, show)?;
    let writer = ArtifactWriter::create(
        &args.output,
        plan.planned.clone(),
        plan.manifest.planned_bytes(),
    )?;
    let windows = match recipe.needs_calibration() {
        true => Some(calibration::windows(
            &args.calibration,
            &args.input,
            &parts,
            show,
        )?),
        false => None,
    };
    let shapes = plan
        .entries
        .iter()
        .map(|entry| (entry.spec.name.clone(), entry.spec.shape.clone()))
        .collect();
    let mut job = Job {
        writer,
        shapes,
        reports: BTreeMap::new(),
        show,
    };
    let stages = job.walk(&parts, &recipe, windows.as_ref())?;
    if let Some(grid) = head_grid(recipe.head, &parts.config) {
        job.head(&model, &parts, &grid)?;
    }
    job.keep(&model, &plan)?;
    plan.manifest.calibration = windows.as_ref().map(calibration::info);
    let activation_bytes = windows.as_ref().map_or(0, |w| {
        (w.ids().len() * parts.config.hidden_size * size_of::<f32>()) as u64
    });
    let summary = job.finish(plan, &recipe)?;
    let summary = Summary {
        seconds: start.elapsed().as_secs_f64(),
        stages,
        peak_rss_bytes: Resident::read().peak_bytes,
        activation_bytes,
        ..summary
    };
    show.print(&summary, |summary| describe(summary, &args.output))?;
    Ok(ExitCode::SUCCESS)
}

/// An artifact being made.
struct Job {
    writer: ArtifactWriter,
    shapes: BTreeMap<String, Vec<usize>>,
    reports: BTreeMap<String, TensorReport>,
    show: Show,
}

impl Job {
    /// Runs the recipe's passes over the blocks, writes what they make, and tells how long its stages took.
    fn walk(
        &mut self,
        parts: &Parts<'_>,
        recipe: &Recipe,
        windows: Option<&Windows>,
    ) -> Result<Times, CliError> {
        let pass = |recipe| prune::pass(recipe, parts, windows, self.show);
        let (joint, before): (Vec<_>, Vec<_>) = recipe.prune.iter().partition(|prune| prune.joint);
        let joint = joint.into_iter().map(pass).next().transpose()?;
        let mut before = before.into_iter().map(pass).next().transpose()?;
        // GPTQ keeps the zeros of a pass before it, or chooses them itself.
        let zeros = match &joint {
            Some(joint) => Some(joint as &dyn Zeros),
            None => before.is_some().then_some(&Found as &dyn Zeros),
        };
        let mut quant = QuantPass::new(&recipe.quantize, &parts.config)?.holding(zeros);
        let mut passes: Vec<&mut dyn BlockPass> = Vec::new();
        passes.extend(before.as_mut().map(|pass| pass as &mut dyn BlockPass));
        passes.push(&mut quant);
        let (ids, window_tokens) =
            windows.map_or((&[][..], 1), |windows| (windows.ids(), windows.tokens()));
        let blocks = parts.config.num_blocks;
        // The sink and the progress both show where the walk is; the walk calls them in turn.
        let progress = std::cell::RefCell::new(Progress::new("quantizing", self.show.quiet));
        let last_error = std::cell::Cell::new(None::<f64>);
        let mut sink = |_: usize, new: Rewritten| -> Result<(), PassError> {
            let errors = new.values().filter_map(|(_, report)| report.relative_error);
            last_error.set(errors.reduce(f64::max));
            self.write(new)
        };
        let mut tick = |at: walk::Progress| {
            let error = last_error.get().map_or(String::new(), |error| {
                format!(", relative error of the last one {error:.1e}")
            });
            progress.borrow_mut().set(
                at.done,
                at.total,
                &format!("block {} of {blocks}{error}", at.block + 1),
            );
        };
        let mut times = walk::walk(parts, ids, window_tokens, &mut passes, &mut sink, &mut tick)?;
        progress.into_inner().finish();
        times.add(quant.times());
        Ok(times)
    }

    fn write(&mut self, new: Rewritten) -> Result<(), PassError> {
        for (name, (tensor, report)) in new {
            match tensor {
                NewTensor::Quantized(matrix) => self.writer.write_quantized(&name, &matrix)?,
                NewTensor::Dense(values) => {
                    let shape = self.shapes[&name].clone();
                    self.writer.write_dense(
                        &name,
                        Dtype::F32,
                        &shape,
                        &float_bytes(&values, Dtype::F32),
                    )?;
                }
            }
            self.reports.insert(name, report);
        }
        Ok(())
    }

    /// Rounds the head to nearest, some rows at a time: as a whole it can be larger than all else in memory.
    fn head(&mut self, model: &Model, parts: &Parts<'_>, grid: &Grid) -> Result<(), CliError> {
        let name = if parts.config.tie_word_embeddings {
            EMBEDDING
        } else {
            HEAD
        };
        let weight = model.weight(name).expect("accounted for");
        let (rows, cols) = (parts.config.vocab_size, parts.config.hidden_size);
        let (mut error, mut signal) = (0f64, 0f64);
        for first in (0..rows).step_by(HEAD_ROWS) {
            let last = (first + HEAD_ROWS).min(rows);
            let mut panel = vec![0f32; (last - first) * cols];
            weight.read_rows_f32(first..last, &mut panel);
            let quantized = rtn(&panel, last - first, cols, grid, None, None)
                .map_err(|error| error.in_tensor(name))?;
            for (w, q) in panel.iter().zip(quantized.dequantize()) {
                error += f64::from(w - q).powi(2);
                signal += f64::from(*w).powi(2);
            }
            self.writer.write_quantized_rows(HEAD, first, &quantized)?;
        }
        model.release(name);
        let relative_error = Some(if signal > 0.0 { error / signal } else { 0.0 });
        self.reports.insert(
            HEAD.into(),
            TensorReport {
                relative_error,
                notes: vec![WEIGHTS_ALONE.into()],
                ..TensorReport::default()
            },
        );
        Ok(())
    }

    /// Copies what stays as stored.
    fn keep(&mut self, model: &Model, plan: &Plan) -> Result<(), CliError> {
        for entry in &plan.entries {
            let name = &entry.spec.name;
            let Some(Planned::Dense { dtype, shape, .. }) = &entry.planned else {
                continue;
            };
            if self.reports.contains_key(name) {
                continue;
            }
            let Some(Weight::Dense(view)) = model.weight(name) else {
                unreachable!("planned from this checkpoint")
            };
            match *dtype == view.dtype {
                true => self.writer.write_dense(name, *dtype, shape, view.bytes)?,
                // A pass might have changed it, and did not.
                false => self.writer.write_dense(
                    name,
                    Dtype::F32,
                    shape,
                    &float_bytes(&view.to_f32(), Dtype::F32),
                )?,
            }
            model.release(name);
        }
        for name in &plan.files {
            self.writer
                .write_file(name, model.file(name).expect("planned from this model"))?;
        }
        Ok(())
    }

    fn finish(self, mut plan: Plan, recipe: &Recipe) -> Result<Summary, CliError> {
        let mut manifest = std::mem::take(&mut plan.manifest);
        for (name, report) in &self.reports {
            manifest
                .tensors
                .get_mut(name)
                .expect("only planned tensors are rewritten")
                .report = report.clone();
        }
        let (source_bytes, calibration) = (manifest.source.bytes, manifest.calibration.clone());
        let written = self.writer.finish(manifest)?;
        plan.set_sizes(&written.entries);
        let groups = groups(&plan);
        let linears = groups.iter().filter(|group| group.quantized);
        let (bits, weights) = linears.fold((0, 0), |(bits, weights), group| {
            (bits + 8 * group.bytes, weights + group.parameters)
        });
        let parameters: u64 = groups.iter().map(|group| group.parameters).sum();
        let errors: Vec<(&String, f64)> = self
            .reports
            .iter()
            .filter_map(|(name, report)| Some((name, report.relative_error?)))
            .collect();
        let worst = errors.iter().copied().max_by(|a, b| a.1.total_cmp(&b.1));
        let fallbacks = self.reports.iter().flat_map(|(name, report)| {
            report
                .fallbacks
                .iter()
                .map(move |text| format!("{name}: {text}"))
        });
        Ok(Summary {
            method: recipe.quantize.method.name(),
            bits_per_weight: bits as f64 / weights as f64,
            bits_per_parameter: 8.0 * written.bytes as f64 / parameters as f64,
            bytes: written.bytes,
            source_bytes,
            ratio: source_bytes as f64 / written.bytes as f64,
            seconds: 0.0,
            stages: Times::default(),
            peak_rss_bytes: None,
            activation_bytes: 0,
            relative_error_mean: (!errors.is_empty())
                .then(|| errors.iter().map(|e| e.1).sum::<f64>() / errors.len() as f64),
            relative_error_max: worst.map(|(tensor, relative_error)| WorstTensor {
                tensor: tensor.clone(),
                relative_error,
            }),
            fallbacks: fallbacks.collect(),
            calibration,
            sha256: written.sha256,
            groups,
        })
    }
}

/// The stages of the walk that took any time worth showing, in seconds.
fn stages(times: &Times) -> String {
    let rewriting = times.rewrite - times.factor - times.sweep - times.refine;
    let stages = [
        ("forward", times.forward),
        ("statistics", times.statistics),
        ("factorization", times.factor),
        ("sweep", times.sweep),
        ("refinement", times.refine),
        ("other changes of weights", rewriting),
        ("writing", times.write),
    ];
    let shown = stages.iter().filter(|(_, seconds)| *seconds >= 0.05);
    let parts: Vec<String> = shown
        .map(|(name, seconds)| format!("{name} {seconds:.1} s"))
        .collect();
    match parts.is_empty() {
        true => "all below 0.1 s".into(),
        false => parts.join(", "),
    }
}

fn describe(summary: &Summary, output: &Path) -> String {
    let mut text = crate::commands::plan::describe_groups(&summary.groups);
    let row = |name: &str, value: String| vec![name.to_string(), value];
    let mut rows = vec![
        row(
            "size",
            format!(
                "{} of {} ({:.2}x smaller)",
                render::bytes(summary.bytes),
                render::bytes(summary.source_bytes),
                summary.ratio
            ),
        ),
        row(
            "bits per quantized weight",
            format!("{:.3}", summary.bits_per_weight),
        ),
        row(
            "bits per parameter, all included",
            format!("{:.3}", summary.bits_per_parameter),
        ),
        row("time", format!("{:.1} s", summary.seconds)),
        row("  stages", stages(&summary.stages)),
    ];
    if let Some(mean) = summary.relative_error_mean {
        rows.insert(3, row("relative error, mean", format!("{mean:.2e}")));
    }
    if let Some(worst) = &summary.relative_error_max {
        rows.insert(
            4,
            row(
                "  largest",
                format!("{:.2e} in {}", worst.relative_error, worst.tensor),
            ),
        );
    }
    if let Some(peak) = summary.peak_rss_bytes {
        let window = render::bytes(summary.activation_bytes);
        rows.push(row(
            "peak memory",
            format!(
                "{} (of it {window} calibration activations)",
                render::bytes(peak)
            ),
        ));
    }
    if let Some(calibration) = &summary.calibration {
        let what = format!(
            "{} windows of {} tokens: {}",
            calibration.windows, calibration.window_tokens, calibration.source
        );
        rows.push(row("calibration", what));
    }
    rows.push(row(
        "fallbacks",
        if summary.fallbacks.is_empty() {
            "none".into()
        } else {
            summary.fallbacks.len().to_string()
        },
    ));
    rows.push(row("artifact", format!("{}", output.display())));
    text.push('\n');
    for row in &rows {
        text += &format!("{:<33} {}\n", row[0], row[1]);
    }
    for fallback in &summary.fallbacks {
        text += &format!("  fallback: {fallback}\n");
    }
    text
}
