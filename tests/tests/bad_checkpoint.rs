//! Checkpoints that are refused: each fault with a message that helps, and without leaving anything behind.

use qbin_tests::checkpoint::{HIDDEN, RawCheckpoint, RawTensor, VOCAB, file, split, with_header};
use qbin_tests::run::Lab;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::FileExt as _;

const Q_PROJ: &str = "model.layers.1.self_attn.q_proj.weight";
const RTN: &str = "quantize --method rtn --group-size 32 model out.qbin";

fn lab() -> Lab {
    Lab::new(env!("CARGO_BIN_EXE_qbin-under-test"))
}

/// A lab with the random checkpoint, changed, in `model`.
fn changed(change: impl FnOnce(&mut RawCheckpoint)) -> Lab {
    let lab = lab();
    let mut checkpoint = RawCheckpoint::random(1);
    change(&mut checkpoint);
    checkpoint.write(&lab.path("model"));
    lab
}

/// A lab with the random checkpoint, its one file of weights replaced.
fn with_file(weights: impl FnOnce(Vec<u8>) -> Vec<u8>) -> Lab {
    let lab = changed(|_| {});
    lab.write(
        "model/model.safetensors",
        weights(lab.read("model/model.safetensors")),
    );
    lab
}

/// A lab with the random checkpoint in shards, its index changed as a text.
fn with_index(change: impl FnOnce(String) -> String) -> Lab {
    let lab = lab();
    RawCheckpoint::random(1).write_sharded(&lab.path("model"));
    let index = String::from_utf8(lab.read("model/model.safetensors.index.json")).expect("UTF-8");
    lab.write("model/model.safetensors.index.json", change(index));
    lab
}

#[test]
fn damaged_files_are_refused() {
    let check = |damage: &dyn Fn(Vec<u8>) -> Vec<u8>, words: &[&str]| {
        let lab = with_file(damage);
        let words: Vec<&str> = words
            .iter()
            .chain(&["model.safetensors`"])
            .copied()
            .collect();
        for command in [
            RTN,
            "plan --group-size 32 model",
            "inspect model",
            "eval perplexity model --data model/config.json",
        ] {
            lab.refuse(command, &words);
        }
    };
    check(
        &|bytes| bytes[..100].to_vec(),
        &["the header length is", "92 bytes", "hint"],
    );
    check(
        &|bytes| bytes[..bytes.len() - 10].to_vec(),
        &["lm_head.weight", "bytes of data", "hint"],
    );
    check(
        &|bytes| [bytes, vec![0; 3]].concat(),
        &["end at byte", "bytes of data", "hint"],
    );
    check(&|_| Vec::new(), &["has 0 bytes"]);
    check(&|bytes| bytes[..5].to_vec(), &["has 5 bytes", "at least 8"]);
    for length in [u64::MAX, 1 << 40] {
        let header_length = |bytes: Vec<u8>| [&length.to_le_bytes()[..], &bytes[8..]].concat();
        check(&header_length, &[&length.to_string(), "hint"]);
    }
    check(
        &|_| with_header("[1, 2]", b""),
        &["not a safetensors header", "tensor names"],
    );
    check(
        &|_| with_header("{\"a\":", b""),
        &["not a safetensors header"],
    );
}

/// Replaces the file's header by what `change` makes of it.
fn reheaded(change: impl FnOnce(String) -> String) -> Lab {
    with_file(|bytes| {
        let (_, data) = split(&bytes);
        let header = String::from_utf8(bytes[8..bytes.len() - data.len()].to_vec()).expect("UTF-8");
        let new = change(header.clone());
        assert_ne!(new, header, "nothing was changed");
        with_header(&new, data)
    })
}

#[test]
fn contradicting_headers_are_refused() {
    // The second tensor begins where the first one does.
    let start = VOCAB * HIDDEN * 2;
    let overlapping =
        reheaded(|header| header.replace(&format!("[{start},{}]", start + 96), "[0,96]"));
    overlapping.refuse(
        RTN,
        &[
            "model.layers.0.input_layernorm.weight",
            "model.embed_tokens.weight",
            "may not overlap",
        ],
    );

    let duplicate =
        reheaded(|header| header.replace("layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"));
    duplicate.refuse(RTN, &["model.layers.0.self_attn.v_proj.weight", "twice"]);

    let wrong_type = reheaded(|header| header.replacen("\"BF16\"", "\"BF17\"", 1));
    wrong_type.refuse(RTN, &["BF17", "model.embed_tokens.weight", "BF16"]);

    let shape = format!("[{VOCAB},{HIDDEN}]");
    let wrong_shape = reheaded(|header| header.replacen(&shape, "[4000,48]", 1));
    wrong_shape.refuse(
        RTN,
        &[
            "model.embed_tokens.weight",
            "4000, 48",
            "384000",
            &start.to_string(),
        ],
    );
    let endless = reheaded(|header| header.replacen(&shape, "[4294967296,4294967296]", 1));
    endless.refuse(RTN, &["model.embed_tokens.weight", "4294967296"]);
}

#[test]
fn every_flipped_bit_of_a_header_is_noticed() {
    let lab = changed(|checkpoint| {
        checkpoint.config["num_hidden_layers"] = json!(1);
        checkpoint
            .tensors
            .retain(|tensor| !tensor.name.contains("layers.1."));
    });
    let bytes = lab.read("model/model.safetensors");
    let header_bytes = bytes.len() - split(&bytes).1.len();

    let path = lab.path("model/model.safetensors");
    let cpu = qbin_tests::reference_cpu();
    let opens = || {
        let model = qbin_format::Model::open(&path).map_err(|error| error.to_string())?;
        qbin_runtime::Parts::new(&model, &cpu)
            .map(|_| ())
            .map_err(|error| error.to_string())
    };
    assert_eq!(opens(), Ok(()));
    let file = fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("open");
    for at in 0..header_bytes {
        for bit in 0..8 {
            file.write_all_at(&[bytes[at] ^ (1 << bit)], at as u64)
                .expect("write");
            assert!(
                opens().is_err(),
                "bit {bit} of byte {at} flipped, and nobody noticed"
            );
        }
        file.write_all_at(&bytes[at..=at], at as u64)
            .expect("write");
    }
    assert_eq!(opens(), Ok(()));
}

#[test]
fn wrong_shards_are_refused() {
    let shard =
        |lab: &Lab, at: usize| lab.path(&format!("model/model-{at:05}-of-00003.safetensors"));
    let missing = with_index(|index| index);
    fs::remove_file(shard(&missing, 2)).expect("remove");
    missing.refuse(
        RTN,
        &["model-00002-of-00003.safetensors", "missing", "hint"],
    );

    for outside in [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..",
    ] {
        let lab = with_index(|index| index.replace("model-00002-of-00003.safetensors", outside));
        // It is there: the rule is about the name.
        lab.write(
            "x.safetensors",
            lab.read("model/model-00002-of-00003.safetensors"),
        );
        lab.refuse(RTN, &[outside, "plain file name", "tensor `"]);
    }

    let twice = with_index(|index| index);
    fs::copy(shard(&twice, 1), shard(&twice, 2)).expect("copy");
    twice.refuse(
        RTN,
        &[
            "model-00001-of-00003",
            "model-00002-of-00003",
            "stored once",
            "hint",
        ],
    );

    let elsewhere = with_index(|index| {
        let mut index: Value = serde_json::from_str(&index).expect("JSON");
        index["weight_map"][Q_PROJ] = json!("model-00001-of-00003.safetensors");
        let other = "model.embed_tokens.weight";
        index["weight_map"][other] = json!("model-00002-of-00003.safetensors");
        index.to_string()
    });
    elsewhere.refuse(RTN, &["model.embed_tokens.weight", "hint"]);

    let unlisted = with_index(|index| index.replace("lm_head.weight", "lm_tail.weight"));
    unlisted.refuse(RTN, &["lm_head.weight", "does not list it", "hint"]);

    with_index(|_| "{}".into()).refuse(RTN, &["not an index", "weight_map"]);
    let cut = with_index(|index| index);
    let half = fs::read(shard(&cut, 3)).expect("read");
    fs::write(shard(&cut, 3), &half[..half.len() / 2]).expect("write");
    cut.refuse(
        RTN,
        &["model-00003-of-00003.safetensors", "bytes of data", "hint"],
    );
}

#[test]
fn weights_that_are_no_numbers_are_refused() {
    let names = [
        Q_PROJ,
        "model.layers.1.mlp.down_proj.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
    ];
    for (name, value, word) in names
        .iter()
        .zip([
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            f32::INFINITY,
        ])
        .map(|(n, v)| (n, v, v.to_string()))
    {
        let lab = changed(|checkpoint| checkpoint.tensor(name).set_bf16(37, value));
        let ids: Vec<i32> = (0..64).map(|at| at * 61 % VOCAB as i32).collect();
        lab.write_npy("ids.npy", 32, &ids);
        for options in [
            "--method rtn",
            "--method gptq",
            "--method awq",
            "--method rtn --head int8",
            "--method rtn --keep *.q_proj.weight",
        ] {
            let args = format!(
                "quantize {options} --group-size 32 --calib ids.npy --calib-windows 2 --calib-tokens 32 model out.qbin"
            );
            lab.refuse(&args, &[name, "37", &word, "hint"]);
        }
    }
}

#[test]
fn configs_that_do_not_fit_are_refused() {
    let config = |key: &str, value: Value| changed(|checkpoint| checkpoint.config[key] = value);
    let check = |lab: &Lab, words: &[&str]| {
        for command in [RTN, "plan --group-size 32 model"] {
            lab.refuse(command, words);
        }
    };
    check(
        &config("architectures", json!(["FalconForCausalLM"])),
        &["FalconForCausalLM", "LlamaForCausalLM", "not supported"],
    );
    check(
        &config("logit_warp", json!(0.5)),
        &["logit_warp", "0.5", "LlamaForCausalLM", "hint"],
    );
    check(
        &config("hidden_act", json!("gelu")),
        &["hidden_act", "gelu", "silu"],
    );
    check(&config("hidden_size", json!(0)), &["hidden_size", "`0`"]);
    check(
        &config("hidden_size", json!("many")),
        &["hidden_size", "many"],
    );
    check(
        &config("quantization_config", json!({"bits": 4})),
        &["quantization_config", "unquantized"],
    );
    check(
        &config("num_key_value_heads", json!(3)),
        &["num_key_value_heads", "`3`", "divisor"],
    );
    check(
        &config("hidden_size", json!(64)),
        &["model.embed_tokens.weight", "[4099, 64]", "[4099, 48]"],
    );
    check(
        &config("num_hidden_layers", json!(3)),
        &["model.layers.2.input_layernorm.weight", "missing", "hint"],
    );
    check(
        &config("num_hidden_layers", json!(1)),
        &[
            "model.layers.1.input_layernorm.weight",
            "belongs to no part",
            "hint",
        ],
    );

    // A stranger's number is no reason to fill the memory with the tensors that it implies.
    let endless = config("num_hidden_layers", json!(2_000_000_000));
    let outcome = endless.run_in_shell(r#"ulimit -v 4000000; exec "$@""#, RTN);
    outcome.assert_refused("2000000000 blocks", &["2000000000"]);

    let lab = changed(|_| {});
    lab.write("model/config.json", "{\"hidden_size\": ");
    check(&lab, &["config.json", "not valid JSON"]);
    lab.write("model/config.json", "[]");
    check(&lab, &["config.json", "an object"]);
    fs::remove_file(lab.path("model/config.json")).expect("remove");
    check(&lab, &["config.json", "missing"]);
}

#[test]
fn tensors_that_do_not_fit_are_refused() {
    let missing = changed(|checkpoint| checkpoint.tensors.retain(|tensor| tensor.name != Q_PROJ));
    missing.refuse(RTN, &[Q_PROJ, "missing", "[48, 48]", "hint"]);
    let transposed = changed(|checkpoint| {
        checkpoint
            .tensor("model.layers.0.self_attn.k_proj.weight")
            .shape
            .reverse()
    });
    transposed.refuse(
        RTN,
        &[
            "model.layers.0.self_attn.k_proj.weight",
            "[24, 48]",
            "[48, 24]",
        ],
    );
    let extra = |name: &str| {
        let tensor = RawTensor {
            name: name.into(),
            dtype: "F32".into(),
            shape: vec![3],
            bytes: vec![0; 12],
        };
        changed(|checkpoint| checkpoint.tensors.push(tensor))
    };
    extra("model.layers.0.adapter.weight").refuse(
        RTN,
        &[
            "model.layers.0.adapter.weight",
            "[3]",
            "belongs to no part",
            "hint",
        ],
    );
    let integers = changed(|checkpoint| checkpoint.tensor(Q_PROJ).dtype = "I16".into());
    integers.refuse(RTN, &[Q_PROJ, "I16", "BF16"]);
    // Known to be unused, and said to be.
    let lab = extra("model.layers.0.self_attn.rotary_emb.inv_freq");
    lab.succeed(RTN);
    let inspected = lab.json("inspect out.qbin");
    assert_eq!(
        inspected["manifest"]["tensors"]["model.layers.0.self_attn.rotary_emb.inv_freq"]["fate"]["kind"],
        "dropped"
    );
}

#[test]
fn a_tokenizer_larger_than_the_vocabulary_is_refused() {
    let lab = changed(|checkpoint| {
        checkpoint.config["vocab_size"] = json!(61);
        for name in ["model.embed_tokens.weight", "lm_head.weight"] {
            let tensor = checkpoint.tensor(name);
            tensor.shape[0] = 61;
            tensor.bytes.truncate(61 * HIDDEN * 2);
        }
    });
    lab.write("model/tokenizer.json", lab.read("tiny/tokenizer.json"));
    lab.write("text.txt", "some text");
    for args in [
        RTN,
        "plan --group-size 32 model",
        "quantize --calib builtin --group-size 32 model out.qbin",
        "run model --prompt x",
        "eval perplexity model --data text.txt --protocol gptq-64",
    ] {
        lab.refuse(args, &["4096", "61", "tokenizer"]);
    }
}

#[test]
fn files_of_another_kind_are_refused() {
    let lab = changed(|_| {});
    lab.succeed(RTN);
    lab.refuse(
        "quantize out.qbin other.qbin",
        &["out.qbin", "artifact already", "checkpoint", "hint"],
    );
    lab.refuse("plan out.qbin", &["out.qbin", "artifact already", "hint"]);
    lab.refuse("verify model", &["`model`", "no artifact", ".qbin"]);
    lab.refuse(
        "verify model/model.safetensors",
        &["model.safetensors", "no artifact"],
    );

    lab.write("model.gguf", b"GGUF\x03\0\0\0\0\0\0\0");
    lab.write("torch/pytorch_model.bin", b"PK\x03\x04rest");
    lab.write(
        "pointer.safetensors",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    );
    fs::create_dir(lab.path("none")).expect("make a folder");
    lab.write("two/a.safetensors", file(&[]));
    lab.write("two/b.safetensors", file(&[]));
    for command in ["inspect", "plan", "verify"] {
        let check = |input: &str, words: &[&str]| lab.refuse(&format!("{command} {input}"), words);
        check("model.gguf", &["model.gguf", "GGUF", "hint", "safetensors"]);
        check(
            "torch",
            &["pytorch_model.bin", "PyTorch", "hint", "safe_serialization"],
        );
        check(
            "torch/pytorch_model.bin",
            &["pytorch_model.bin", "PyTorch", "hint"],
        );
        check(
            "pointer.safetensors",
            &["pointer.safetensors", "git-lfs", "hint"],
        );
        check("nowhere", &["`nowhere`", "No such file"]);
        check("none", &["`none`", "no safetensors file", "hint"]);
        check("two", &["a.safetensors", "b.safetensors", "hint"]);
    }
}
