//! Damaged and hostile safetensors files: an error that says what is wrong, never a panic, and never a
//! view outside the file.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use qbin_format::{Checkpoint, Dtype, FormatError};

use crate::common::{check_words, raw_file};

fn open(bytes: &[u8]) -> Result<Checkpoint, FormatError> {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("bad.safetensors");
    fs::write(&path, bytes).expect("write");
    Checkpoint::open(&path)
}

/// One tensor's entry.
fn tensor(name: &str, dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
}

#[test]
fn every_kind_of_bad_header_is_named() {
    let one = |dtype, shape, offsets| format!("{{{}}}", tensor("w", dtype, shape, offsets));
    let two = |a: &str, b: &str| {
        format!(
            "{{{},{}}}",
            tensor("a", "U8", "[4]", a),
            tensor("b", "U8", "[4]", b)
        )
    };
    let cases: [(String, &[&str]); 20] = [
        (
            one("F16", "[2,3]", "[0,8]"),
            &["`w`", "[2, 3]", "F16", "12 bytes", "span 8"],
        ),
        (one("F7", "[2]", "[0,8]"), &["`w`", "`F7`", "BF16"]),
        (
            one("U8", "[9]", "[0,9]"),
            &["`w`", "0..9", "8 bytes of data", "again"],
        ),
        (one("U8", "[8]", "[8,0]"), &["`w`", "8..0"]),
        (
            one("U8", "[0]", "[18446744073709551615,18446744073709551615]"),
            &["`w`", "8 bytes of data"],
        ),
        (
            one("F32", "[4611686018427387904]", "[0,8]"),
            &["`w`", "larger than any file"],
        ),
        (
            one("U8", "[4294967296,4294967296,4294967296]", "[0,8]"),
            &["`w`", "larger than any file"],
        ),
        (
            one("U8", "[-8]", "[0,8]"),
            &["`w`", "not a safetensors header", "-8"],
        ),
        (
            one("U8", "[8.0]", "[0,8]"),
            &["`w`", "not a safetensors header"],
        ),
        (
            one("U8", "[8]", "[0]"),
            &["`w`", "not a safetensors header"],
        ),
        (
            one("U8", "[4]", "[0,4]"),
            &["end at byte 4", "8 bytes of data"],
        ),
        (
            one("U8", "[4]", "[4,8]"),
            &["`w`", "byte 4", "expected 0", "without a gap"],
        ),
        (
            two("[0,4]", "[3,7]"),
            &["`b`", "byte 3", "`a`", "ends at 4", "overlap"],
        ),
        (two("[0,4]", "[0,4]"), &["overlap"]),
        (
            format!("{{{0},{0}}}", tensor("w", "U8", "[4]", "[0,4]")),
            &["`w`", "twice"],
        ),
        (
            r#"{"w":{"dtype":"U8","dtype":"I8","shape":[8],"data_offsets":[0,8]}}"#.to_owned(),
            &["`w`", "duplicate field `dtype`"],
        ),
        (
            r#"{"w":{"dtype":"U8","shape":[8],"data_offsets":[0,8],"strides":[1]}}"#.to_owned(),
            &["`w`", "unknown field `strides`"],
        ),
        (
            r#"{"__metadata__":{"k":"1","k":"2"}}"#.to_owned(),
            &["`k`", "twice"],
        ),
        (
            r#"{"__metadata__":{},"__metadata__":{}}"#.to_owned(),
            &["`__metadata__`", "twice"],
        ),
        ("[]".to_owned(), &["not a safetensors header", "object"]),
    ];
    for (header, words) in cases {
        let error = open(&raw_file(&header, &[0; 8])).expect_err(&header);
        check_words(&error, &["bad.safetensors"]);
        check_words(&error, words);
    }
}

#[test]
fn bad_length_fields_are_named() {
    check_words(
        &open(b"").expect_err("empty"),
        &["has 0 bytes", "at least 8"],
    );
    check_words(&open(&[1; 7]).expect_err("short"), &["has 7 bytes"]);
    let mut file = raw_file("{}", &[]);
    file[0] = 3;
    check_words(
        &open(&file).expect_err("beyond"),
        &["length is 3", "2 bytes after", "again"],
    );
    file[7] = 255;
    check_words(&open(&file).expect_err("far beyond"), &["2 bytes after"]);
    assert_eq!(
        open(&raw_file("{}", &[]))
            .expect("no tensor")
            .names()
            .count(),
        0
    );
}

#[test]
fn a_huge_header_is_not_read() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("huge.safetensors");
    fs::write(&path, 150_000_000u64.to_le_bytes()).expect("write");
    let file = fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("open");
    file.set_len(200_000_000).expect("sparse");
    let error = Checkpoint::open(&path).expect_err("too long");
    check_words(&error, &["150000000", "at most 100000000"]);
}

#[test]
fn a_cut_file_is_refused_at_every_length() {
    let header = format!("{{{}}}", tensor("w", "U8", "[5]", "[0,5]"));
    let file = raw_file(&header, &[7; 5]);
    open(&file).expect("whole");
    for len in 0..file.len() {
        open(&file[..len]).expect_err("cut");
    }
}

/// Opens a file of any bytes. If it opens, every view must lie in the file, and the oracle must agree
/// that the file is valid: we are nowhere less strict.
fn check_any(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).expect("write");
    let Ok(checkpoint) = Checkpoint::open(path) else {
        return;
    };
    let oracle = safetensors::SafeTensors::deserialize(bytes).expect("the oracle accepts it too");
    assert_eq!(oracle.len(), checkpoint.names().count());
    for name in checkpoint.names() {
        let (ours, theirs) = (checkpoint.tensor(name).expect("named"), oracle.tensor(name));
        let theirs = theirs.expect("named");
        assert_eq!((ours.shape, ours.bytes), (theirs.shape(), theirs.data()));
        assert_eq!(ours.bytes.len(), ours.len() * ours.dtype.size());
        let elements: usize = ours.shape.iter().product();
        assert_eq!(elements, ours.len());
    }
}

fn valid_file() -> Vec<u8> {
    let header = format!(
        r#"{{"__metadata__":{{"format":"pt"}},{},{}}}"#,
        tensor("model.layers.0.w", "F16", "[2,3]", "[0,12]"),
        tensor("b", "F32", "[1]", "[12,16]")
    );
    raw_file(&header, &[1; 16])
}

proptest! {
    #[test]
    fn damaged_files_never_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), cut: Option<prop::sample::Index>) {
        let folder = tempfile::tempdir().expect("temp folder");
        let mut file = valid_file();
        for (at, byte) in edits {
            let at = at.index(file.len());
            file[at] = byte;
        }
        if let Some(cut) = cut {
            file.truncate(cut.index(file.len()));
        }
        check_any(&folder.path().join("m.safetensors"), &file);
    }

    #[test]
    fn any_length_field_never_panics(length: u64, small in 0u64..400) {
        let folder = tempfile::tempdir().expect("temp folder");
        let mut file = valid_file();
        for length in [length, small, (length % 256) << 56, small + 90_000_000] {
            file[..8].copy_from_slice(&length.to_le_bytes());
            check_any(&folder.path().join("m.safetensors"), &file);
        }
    }

    /// Well-formed headers with wild numbers: we accept exactly what the oracle accepts.
    #[test]
    fn offsets_and_shapes_are_judged_as_by_the_oracle(
        entries in prop::collection::vec((0usize..13, prop::collection::vec(prop_oneof![4 => 0u64..5, 1 => any::<u64>()], 0..3), 0u64..3, 0u64..20, any::<bool>()), 0..4),
        trailing in prop_oneof![4 => Just(0usize), 1 => 1usize..4],
    ) {
        let mut end = 0;
        let mut texts = Vec::new();
        for (n, (dtype, shape, gap, len, fitting)) in entries.into_iter().enumerate() {
            let dtype = Dtype::ALL[dtype];
            let size = shape.iter().try_fold(dtype.size() as u64, |size, &d| size.checked_mul(d));
            let (gap, len) = match size {
                Some(size) if fitting && size < 1000 => (0, size),
                _ => (gap, len),
            };
            let begin = end + gap;
            end = begin + len;
            texts.push(tensor(&n.to_string(), dtype.name(), &format!("{shape:?}"), &format!("[{begin},{end}]")));
        }
        let file = raw_file(&format!("{{{}}}", texts.join(",")), &vec![0; end as usize + trailing]);
        let ours = open(&file);
        let theirs = safetensors::SafeTensors::deserialize(&file);
        prop_assert_eq!(ours.is_ok(), theirs.is_ok(), "{:?} {:?}", ours.err(), theirs.err());
    }
}
