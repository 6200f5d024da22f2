//! What is written is what is read, whatever the order of writing.

use std::fs;
use std::path::Path;

use qbin_format::{
    Artifact, ArtifactWriter, Checkpoint, Dtype, Fate, Manifest, Model, Planned, QuantizedMatrix,
    Weight, artifact_layout, sha256_hex,
};

use crate::common::{Small, check_words, entry, random_matrix, scheme, small};

fn check_contents(path: &Path, small: &Small) {
    let artifact = Artifact::open(path).expect("open");
    artifact.verify(&mut |_| ()).expect("verify");
    for (name, matrix) in &small.matrices {
        let view = artifact.quantized(name).expect("quantized");
        assert_eq!(view.unpack(), *matrix);
        assert!(artifact.tensor(name).is_none());
        for slice in [view.codes, view.scales] {
            assert_eq!(slice.as_ptr().align_offset(64), 0, "{name}");
        }
    }
    for (name, dtype, shape, bytes) in &small.dense {
        let tensor = artifact.tensor(name).expect("kept");
        assert_eq!((tensor.name, tensor.dtype), (*name, *dtype));
        assert_eq!((tensor.shape, tensor.bytes), (&shape[..], &bytes[..]));
        assert!(artifact.quantized(name).is_none());
        artifact.release(name);
        assert_eq!(tensor.bytes, bytes);
    }
    for (name, bytes) in &small.files {
        assert_eq!(artifact.file(name), Some(&bytes[..]));
    }
    let config = artifact.file("config.json").expect("config");
    let config: serde_json::Value = serde_json::from_slice(config).expect("json");
    assert_eq!(config, small.manifest.config);
}

#[test]
fn what_was_written_is_read() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("m.qbin");
    let small = small();
    let written = small.write(&path).expect("write");
    let bytes = fs::read(&path).expect("read");
    assert_eq!(written.bytes, bytes.len() as u64);
    assert_eq!(written.sha256, sha256_hex(&bytes));
    check_contents(&path, &small);

    let layout = artifact_layout(&small.planned(), small.manifest.planned_bytes()).expect("plan");
    assert_eq!(layout.total_bytes, written.bytes);
    let entries: Vec<(&str, u64)> = layout
        .entries
        .iter()
        .map(|e| (e.name.as_str(), e.bytes))
        .collect();
    // 2 panels of 2 tiles of 512 bytes, 3 groups of 16 scales and zero points in each panel.
    assert_eq!(entries[0], ("a.weight", 2 * (2 * 512 + 3 * 16 * 3)));
    assert_eq!(entries[1], ("b.weight", 1024 + 16 * 2));
    assert_eq!(entries[2], ("norm.weight", 10));
}

#[test]
fn a_model_hides_whether_it_is_quantized_and_follows_aliases() {
    let folder = tempfile::tempdir().expect("temp folder");
    // The name says nothing: an artifact is known by its manifest.
    let path = folder.path().join("m.safetensors");
    let small = small();
    small.write(&path).expect("write");
    let model = Model::open(&path).expect("open");
    assert!(matches!(model, Model::Artifact(_)));
    let names: Vec<&str> = model.names().collect();
    assert_eq!(
        names,
        ["a.weight", "b.weight", "ids", "norm.weight", "tied.weight"]
    );
    assert!(model.weight("inv_freq").is_none());

    let weight = model.weight("tied.weight").expect("alias");
    assert!(matches!(weight, Weight::Quantized(_)));
    assert_eq!(weight.shape(), [31, 70]);
    let mut rows = vec![f32::NAN; 3 * 70];
    weight.read_rows_f32(14..17, &mut rows);
    assert_eq!(rows, small.matrices[0].1.dequantize()[14 * 70..17 * 70]);
    model.release("tied.weight");

    let norm = model.weight("norm.weight").expect("kept");
    let mut rows = [f32::NAN; 2];
    norm.read_rows_f32(3..5, &mut rows);
    let bf16 = |low: u8, high: u8| half::bf16::from_le_bytes([low, high]).to_f32();
    assert_eq!(rows, [bf16(6, 7), bf16(8, 9)]);

    let error = Checkpoint::open(&path).expect_err("an artifact is no checkpoint");
    check_words(&error, &["m.safetensors", "artifact already", "checkpoint"]);
}

#[test]
fn the_safetensors_crate_reads_an_artifact() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("m.qbin");
    let small = small();
    small.write(&path).expect("write");
    let bytes = fs::read(&path).expect("read");
    let oracle = safetensors::SafeTensors::deserialize(&bytes).expect("a valid safetensors file");
    let artifact = Artifact::open(&path).expect("open");
    for (name, dtype, shape, bytes) in &small.dense {
        let tensor = oracle.tensor(name).expect("kept");
        assert_eq!(tensor.dtype().to_string(), dtype.name());
        assert_eq!((tensor.shape(), tensor.data()), (&shape[..], &bytes[..]));
    }
    for (name, _) in &small.matrices {
        let view = artifact.quantized(name).expect("quantized");
        let data = |part: &str| {
            oracle
                .tensor(&format!("{name}.{part}"))
                .map(|t| t.data().to_vec())
        };
        assert_eq!(data("codes").expect("codes"), view.codes);
        assert_eq!(data("scales").expect("scales"), view.scales);
        assert_eq!(data("zero_points").is_ok(), !view.scheme.symmetric);
    }
}

#[test]
fn the_bytes_do_not_depend_on_the_order_of_writing() {
    let folder = tempfile::tempdir().expect("temp folder");
    let small = small();
    let (one, two) = (folder.path().join("1.qbin"), folder.path().join("2.qbin"));
    small.write(&one).expect("write");

    let mut writer = small.writer(&two, small.manifest.planned_bytes());
    for (name, bytes) in &small.files {
        writer.write_file(name, bytes).expect("write");
    }
    for (name, dtype, shape, bytes) in small.dense.iter().rev() {
        writer
            .write_dense(name, *dtype, shape, bytes)
            .expect("write");
    }
    let (b, a) = (&small.matrices[1], &small.matrices[0]);
    writer.write_quantized(b.0, &b.1).expect("write");
    for rows in [0..16, 16..31] {
        writer
            .write_quantized_rows(a.0, rows.start, &rows_of(&a.1, rows))
            .expect("write");
    }
    let mut manifest = small.manifest.clone();
    // The order of keys in config.json is no property of the model.
    manifest.config = serde_json::json!({"hidden_size": 64, "model_type": "llama"});
    manifest
        .files
        .insert("stale".to_owned(), Default::default());
    writer.finish(manifest).expect("finish");
    assert!(fs::read(&one).expect("read") == fs::read(&two).expect("read"));
}

pub(crate) fn rows_of(m: &QuantizedMatrix, rows: std::ops::Range<usize>) -> QuantizedMatrix {
    let groups = m.scheme.groups(m.cols);
    let grouped = rows.start * groups..rows.end * groups;
    QuantizedMatrix {
        scheme: m.scheme,
        rows: rows.len(),
        cols: m.cols,
        codes: m.codes[rows.start * m.cols..rows.end * m.cols].to_vec(),
        scales: m.scales[grouped.clone()].to_vec(),
        zero_points: m.zero_points.get(grouped).unwrap_or(&[]).to_vec(),
    }
}

/// A matrix of more weights than are packed at a time, in two pieces.
#[test]
fn a_large_matrix_is_written_in_pieces() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("m.qbin");
    let matrix = random_matrix(scheme(4, Some(128), false), 1500, 1000, 3);
    let planned = vec![Planned::Quantized {
        name: "w".to_owned(),
        scheme: matrix.scheme,
        rows: matrix.rows,
        cols: matrix.cols,
    }];
    let mut manifest = Manifest::default();
    let fate = Fate::quantized(matrix.scheme, "rtn");
    manifest
        .tensors
        .insert("w".to_owned(), entry(fate, &[1500, 1000]));
    let mut writer =
        ArtifactWriter::create(&path, planned, manifest.planned_bytes()).expect("create");
    for rows in [0..1280, 1280..1500] {
        let part = rows_of(&matrix, rows.clone());
        writer
            .write_quantized_rows("w", rows.start, &part)
            .expect("write");
    }
    writer.finish(manifest).expect("finish");
    let artifact = Artifact::open(&path).expect("open");
    assert_eq!(artifact.quantized("w").expect("quantized").unpack(), matrix);
}

#[test]
fn a_manifest_longer_than_planned_moves_the_data() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("m.qbin");
    let mut small = small();
    // More data than is moved at a time.
    let big: Vec<u8> = (0..3_000_000u32).map(|i| (i % 253) as u8).collect();
    small.files.push(("notes", big));
    let mut writer = small.writer(&path, 10);
    small.fill(&mut writer).expect("write");
    small.manifest.recipe = serde_json::json!("x".repeat(9000));
    let written = writer.finish(small.manifest.clone()).expect("finish");
    check_contents(&path, &small);
    assert_eq!(written.bytes, fs::metadata(&path).expect("metadata").len());
}

#[test]
fn verify_reports_every_byte_of_tensors_and_files() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("m.qbin");
    let small = small();
    small.write(&path).expect("write");
    let mut seen = 0;
    let artifact = Artifact::open(&path).expect("open");
    artifact.verify(&mut |bytes| seen += bytes).expect("verify");
    let layout = artifact_layout(&small.planned(), 0).expect("plan");
    assert_eq!(
        seen,
        layout.entries.iter().map(|entry| entry.bytes).sum::<u64>()
    );
}

#[test]
fn names_and_sizes_that_cannot_be_stored_are_refused() {
    let dense = |name: &str, shape: &[usize]| Planned::Dense {
        name: name.to_owned(),
        dtype: Dtype::F32,
        shape: shape.to_vec(),
    };
    let quantized = |bits, group_size, rows, cols| Planned::Quantized {
        name: "w".to_owned(),
        scheme: scheme(bits, group_size, true),
        rows,
        cols,
    };
    let cases = [
        (vec![dense("qbin.x", &[1])], "reserved"),
        (vec![dense("__metadata__", &[1])], "reserved"),
        (vec![dense("a", &[1]), dense("a", &[2])], "twice"),
        (
            vec![dense("w.codes", &[1]), quantized(4, None, 1, 1)],
            "twice",
        ),
        (vec![dense("a", &[usize::MAX, 2])], "larger than any file"),
        (vec![dense("a", &[1 << 61])], "larger than any file"),
        (
            vec![quantized(4, None, usize::MAX, 1)],
            "larger than any file",
        ),
        (
            vec![quantized(4, None, 1 << 40, 1 << 40)],
            "larger than any file",
        ),
        (vec![quantized(3, None, 1, 1)], "bits are 4 or 8"),
        (
            vec![quantized(4, Some(0), 1, 1)],
            "group size is at least 1",
        ),
        (vec![quantized(8, None, 0, 1)], "no side is empty"),
    ];
    for (planned, words) in cases {
        let error = artifact_layout(&planned, 0).expect_err(words);
        check_words(&error, &[planned[0].name(), words]);
    }
}
