//! What the end-to-end tests share: comparators, golden values, small checkpoints, and running the program.
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod close;
pub mod run;

use std::path::{Path, PathBuf};

use qbin_runtime::kernels::Isa;
use qbin_runtime::{Cpu, Path as Arithmetic};
use serde_json::Value;

/// Root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("this package is a folder of the repository")
        .to_path_buf()
}

/// The reference path at the level that `QBIN_ISA` names, or else the highest there is, on two threads.
///
/// # Panics
/// If this machine does not have that level.
pub fn reference_cpu() -> Cpu {
    let isa = std::env::var("QBIN_ISA").map_or_else(
        |_| Isa::detect(),
        |name| {
            let level = name.parse().expect("a level");
            Isa::at(level).expect("a level of this machine")
        },
    );
    Cpu::new(Arithmetic::Reference, isa, 2)
}

/// The golden file `tests/golden/{name}`, for example `logits/llama2.json`.
///
/// # Panics
/// If the file is missing or no JSON.
#[track_caller]
pub fn golden(name: &str) -> Value {
    let path = root().join("tests/golden").join(name);
    let text = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("`{}`: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("`{}`: {error}", path.display()))
}

/// The numbers of a JSON list, nested lists joined in order.
///
/// # Panics
/// If anything but numbers and lists is found.
#[track_caller]
pub fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(items) => items.iter().flat_map(numbers).collect(),
        other => vec![
            other
                .as_f64()
                .unwrap_or_else(|| panic!("expected a number, got `{other}`")),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_logits_have_the_shape_they_state() {
        let golden = golden("logits/llama2.json");
        let positions = numbers(&golden["positions"]);
        let logits = numbers(&golden["logits"]);
        assert_eq!(logits.len(), positions.len() * 96);
        assert!(logits.iter().all(|logit| logit.is_finite()));
    }

    #[test]
    fn numbers_keeps_the_order_of_nested_lists() {
        let value = serde_json::json!([[1, 2.5], [], [[-3]]]);
        assert_eq!(numbers(&value), [1.0, 2.5, -3.0]);
    }
}
