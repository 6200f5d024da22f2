//! Damaged artifacts, and artifacts whose manifest does not fit what is stored.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use qbin_format::{Artifact, FormatError, Model, sha256_hex};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{Small, check_words, raw_file, small, small_and_sparse};

/// A small artifact with a header no longer than necessary.
fn artifact() -> (TempDir, PathBuf) {
    artifact_of(&small())
}

fn artifact_of(small: &Small) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("m.qbin");
    let mut writer = small.writer(&path, 10);
    small.fill(&mut writer).expect("write");
    writer.finish(small.manifest.clone()).expect("finish");
    (folder, path)
}

fn open_and_verify(path: &Path) -> Result<(), FormatError> {
    match Model::open(path)? {
        Model::Artifact(artifact) => artifact.verify(&mut |_| ()),
        Model::Checkpoint(checkpoint) => {
            let path = checkpoint
                .input_paths()
                .next()
                .expect("one file")
                .to_owned();
            Err(FormatError::NotAnArtifact { path })
        }
    }
}

#[test]
fn a_flipped_bit_is_found_wherever_it_is() {
    let (_folder, path) = artifact_of(&small_and_sparse());
    open_and_verify(&path).expect("whole");
    let bytes = fs::read(&path).expect("read");
    let file = fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("open");
    for (at, &byte) in bytes.iter().enumerate() {
        // One bit of each byte, a different one each time; all of them in the length field.
        let bits = if at < 8 { 0..8 } else { at % 7..at % 7 + 1 };
        for bit in bits {
            file.write_all_at(&[byte ^ 1 << bit], at as u64)
                .expect("write");
            open_and_verify(&path).expect_err(&format!("byte {at}, bit {bit}"));
        }
        file.write_all_at(&[byte], at as u64).expect("write");
    }
    open_and_verify(&path).expect("whole again");
}

#[test]
fn a_cut_artifact_is_refused() {
    let (_folder, path) = artifact();
    let bytes = fs::read(&path).expect("read");
    let file = fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("open");
    for len in (0..bytes.len()).rev().step_by(61) {
        file.set_len(len as u64).expect("cut");
        open_and_verify(&path).expect_err("cut");
    }
}

#[test]
fn a_wrong_digest_names_tensor_and_digests() {
    let (_folder, path) = artifact();
    let expected = Artifact::open(&path).expect("open").manifest().tensors["norm.weight"]
        .sha256
        .clone();
    let mut bytes = fs::read(&path).expect("read");
    let at = bytes
        .windows(10)
        .position(|w| w == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
        .expect("the tensor");
    bytes[at] = 9;
    fs::write(&path, bytes).expect("write");
    let error = open_and_verify(&path).expect_err("damaged");
    let got = sha256_hex(&[9, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    check_words(
        &error,
        &["m.qbin", "`norm.weight`", &expected, &got, "quantize again"],
    );
}

/// Rewrites the artifact with changed header entries, metadata and data, and returns the error.
///
/// The manifest's digest is made right again after `edit`, so that what is tested is what lies behind it.
fn error_after(
    edit_manifest: impl Fn(&mut Value),
    edit_header: impl Fn(&mut serde_json::Map<String, Value>),
    edit_data: impl Fn(&BTreeMap<String, (usize, usize)>, &mut Vec<u8>),
) -> FormatError {
    error_after_in(&small(), edit_manifest, edit_header, edit_data)
}

fn error_after_in(
    small: &Small,
    edit_manifest: impl Fn(&mut Value),
    edit_header: impl Fn(&mut serde_json::Map<String, Value>),
    edit_data: impl Fn(&BTreeMap<String, (usize, usize)>, &mut Vec<u8>),
) -> FormatError {
    let (_folder, path) = artifact_of(small);
    let bytes = fs::read(&path).expect("read");
    let n = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let mut header: serde_json::Map<String, Value> =
        serde_json::from_slice(&bytes[8..8 + n]).expect("json");
    let mut data = bytes[8 + n..].to_vec();

    let mut ranges = BTreeMap::new();
    for (name, tensor) in &header {
        if let [from, to] = ["/data_offsets/0", "/data_offsets/1"]
            .map(|p| tensor.pointer(p).and_then(Value::as_u64))
            && let (Some(from), Some(to)) = (from, to)
        {
            ranges.insert(name.clone(), (from as usize, to as usize));
        }
    }
    edit_data(&ranges, &mut data);
    let manifest = header["__metadata__"]["qbin"].as_str().expect("text");
    let mut manifest: Value = serde_json::from_str(manifest).expect("json");
    edit_manifest(&mut manifest);
    // A test of what a digest cannot find gives the changed tensor its right digest.
    for (name, _) in &small.matrices {
        let parts = ["codes", "masks", "offsets", "scales", "zero_points"];
        let stored = parts.map(|part| ranges.get(&format!("{name}.{part}")));
        let digests = stored.into_iter().flatten().flat_map(|&(from, to)| {
            let hex = sha256_hex(&data[from..to]);
            (0..32).map(move |i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).expect("hex"))
        });
        manifest["tensors"][name]["sha256"] = json!(sha256_hex(&digests.collect::<Vec<u8>>()));
    }
    let text = manifest.to_string();
    header.insert(
        "__metadata__".to_owned(),
        json!({"qbin": text, "qbin.sha256": sha256_hex(text.as_bytes())}),
    );
    edit_header(&mut header);
    let mut text = Value::Object(header).to_string();
    text += &" ".repeat((8 + text.len()).next_multiple_of(4096) - 8 - text.len());
    fs::write(&path, raw_file(&text, &data)).expect("write");
    open_and_verify(&path).expect_err("should be refused")
}

#[test]
fn the_helper_alone_changes_nothing() {
    // Only the last edit does, by cutting the file.
    let error = error_after(|_| (), |_| (), |_, data| data.truncate(data.len() - 1));
    assert!(
        matches!(error, FormatError::OffsetsOutOfRange { .. }),
        "{error}"
    );
}

#[test]
fn a_manifest_that_does_not_fit_is_refused() {
    type Edit = fn(&mut Value);
    let cases: [(Edit, &[&str]); 16] = [
        (
            |m| m["format_version"] = json!(2),
            &["version 2", "reads 1", "newer release"],
        ),
        (
            |m| m["required_features"] = json!(["rotation"]),
            &["`rotation`", "newer release"],
        ),
        (
            |m| m["files"] = json!(3),
            &["manifest cannot be read", "integer `3`"],
        ),
        (
            |m| m["tensors"]["a.weight"]["fate"]["kind"] = json!("melted"),
            &["`a.weight`", "melted"],
        ),
        (
            |m| m["tensors"]["a.weight"]["fate"]["encoding"] = json!("int8.t16x64"),
            &["`a.weight`", "`int4.t16x64`", "`int8.t16x64`"],
        ),
        (
            |m| m["tensors"]["a.weight"]["fate"]["bits"] = json!(5),
            &["`a.weight`", "encoding"],
        ),
        (
            |m| m["tensors"]["a.weight"]["fate"]["scale_dtype"] = json!("F32"),
            &["`a.weight`", "F16", "F32"],
        ),
        (
            |m| m["tensors"]["a.weight"]["fate"]["group_size"] = json!(0),
            &["`a.weight`", "at least 1"],
        ),
        (
            |m| m["tensors"]["a.weight"]["fate"]["group_size"] = json!(16),
            &["`a.weight.scales`", "[2, 5, 16]", "[2, 3, 16]"],
        ),
        (
            |m| m["tensors"]["a.weight"]["shape"] = json!([31, 70, 1]),
            &["`a.weight`", "two dimensions"],
        ),
        (
            |m| m["tensors"]["a.weight"]["shape"] = json!([u64::MAX, 70]),
            &["`a.weight`", "larger than any file"],
        ),
        (
            |m| m["tensors"]["norm.weight"]["shape"] = json!([4]),
            &["`norm.weight`", "BF16 [4]", "BF16 [5]"],
        ),
        (
            |m| m["tensors"]["tied.weight"]["shape"] = json!([16, 70]),
            &["`tied.weight`", "`a.weight`", "same shape"],
        ),
        (
            |m| m["tensors"]["tied.weight"]["fate"]["of"] = json!("inv_freq"),
            &["`tied.weight`", "`inv_freq`", "stored"],
        ),
        (
            |m| m["files"]["tokenizer.json"]["bytes"] = json!(u64::MAX),
            &["`qbin.file/tokenizer.json`", "U8 [8]"],
        ),
        (
            |m| m["tensors"]["ids"]["fate"] = json!({"kind": "dropped", "reason": ""}),
            &["`ids`", "does not list"],
        ),
    ];
    for (edit, words) in cases {
        let error = error_after(edit, |_| (), |_, _| ());
        check_words(&error, &["m.qbin"]);
        check_words(&error, words);
    }
}

#[test]
fn a_header_that_does_not_fit_is_refused() {
    type Edit = fn(&mut serde_json::Map<String, Value>);
    let rename = |from: &'static str, to: &'static str| {
        move |header: &mut serde_json::Map<String, Value>| {
            let tensor = header.remove(from).expect("there");
            header.insert(to.to_owned(), tensor);
        }
    };
    let error = error_after(|_| (), rename("norm.weight", "norm"), |_, _| ());
    check_words(&error, &["`norm.weight`", "BF16 [5]", "nothing"]);
    let error = error_after(|_| (), rename("qbin.pad.0", "qbin.pad.9"), |_, _| ());
    check_words(&error, &["qbin.pad.", "does not list"]);
    let cases: [(Edit, &[&str]); 3] = [
        (
            |h| h["__metadata__"]["qbin.sha256"] = json!("00"),
            &["manifest's digest", "`00`"],
        ),
        (
            |h| h["__metadata__"] = json!({"qbin": "{}"}),
            &["manifest's digest"],
        ),
        (
            |h| h["norm.weight"]["dtype"] = json!("F16"),
            &["`norm.weight`", "BF16 [5]", "F16 [5]"],
        ),
    ];
    for (edit, words) in cases {
        check_words(&error_after(|_| (), edit, |_, _| ()), words);
    }
}

#[test]
fn misplaced_data_is_refused() {
    // The header text loses its padding.
    let (_folder, path) = artifact();
    let bytes = fs::read(&path).expect("read");
    let n = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let text = std::str::from_utf8(&bytes[8..8 + n])
        .expect("text")
        .trim_end();
    fs::write(&path, raw_file(text, &bytes[8 + n..])).expect("write");
    let error = open_and_verify(&path).expect_err("misaligned");
    check_words(&error, &["the data", "no multiple of 4096"]);
}

#[test]
fn unused_places_with_other_values_are_found() {
    type Edit = fn(&BTreeMap<String, (usize, usize)>, &mut Vec<u8>);
    // `a.weight` is [31, 70] with 3 groups: columns 70.. of the second tile of row 0 are padding, and so
    // is row 15 of the second panel.
    let cases: [(Edit, &[&str]); 6] = [
        (
            |r, d| d[r["a.weight.codes"].0 + 512 + 64 * 7] ^= 0x10,
            &["`a.weight.codes, row 0`", "element 124"],
        ),
        (
            |r, d| d[r["a.weight.codes"].0 + 1024 + 60] ^= 0x01,
            &["`a.weight.codes, row 31`", "element 0", "0x9", "0x8"],
        ),
        (
            |r, d| d[r["a.weight.scales"].1 - 2] = 1,
            &["`a.weight.scales`", "element 95"],
        ),
        (
            |r, d| d[r["a.weight.zero_points"].1 - 1] = 0,
            &["`a.weight.zero_points`", "element 95", "0x8"],
        ),
        (
            |r, d| d[r["a.weight.zero_points"].0] = 16,
            &["`a.weight.zero_points`", "0x10", "0xf"],
        ),
        (
            |r, d| d[r["b.weight.scales"].0..][..2].copy_from_slice(&[0, 0x7c]),
            &["`b.weight`", "row 0", "inf", "finite"],
        ),
    ];
    for (edit, words) in cases {
        check_words(&error_after(|_| (), |_| (), edit), words);
    }
    let pad: Edit = |r, d| d[r["qbin.pad.0"].0] = 1;
    check_words(
        &error_after(|_| (), |_| (), pad),
        &["`qbin.pad.0`", "0x1", "0x0"],
    );
}

#[test]
fn sparse_codes_that_do_not_fit_are_refused() {
    type Edit = fn(&BTreeMap<String, (usize, usize)>, &mut Vec<u8>);
    fn put(data: &mut [u8], at: usize, value: u64) {
        data[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    // `c.weight` is a bitmask of two panels, `d.weight` two of four in a block and a half.
    let refused_on_opening: [(Edit, &[&str]); 5] = [
        (
            |r, d| put(d, r["c.weight.offsets"].0, 1),
            &["panel 0", "is 1, expected 0..=0"],
        ),
        (
            |r, d| put(d, r["c.weight.offsets"].0 + 8, u64::MAX),
            &["panel 1", "is 18446744073709551615, expected 0..=1024"],
        ),
        (
            |r, d| put(d, r["c.weight.offsets"].0 + 16, 0),
            &["panel 2", "is 0"],
        ),
        (
            |r, d| {
                let at = r["c.weight.offsets"].0 + 16;
                d[at] += 1;
            },
            &["panel 2", "512 bytes before the end"],
        ),
        (
            |r, d| {
                let at = r["c.weight.offsets"].0 + 16;
                d[at] -= 1;
            },
            &["panel 2", "512 bytes before the end"],
        ),
    ];
    for (edit, words) in refused_on_opening {
        let error = error_after_in(&small_and_sparse(), |_| (), |_| (), edit);
        assert!(matches!(error, FormatError::Offsets { .. }), "{error}");
        check_words(
            &error,
            &["m.qbin", "`c.weight.offsets`", "copy or download"],
        );
        check_words(&error, words);
    }

    let found_by_verify: [(Edit, &str, usize); 6] = [
        // More codes than the panel has, in an even quad and an odd one, and fewer.
        (
            |r, d| d[r["c.weight.masks"].0..][..16].fill(0xff),
            "c.weight",
            0,
        ),
        (
            |r, d| d[r["c.weight.masks"].0 + 256..][..16].fill(0),
            "c.weight",
            1,
        ),
        // A stored zero.
        (|r, d| d[r["c.weight.codes"].0] = 0x88, "c.weight", 0),
        // A panel that begins one byte late.
        (|r, d| d[r["c.weight.offsets"].0 + 8] ^= 1, "c.weight", 0),
        // Columns out of order.
        (
            |r, d| {
                let byte = &mut d[r["d.weight.codes"].0];
                *byte = *byte & !7 | 3;
            },
            "d.weight",
            0,
        ),
        // A code of a tile that is not there.
        (|r, d| d[r["d.weight.codes"].1 - 1] = 1, "d.weight", 0),
    ];
    for (edit, name, panel) in found_by_verify {
        let error = error_after_in(&small_and_sparse(), |_| (), |_| (), edit);
        assert!(matches!(error, FormatError::Sparse { .. }), "{error}");
        check_words(
            &error,
            &[&format!("panel {panel} in `{name}`"), "copy or download"],
        );
    }

    let tail: Edit = |r, d| d[r["c.weight.codes"].1 - 1] = 1;
    let error = error_after_in(&small_and_sparse(), |_| (), |_| (), tail);
    check_words(&error, &["`c.weight.codes`", "0x1", "0x0"]);
}

#[test]
fn a_sparse_manifest_that_does_not_fit_is_refused() {
    type Edit = fn(&mut Value);
    let cases: [(Edit, &[&str]); 4] = [
        (
            |m| m["required_features"] = json!(["sparse.2of4"]),
            &[
                "`c.weight`",
                "`sparse.bitmask` among the required",
                "sparse.2of4",
            ],
        ),
        (
            |m| m["tensors"]["c.weight"]["fate"]["encoding"] = json!("int4.t16x64.2of4"),
            &["`c.weight.codes`", "[2, 1, 704]"],
        ),
        (
            |m| m["tensors"]["d.weight"]["fate"]["encoding"] = json!("int8.t16x64"),
            &["`d.weight.codes`", "[1, 3, 1024]"],
        ),
        (
            |m| m["tensors"]["c.weight"]["shape"] = json!([48, 128]),
            &["`c.weight.masks`", "[3, 2, 128]"],
        ),
    ];
    for (edit, words) in cases {
        let error = error_after_in(&small_and_sparse(), edit, |_| (), |_, _| ());
        check_words(&error, words);
    }
}

#[test]
fn a_plain_safetensors_file_is_no_artifact() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("m.qbin");
    fs::write(&path, raw_file("{}", &[])).expect("write");
    let error = Artifact::open(&path).expect_err("plain");
    check_words(&error, &["m.qbin", "without a `qbin` manifest"]);
}
