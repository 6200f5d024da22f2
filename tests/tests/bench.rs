//! `qbin bench`: every figure is there and fits the others, whatever the machine; no speed is asserted.

use qbin_tests::checkpoint::{INNER, RawCheckpoint};
use qbin_tests::run::Lab;
use serde_json::Value;

fn lab() -> Lab {
    Lab::new(env!("CARGO_BIN_EXE_qbin-under-test"))
}

/// A number that is finite and above 0.
#[track_caller]
fn positive(value: &Value) -> f64 {
    let number = value
        .as_f64()
        .unwrap_or_else(|| panic!("`{value}` is no number"));
    assert!(number.is_finite() && number > 0.0, "{number}");
    number
}

#[track_caller]
fn assert_near(got: f64, expected: f64) {
    assert!(
        (got - expected).abs() <= 1e-9 * expected.abs(),
        "{got} against {expected}"
    );
}

#[test]
fn figures_fit_each_other() {
    let lab = lab();
    RawCheckpoint::random(1).write(&lab.path("model"));
    lab.succeed("quantize --method rtn --group-size 32 --head int8 model out.qbin");
    let settings = "--prompt 9 --generate 3 --depth 5 --repeat 2 --batch 1,3 --threads 1,2 --isa scalar --price-per-hour 1.5";
    let report = lab.json(&format!("bench out.qbin {settings}"));

    let rows = report["results"].as_array().expect("results");
    let keys: Vec<_> = rows
        .iter()
        .map(|row| (row["threads"].as_u64(), row["batch"].as_u64()))
        .collect();
    assert_eq!(
        keys,
        [
            (Some(1), Some(1)),
            (Some(1), Some(3)),
            (Some(2), Some(1)),
            (Some(2), Some(3))
        ]
    );
    let weights = positive(&report["weight_bytes"]);
    assert!(weights < positive(&report["file_bytes"]));
    // Two blocks, keys and values of 2 heads of 12 channels, bf16.
    let position = (2 * 2 * 24 * 2) as f64;
    assert_near(positive(&report["cache_bytes"]), 3.0 * 9.0 * position);
    // q, k, v, o and the MLP of two blocks, and the head.
    let (block, head) = (2 * (3 * 48 * 48 + 3 * 48 * INNER), 4099 * 48);
    // Of the last block all but k and v, for the prompt's last token alone.
    let last = 2 * 48 * 48 + 3 * 48 * INNER;

    for row in rows {
        assert_eq!(row["isa"], "scalar");
        let batch = positive(&row["batch"]);
        let prompt = positive(&row["prompt_tokens_per_second"]["median"]);
        assert!(positive(&row["prompt_tokens_per_second"]["best"]) >= prompt);
        assert_near(positive(&row["first_token_seconds"]), batch * 9.0 / prompt);
        let per_token = 2.0 * ((block - last) as f64 + (last + head) as f64 / 9.0);
        assert_near(
            positive(&row["prompt_operations_per_second"]),
            prompt * per_token,
        );
        let generated = positive(&row["generated_tokens_per_second"]["median"]);
        // The three steps see 6, 7 and 8 positions.
        let bytes = weights / batch + 7.0 * position;
        assert_near(positive(&row["bytes_per_token"]), bytes);
        assert_near(positive(&row["bytes_per_second"]), bytes * generated);
        let limits = &row["limits"];
        let limit = positive(&limits["read_bytes"]);
        assert!(limit >= positive(&limits["plain_read_bytes"]));
        positive(&limits["weight_read_bytes"]);
        assert_near(
            positive(&row["share_of_read_limit"]),
            bytes * generated / limit,
        );
        // The scalar level has no instruction to compare with.
        assert!(limits["int8_operations"].is_null() && row["prompt_share_of_peak"].is_null());
        let cost = |of: &str| positive(&row[of]);
        assert_near(
            cost("cost_per_million_prompt_tokens"),
            1.5 / 3.6e-3 / prompt,
        );
        assert_near(
            cost("cost_per_million_generated_tokens"),
            1.5 / 3.6e-3 / generated,
        );
    }
    let cold = &report["cold"];
    assert!(positive(&cold["first_token_seconds"]) > positive(&cold["load_seconds"]));
}

#[test]
fn the_table_has_a_row_for_each_setting() {
    let text = lab().succeed("bench tiny --prompt 4 --generate 2 --repeat 1 --batch 1,2 --threads 1 --path reference --no-limits");
    let tables: Vec<&str> = text.lines().filter(|line| line.starts_with('|')).collect();
    assert_eq!(tables.len(), 2 * (2 + 2), "{text}");
    assert!(
        text.contains("reference path") && !text.contains("cost of"),
        "{text}"
    );
    for heading in ["prompt tokens/s", "generated tokens/s", "of read limit"] {
        assert!(text.contains(heading), "no `{heading}` in {text}");
    }
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let lab = lab();
    lab.refuse("bench nowhere", &["nowhere"]);
    lab.refuse("bench tiny --prompt 100000", &["100064", "context", "hint"]);
    lab.refuse("bench tiny --depth 100000", &["100064", "context"]);
    lab.refuse("bench tiny --batch 0", &["`0`", "--batch"]);
    lab.refuse("bench tiny --batch 1,x", &["`x`", "--batch"]);
    lab.refuse("bench tiny --threads 0", &["0", "--threads"]);
    lab.refuse("bench tiny --isa sse9", &["`sse9`", "avx2"]);
    lab.refuse("bench tiny --path quick", &["`quick`", "reference", "fast"]);
    lab.refuse("bench tiny --price-per-hour -1", &["`-1`", "price"]);
    lab.refuse("bench tiny --price-per-hour nan", &["`nan`", "price"]);
    lab.refuse(
        "run tiny --prompt x --threads 1,2",
        &["--threads", "`bench`"],
    );
    #[cfg(target_os = "linux")]
    lab.refuse(
        "bench tiny --batch 100000000",
        &["100000000", "memory", "hint"],
    );
}
