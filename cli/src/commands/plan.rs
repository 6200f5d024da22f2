//! `qbin plan`: every tensor's fate from the headers alone.

use crate::args::PlanArgs;
use crate::commands::Show;
use crate::error::CliError;
use crate::plan::Plan;
use crate::recipe::Recipe;
use crate::{loaded, render};
use qbin_format::{Fate, Model};
use qbin_runtime::spec::Role;
use serde::Serialize;
use std::collections::BTreeMap;
use std::process::ExitCode;

/// Tensors of one kind with one fate.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Group {
    /// What they are.
    pub(crate) what: String,
    /// What becomes of them.
    pub(crate) fate: String,
    /// Whether they are on a grid.
    pub(crate) quantized: bool,
    /// How many.
    pub(crate) tensors: usize,
    /// Their parameters.
    pub(crate) parameters: u64,
    /// Their bytes in the artifact.
    pub(crate) bytes: u64,
}

#[derive(Serialize)]
struct Planning {
    bytes: u64,
    source_bytes: u64,
    bits_per_weight: f64,
    groups: Vec<Group>,
    tensors: Vec<TensorFate>,
}

#[derive(Serialize)]
struct TensorFate {
    name: String,
    shape: Vec<usize>,
    bytes: u64,
    source_bytes: u64,
    #[serde(flatten)]
    fate: Fate,
}

pub(crate) fn run(args: &PlanArgs, show: Show) -> Result<ExitCode, CliError> {
    let recipe = Recipe::from_args(&args.recipe)?;
    let model = Model::open(&args.input)?;
    if matches!(model, Model::Artifact(_)) {
        return Err(CliError::AlreadyQuantized {
            path: args.input.clone(),
        });
    }
    let config = loaded::config(&model)?;
    loaded::tokenizer(&model, &config)?;
    let plan = Plan::new(&model, &config, &recipe, 0)?;
    let groups = groups(&plan);
    let on_grid = || groups.iter().filter(|group| group.quantized);
    let tensors = plan.entries.iter().map(|entry| TensorFate {
        name: entry.spec.name.clone(),
        shape: entry.spec.shape.clone(),
        bytes: entry.bytes,
        source_bytes: entry.source_bytes,
        fate: entry.fate.clone(),
    });
    let planning = Planning {
        bytes: plan.layout.total_bytes,
        source_bytes: plan.entries.iter().map(|entry| entry.source_bytes).sum(),
        bits_per_weight: 8.0 * on_grid().map(|g| g.bytes).sum::<u64>() as f64
            / on_grid().map(|g| g.parameters).sum::<u64>() as f64,
        tensors: tensors.collect(),
        groups,
    };
    show.print(&planning, describe)?;
    Ok(ExitCode::SUCCESS)
}

fn describe(planning: &Planning) -> String {
    let rows: Vec<Vec<String>> = planning
        .tensors
        .iter()
        .map(|t| {
            vec![
                t.name.clone(),
                format!("{:?}", t.shape),
                render::bytes(t.source_bytes),
                render::bytes(t.bytes),
                describe_fate(&t.fate),
            ]
        })
        .collect();
    let mut text = render::table(&["tensor", "shape", "from", "to", "fate"], &rows);
    text.push('\n');
    text += &describe_groups(&planning.groups);
    let sizes = format!(
        "{} of {}",
        render::bytes(planning.bytes),
        render::bytes(planning.source_bytes)
    );
    text += &format!(
        "\n{sizes}, {:.3} bits per quantized weight\n",
        planning.bits_per_weight
    );
    text
}

/// What stands in a table for a fate.
pub(crate) fn describe_fate(fate: &Fate) -> String {
    match fate {
        Fate::Quantized {
            bits,
            group_size,
            symmetric,
            method,
            encoding,
            ..
        } => {
            // `int4.t16x64.bitmask`; a dense encoding has two parts.
            let sparse = encoding.split('.').nth(2);
            let sparse = sparse.map_or(String::new(), |name| format!(" {name}"));
            let group = group_size.map_or("per channel".into(), |size| format!("g{size}"));
            format!(
                "int{bits} {group} {}{sparse} ({method})",
                if *symmetric {
                    "symmetric"
                } else {
                    "asymmetric"
                }
            )
        }
        Fate::Kept { dtype, reason } => format!("{dtype}: {reason}"),
        Fate::Alias { of, reason } => format!("same as {of}: {reason}"),
        Fate::Dropped { reason } => format!("dropped: {reason}"),
    }
}

/// Sums over the tensors of a plan, in order of first appearance.
pub(crate) fn groups(plan: &Plan) -> Vec<Group> {
    let mut at: BTreeMap<(String, String), usize> = BTreeMap::new();
    let mut groups: Vec<Group> = Vec::new();
    for entry in &plan.entries {
        let what = match entry.spec.role {
            Role::Embedding => "embedding",
            Role::Norm { .. } => "norms",
            Role::Linear { .. } => "linears",
            Role::Bias { .. } => "biases",
            Role::Head => "head",
            Role::Unused { .. } => "unused",
        };
        let fate = describe_fate(&entry.fate);
        let index = *at.entry((what.into(), fate.clone())).or_insert_with(|| {
            let quantized = matches!(entry.fate, Fate::Quantized { .. });
            groups.push(Group {
                what: what.into(),
                fate,
                quantized,
                tensors: 0,
                parameters: 0,
                bytes: 0,
            });
            groups.len() - 1
        });
        let stored = entry.planned.is_some();
        groups[index].tensors += 1;
        groups[index].parameters += if stored {
            entry.spec.shape.iter().product::<usize>() as u64
        } else {
            0
        };
        groups[index].bytes += entry.bytes;
    }
    groups
}

pub(crate) fn describe_groups(groups: &[Group]) -> String {
    let rows: Vec<Vec<String>> = groups
        .iter()
        .map(|g| {
            let bpw = if g.parameters > 0 {
                format!("{:.3}", 8.0 * g.bytes as f64 / g.parameters as f64)
            } else {
                "-".into()
            };
            vec![
                g.what.clone(),
                g.tensors.to_string(),
                g.parameters.to_string(),
                render::bytes(g.bytes),
                bpw,
                g.fate.clone(),
            ]
        })
        .collect();
    render::table(
        &[
            "",
            "tensors",
            "parameters",
            "bytes",
            "bits each",
            "stored as",
        ],
        &rows,
    )
}
