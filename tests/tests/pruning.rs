//! Pruning from end to end: folders and artifacts with exactly the zeros that were asked for.

use qbin_format::Model;
use qbin_tests::checkpoint::{RawCheckpoint, VOCAB};
use qbin_tests::run::Lab;
use safetensors::SafeTensors;
use serde_json::json;

const CALIB: &str = "--calib builtin --calib-windows 8 --calib-tokens 64";
const RANDOM_CALIB: &str = "--calib ids.npy --calib-windows 6 --calib-tokens 32";

fn lab() -> Lab {
    let lab = Lab::new(env!("CARGO_BIN_EXE_qbin-under-test"));
    let checkpoint = RawCheckpoint::random(1);
    checkpoint.write(&lab.path("single"));
    checkpoint.write_sharded(&lab.path("sharded"));
    let ids: Vec<i32> = (0..6 * 32).map(|at| at * 7919 % VOCAB as i32).collect();
    lab.write_npy("ids.npy", 32, &ids);
    lab
}

/// The values of a tensor of a model, with its columns.
fn values(model: &Model, name: &str) -> (Vec<f32>, usize) {
    let weight = model.weight(name).expect("one of its tensors");
    let shape = weight.shape();
    let mut values = vec![f32::NAN; shape.iter().product()];
    weight.read_rows_f32(0..shape[0], &mut values);
    (values, shape.last().copied().unwrap_or(1))
}

fn zeros(values: &[f32]) -> usize {
    values.iter().filter(|value| **value == 0.0).count()
}

fn linears(model: &Model) -> Vec<String> {
    let names = model.names().filter(|name| name.contains("_proj.weight"));
    names.map(String::from).collect()
}

/// Every run of `of` columns of every linear has at least `least` zeros, and not all are.
#[track_caller]
fn assert_pattern(model: &Model, least: usize, of: usize) {
    for name in linears(model) {
        let (values, cols) = values(model, &name);
        for row in values.chunks(cols) {
            for run in row.chunks_exact(of) {
                assert!(zeros(run) >= least, "{name}: {run:?}");
            }
        }
        assert!(zeros(&values) < values.len() * (least + 1) / of, "{name}");
    }
}

#[test]
fn a_pruned_folder_is_the_checkpoint_with_zeros() {
    let lab = lab();
    for method in ["magnitude", "wanda", "sparsegpt"] {
        let options = format!("--method {method} --sparsity 0.5 {RANDOM_CALIB}");
        let summary = lab.json(&format!("prune {options} sharded pruned"));
        let (before, after) = (
            lab.read("single/model.safetensors"),
            lab.read("pruned/model.safetensors"),
        );
        let before = SafeTensors::deserialize(&before).expect("a safetensors file");
        let after = SafeTensors::deserialize(&after).expect("a safetensors file");
        assert_eq!(before.names().len(), after.names().len());
        for name in before.names() {
            let (old, new) = (
                before.tensor(name).expect("its name"),
                after.tensor(name).expect(name),
            );
            assert_eq!(
                (old.dtype(), old.shape()),
                (new.dtype(), new.shape()),
                "{method} {name}"
            );
            assert_eq!(
                old.data() == new.data(),
                !name.contains("_proj"),
                "{method} {name}"
            );
        }
        assert!(lab.read("pruned/config.json") == lab.read("single/config.json"));
        let model = Model::open(&lab.path("pruned")).expect("a checkpoint");
        let mut all = 0;
        for name in linears(&model) {
            let (values, _) = values(&model, &name);
            assert_eq!(2 * zeros(&values), values.len(), "{method} {name}");
            all += zeros(&values);
        }
        assert_eq!(
            (&summary["zeros"], &summary["sparsity"]),
            (&json!(all), &json!(0.5))
        );
        assert_eq!(summary["tensors"].as_array().map(Vec::len), Some(14));
        let error = summary["relative_error_mean"].as_f64().expect("a number");
        assert!(error > 1e-4 && error < 1.0, "{method}: {error}");
        assert!(!lab.names().iter().any(|name| name.contains(".partial")));
        std::fs::remove_dir_all(lab.path("pruned")).expect("remove");
    }
}

#[test]
fn patterns_hold_in_folders_and_artifacts() {
    let lab = lab();
    // 48 and 88 columns: of 88 a run of six cuts off four, which get their share of zeros.
    for (pattern, least, of) in [("2:4", 2, 4), ("4:8", 4, 8), ("4:6", 4, 6)] {
        lab.succeed(&format!(
            "prune --sparsity {pattern} {RANDOM_CALIB} single pruned"
        ));
        assert_pattern(
            &Model::open(&lab.path("pruned")).expect("a checkpoint"),
            least,
            of,
        );
        std::fs::remove_dir_all(lab.path("pruned")).expect("remove");
    }
    for method in [
        "gptq --bits 4",
        "gptq --bits 8",
        "gptq --refine 0 --act-order none",
        "rtn",
        "awq",
    ] {
        let options = format!("--method {method} --group-size 32 --sparsity 2:4 {RANDOM_CALIB}");
        lab.succeed(&format!("quantize {options} single out.qbin"));
        assert_pattern(
            &Model::open(&lab.path("out.qbin")).expect("an artifact"),
            2,
            4,
        );
    }
}

#[test]
fn layers_have_their_own_sparsity() {
    let lab = lab();
    let layers =
        "--layer *.mlp.*=0.25 --layer *.k_proj.weight=0 --layer *.0.mlp.down_proj.weight=2:4";
    let summary = lab.json(&format!(
        "prune --sparsity 0.5 {layers} {RANDOM_CALIB} single pruned"
    ));
    let model = Model::open(&lab.path("pruned")).expect("a checkpoint");
    for name in linears(&model) {
        let (values, _) = values(&model, &name);
        let share = match name.as_str() {
            name if name.contains("k_proj") => 0.0,
            name if name.contains("0.mlp.down_proj") => 0.5,
            name if name.contains("mlp") => 0.25,
            _ => 0.5,
        };
        assert_eq!(zeros(&values) as f64, share * values.len() as f64, "{name}");
    }
    assert_eq!(
        summary["tensors"].as_array().map(Vec::len),
        Some(12),
        "k is left alone"
    );
}

#[test]
fn a_share_is_dealt_out_as_a_whole() {
    let lab = lab();
    for method in ["magnitude", "wanda", "sparsegpt"] {
        let options =
            format!("--method {method} --sparsity 0.5 --allocate --layer *.k_proj.weight=0.25");
        let summary = lab.json(&format!("prune {options} {CALIB} tiny pruned"));
        let (mut zeros, mut weights, mut shares) = (0.0, 0.0, Vec::new());
        let tensors = summary["tensors"].as_array().expect("a list");
        for tensor in tensors {
            let number = |key: &str| tensor[key].as_f64().expect("a number");
            if tensor["name"]
                .as_str()
                .is_some_and(|name| name.contains("k_proj"))
            {
                assert_eq!(
                    4.0 * number("zeros"),
                    number("weights"),
                    "{method} {tensor}"
                );
                continue;
            }
            zeros += number("zeros");
            weights += number("weights");
            shares.push(number("zeros") / number("weights"));
        }
        // Each linear's count is rounded for itself; Wanda's are rounded in each row.
        let tolerance = if method == "wanda" {
            0.5 / 128.0
        } else {
            24.0 / weights
        };
        assert!(
            (zeros / weights - 0.5).abs() <= tolerance,
            "{method}: {zeros} of {weights}"
        );
        assert!(
            shares.iter().any(|&share| share > 0.55) && shares.iter().any(|&share| share < 0.45),
            "{shares:?}"
        );
        std::fs::remove_dir_all(lab.path("pruned")).expect("remove");
    }
}

#[test]
fn gptq_after_pruning_keeps_the_zeros() {
    let lab = lab();
    for (prune, joint) in [
        ("magnitude", false),
        ("wanda", false),
        ("sparsegpt", false),
        ("wanda", true),
        ("sparsegpt", true),
    ] {
        lab.write(
            "recipe.toml",
            format!(
                "[[pass]]\nmethod = \"{prune}\"\nsparsity = \"2:4\"\njoint = {joint}\n[[pass.override]]\npattern = \"*.v_proj.weight\"\n\
                 sparsity = 0\n[[pass]]\nmethod = \"gptq\"\n"
            ),
        );
        lab.succeed(&format!(
            "quantize --recipe recipe.toml {CALIB} tiny out.qbin"
        ));
        let model = Model::open(&lab.path("out.qbin")).expect("an artifact");
        for name in linears(&model) {
            let (values, cols) = values(&model, &name);
            let least = if name.contains("v_proj") { 0 } else { 2 };
            for run in values.chunks(cols).flat_map(|row| row.chunks_exact(4)) {
                assert!(zeros(run) >= least, "{prune} {joint} {name}: {run:?}");
            }
            let share = zeros(&values) as f64 / values.len() as f64;
            let expected = if least == 0 { 0.0..0.3 } else { 0.5..0.65 };
            assert!(expected.contains(&share), "{prune} {joint} {name}: {share}");
        }
        let inspected = lab.json("inspect out.qbin --tensors");
        let tensors = inspected["tensors"].as_array().expect("a list");
        for tensor in tensors {
            let name = tensor["name"].as_str().expect("a name");
            let (values, _) = values(&model, name);
            let share = zeros(&values) as f64 / values.len() as f64;
            assert_eq!(tensor["sparsity"], json!(share), "{name}");
        }
    }
}

#[test]
fn bytes_do_not_depend_on_threads_or_shards() {
    let lab = lab();
    for sparsity in ["0.5", "2:4"] {
        let quantized = |input: &str, threads: usize| {
            let options =
                format!("--group-size 32 --sparsity {sparsity} {RANDOM_CALIB} --threads {threads}");
            lab.succeed(&format!("quantize {options} {input} out.qbin"));
            lab.read("out.qbin")
        };
        assert!(
            quantized("single", 1) == quantized("sharded", 3),
            "{sparsity}"
        );
        let pruned = |input: &str, threads: usize| {
            let options = format!("--sparsity {sparsity} {RANDOM_CALIB} --threads {threads}");
            lab.succeed(&format!("prune {options} {input} pruned"));
            let bytes = lab.read("pruned/model.safetensors");
            std::fs::remove_dir_all(lab.path("pruned")).expect("remove");
            bytes
        };
        assert!(pruned("single", 1) == pruned("sharded", 3), "{sparsity}");
    }
}

#[test]
fn better_methods_lose_less() {
    let lab = lab();
    lab.write("text.txt", qbin_calib_data::CORPUS[0].text);
    let kl = |command: &str, options: &str| {
        let calib = "--calib builtin --calib-windows 48 --calib-tokens 128";
        lab.succeed(&format!("{command} {options} {calib} tiny made"));
        let compared =
            lab.json("eval compare tiny made --data text.txt --protocol gptq-128 --windows 16");
        let made = lab.path("made");
        match made.is_dir() {
            true => std::fs::remove_dir_all(made).expect("remove"),
            false => std::fs::remove_file(made).expect("remove"),
        }
        compared["kl_mean"].as_f64().expect("a number")
    };
    let prune = |options: &str| kl("prune", &format!("--sparsity 0.5 {options}"));
    let [magnitude, wanda, plain, refined] =
        ["--method magnitude", "--method wanda", "--refine 0", ""].map(prune);
    assert!(
        magnitude > wanda && wanda > plain && plain > refined,
        "{magnitude} {wanda} {plain} {refined}"
    );
    lab.write(
        "chain.toml",
        "[[pass]]\nmethod = \"sparsegpt\"\nsparsity = 0.5\nrefine = 0\n[[pass]]\nmethod = \"gptq\"",
    );
    let chain = kl("quantize", "--recipe chain.toml");
    let joint = kl("quantize", "--sparsity 0.5");
    assert!(joint < chain, "{joint} {chain}");
}
