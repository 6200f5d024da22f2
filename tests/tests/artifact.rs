//! The main job from end to end: a checkpoint becomes an artifact that is whole, reproducible and runs.

use qbin_calib_data::{CORPUS, CorpusText};
use qbin_format::Model;
use qbin_tests::checkpoint::{HIDDEN, RawCheckpoint, VOCAB, split};
use qbin_tests::run::{Lab, copy_folder};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::fs;

/// Few tokens: these tests are about bytes, not about quality.
const CALIB: &str = "--calib builtin --calib-windows 8 --calib-tokens 64";
const METHODS: [&str; 3] = ["rtn", "gptq", "awq"];

fn lab() -> Lab {
    Lab::new(env!("CARGO_BIN_EXE_qbin-under-test"))
}

/// A lab with the random checkpoint as one file in `single`, as three in `sharded`, and ids for it in `ids.npy`.
fn lab_with_random() -> Lab {
    let lab = lab();
    let checkpoint = RawCheckpoint::random(1);
    checkpoint.write(&lab.path("single"));
    checkpoint.write_sharded(&lab.path("sharded"));
    let ids: Vec<i32> = (0..6 * 32).map(|at| at * 7919 % VOCAB as i32).collect();
    lab.write_npy("ids.npy", 32, &ids);
    lab
}

const RANDOM_CALIB: &str = "--calib ids.npy --calib-windows 6 --calib-tokens 32";

/// The manifest inside an artifact, read by the `safetensors` crate.
fn manifest(artifact: &[u8]) -> Value {
    let (_, metadata) = SafeTensors::read_metadata(artifact).expect("a valid safetensors file");
    let metadata = metadata.metadata().clone().expect("metadata");
    serde_json::from_str(&metadata["qbin"]).expect("a JSON manifest")
}

/// Quantizes `input` and checks what holds for every artifact; returns the summary and the manifest.
#[track_caller]
fn check(lab: &Lab, input: &str, recipe: &str, calib: &str) -> (Value, Value) {
    let summary = lab.json(&format!("quantize {recipe} {calib} {input} out.qbin"));
    let bytes = lab.read("out.qbin");
    assert_eq!(summary["bytes"], bytes.len(), "{recipe}");
    assert!(
        summary["seconds"]
            .as_f64()
            .is_some_and(|seconds| seconds > 0.0)
    );
    let stage = |name: &str| summary["stages"][name].as_f64().unwrap_or(f64::NAN);
    let stages = ["forward", "statistics", "rewrite", "write"].map(stage);
    assert!(
        stages.iter().all(|&seconds| seconds >= 0.0)
            && stages.iter().sum::<f64>() <= summary["seconds"].as_f64().unwrap_or(f64::NAN)
            && stage("write") > 0.0
            && (!recipe.contains("gptq") || stage("statistics") > 0.0),
        "{recipe}: {}",
        summary["stages"]
    );
    assert!(
        summary["peak_rss_bytes"]
            .as_u64()
            .is_some_and(|peak| peak > 1 << 20)
    );

    let plan = lab.json(&format!("plan {recipe} {input}"));
    let sparse = manifest(&bytes)["required_features"] != json!([]);
    for size in ["bytes", "bits_per_weight"] {
        let (planned, written) = (plan[size].as_f64(), summary[size].as_f64());
        // A plan does not know which weights will be zero: with sparse encodings it is an upper bound.
        let holds = match sparse {
            true => planned > written,
            false => planned == written && planned.is_some(),
        };
        assert!(
            holds,
            "{recipe}: {size} planned {planned:?}, written {written:?}"
        );
    }
    assert!(lab.succeed("verify out.qbin").starts_with("ok"));
    assert!(
        !lab.names().iter().any(|name| name.contains(".partial")),
        "{:?}",
        lab.names()
    );

    let (header, _) = split(&bytes);
    let data_start = bytes.len() as u64 - largest_end(&header);
    assert!(
        data_start.is_multiple_of(4096),
        "data starts at {data_start}"
    );
    let manifest = manifest(&bytes);
    SafeTensors::deserialize(&bytes).expect("a valid safetensors file");
    for name in names_of(lab, input) {
        assert!(
            manifest["tensors"][&name].is_object(),
            "{recipe}: `{name}` is not accounted for"
        );
    }
    for tensor in plan["tensors"].as_array().expect("a list") {
        let fate = &manifest["tensors"][tensor["name"].as_str().expect("a name")]["fate"];
        assert_eq!(fate["kind"], tensor["kind"], "{recipe}: {tensor}");
    }
    (summary, manifest)
}

fn largest_end(header: &Value) -> u64 {
    let ends = header
        .as_object()
        .expect("an object")
        .values()
        .filter_map(|tensor| tensor["data_offsets"][1].as_u64());
    ends.max().expect("a tensor")
}

/// Names of the tensors of a checkpoint that is one file.
fn names_of(lab: &Lab, input: &str) -> Vec<String> {
    let file = lab.read(&format!("{input}/model.safetensors"));
    let (header, _) = split(&file);
    header
        .as_object()
        .expect("an object")
        .keys()
        .filter(|name| *name != "__metadata__")
        .cloned()
        .collect()
}

#[test]
fn every_method_and_grid_makes_a_whole_artifact() {
    let lab = lab();
    let grids = [
        (
            "--bits 4 --group-size 32 --asymmetric --head keep",
            json!([4, 32, false]),
        ),
        (
            "--bits 4 --group-size 64 --symmetric --head int8",
            json!([4, 64, true]),
        ),
        (
            "--bits 4 --group-size channel --asymmetric --head int4",
            json!([4, null, false]),
        ),
        (
            "--bits 8 --group-size channel --symmetric",
            json!([8, null, true]),
        ),
        (
            "--bits 8 --group-size 128 --asymmetric --head int4",
            json!([8, 128, false]),
        ),
    ];
    for method in METHODS {
        for (grid, expected) in &grids {
            let (summary, manifest) =
                check(&lab, "tiny", &format!("--method {method} {grid}"), CALIB);
            let tensor = |name: &str| manifest["tensors"][name]["fate"].clone();
            let linear = tensor("model.layers.1.mlp.down_proj.weight");
            assert_eq!(
                json!([linear["bits"], linear["group_size"], linear["symmetric"]]),
                *expected,
                "{method} {grid}"
            );
            assert_eq!(linear["method"], method);
            assert_eq!(tensor("model.embed_tokens.weight")["kind"], "kept");
            let head = if grid.contains("--head int") {
                "quantized"
            } else {
                "alias"
            };
            assert_eq!(tensor("lm_head.weight")["kind"], head, "{method} {grid}");
            if *grid == grids[0].0 {
                // An f16 scale and a zero point of one byte for 32 codes of 4 bits.
                assert_eq!(summary["bits_per_weight"], 4.75, "{method}");
            }
            assert_eq!(summary["fallbacks"], json!([]), "{method} {grid}");
        }
    }
}

#[test]
fn odd_shapes_are_first_class() {
    let lab = lab_with_random();
    for method in METHODS {
        for grid in [
            "--bits 4 --group-size 32 --head int4",
            "--bits 8 --group-size channel --head int8",
            "--group-size 32 --symmetric",
        ] {
            check(
                &lab,
                "single",
                &format!("--method {method} {grid}"),
                RANDOM_CALIB,
            );
        }
    }
}

#[test]
fn what_is_kept_is_kept_byte_for_byte() {
    let lab = lab_with_random();
    check(
        &lab,
        "single",
        "--method gptq --group-size 32 --keep *.k_proj.weight",
        RANDOM_CALIB,
    );
    let (before, after) = (lab.read("single/model.safetensors"), lab.read("out.qbin"));
    let before = SafeTensors::deserialize(&before).expect("a safetensors file");
    let after = SafeTensors::deserialize(&after).expect("a safetensors file");
    for name in [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.k_proj.weight",
    ] {
        let (before, after) = (
            before.tensor(name).expect(name),
            after.tensor(name).expect(name),
        );
        assert!(
            before.data() == after.data() && before.dtype() == after.dtype(),
            "{name}"
        );
    }
}

#[test]
fn bytes_do_not_depend_on_threads_or_shards() {
    let lab = lab_with_random();
    for method in METHODS {
        let make = |input: &str, threads: usize| {
            let options = format!(
                "--method {method} --group-size 32 --head int8 {RANDOM_CALIB} --threads {threads}"
            );
            lab.succeed(&format!("quantize {options} {input} out.qbin"));
            lab.read("out.qbin")
        };
        let expected = make("single", 1);
        assert!(make("single", 2) == expected, "{method}: 2 threads");
        assert!(make("sharded", 2) == expected, "{method}: sharded");
        assert!(
            make("sharded/model.safetensors.index.json", 1) == expected,
            "{method}: index"
        );
        assert!(
            make("single/model.safetensors", 3) == expected,
            "{method}: file, 3 threads"
        );
        lab.succeed(&format!("quantize --method {method} --group-size 32 --head int8 {RANDOM_CALIB} --seed 1 single out.qbin"));
        assert!(
            lab.read("out.qbin") != expected,
            "{method}: the seed stands in the manifest"
        );
    }
}

#[test]
fn a_real_models_bytes_do_not_depend_on_threads() {
    let lab = lab();
    for method in METHODS {
        let make = |threads: usize| {
            lab.succeed(&format!(
                "quantize --method {method} {CALIB} --threads {threads} tiny out.qbin"
            ));
            lab.read("out.qbin")
        };
        assert!(make(1) == make(2), "{method}");
    }
}

#[test]
fn text_that_the_model_writes_itself_depends_on_the_seed_only() {
    let lab = lab();
    let digest = |options: &str| {
        let summary = lab.json(&format!(
            "quantize --method gptq --calib-windows 4 --calib-tokens 32 {options} tiny out.qbin"
        ));
        assert!(
            summary["calibration"]["source"]
                .as_str()
                .is_some_and(|source| source.contains("self")),
            "{summary}"
        );
        assert_eq!(summary["calibration"]["tokens"], 128);
        summary["calibration"]["sha256"]
            .as_str()
            .expect("a digest")
            .to_string()
    };
    let expected = digest("--calib self --seed 5 --threads 1");
    assert_eq!(digest("--seed 5 --threads 2"), expected);
    assert_ne!(digest("--seed 6"), expected);
}

#[test]
fn an_artifact_runs_alone() {
    let lab = lab();
    lab.succeed(&format!("quantize {CALIB} tiny out.qbin"));
    // Away from every other file of the model.
    let alone = Lab::new(env!("CARGO_BIN_EXE_qbin-under-test"));
    alone.write("moved.bin", lab.read("out.qbin"));
    drop(lab);
    let prompt = |model: &str, more: &[&str]| {
        let mut args = vec!["run", model, "--prompt", "The sea is", "--max-tokens", "24"];
        args.extend(more);
        let outcome = alone.run_args(args);
        assert_eq!(outcome.status, Some(0), "{}", outcome.stderr);
        outcome.stdout
    };
    let greedy = prompt("moved.bin", &[]);
    assert!(greedy.trim().len() > 20, "{greedy}");
    assert_eq!(prompt("moved.bin", &["--threads", "1"]), greedy);
    let generated: Value = serde_json::from_str(&prompt("moved.bin", &["--json"])).expect("JSON");
    assert_eq!(
        format!("{}\n", generated["text"].as_str().expect("text")),
        greedy
    );
    assert_eq!(
        (&generated["tokens"], &generated["finish"]),
        (&json!(24), &json!("length"))
    );
    let sampled = |seed| prompt("moved.bin", &["--temperature", "1.5", "--seed", seed]);
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
}

/// Text that `builtin` calibration has seen, too: for tests that are not about quality.
fn text(name: &str, bytes: usize) -> &'static str {
    let text = CORPUS
        .iter()
        .find(|text| text.name == name)
        .expect("a text of the corpus")
        .text;
    &text[..text.floor_char_boundary(bytes)]
}

#[test]
fn perplexity_is_measured_on_checkpoints_and_artifacts() {
    let lab = lab();
    lab.write("text.txt", text("narrative", 6000));
    lab.succeed("quantize --method rtn --bits 8 --group-size channel tiny out.qbin");
    let measure = |model: &str, protocol: &str| {
        lab.json(&format!(
            "eval perplexity {model} --data text.txt --protocol {protocol}"
        ))
    };
    for protocol in ["gptq-128", "llamacpp-64"] {
        let (base, model) = (measure("tiny", protocol), measure("out.qbin", protocol));
        for measured in [&base, &model] {
            let number = |key: &str| {
                measured[key]
                    .as_f64()
                    .unwrap_or_else(|| panic!("no `{key}` in {measured}"))
            };
            assert!(
                (number("nll").exp() - number("perplexity")).abs() <= 1e-9 * number("perplexity")
            );
            assert!(
                number("perplexity") > 5.0 && number("perplexity") < 500.0,
                "{measured}"
            );
            assert!(number("tokens") > 100.0 && number("perplexity_error") > 0.0);
            assert_eq!(measured["protocol"], protocol);
        }
        assert_eq!(base["tokens"], model["tokens"]);
        let compared = lab.json(&format!(
            "eval compare tiny out.qbin --data text.txt --protocol {protocol}"
        ));
        let close = |a: &Value, b: &Value| {
            (a.as_f64().expect("a number") - b.as_f64().expect("a number")).abs() <= 1e-9
        };
        assert!(
            close(&compared["base"]["nll"], &base["nll"])
                && close(&compared["model"]["nll"], &model["nll"]),
            "{compared}"
        );
        let ratio = compared["ln_ppl_ratio"].as_f64().expect("a number");
        let expected =
            model["nll"].as_f64().expect("a number") - base["nll"].as_f64().expect("a number");
        assert!((ratio - expected).abs() <= 1e-9, "{ratio} {expected}");
    }
    let one_window =
        lab.json("eval perplexity tiny --data text.txt --protocol gptq-128 --windows 1");
    assert_eq!(
        (&one_window["tokens"], &one_window["perplexity_error"]),
        (&json!(127), &Value::Null)
    );
}

#[test]
fn a_model_compared_with_itself_does_not_differ() {
    let lab = lab();
    lab.write("text.txt", text("technical", 4000));
    lab.succeed("quantize --method rtn tiny out.qbin");
    for model in ["tiny", "out.qbin"] {
        let same = lab.json(&format!(
            "eval compare {model} {model} --data text.txt --protocol gptq-64"
        ));
        assert_eq!(
            json!([same["kl_mean"], same["top1"], same["ln_ppl_ratio"]]),
            json!([0.0, 1.0, 0.0]),
            "{model}"
        );
    }
}

#[test]
fn better_methods_and_more_bits_are_better() {
    let lab = lab();
    // Calibrated on other texts than it is measured on.
    let (measured, calibrated): (Vec<&CorpusText>, Vec<&CorpusText>) = CORPUS
        .iter()
        .partition(|text| text.domain == "encyclopedic");
    lab.write(
        "measured.txt",
        &measured[0].text[..measured[0].text.floor_char_boundary(20_000)],
    );
    lab.write(
        "calibrated.txt",
        calibrated
            .iter()
            .map(|text| text.text)
            .collect::<Vec<_>>()
            .join("\n\n"),
    );
    let kl = |recipe: &str| {
        lab.succeed(&format!("quantize {recipe} --calib calibrated.txt --calib-windows 64 --calib-tokens 128 tiny out.qbin"));
        let compared =
            lab.json("eval compare tiny out.qbin --data measured.txt --protocol gptq-128");
        compared["kl_mean"].as_f64().expect("a number")
    };
    let int4 = METHODS.map(|method| kl(&format!("--method {method} --bits 4 --group-size 128")));
    let [rtn, gptq, awq] = int4;
    assert!(gptq < 0.8 * rtn, "gptq {gptq}, rtn {rtn}");
    assert!(awq < rtn, "awq {awq}, rtn {rtn}");
    assert!(rtn < 0.1, "rtn {rtn}");
    let int8 = kl("--method rtn --bits 8 --group-size channel");
    assert!((0.0..0.0005).contains(&int8), "int8 {int8}");
}

#[test]
fn a_recipe_file_does_what_it_says() {
    let lab = lab();
    lab.write(
        "recipe.toml",
        r#"
            head = "int8"
            [[pass]]
            method = "gptq"
            bits = 4
            group_size = 64
            [[pass.override]]
            pattern = "*.down_proj.weight"
            bits = 8
            group_size = "channel"
            [[pass.override]]
            pattern = "model.layers.0.*.v_proj.weight"
            keep = true
        "#,
    );
    let (_, manifest) = check(&lab, "tiny", "--recipe recipe.toml", CALIB);
    let fate = |name: &str| manifest["tensors"][name]["fate"].clone();
    let grid = |name: &str| json!([fate(name)["bits"], fate(name)["group_size"]]);
    assert_eq!(grid("model.layers.3.mlp.up_proj.weight"), json!([4, 64]));
    assert_eq!(
        grid("model.layers.3.mlp.down_proj.weight"),
        json!([8, null])
    );
    assert_eq!(grid("lm_head.weight")[0], 8);
    let kept = fate("model.layers.0.self_attn.v_proj.weight");
    assert!(
        kept["kind"] == "kept"
            && kept["reason"]
                .as_str()
                .is_some_and(|reason| reason.contains("v_proj")),
        "{kept}"
    );
    assert_eq!(
        fate("model.layers.1.self_attn.v_proj.weight")["kind"],
        "quantized"
    );
    assert_eq!(manifest["recipe"]["quantize"]["bits"], 4);
}

#[test]
fn pruned_weights_are_exact_zeros_in_the_artifact() {
    let lab = lab();
    for (grid, calib) in [
        ("rtn\"\nsymmetric = false", ""),
        ("rtn\"\nbits = 8", ""),
        ("awq\"\ngroup_size = 32", CALIB),
    ] {
        lab.write("recipe.toml", format!("[[pass]]\nmethod = \"magnitude\"\nsparsity = \"2:4\"\n[[pass]]\nmethod = \"{grid}\n"));
        check(&lab, "tiny", "--recipe recipe.toml", calib);
        let model = Model::open(&lab.path("out.qbin")).expect("an artifact");
        for name in names_of(&lab, "tiny")
            .iter()
            .filter(|name| name.contains("proj"))
        {
            let weight = model.weight(name).expect("one of its tensors");
            let shape = weight.shape();
            let mut values = vec![f32::NAN; shape[0] * shape[1]];
            weight.read_rows_f32(0..shape[0], &mut values);
            let dense = values
                .chunks(4)
                .position(|run| run.iter().filter(|value| **value == 0.0).count() < 2);
            assert_eq!(
                dense, None,
                "{grid}: {name} has fewer than two zeros in a run of four"
            );
            assert!(
                values.iter().filter(|value| **value != 0.0).count() > values.len() / 4,
                "{name}"
            );
        }
    }
}

#[test]
fn a_plan_reads_no_weights() {
    let lab = lab();
    // 13 GB of holes in the shape of a 7B model: reading them would take much longer than the processor time given.
    let mut checkpoint = RawCheckpoint::random(1);
    for (key, value) in [
        ("hidden_size", 4096),
        ("intermediate_size", 11_008),
        ("num_attention_heads", 32),
        ("num_key_value_heads", 32),
    ] {
        checkpoint.config[key] = json!(value);
    }
    checkpoint.config["num_hidden_layers"] = json!(32);
    let wide = |size: usize| match size {
        HIDDEN => 4096,
        24 => 4096,
        88 => 11_008,
        other => other,
    };
    let mut entries = Vec::new();
    let mut end = 0_u64;
    for tensor in &checkpoint.tensors {
        let shape: Vec<usize> = tensor.shape.iter().map(|&size| wide(size)).collect();
        let blocks = if tensor.name.contains("layers.1.") {
            1..32
        } else {
            1..2
        };
        for block in blocks {
            let start = end;
            end += 2 * shape.iter().product::<usize>() as u64;
            let name = tensor
                .name
                .replace("layers.1.", &format!("layers.{block}."));
            entries.push(format!(
                "{}:{}",
                json!(name),
                json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]})
            ));
        }
    }
    let header = format!("{{{}}}", entries.join(","));
    lab.write("big/config.json", checkpoint.config.to_string());
    lab.write(
        "big/model.safetensors",
        [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat(),
    );
    let file = fs::OpenOptions::new()
        .write(true)
        .open(lab.path("big/model.safetensors"))
        .expect("open");
    file.set_len(8 + header.len() as u64 + end).expect("a hole");
    assert!(end > 12_000_000_000, "{end}");
    let outcome = lab.run_in_shell(r#"ulimit -t 2; exec "$@""#, "plan big --json");
    assert_eq!(outcome.status, Some(0), "{}", outcome.stderr);
    let plan: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
    let bytes = plan["bytes"].as_f64().expect("a number");
    assert!(
        bytes > 0.25 * end as f64 && bytes < 0.3 * end as f64,
        "{bytes} of {end}"
    );
}

#[test]
fn inspect_shows_what_is_inside() {
    let lab = lab();
    lab.succeed("quantize --method rtn tiny out.qbin");
    let checkpoint = lab.json("inspect tiny");
    assert_eq!(
        json!([checkpoint["kind"], checkpoint["architecture"]]),
        json!(["checkpoint", "LlamaForCausalLM"])
    );
    assert_eq!(
        checkpoint["tensors"].as_array().map(Vec::len),
        Some(names_of(&lab, "tiny").len())
    );
    let artifact = lab.json("inspect out.qbin");
    assert_eq!(artifact["kind"], "artifact");
    assert_eq!(artifact["bytes"], lab.read("out.qbin").len());
    assert_eq!(artifact["manifest"], manifest(&lab.read("out.qbin")));
    assert!(
        artifact["files"]
            .as_array()
            .is_some_and(|files| files.contains(&json!("tokenizer.json"))),
        "{artifact}"
    );
    let text = lab.succeed("inspect out.qbin --tensors");
    assert!(
        text.contains("model.layers.3.mlp.down_proj.weight")
            && text.contains("int4 g128 asymmetric (rtn)"),
        "{text}"
    );
}

#[test]
fn completions_and_man_pages_know_every_command() {
    let lab = lab();
    let commands = [
        "quantize",
        "plan",
        "inspect",
        "verify",
        "eval",
        "run",
        "completions",
        "man",
    ];
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = lab.succeed(&format!("completions {shell}"));
        for word in commands
            .iter()
            .chain(&["perplexity", "group-size", "calib-windows"])
        {
            assert!(script.contains(word), "{shell}: no `{word}`");
        }
    }
    lab.succeed("man pages");
    for command in commands.iter().chain(&["eval-perplexity", "eval-compare"]) {
        let page = String::from_utf8(lab.read(&format!("pages/qbin-{command}.1"))).expect("UTF-8");
        assert!(
            page.contains(".TH") && page.contains("SYNOPSIS"),
            "{command}"
        );
    }
    let help = lab.succeed("--help");
    assert!(
        commands.iter().all(|command| help.contains(command)),
        "{help}"
    );
}

#[test]
fn a_run_over_an_artifact_replaces_it() {
    let lab = lab();
    lab.write("out.qbin", "something else");
    lab.succeed("quantize --method rtn tiny out.qbin");
    let first = lab.read("out.qbin");
    lab.succeed("quantize --method rtn --bits 8 tiny out.qbin");
    assert_ne!(lab.read("out.qbin").len(), first.len());
    assert!(lab.succeed("verify out.qbin").starts_with("ok"));
    // The input is only read.
    let mut copy = lab.path("copy");
    copy_folder(&lab.path("tiny"), &copy);
    copy.push("model.safetensors");
    let mut permissions = fs::metadata(&copy).expect("metadata").permissions();
    permissions.set_readonly(true);
    fs::set_permissions(&copy, permissions).expect("make read-only");
    lab.succeed("quantize --method rtn copy other.qbin");
}
