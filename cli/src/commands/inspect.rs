//! `qbin inspect`: what is in a model file.

use crate::args::InspectArgs;
use crate::commands::Show;
use crate::commands::plan::describe_fate;
use crate::error::CliError;
use crate::{loaded, render};
use qbin_format::{Manifest, Model, Weight};
use serde::Serialize;
use std::process::ExitCode;

#[derive(Serialize)]
struct Inspected<'a> {
    kind: &'static str,
    architecture: &'static str,
    bytes: u64,
    files: Vec<&'static str>,
    tensors: Vec<Tensor>,
    /// Everything the artifact says of itself.
    manifest: Option<&'a Manifest>,
}

#[derive(Serialize)]
struct Tensor {
    name: String,
    shape: Vec<usize>,
    stored: String,
    relative_error: Option<f64>,
    /// Share of weights that are exactly zero; counted only where tensors are asked for, because all data is read.
    sparsity: Option<f64>,
}

/// Rows of a tensor in memory at once.
const ROWS: usize = 256;

pub(crate) fn run(args: &InspectArgs, show: Show) -> Result<ExitCode, CliError> {
    let model = Model::open(&args.model)?;
    let config = loaded::config(&model)?;
    let files = qbin_format::SIDE_FILES
        .into_iter()
        .filter(|name| model.file(name).is_some())
        .collect();
    let architecture = config.architecture.name();
    let sparsity = |name: &str| args.tensors.then(|| sparsity(&model, name)).flatten();
    let inspected = match &model {
        Model::Checkpoint(checkpoint) => {
            let tensors = checkpoint.names().filter_map(|name| {
                let Some(Weight::Dense(view)) = model.weight(name) else {
                    return None;
                };
                Some(Tensor {
                    name: name.into(),
                    shape: view.shape.into(),
                    stored: view.dtype.name().into(),
                    relative_error: None,
                    sparsity: sparsity(name),
                })
            });
            let tensors = tensors.collect();
            Inspected {
                kind: "checkpoint",
                architecture,
                bytes: checkpoint.total_bytes(),
                files,
                tensors,
                manifest: None,
            }
        }
        Model::Artifact(artifact) => {
            let manifest = artifact.manifest();
            let tensors = manifest.tensors.iter().map(|(name, entry)| Tensor {
                name: name.clone(),
                shape: entry.shape.clone(),
                stored: describe_fate(&entry.fate),
                relative_error: entry.report.relative_error,
                sparsity: sparsity(name),
            });
            let tensors = tensors.collect();
            Inspected {
                kind: "artifact",
                architecture,
                bytes: artifact.file_bytes(),
                files,
                tensors,
                manifest: Some(manifest),
            }
        }
    };
    show.print(&inspected, |inspected| describe(inspected, args.tensors))?;
    Ok(ExitCode::SUCCESS)
}

/// The share of a tensor that is zero, read piece by piece; none for what holds no weights.
fn sparsity(model: &Model, name: &str) -> Option<f64> {
    let weight = model.weight(name)?;
    if matches!(weight, Weight::Dense(view) if !view.dtype.is_float_weight()) {
        return None;
    }
    let shape = weight.shape();
    let rows = *shape.first()?;
    let row: usize = shape[1..].iter().product();
    let mut zeros = 0;
    for first in (0..rows).step_by(ROWS) {
        let last = rows.min(first + ROWS);
        let mut values = vec![0f32; (last - first) * row];
        weight.read_rows_f32(first..last, &mut values);
        zeros += values.iter().filter(|value| **value == 0.0).count();
    }
    model.release(name);
    (rows * row > 0).then(|| zeros as f64 / (rows * row) as f64)
}

fn describe(inspected: &Inspected<'_>, tensors: bool) -> String {
    let mut text = format!(
        "{} of a {}, {}, {} tensors\nfiles inside: {}\n",
        inspected.kind,
        inspected.architecture,
        render::bytes(inspected.bytes),
        inspected.tensors.len(),
        inspected.files.join(", ")
    );
    if let Some(manifest) = inspected.manifest {
        text += &format!(
            "made by qbin {}, seed {}\nrecipe: {}\n",
            manifest.tool_version, manifest.seed, manifest.recipe
        );
        text += &format!(
            "source: {} tensors, {}, sha256 {}\n",
            manifest.source.tensors,
            render::bytes(manifest.source.bytes),
            manifest.source.sha256
        );
        if let Some(c) = &manifest.calibration {
            text += &format!(
                "calibration: {} windows of {} tokens, {}, sha256 {}\n",
                c.windows, c.window_tokens, c.source, c.sha256
            );
        }
        for (name, entry) in &manifest.tensors {
            for fallback in &entry.report.fallbacks {
                text += &format!("fallback: {name}: {fallback}\n");
            }
        }
    }
    if tensors {
        let error = |e: Option<f64>| e.map_or(String::new(), |e| format!("{e:.2e}"));
        let rows: Vec<Vec<String>> = inspected
            .tensors
            .iter()
            .map(|t| {
                vec![
                    t.name.clone(),
                    format!("{:?}", t.shape),
                    error(t.relative_error),
                    t.sparsity
                        .map_or(String::new(), |s| format!("{:.2}%", 100.0 * s)),
                    t.stored.clone(),
                ]
            })
            .collect();
        text.push('\n');
        text += &render::table(
            &["tensor", "shape", "relative error", "zeros", "stored as"],
            &rows,
        );
    }
    text
}
