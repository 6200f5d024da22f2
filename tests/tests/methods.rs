//! Rounding, GPTQ, pruning, tokens and chat prompts against the golden values of other programs.

use qbin_calib_data::{Message, Tokenizer};
use qbin_format::QuantizedMatrix;
use qbin_prune::{Sparsity, magnitude, sparsegpt, wanda};
use qbin_quant::{
    ActOrder, Factor, Gptq, GptqParams, Granularity, Grid, Moments, ScaleSearch, Survivors, gptq,
    rtn,
};
use qbin_tests::{golden, numbers, root};
use serde_json::Value;

/// A golden file of a method: its inputs as the numbers they stand for.
struct Inputs {
    name: String,
    golden: Value,
    rows: usize,
    cols: usize,
    weight: Vec<f32>,
}

impl Inputs {
    fn read(name: &str) -> Self {
        let golden = golden(&format!("methods/{name}.json"));
        let size = |key: &str| golden[key].as_u64().expect("a size") as usize;
        let (rows, cols) = (size("rows"), size("cols"));
        let weight = in_units(&golden["weight"], &golden["weight_unit"]);
        assert_eq!(weight.len(), rows * cols);
        Self {
            name: name.into(),
            rows,
            cols,
            weight,
            golden,
        }
    }

    fn cases(&self) -> &[Value] {
        let cases = self.golden["cases"].as_array().expect("a list of cases");
        assert!(!cases.is_empty(), "{}", self.name);
        cases
    }

    fn moments(&self) -> Moments {
        let mut moments = Moments::new(self.cols);
        moments
            .add(&in_units(
                &self.golden["activations"],
                &self.golden["activation_unit"],
            ))
            .expect("finite inputs");
        assert_eq!(
            moments.tokens(),
            self.golden["tokens"].as_u64().expect("a count")
        );
        moments
    }

    /// The damping that `case` means. There a dead column counts as 1 in the mean diagonal, here it does not count.
    fn damp_fraction(&self, case: &Value) -> f64 {
        let diagonal: Vec<f64> = self
            .moments()
            .square_mean()
            .iter()
            .map(|square| 2.0 * square)
            .collect();
        let live: Vec<f64> = diagonal
            .iter()
            .copied()
            .filter(|&value| value > 0.0)
            .collect();
        let dead = (diagonal.len() - live.len()) as f64;
        let sum: f64 = live.iter().sum();
        case["damp_fraction"].as_f64().expect("a fraction") * ((sum + dead) / diagonal.len() as f64)
            / (sum / live.len() as f64)
    }
}

/// Integers times their unit; exact in f32.
fn in_units(values: &Value, unit: &Value) -> Vec<f32> {
    let unit = unit.as_f64().expect("a unit");
    numbers(values)
        .into_iter()
        .map(|value| (value * unit) as f32)
        .collect()
}

fn grid(case: &Value) -> Grid {
    Grid {
        bits: case["bits"].as_u64().expect("a width") as u8,
        symmetric: case["symmetric"].as_bool().expect("a flag"),
        granularity: case["group_size"]
            .as_u64()
            .map_or(Granularity::Channel, |size| {
                Granularity::Group(size as usize)
            }),
        search: ScaleSearch::None,
    }
}

#[track_caller]
fn assert_same(actual: &QuantizedMatrix, case: &Value, what: &str) {
    let codes: Vec<f64> = actual.codes.iter().map(|&code| code.into()).collect();
    assert!(codes == numbers(&case["codes"]), "{what}: codes differ");
    // Golden scales are f16 values in their shortest f32 form.
    let scales: Vec<f32> = actual.scales.iter().map(|scale| scale.to_f32()).collect();
    let expected: Vec<f32> = numbers(&case["scales"])
        .into_iter()
        .map(|scale| scale as f32)
        .collect();
    assert_eq!(scales, expected, "{what}: scales");
    // None are stored for a symmetric grid, neither there nor here.
    let zero_points: Vec<f64> = actual
        .zero_points
        .iter()
        .map(|&zero_point| zero_point.into())
        .collect();
    assert_eq!(
        zero_points,
        numbers(&case["zero_points"]),
        "{what}: zero points"
    );
}

#[test]
fn nearest_values_agree() {
    for name in ["rtn-8x16", "rtn-16x96", "rtn-64x256"] {
        let inputs = Inputs::read(name);
        for case in inputs.cases() {
            let actual = rtn(
                &inputs.weight,
                inputs.rows,
                inputs.cols,
                &grid(case),
                None,
                None,
            )
            .expect("valid inputs");
            assert_same(&actual, case, &format!("{name} {}", describe(case)));
        }
    }
}

#[test]
fn gptq_agrees() {
    for name in ["gptq-8x16", "gptq-16x96", "gptq-16x96-dead", "gptq-64x256"] {
        let inputs = Inputs::read(name);
        let dead = numbers(&inputs.golden["dead_columns"]).len();
        for case in inputs.cases() {
            // As in the paper: nothing after the sweep.
            let mut params = GptqParams {
                refine_sweeps: 0,
                damp_fraction: inputs.damp_fraction(case),
                ..GptqParams::new(grid(case))
            };
            params.act_order = if case["act_order"] == "group" {
                ActOrder::Group
            } else {
                ActOrder::None
            };
            let what = format!("{name} {}", describe(case));
            for update_block in [128, 32, 1] {
                params.update_block = update_block;
                let Gptq { quantized, report } = gptq(
                    &inputs.weight,
                    inputs.rows,
                    inputs.cols,
                    inputs.moments(),
                    &params,
                )
                .expect("valid inputs");
                assert_same(&quantized, case, &what);
                assert_eq!(
                    (report.dead_columns, report.fallback),
                    (dead, None),
                    "{what}"
                );
                let expected = case["relative_error"].as_f64().expect("an error");
                assert!(
                    (report.relative_error - expected).abs() <= 1e-3 * expected,
                    "{what}: {} {expected}",
                    report.relative_error
                );
            }
        }
    }
}

#[test]
fn refinement_lowers_the_error_of_every_case() {
    for name in ["gptq-8x16", "gptq-16x96", "gptq-16x96-dead", "gptq-64x256"] {
        let inputs = Inputs::read(name);
        for case in inputs.cases() {
            let params = GptqParams {
                damp_fraction: inputs.damp_fraction(case),
                ..GptqParams::new(grid(case))
            };
            assert!(params.refine_sweeps > 0);
            let refined = gptq(
                &inputs.weight,
                inputs.rows,
                inputs.cols,
                inputs.moments(),
                &params,
            )
            .expect("valid inputs");
            let nearest = case["relative_error_of_rtn"].as_f64().expect("an error");
            assert!(
                refined.report.relative_error < nearest,
                "{name} {}",
                describe(case)
            );
            if case["act_order"] == "group" {
                let plain = case["relative_error"].as_f64().expect("an error");
                assert!(
                    refined.report.relative_error <= plain,
                    "{name} {}: {}",
                    describe(case),
                    refined.report.relative_error
                );
            }
        }
    }
}

fn sparsity(case: &Value) -> Sparsity {
    match case["share"].as_f64() {
        Some(share) => Sparsity::Share(share),
        None => {
            let size = |key: &str| case[key].as_u64().expect("a number") as usize;
            Sparsity::Pattern {
                zeros: size("zeros"),
                of: size("of"),
            }
        }
    }
}

/// The factor of a pruning case, in the order of the file.
fn pruning_factor(inputs: &Inputs, case: &Value, grid: Grid) -> Factor {
    let params = GptqParams {
        act_order: ActOrder::None,
        // Unlike in the cases of gptq, dead columns do not count in the mean diagonal there either.
        damp_fraction: case["damp_fraction"].as_f64().expect("a fraction"),
        refine_sweeps: 0,
        ..GptqParams::new(grid)
    };
    Factor::new(inputs.moments(), &params).expect("valid parameters")
}

#[test]
fn pruning_agrees() {
    for name in ["pruning-12x160", "pruning-8x48-dead"] {
        let inputs = Inputs::read(name);
        let (weight, cols) = (&inputs.weight, inputs.cols);
        let metric = inputs.moments().metric();
        for case in inputs.cases() {
            let (method, sparsity) = (case["method"].as_str().expect("a name"), sparsity(case));
            let what = format!("{name} {method} {sparsity}");
            let mut pruned = weight.clone();
            let zeros = match method {
                "magnitude" => magnitude(weight, cols, sparsity),
                "wanda" => wanda(weight, &inputs.moments().square_mean(), sparsity),
                _ => {
                    let runs = Granularity::Group(sparsity.run().unwrap_or(1));
                    let grid = Grid {
                        bits: 4,
                        symmetric: true,
                        granularity: runs,
                        search: ScaleSearch::None,
                    };
                    let done = sparsegpt(weight, &pruning_factor(&inputs, case, grid), sparsity);
                    pruned = done.weight;
                    done.zeros
                }
            };
            let mask: Vec<f64> = zeros
                .iter()
                .map(|&zero| f64::from(u8::from(zero)))
                .collect();
            assert!(mask == numbers(&case["mask"]), "{what}: other zeros");
            (pruned.iter_mut().zip(&zeros))
                .filter(|(_, zero)| **zero)
                .for_each(|(weight, _)| *weight = 0.0);
            if let Some(expected) = case.get("weight") {
                // Corrections are sums over all columns in f32, of terms at most as large as a weight.
                let largest = weight.iter().fold(0f64, |m, w| m.max(f64::from(w.abs())));
                let tolerance = 4.0 * cols as f64 * f64::from(f32::EPSILON) * largest;
                for (at, (actual, expected)) in pruned.iter().zip(numbers(expected)).enumerate() {
                    let difference = (f64::from(*actual) - expected).abs();
                    assert!(difference <= tolerance, "{what} {at}: {actual} {expected}");
                }
            }
            let (error, expected) = (
                metric.relative_error(weight, &pruned),
                case["relative_error"].as_f64().expect("an error"),
            );
            assert!(
                (error - expected).abs() <= 1e-3 * expected,
                "{what}: {error} {expected}"
            );
        }
    }
}

#[test]
fn zeros_and_a_grid_in_one_sweep_agree() {
    let inputs = Inputs::read("pruning-6x160-joint");
    let (weight, metric) = (&inputs.weight, inputs.moments().metric());
    for case in inputs.cases() {
        let (grid, sparsity) = (grid(case), sparsity(case));
        let factor = pruning_factor(&inputs, case, grid);
        let zeros = sparsegpt(weight, &factor, sparsity).zeros;
        let survivors = Survivors {
            zeros: &zeros,
            start: weight,
            metric: &metric,
        };
        let done = factor
            .quantize_survivors(weight, inputs.rows, &grid, Some(&survivors))
            .expect("valid inputs");
        let what = format!("{sparsity} {}", describe(case));
        assert_same(&done.quantized, case, &what);
        let (error, expected) = (
            done.report.relative_error,
            case["relative_error"].as_f64().expect("an error"),
        );
        assert!(
            (error - expected).abs() <= 1e-3 * expected,
            "{what}: {error} {expected}"
        );
    }
}

fn describe(case: &Value) -> String {
    format!(
        "bits {} symmetric {} group {} order {}",
        case["bits"], case["symmetric"], case["group_size"], case["act_order"]
    )
}

fn tokenizer(template: Option<&str>) -> Tokenizer {
    let file = |name: &str| {
        std::fs::read(root().join("tests/models/tiny-1m").join(name))
            .expect("a file of the tiny model")
    };
    let [tokenizer, config, special, generation] = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    ]
    .map(file);
    Tokenizer::from_files(
        &tokenizer,
        Some(&config),
        Some(&special),
        template.map(str::as_bytes),
        Some(&generation),
    )
    .expect("valid files")
}

/// A tokenizer whose chat prompt is the message itself: its ids are those of a text with special tokens read as such.
fn echo() -> Tokenizer {
    tokenizer(Some("{{- messages[0].content -}}"))
}

fn ids_of_marked(echo: &Tokenizer, text: &str) -> Vec<u32> {
    echo.encode_chat(&[Message::user(text)], false)
        .expect("a text")
}

#[test]
fn tokens_agree() {
    let golden = golden("tokens/tiny-1m.json");
    let (tokenizer, echo) = (tokenizer(None), echo());
    let (mut plain, mut marked) = (0, 0);
    for case in golden["cases"].as_array().expect("a list of cases") {
        let text = case["text"].as_str().expect("a text");
        let expected: Vec<u32> = numbers(&case["ids"])
            .into_iter()
            .map(|id| id as u32)
            .collect();
        assert_eq!(ids_of_marked(&echo, text), expected, "{text:?}");
        if expected.iter().any(|&id| id < 2) {
            // In calibration text a special token that is written out is text, and decodes to it.
            marked += 1;
            let ids = tokenizer.encode(text).expect("a text");
            assert!(ids != expected && ids.iter().all(|&id| id >= 2), "{text:?}");
            assert_eq!(tokenizer.decode(&ids).expect("ids"), text);
        } else {
            plain += 1;
            assert_eq!(
                tokenizer.encode(text).expect("a text"),
                expected,
                "{text:?}"
            );
            assert_eq!(
                tokenizer.decode(&expected).expect("ids"),
                case["decoded"].as_str().expect("a text"),
                "{text:?}"
            );
        }
    }
    assert_eq!((plain, marked), (43, 3));
}

#[test]
fn chat_prompts_agree() {
    let echo = echo();
    let (mut rendered, mut refused, mut beyond) = (0, 0, 0);
    for name in ["chatml", "headers", "inst"] {
        let golden = golden(&format!("chat/{name}.json"));
        let tokenizer = tokenizer(golden["template"].as_str());
        for case in golden["cases"].as_array().expect("a list of cases") {
            // Tools and messages in parts are not what calibration or `run` can say.
            let Some(messages) = case["tools"]
                .is_null()
                .then(|| messages(&case["messages"]))
                .flatten()
            else {
                beyond += 1;
                continue;
            };
            let actual = tokenizer.encode_chat(
                &messages,
                case["add_generation_prompt"].as_bool().expect("a flag"),
            );
            if let Some(expected) = case["rendered"].as_str() {
                rendered += 1;
                assert_eq!(
                    actual.expect("a prompt"),
                    ids_of_marked(&echo, expected),
                    "{name}: {expected}"
                );
            } else {
                refused += 1;
                let error = actual.expect_err("the template refuses it");
                let cause = std::error::Error::source(&error)
                    .expect("what the template said")
                    .to_string();
                assert!(
                    cause.contains(case["error"].as_str().expect("a message")),
                    "{name}: {cause}"
                );
            }
        }
    }
    assert_eq!((rendered, refused, beyond), (20, 2, 4));
}

fn messages(list: &Value) -> Option<Vec<Message>> {
    let message = |message: &Value| {
        let role = message["role"].as_str()?.to_string();
        Some(Message {
            role,
            content: message["content"].as_str()?.to_string(),
        })
    };
    list.as_array()?.iter().map(message).collect()
}
