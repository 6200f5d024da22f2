//! Arguments, texts, recipes and outputs that are refused: each with a message that helps, and without leaving
//! anything behind.

use qbin_tests::checkpoint::RawCheckpoint;
use qbin_tests::run::{Lab, copy_folder};
use std::fs;
use std::os::unix::fs::symlink;

const RTN: &str = "quantize --method rtn --group-size 32 model out.qbin";

/// A lab with the random checkpoint in `model`.
fn lab() -> Lab {
    let lab = Lab::new(env!("CARGO_BIN_EXE_qbin-under-test"));
    RawCheckpoint::random(1).write(&lab.path("model"));
    lab
}

#[test]
fn calibration_that_is_not_there_is_refused() {
    let lab = lab();
    lab.write("empty.txt", "");
    lab.write("blank.txt", " \n\n ");
    lab.write("short.txt", "The tide comes in twice a day. ".repeat(21));
    lab.write("binary.txt", [b'a', 0xff, 0xfe]);
    lab.write("lines.jsonl", "{\"text\": \"one\"}\n{\"body\": \"two\"}\n");
    lab.write_npy("large.npy", 4, &[1, 2, 3, 4, 5, 6, 4096, 8]);
    lab.write_npy("negative.npy", 4, &[1, 2, 3, -4]);
    lab.write_npy("few.npy", 4, &[1, 2, 3, 4]);
    lab.write("cut.npy", &lab.read("large.npy")[..130]);
    let check =
        |calib: &str, words: &[&str]| lab.refuse(&format!("quantize {calib} tiny out.qbin"), words);
    check("--calib empty.txt", &["empty.txt", "empty", "hint"]);
    check(
        "--calib blank.txt --calib-windows 1 --calib-tokens 64",
        &["blank.txt", "hint"],
    );
    check(
        "--calib short.txt --calib-tokens 64",
        &["short.txt", "128", "64 tokens", "there are 3", "hint"],
    );
    check(
        "--calib nowhere.txt",
        &["nowhere.txt", "cannot be read", "No such file"],
    );
    check(
        "--calib binary.txt",
        &["binary.txt", "UTF-8", "byte 1", "hint"],
    );
    check(
        "--calib lines.jsonl --calib-windows 1",
        &["lines.jsonl:2", "`text`", "`body`", "hint"],
    );
    check(
        "--calib large.npy --calib-windows 2 --calib-tokens 4",
        &["large.npy", "4096", "window 1", "hint"],
    );
    check(
        "--calib negative.npy --calib-windows 1 --calib-tokens 4",
        &["negative.npy", "-4", "no token id"],
    );
    check(
        "--calib few.npy --calib-windows 128 --calib-tokens 4",
        &["few.npy", "128", "there are 1", "hint"],
    );
    check(
        "--calib few.npy --calib-windows 1 --calib-tokens 8",
        &["few.npy", "windows of 4 tokens", "8 tokens", "hint"],
    );
    check(
        "--calib cut.npy --calib-windows 2 --calib-tokens 4",
        &["cut.npy", "bytes after the header", "hint"],
    );
    check(
        "--calib few.npy --calib short.txt",
        &["few.npy", "short.txt", "hint"],
    );
    check("--calib builtin --calib short.txt", &["builtin", "alone"]);
    check(
        "--calib builtin --calib-tokens 2048",
        &["2048", "1024", "hint"],
    );
    check(
        "--calib builtin --calib-windows 100000",
        &["100000", "hint"],
    );

    lab.write("text.txt", "x");
    for source in ["self", "builtin", "text.txt"] {
        let args = format!("quantize --group-size 32 --calib {source} model out.qbin");
        lab.refuse(&args, &["tokenizer", "hint"]);
    }
}

#[test]
fn options_out_of_range_are_refused() {
    let lab = lab();
    let check = |options: &str, words: &[&str]| {
        lab.refuse(
            &format!("quantize --method rtn {options} model out.qbin"),
            words,
        );
        lab.refuse(&format!("plan --method rtn {options} model"), words);
    };
    check("--group-size 0", &["`0`", "32", "64", "128", "channel"]);
    check("--group-size 48", &["`48`", "32", "64", "128", "channel"]);
    check("--group-size -1", &["-1"]);
    check(
        "--group-size 64",
        &[
            "model.layers.0.self_attn.q_proj.weight",
            "`64`",
            "`48`",
            "hint",
        ],
    );
    check(
        "",
        &[
            "model.layers.0.self_attn.q_proj.weight",
            "`128`",
            "`48`",
            "hint",
        ],
    );
    check("--group-size 32 --bits 5", &["`5`", "`4`", "`8`"]);
    check(
        "--group-size 32 --symmetric --asymmetric",
        &["--symmetric", "--asymmetric"],
    );
    check("--group-size 32 --damp 0.1", &["--damp", "gptq", "rtn"]);
    check(
        "--group-size 32 --keep *.q_porj.*",
        &["*.q_porj.*", "matches no", "hint"],
    );
    check("--group-size 32 --keep [", &["`[`", "glob"]);
    check("--group-size 32 --threads 0", &["--threads", "0"]);
    lab.refuse(
        "quantize --method gptq --damp -1 --group-size 32 model out.qbin",
        &["-1"],
    );
    lab.refuse(
        "quantize --method gptq --damp nan --group-size 32 model out.qbin",
        &["damp", "NaN"],
    );
    lab.refuse(
        "quantize --calib-windows 0 model out.qbin",
        &["calib-windows", "`0`"],
    );
    lab.refuse(
        "quantize --method best model out.qbin",
        &["best", "rtn", "gptq", "awq"],
    );
    lab.refuse("run tiny --prompt x --temperature -1", &["-1"]);
    lab.refuse("run tiny --prompt x --top-p 2", &["2"]);
}

#[test]
fn recipes_that_cannot_be_meant_are_refused() {
    let lab = lab();
    let check = |recipe: &str, words: &[&str]| {
        lab.write("recipe.toml", recipe);
        let words: Vec<&str> = words.iter().chain(&["recipe"]).copied().collect();
        lab.refuse("quantize --recipe recipe.toml model out.qbin", &words);
        lab.refuse("plan --recipe recipe.toml model", &words);
    };
    check("[[pass]]\nmethod = \"rtn\"\nbitz = 4", &["bitz", "bits"]);
    check(
        "haed = \"keep\"\n[[pass]]\nmethod = \"rtn\"",
        &["haed", "head"],
    );
    check(
        "[[pass]]\nmethod = \"squeeze\"",
        &["squeeze", "awq", "magnitude"],
    );
    check("[[pass]]\nbits = 4", &["method", "rtn"]);
    check(
        "[[pass]]\nmethod = \"rtn\"\ngroup_size = 48",
        &["48", "channel"],
    );
    check(
        "[[pass]]\nmethod = \"magnitude\"\nsparsity = 0.5",
        &["grid", "rtn"],
    );
    check(
        "[[pass]]\nmethod = \"magnitude\"\nsparsity = \"4:2\"\n[[pass]]\nmethod = \"rtn\"",
        &["4:2", "2:4"],
    );
    check(
        "[[pass]]\nmethod = \"sparsegpt\"\njoint = true\nsparsity = 0.5\n[[pass]]\nmethod = \"rtn\"",
        &["joint", "gptq", "rtn"],
    );
    check("[[pass", &["TOML"]);
    // Valid as a recipe, but not for this model.
    lab.write("recipe.toml", "[[pass]]\nmethod = \"rtn\"\ngroup_size = 32\n[[pass.override]]\npattern = \"*.qkv.weight\"\nbits = 8");
    lab.refuse(
        "quantize --recipe recipe.toml model out.qbin",
        &["*.qkv.weight", "matches no", "hint"],
    );
    lab.write("recipe.toml", "[[pass]]\nmethod = \"magnitude\"\nsparsity = 0.5\ntargets = [\"*.qkv.*\"]\n[[pass]]\nmethod = \"rtn\"\ngroup_size = 32");
    lab.refuse(
        "quantize --recipe recipe.toml model out.qbin",
        &["*.qkv.*", "matches no", "hint"],
    );
    lab.refuse(
        "quantize --recipe nowhere.toml model out.qbin",
        &["nowhere.toml", "No such file"],
    );
    lab.refuse(
        "quantize --recipe recipe.toml --bits 8 model out.qbin",
        &["--recipe", "--bits"],
    );
}

#[test]
fn sparsities_that_cannot_be_are_refused() {
    let lab = lab();
    for sparsity in ["1", "-0.5", "half", "4:4", "4:2", "0:4", "2:"] {
        let words = [sparsity, "0.5", "2:4"];
        lab.refuse(
            &format!("quantize --sparsity={sparsity} model out.qbin"),
            &words,
        );
        lab.refuse(&format!("prune --sparsity={sparsity} model pruned"), &words);
    }
    let check = |options: &str, words: &[&str]| {
        lab.refuse(&format!("prune {options} model pruned"), words);
    };
    check("", &["--sparsity"]);
    check(
        "--sparsity 0.5 --layer *.q_proj.weight",
        &["--layer", "GLOB=SPARSITY"],
    );
    check("--sparsity 0.5 --layer *.q_proj.weight=2", &["`2`", "2:4"]);
    check(
        "--sparsity 0.5 --layer *.qkv.weight=0.3",
        &["*.qkv.weight", "matches no", "hint"],
    );
    check("--sparsity 0.5 --damp 0", &["damp"]);
    check(
        "--sparsity 0.5 --method wanda --refine 1",
        &["--refine", "sparsegpt", "wanda"],
    );
    // Runs of twelve columns do not fit into groups of 32.
    lab.refuse(
        "quantize --group-size 32 --sparsity 6:12 model out.qbin",
        &["model.layers.0", "6:12", "`32`", "whole runs"],
    );
}

#[test]
fn a_folder_that_is_there_is_not_pruned_into() {
    let lab = lab();
    let prune = "prune --method magnitude --sparsity 0.5 model pruned";
    lab.write("pruned/notes.txt", "mine");
    lab.refuse(prune, &["pruned", "exists"]);
    assert_eq!(lab.read("pruned/notes.txt"), b"mine");
    fs::remove_dir_all(lab.path("pruned")).expect("remove");
    lab.write("pruned.partial/notes.txt", "mine");
    lab.refuse(prune, &["pruned.partial", "exists", "hint"]);
    assert_eq!(lab.read("pruned.partial/notes.txt"), b"mine");
    fs::remove_dir_all(lab.path("pruned.partial")).expect("remove");
    // One that fails on the way leaves nothing.
    lab.refuse(
        "prune --sparsity 0.5 --calib nowhere.txt model pruned",
        &["nowhere.txt"],
    );
}

#[test]
fn outputs_that_cannot_be_written_are_refused() {
    let lab = lab();
    let to = |output: &str| format!("quantize --method rtn --group-size 32 model {output}");
    lab.refuse(
        &to("nowhere/out.qbin"),
        &["nowhere/out.qbin", "No such file"],
    );
    lab.refuse(
        &to("model/config.json/out.qbin"),
        &["model/config.json/out.qbin"],
    );
    // Not even root can make a file there.
    lab.refuse(&to("/proc/out.qbin"), &["/proc/out.qbin"]);
    lab.refuse(&to("model"), &["`model`", "folder"]);
    lab.refuse(&to("."), &["`.`"]);

    let weights = lab.read("model/model.safetensors");
    let config = lab.read("model/config.json");
    symlink("model/model.safetensors", lab.path("soft.qbin")).expect("link");
    fs::hard_link(lab.path("model/model.safetensors"), lab.path("hard.qbin")).expect("link");
    symlink("model", lab.path("way")).expect("link");
    for same in [
        "model/model.safetensors",
        "./model/../model/model.safetensors",
        "soft.qbin",
        "hard.qbin",
        "way/model.safetensors",
        "model/config.json",
    ] {
        lab.refuse(&to(same), &["same file as the input", same, "hint"]);
    }
    lab.refuse(
        "quantize --method rtn --group-size 32 model/model.safetensors hard.qbin",
        &["same file as the input", "hint"],
    );
    assert!(
        lab.read("model/model.safetensors") == weights && lab.read("model/config.json") == config
    );
}

#[test]
fn a_full_disk_is_noticed_before_the_work() {
    let lab = lab();
    // No file may grow beyond some kilobytes. The signal that would end the program is ignored, and it gets an error.
    let outcome = lab.run_in_shell(r#"trap "" XFSZ; ulimit -f 64; exec "$@""#, RTN);
    outcome.assert_refused(RTN, &["out.qbin", "File too large"]);
    assert!(
        !lab.names().iter().any(|name| name.starts_with("out.qbin")),
        "{:?}",
        lab.names()
    );

    // A file system of 256 KiB, where this user may mount one; the artifact takes more.
    let script = r#"unshare -rm sh -c 'mkdir full && mount -t tmpfs -o size=256k tmpfs full' || exit 77
        exec unshare -rm sh -c 'mount -t tmpfs -o size=256k tmpfs full && "$@"; status=$?; ls -A full >&2; exit $status' sh "$@""#;
    let outcome = lab.run_in_shell(
        script,
        "quantize --method rtn --group-size 32 model full/out.qbin",
    );
    if outcome.status != Some(77) {
        outcome.assert_refused(
            "on a full file system",
            &["full/out.qbin", "262144 free", "hint"],
        );
        assert!(!outcome.stderr.contains("partial"), "{}", outcome.stderr);
    }
    // Results that cannot be printed.
    let outcome = lab.run_in_shell(r#"exec "$@" > /dev/full"#, "plan --group-size 32 model");
    outcome.assert_refused("to a full device", &["stdout", "No space left"]);
}

#[test]
fn what_a_crash_left_behind_is_taken_over() {
    let lab = lab();
    lab.write("out.qbin.partial", vec![7; 5_000_000]);
    lab.succeed(RTN);
    assert!(lab.succeed("verify out.qbin").starts_with("ok"));
    assert!(!lab.names().contains(&"out.qbin.partial".to_string()));
}

#[test]
fn texts_that_cannot_be_scored_are_refused() {
    let lab = lab();
    lab.write("short.txt", "Only a few words.");
    lab.write("text.txt", "The tide comes in twice a day. ".repeat(40));
    lab.write("empty.txt", "");
    lab.write("binary.txt", [0x80]);
    for model in ["perplexity tiny", "compare tiny tiny"] {
        let check =
            |options: &str, words: &[&str]| lab.refuse(&format!("eval {model} {options}"), words);
        check("--data short.txt", &["2048", "1024", "context"]);
        check(
            "--data short.txt --protocol gptq-512",
            &["gptq-512", "512", "tokens"],
        );
        check("--data empty.txt --protocol gptq-64", &["0 tokens", "64"]);
        check(
            "--data text.txt --protocol gptq-64 --windows 1000",
            &["1000", "gptq-64", "holds"],
        );
        check(
            "--data text.txt --protocol llamacpp-1024",
            &["llamacpp-1024", "2048"],
        );
        check(
            "--data text.txt --protocol wikitext",
            &["wikitext", "gptq-N"],
        );
        check("--data text.txt --protocol gptq-0", &["gptq-0", "gptq-N"]);
        check(
            "--data nowhere.txt --protocol gptq-64",
            &["nowhere.txt", "No such file"],
        );
        check(
            "--data binary.txt --protocol gptq-64",
            &["binary.txt", "UTF-8", "byte 0"],
        );
    }
    copy_folder(&lab.path("tiny"), &lab.path("deaf"));
    fs::remove_file(lab.path("deaf/tokenizer.json")).expect("remove");
    lab.refuse(
        "eval perplexity deaf --data text.txt",
        &["tokenizer.json", "`deaf`", "hint"],
    );
    lab.refuse("run deaf --prompt x", &["tokenizer.json", "`deaf`", "hint"]);
    lab.refuse("run tiny --prompt x --chat", &["chat template", "hint"]);
    RawCheckpoint::random(1).write(&lab.path("other"));
    lab.refuse(
        "eval compare tiny other --data text.txt --protocol gptq-64",
        &["4096", "4099"],
    );
}
