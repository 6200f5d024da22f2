//! The example of `docs/format.md` is what the code writes.

use crate::common::{entry, kept, scheme};
use half::f16;
use qbin_format::{
    Artifact, ArtifactWriter, Dtype, Encoding, Fate, Manifest, PackedMatrix, Planned,
    QuantizedMatrix, Sparsity,
};
use serde_json::Value;

const DOCUMENT: &str = include_str!("../../../docs/format.md");

/// The fenced block with this info string.
fn block(info: &str) -> &'static str {
    let start = format!("\n```{info}\n");
    let (_, rest) = DOCUMENT
        .split_once(&start)
        .unwrap_or_else(|| panic!("no block `{info}`"));
    rest.split_once("\n```").expect("the block ends").0
}

fn hex_block(info: &str) -> Vec<u8> {
    let words = block(info).split_whitespace();
    words
        .map(|word| u8::from_str_radix(word, 16).expect("hex"))
        .collect()
}

/// A cell of the example's table as numbers.
fn cell(line: &str, column: usize) -> Vec<f32> {
    let cell = line.split('|').nth(column + 1).expect("a column").trim();
    let numbers = cell.trim_matches('`').split_whitespace();
    numbers
        .map(|number| number.parse().expect("a number"))
        .collect()
}

fn matrix() -> QuantizedMatrix {
    let example = DOCUMENT.split_once("## Example").expect("an example").1;
    let rows: Vec<&str> = example
        .lines()
        .filter(|l| l.starts_with("| 0 ") || l.starts_with("| 1 "))
        .collect();
    let column = |n| {
        rows.iter()
            .flat_map(|row| cell(row, n))
            .collect::<Vec<f32>>()
    };
    QuantizedMatrix {
        scheme: scheme(4, Some(4), false),
        rows: 2,
        cols: 6,
        codes: column(1).iter().map(|&code| code as u8).collect(),
        scales: column(2)
            .iter()
            .map(|&scale| f16::from_f32(scale))
            .collect(),
        zero_points: column(3).iter().map(|&zero| zero as u8).collect(),
    }
}

#[test]
fn the_example_matrix_has_the_bytes_and_values_of_the_document() {
    let packed = PackedMatrix::pack(&matrix());
    let view = packed.view();
    assert_eq!(view.codes, hex_block("text codes"));
    assert_eq!(view.scales, hex_block("text scales"));
    assert_eq!(view.zero_points, hex_block("text zero_points"));
    let values = block("text values").split_whitespace();
    let expected: Vec<f32> = values
        .map(|value| value.parse().expect("a number"))
        .collect();
    let mut got = vec![f32::NAN; 12];
    view.read_f32(0..2, &mut got);
    assert_eq!(got, expected);
}

#[test]
fn the_example_file_has_the_header_and_manifest_of_the_document() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("example.qbin");
    let matrix = matrix();
    let planned = vec![
        Planned::Quantized {
            name: "w".to_owned(),
            scheme: matrix.scheme,
            rows: 2,
            cols: 6,
        },
        Planned::Dense {
            name: "norm".to_owned(),
            dtype: Dtype::F32,
            shape: vec![3],
        },
        Planned::File {
            name: "note.txt".to_owned(),
            bytes: 2,
        },
    ];
    let mut manifest = Manifest::default();
    let fate = Fate::quantized(matrix.scheme, "rtn");
    manifest
        .tensors
        .insert("w".to_owned(), entry(fate, &[2, 6]));
    manifest
        .tensors
        .insert("norm".to_owned(), kept(Dtype::F32, &[3]));
    let mut writer =
        ArtifactWriter::create(&path, planned, manifest.planned_bytes()).expect("create");
    writer.write_quantized("w", &matrix).expect("write");
    writer
        .write_dense("norm", Dtype::F32, &[3], &[0; 12])
        .expect("write");
    writer.write_file("note.txt", b"hi").expect("write");
    writer.finish(manifest).expect("finish");

    let bytes = std::fs::read(&path).expect("read");
    let n = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + n]).expect("text");
    assert_eq!((8 + n) % 4096, 0);
    let mut header: serde_json::Map<String, Value> = serde_json::from_str(header).expect("json");
    header.remove("__metadata__").expect("metadata");
    let expected: Value = serde_json::from_str(block("json header")).expect("json");
    assert_eq!(Value::Object(header), expected);

    let artifact = Artifact::open(&path).expect("open");
    let got = serde_json::to_value(&artifact.manifest().tensors["w"]).expect("json");
    let expected: Value = serde_json::from_str(block("json entry")).expect("json");
    assert_eq!(got, expected);
}

#[test]
fn the_sparse_example_has_the_bytes_of_the_document() {
    let rows = DOCUMENT
        .lines()
        .filter(|l| l.starts_with("| 0s") || l.starts_with("| 1s"));
    let codes = rows.flat_map(|row| cell(row, 1)).map(|code| code as u8);
    let matrix = QuantizedMatrix {
        scheme: scheme(4, None, true),
        rows: 2,
        cols: 8,
        codes: codes.collect(),
        scales: vec![f16::ONE; 2],
        zero_points: Vec::new(),
    };
    let packed = |encoding| PackedMatrix::pack_as(&matrix, encoding).expect("two of four");
    let bitmask = packed(Encoding::Bitmask);
    let Sparsity::Bitmask { masks, offsets } = bitmask.view().sparsity else {
        panic!("no bitmask");
    };
    let mut expected = hex_block("text bitmask codes (then 512 zero bytes)");
    expected.resize(expected.len() + 512, 0);
    assert_eq!(bitmask.view().codes, expected);
    let mut expected = hex_block("text bitmask masks (then 112 zero bytes)");
    expected.resize(expected.len() + 112, 0);
    assert_eq!(masks, expected);
    assert_eq!(offsets, [0u64, 3].map(u64::to_le_bytes).as_flattened());

    let two_of_four = packed(Encoding::TwoOfFour);
    let mut expected = hex_block("text 2of4 first vector");
    expected.extend(hex_block("text 2of4 second vector (then 64 zero bytes)"));
    expected.resize(3 * 64, 0);
    expected.extend(hex_block(
        "text 2of4 codes (then 224 bytes 88 and 256 zero bytes)",
    ));
    expected.resize(expected.len() + 224, 0x88);
    expected.resize(expected.len() + 256, 0);
    assert_eq!(two_of_four.view().codes, expected);
}
