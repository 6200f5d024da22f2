//! An artifact in which a bit has flipped: `verify` says where.

use qbin_format::{FormatError, Model};
use qbin_tests::checkpoint::{RawCheckpoint, split};
use qbin_tests::run::Lab;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

/// A lab with an artifact of the random checkpoint, its bytes, and where its data starts.
fn lab() -> (Lab, Vec<u8>, usize) {
    let lab = Lab::new(env!("CARGO_BIN_EXE_qbin-under-test"));
    RawCheckpoint::random(1).write(&lab.path("model"));
    lab.write("model/tokenizer.json", lab.read("tiny/tokenizer.json"));
    lab.succeed("quantize --method rtn --group-size 32 --head int4 model out.qbin");
    let bytes = lab.read("out.qbin");
    let header_bytes = u64::from_le_bytes(*bytes.first_chunk().expect("a length")) as usize;
    (lab, bytes, 8 + header_bytes)
}

/// Writes `bytes` as `bad.qbin` with one bit flipped.
fn write_flipped(lab: &Lab, bytes: &[u8], at: usize) {
    let mut bytes = bytes.to_vec();
    bytes[at] ^= 0x10;
    lab.write("bad.qbin", bytes);
}

/// Calls `check` with `bad.qbin` having a bit of each of the bytes `at` flipped in turn.
fn for_each_flipped(
    lab: &Lab,
    bytes: &[u8],
    at: impl Iterator<Item = usize>,
    check: impl Fn(usize, Result<Model, FormatError>),
) {
    lab.write("bad.qbin", bytes);
    let path = lab.path("bad.qbin");
    let file = File::options().write(true).open(&path).expect("open");
    for at in at {
        file.write_all_at(&[bytes[at] ^ 0x10], at as u64)
            .expect("write");
        check(at, Model::open(&path));
        file.write_all_at(&bytes[at..=at], at as u64)
            .expect("write");
    }
}

#[test]
fn a_flipped_bit_is_found_in_every_part() {
    let (lab, bytes, data_start) = lab();
    let (header, _) = split(&bytes);
    let mut kinds = [0; 3];
    for (part, tensor) in header
        .as_object()
        .expect("an object")
        .iter()
        .filter(|(name, _)| *name != "__metadata__")
    {
        let offset = |at: usize| tensor["data_offsets"][at].as_u64().expect("an offset") as usize;
        if offset(0) == offset(1) {
            continue;
        }
        write_flipped(&lab, &bytes, data_start + (offset(0) + offset(1)) / 2);
        let outcome = lab.run("verify bad.qbin");
        assert_eq!(outcome.status, Some(1), "{part}: {}", outcome.stderr);
        assert!(
            !outcome.stderr.contains("panicked") && outcome.stderr.contains("hint"),
            "{}",
            outcome.stderr
        );
        // Parts of a tensor are stored under its name and an ending; files and gaps under names of their own.
        let tensor = [".codes", ".scales", ".zero_points"]
            .iter()
            .find_map(|ending| part.strip_suffix(ending));
        let named = tensor.unwrap_or(part.strip_prefix("qbin.file/").unwrap_or(part));
        assert!(outcome.stderr.contains(named), "{part}: {}", outcome.stderr);
        kinds[usize::from(tensor.is_some()) + 2 * usize::from(part.starts_with("qbin."))] += 1;
        let json = lab.run("verify bad.qbin --json");
        let verified: serde_json::Value = serde_json::from_str(&json.stdout).expect("JSON");
        assert!(
            json.status == Some(1) && verified["ok"] == false && verified["error"].is_string(),
            "{verified}"
        );
    }
    // Kept tensors, parts of quantized ones, files.
    assert!(kinds.iter().all(|&count| count > 1), "{kinds:?}");
}

/// Every command that opens `bad.qbin` refuses it, and says `word`.
fn refused(lab: &Lab, what: &str, word: &str) {
    for command in [
        "verify bad.qbin",
        "inspect bad.qbin",
        "run bad.qbin --prompt x",
    ] {
        let outcome = lab.run(command);
        let text = &outcome.stderr;
        assert_eq!(outcome.status, Some(2), "{what}, `{command}`: {text}");
        assert!(
            text.starts_with("error: ") && text.contains(word),
            "{what}, `{command}`: {text}"
        );
    }
}

#[test]
fn a_flipped_bit_of_the_header_is_refused() {
    let (lab, bytes, data_start) = lab();
    let check = |at: usize| {
        write_flipped(&lab, &bytes, at);
        refused(&lab, &format!("byte {at}"), "bad.qbin");
    };
    (0..8)
        .chain((8..data_start).step_by(data_start / 12))
        .for_each(check);

    // Many more of them, without starting a program for each.
    for_each_flipped(&lab, &bytes, (8..data_start).step_by(17), |at, opened| {
        // The manifest may have lost its name; what is left is not taken for an artifact.
        assert!(
            !matches!(opened, Ok(Model::Artifact(_))),
            "byte {at} flipped, and nobody noticed"
        );
    });
}

#[test]
fn a_flipped_bit_anywhere_in_the_data_is_found() {
    let (lab, bytes, data_start) = lab();
    let step = (bytes.len() - data_start) / 150;
    for_each_flipped(
        &lab,
        &bytes,
        (data_start..bytes.len()).step_by(step),
        |at, opened| {
            let Ok(Model::Artifact(artifact)) = opened else {
                panic!("byte {at}: its header is whole")
            };
            assert!(
                artifact.verify(&mut |_| {}).is_err(),
                "byte {at} flipped, and nobody noticed"
            );
        },
    );
}

#[test]
fn a_cut_artifact_is_refused() {
    let (lab, bytes, data_start) = lab();
    for len in [
        0,
        7,
        100,
        data_start - 1,
        data_start,
        bytes.len() / 2,
        bytes.len() - 1,
    ] {
        lab.write("bad.qbin", &bytes[..len]);
        refused(&lab, &format!("{len} bytes"), "hint: ");
    }
}
