//! The quality table of `docs/quality.md`: our methods beside those of other tools, on the same models,
//! texts and calibration windows.
//!
//! Every figure comes from `quantize` or `prune`, and `eval compare`, run as a user would run them: this program
//! starts itself again as `qbin`.

// A program that prints a table.
#![allow(clippy::print_stdout)]

use qbin_format::Model;
use qbin_runtime::{Decoder, Parts};
use qbin_tests::{golden, numbers, reference_cpu, root};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const USAGE: &str = "usage: quality MODELS_DIR CALIB.npy TEXT.txt... [-- MODEL...]
  MODELS_DIR  folder with one folder for each model
  CALIB.npy   token ids of the calibration windows
  TEXT.txt    texts to measure on, named as in tests/golden/quality/reference.json
  MODEL       models, all of the reference file if none is given";

/// What `SURVIVORS` stands for in the options of a row.
const SURVIVORS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/recipes/survivors.toml");

const PROTOCOL: [&str; 4] = ["--protocol", "gptq-512", "--windows", "64"];

/// One row: a name, a command of `qbin` with its options, and the reference rows it must not be worse than.
struct Row {
    name: &'static str,
    options: &'static str,
    bars: &'static [Bar],
}

/// Ours may be at most `factor` times the reference.
struct Bar {
    reference: &'static str,
    factor: f64,
}

const fn below(reference: &'static str) -> Bar {
    Bar {
        reference,
        factor: 1.0,
    }
}

/// For methods without freedom, but for the rounding of RTN's scales to f16 and of which equals go first.
const fn same(reference: &'static str) -> Bar {
    Bar {
        reference,
        factor: 1.02,
    }
}

/// `GIVEN` stands for the calibration file.
const ROWS: &[Row] = &[
    Row {
        name: "RTN W4 g128 asym",
        options: "quantize --method rtn --asymmetric",
        bars: &[same("rtn-w4-g128-asym")],
    },
    Row {
        name: "RTN W4 g128 sym",
        options: "quantize --method rtn --symmetric",
        bars: &[same("rtn-w4-g128-sym")],
    },
    Row {
        name: "RTN W4 g32 asym",
        options: "quantize --method rtn --group-size 32 --asymmetric",
        bars: &[same("rtn-w4-g32-asym")],
    },
    Row {
        name: "RTN W4 g32 sym",
        options: "quantize --method rtn --group-size 32 --symmetric",
        bars: &[same("rtn-w4-g32-sym")],
    },
    Row {
        name: "RTN W4 channel asym",
        options: "quantize --method rtn --group-size channel --asymmetric",
        bars: &[same("rtn-w4-pc-asym")],
    },
    Row {
        name: "RTN W8 channel",
        options: "quantize --method rtn --bits 8 --group-size channel",
        bars: &[same("rtn-w8-pc-sym")],
    },
    Row {
        name: "RTN W3 g128 asym",
        options: "quantize --method rtn --bits 3 --asymmetric",
        bars: &[same("rtn-w3-g128-asym")],
    },
    Row {
        name: "GPTQ W4 g128 asym",
        options: "quantize --method gptq --asymmetric --calib GIVEN",
        bars: &[
            below("gptq-w4-g128-asym-actstatic"),
            below("gptq-w4-g128-asym-actstatic-mse"),
        ],
    },
    Row {
        name: "GPTQ W4 g128 sym",
        options: "quantize --method gptq --symmetric --calib GIVEN",
        bars: &[
            below("gptq-w4-g128-sym-actstatic"),
            below("gptq-w4-g128-sym"),
            below("e2e-llmc-gptq-w4a16"),
            below("e2e-gptqmodel-w4-g128"),
            below("e2e-llmc-gptq"),
            below("e2e-gm"),
            below("gptq-w4-g128-sym-actstatic-mse"),
        ],
    },
    Row {
        name: "GPTQ W4 g32 asym",
        options: "quantize --method gptq --group-size 32 --asymmetric --calib GIVEN",
        bars: &[below("gptq-w4-g32-asym-actstatic")],
    },
    Row {
        name: "GPTQ W4 channel asym",
        options: "quantize --method gptq --group-size channel --asymmetric --calib GIVEN",
        bars: &[below("gptq-w4-pc-asym-act")],
    },
    Row {
        name: "GPTQ W3 g128 asym",
        options: "quantize --method gptq --bits 3 --asymmetric --calib GIVEN",
        bars: &[below("gptq-w3-g128-asym-actstatic")],
    },
    Row {
        name: "AWQ W4 g128 asym",
        options: "quantize --method awq --asymmetric --calib GIVEN",
        bars: &[
            below("awq-w4-g128-asym-clip"),
            below("e2e-llmc-awq-w4a16-asym"),
            below("e2e-llmc-awq"),
        ],
    },
    Row {
        name: "AWQ W3 g128 asym",
        options: "quantize --method awq --bits 3 --asymmetric --calib GIVEN",
        bars: &[below("awq-w3-g128-asym-clip")],
    },
    Row {
        name: "GPTQ W4 g128 asym, builtin text",
        options: "quantize --method gptq --asymmetric --calib builtin",
        bars: &[],
    },
    Row {
        name: "GPTQ W4 g128 asym, self-written text",
        options: "quantize --method gptq --asymmetric --calib self",
        bars: &[],
    },
    Row {
        name: "magnitude 50%",
        options: "prune --method magnitude --sparsity 0.5",
        bars: &[same("magnitude-50")],
    },
    Row {
        name: "Wanda 50%",
        options: "prune --method wanda --sparsity 0.5 --calib GIVEN",
        bars: &[same("wanda-50")],
    },
    Row {
        name: "SparseGPT 50%, plain",
        options: "prune --sparsity 0.5 --refine 0 --calib GIVEN",
        bars: &[same("sparsegpt-50")],
    },
    Row {
        name: "SparseGPT 50%",
        options: "prune --sparsity 0.5 --calib GIVEN",
        bars: &[
            below("sparsegpt-50"),
            below("e2e-llmc-sparsegpt-50"),
            below("e2e-llmc-sparsegpt"),
        ],
    },
    Row {
        name: "SparseGPT 50%, allocated",
        options: "prune --sparsity 0.5 --allocate --calib GIVEN",
        bars: &[below("sparsegpt-50")],
    },
    Row {
        name: "SparseGPT 2:4",
        options: "prune --sparsity 2:4 --calib GIVEN",
        bars: &[below("sparsegpt-2:4")],
    },
    Row {
        name: "SparseGPT 4:8",
        options: "prune --sparsity 4:8 --calib GIVEN",
        bars: &[below("sparsegpt-4:8")],
    },
    Row {
        name: "SparseGPT 50% + GPTQ W4 g128 asym",
        options: "quantize --sparsity 0.5 --asymmetric --calib GIVEN",
        bars: &[below("sparsegpt-50-w4")],
    },
    Row {
        name: "SparseGPT 50%, then RTN W4 g128 asym",
        options: "quantize --method rtn --sparsity 0.5 --asymmetric --calib GIVEN",
        bars: &[],
    },
    Row {
        name: "SparseGPT 50%, then GPTQ W4 g128 asym on the survivors",
        options: "quantize --recipe SURVIVORS --calib GIVEN",
        bars: &[],
    },
    Row {
        name: "SparseGPT 50% + GPTQ W4 g128 asym, allocated",
        options: "quantize --sparsity 0.5 --allocate --asymmetric --calib GIVEN",
        bars: &[below("sparsegpt-50-w4")],
    },
    Row {
        name: "SparseGPT 2:4 + GPTQ W4 g128 asym",
        options: "quantize --sparsity 2:4 --asymmetric --calib GIVEN",
        bars: &[],
    },
];

fn main() -> ExitCode {
    let mut args = std::env::args_os().peekable();
    let program = args.next().unwrap_or_default();
    if args.next_if(|arg| arg == "as-qbin").is_some() {
        return qbin_cli::main(std::iter::once(program).chain(args));
    }
    let args: Vec<PathBuf> = args.map(PathBuf::from).collect();
    let (files, models) = match args.iter().position(|arg| arg == Path::new("--")) {
        Some(at) => (&args[..at], &args[at + 1..]),
        None => (&args[..], &args[..0]),
    };
    let [dir, calib, texts @ ..] = files else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let reference = golden("quality/reference.json");
    let known = reference["models"].as_object().expect("models by name");
    let asked: Vec<&str> = match models {
        [] => known.keys().map(String::as_str).collect(),
        models => models.iter().filter_map(|model| model.to_str()).collect(),
    };
    let mut all_met = true;
    for model in asked {
        println!("\n### {model}\n");
        if let Some(ratio) = logits_difference(&dir.join(model), model) {
            println!("Logits against transformers: max |Δ| = {ratio:.1e} · max |logit|\n");
        }
        all_met &= table(&dir.join(model), calib, texts, &known[model]);
    }
    ExitCode::from(u8::from(!all_met))
}

/// Largest difference of our logits from recorded ones, relative to the largest logit, where some are recorded: a
/// runtime that computes something else makes all figures worthless.
fn logits_difference(folder: &Path, model: &str) -> Option<f64> {
    let file = format!("logits/shared/{model}.json");
    let recorded = root().join("tests/golden").join(&file).exists();
    let golden = recorded.then(|| golden(&file))?;
    let list = |key: &str| numbers(&golden[key]);
    let tokens: Vec<u32> = list("tokens").into_iter().map(|id| id as u32).collect();
    let model = Model::open(folder).expect("a model folder");
    let parts = Parts::new(&model, &reference_cpu()).expect("a supported model");
    let decoder = Decoder::new(&parts).expect("finite weights");
    let hidden = decoder
        .forward(&[&tokens], None)
        .expect("ids of the vocabulary");
    let width = decoder.config().hidden_size;
    let positions = list("positions").into_iter().map(|at| at as usize);
    let rows: Vec<f32> = positions
        .flat_map(|at| hidden[at * width..(at + 1) * width].to_vec())
        .collect();
    let (logits, expected) = (decoder.logits(&rows), list("logits"));
    assert_eq!(logits.len(), expected.len(), "{file}");
    let largest = expected.iter().fold(0f64, |m, x| m.max(x.abs()));
    let differences = logits
        .iter()
        .zip(&expected)
        .map(|(a, b)| (f64::from(*a) - b).abs());
    Some(differences.fold(0f64, f64::max) / largest)
}

/// Prints one model's table; whether every bar was met.
fn table(model: &Path, calib: &Path, texts: &[PathBuf], reference: &Value) -> bool {
    let titles: Vec<&str> = texts
        .iter()
        .filter_map(|text| text.file_stem()?.to_str())
        .collect();
    println!(
        "| | bits per weight | seconds | {} | bar |",
        titles.join(" | ")
    );
    println!("|---|---:|---:|{}---|", "---:|".repeat(titles.len()));
    let scratch = tempfile::tempdir().expect("a temporary folder");
    let made_model = scratch.path().join("made");
    let mut all_met = true;
    // A row whose references are all of other models says nothing here.
    let says_something = |row: &&Row| {
        row.bars.is_empty()
            || row
                .bars
                .iter()
                .any(|bar| reference.get(bar.reference).is_some())
    };
    for row in ROWS.iter().filter(says_something) {
        let options = row.options.split(' ').map(|option| match option {
            "GIVEN" => calib.into(),
            "SURVIVORS" => PathBuf::from(SURVIVORS),
            _ => PathBuf::from(option),
        });
        let made = qbin(options.chain([model.into(), made_model.clone()]));
        let figures: Vec<Value> = texts
            .iter()
            .map(|text| {
                let paths = [
                    "eval".into(),
                    "compare".into(),
                    model.to_path_buf(),
                    made_model.clone(),
                    "--data".into(),
                    text.clone(),
                ];
                qbin(paths.into_iter().chain(PROTOCOL.map(PathBuf::from)))
            })
            .collect();
        // A pruned folder is not written over.
        match made_model.is_dir() {
            true => std::fs::remove_dir_all(&made_model),
            false => std::fs::remove_file(&made_model),
        }
        .expect("remove what was made");
        let (bars, met) = judge(row, &titles, &figures, reference);
        all_met &= met;
        let cells: Vec<String> = figures
            .iter()
            .map(|f| {
                format!(
                    "{:.5} ± {:.5}, {:.2}%",
                    number(f, "kl_mean"),
                    number(f, "kl_error"),
                    100.0 * number(f, "top1")
                )
            })
            .collect();
        println!(
            "| {} | {} | {:.1} | {} | {bars} |",
            row.name,
            // A pruned checkpoint has the types it had.
            made["bits_per_weight"]
                .as_f64()
                .map_or("as stored".into(), |bits| format!("{bits:.3}")),
            number(&made, "seconds"),
            cells.join(" | ")
        );
    }
    all_met
}

/// The reference rows that exist for this model, and whether ours is within all of them.
fn judge(row: &Row, titles: &[&str], figures: &[Value], reference: &Value) -> (String, bool) {
    let mut cells = Vec::new();
    let mut met = true;
    for bar in row.bars {
        let Some(other) = reference.get(bar.reference) else {
            continue;
        };
        let limits: Vec<f64> = titles
            .iter()
            .map(|title| number(&other[*title], "kl_mean"))
            .collect();
        // Figures of the reference have five decimals; half a unit of the last one is not a difference.
        let within = limits
            .iter()
            .zip(figures)
            .all(|(limit, figure)| number(figure, "kl_mean") <= bar.factor * limit + 5e-6);
        let shown: Vec<String> = limits.iter().map(|limit| format!("{limit:.5}")).collect();
        cells.push(format!(
            "{} {}: {}",
            bar.reference,
            shown.join(" / "),
            if within { "met" } else { "**not met**" }
        ));
        met &= within;
    }
    (cells.join("; "), met)
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or(f64::NAN)
}

/// Runs this program as `qbin … --json --quiet` and reads what it prints.
fn qbin(args: impl Iterator<Item = PathBuf>) -> Value {
    let program = std::env::current_exe().expect("the path of this program");
    let args: Vec<PathBuf> = args.chain(["--json".into(), "--quiet".into()]).collect();
    let output = Command::new(program)
        .arg("as-qbin")
        .args(&args)
        .output()
        .expect("this program can be started again");
    assert!(
        output.status.success(),
        "{args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}
