//! Checkpoints: which files are read, and that shards are one checkpoint.

use std::fs;
use std::path::Path;

use half::f16;
use qbin_format::{Checkpoint, Dtype, Model, SafetensorsWriter, SourceHasher, SourceInfo};

use crate::common::{Dense, check_words, list, write_safetensors};

fn tensors() -> Vec<Dense> {
    let f16s = |n: u16| {
        (0..n)
            .flat_map(|i| f16::from_f32(f32::from(i)).to_le_bytes())
            .collect()
    };
    vec![
        ("model.b", Dtype::F16, vec![2, 3], f16s(6)),
        (
            "model.a",
            Dtype::F32,
            vec![1],
            1.5f32.to_le_bytes().to_vec(),
        ),
        ("lm_head", Dtype::U8, vec![0, 4], vec![]),
        ("scalar", Dtype::F16, vec![], f16s(1)),
    ]
}

/// Writes the tensors into two shards and the index beside them.
fn write_sharded(folder: &Path) {
    let tensors = tensors();
    write_safetensors(&folder.join("m-1.safetensors"), &tensors[..1]);
    write_safetensors(&folder.join("m-2.safetensors"), &tensors[1..]);
    write_index(
        folder,
        &[
            ("model.b", "m-1.safetensors"),
            ("model.a", "m-2.safetensors"),
            ("lm_head", "m-2.safetensors"),
            ("scalar", "m-2.safetensors"),
        ],
    );
}

fn write_index(folder: &Path, map: &[(&str, &str)]) {
    let map: serde_json::Map<_, _> = map.iter().map(|&(k, v)| (k.to_owned(), v.into())).collect();
    let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map});
    let path = folder.join("model.safetensors.index.json");
    fs::write(path, index.to_string()).expect("write");
}

fn digest(checkpoint: &Checkpoint) -> SourceInfo {
    let mut hasher = SourceHasher::new();
    for name in checkpoint.names() {
        hasher.add(&checkpoint.tensor(name).expect("named"));
        checkpoint.release(name);
    }
    hasher.finish()
}

#[test]
fn shards_and_a_single_file_are_the_same_checkpoint() {
    let (one, two) = (
        tempfile::tempdir().expect("temp"),
        tempfile::tempdir().expect("temp"),
    );
    write_safetensors(&one.path().join("model.safetensors"), &tensors());
    write_sharded(two.path());
    let single = Checkpoint::open(one.path()).expect("open");
    let sharded = Checkpoint::open(two.path()).expect("open");
    for checkpoint in [&single, &sharded] {
        let names: Vec<&str> = checkpoint.names().collect();
        assert_eq!(names, ["lm_head", "model.a", "model.b", "scalar"]);
        for (name, dtype, shape, bytes) in &tensors() {
            let tensor = checkpoint.tensor(name).expect("there");
            assert_eq!(
                (tensor.name, tensor.dtype, tensor.shape),
                (*name, *dtype, &shape[..])
            );
            assert_eq!(tensor.bytes, bytes);
        }
        assert!(checkpoint.tensor("model").is_none());
        assert_eq!(checkpoint.total_bytes(), 12 + 4 + 2);
    }
    assert_eq!(digest(&single), digest(&sharded));
    assert_eq!((digest(&single).tensors, digest(&single).bytes), (4, 18));
    assert_eq!(
        single.tensor("model.b").expect("there").to_f32(),
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    );
}

#[test]
fn a_folder_stands_for_its_index_then_its_model_then_its_single_file() {
    let folder = tempfile::tempdir().expect("temp folder");
    let at = folder.path();
    check_words(
        &Checkpoint::open(at).expect_err("empty"),
        &["no safetensors file", "index"],
    );

    write_safetensors(&at.join("x.safetensors"), &tensors()[..1]);
    assert_eq!(Checkpoint::open(at).expect("single").names().count(), 1);
    write_safetensors(&at.join("y.safetensors"), &tensors()[..2]);
    let error = Checkpoint::open(at).expect_err("two files");
    check_words(
        &error,
        &[
            "2 safetensors files",
            "x.safetensors",
            "y.safetensors",
            "the file itself",
        ],
    );

    write_safetensors(&at.join("model.safetensors"), &tensors()[..3]);
    assert_eq!(Checkpoint::open(at).expect("model").names().count(), 3);
    write_sharded(at);
    assert_eq!(Checkpoint::open(at).expect("index").names().count(), 4);
    let model = Model::open(&at.join("model.safetensors.index.json")).expect("index");
    assert!(matches!(&model, Model::Checkpoint(_)));
    assert_eq!(model.names().count(), 4);
    let weight = model.weight("model.b").expect("there");
    let mut row = [f32::NAN; 3];
    weight.read_rows_f32(1..2, &mut row);
    assert_eq!((weight.shape(), row), (vec![2, 3], [3.0, 4.0, 5.0]));
}

#[test]
fn side_files_are_read_and_named_as_inputs() {
    let folder = tempfile::tempdir().expect("temp folder");
    write_sharded(folder.path());
    fs::write(folder.path().join("config.json"), "{}").expect("write");
    fs::write(folder.path().join("notes.txt"), "").expect("write");
    let checkpoint = Checkpoint::open(folder.path()).expect("open");
    assert_eq!(checkpoint.file("config.json"), Some(&b"{}"[..]));
    assert_eq!(checkpoint.file("tokenizer.json"), None);
    assert_eq!(checkpoint.file("notes.txt"), None);
    let name = |path: &Path| {
        path.file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned()
    };
    let mut inputs: Vec<String> = checkpoint.input_paths().map(name).collect();
    inputs.sort();
    let mut expected = list(folder.path());
    expected.retain(|name| name != "notes.txt");
    assert_eq!(inputs, expected);

    let tokenizer = fs::File::create(folder.path().join("tokenizer.json")).expect("create");
    tokenizer.set_len((64 << 20) + 1).expect("sparse");
    let error = Checkpoint::open(folder.path()).expect_err("too large");
    check_words(&error, &["tokenizer.json", "67108865", "67108864"]);
}

#[test]
fn an_index_that_does_not_fit_its_shards_is_refused() {
    let good = [
        ("model.b", "m-1.safetensors"),
        ("model.a", "m-2.safetensors"),
        ("lm_head", "m-2.safetensors"),
        ("scalar", "m-2.safetensors"),
    ];
    let with = |tensor: &'static str, shard: &'static str| {
        let mut map = good.to_vec();
        map.retain(|(name, _)| *name != tensor);
        map.push((tensor, shard));
        map
    };
    type Map = Vec<(&'static str, &'static str)>;
    let cases: [(Map, &[&str]); 8] = [
        (
            with("model.a", "m-3.safetensors"),
            &["m-3.safetensors", "missing", "model.a"],
        ),
        (
            with("model.a", "m-1.safetensors"),
            &["model.a", "not in", "m-1.safetensors"],
        ),
        (
            with("model.c", "m-1.safetensors"),
            &["model.c", "not in", "m-1.safetensors"],
        ),
        (
            good[1..]
                .iter()
                .chain([&("model.c", "m-1.safetensors")])
                .copied()
                .collect(),
            &["model.b", "m-1.safetensors", "does not list"],
        ),
        (
            with("model.a", "../m-2.safetensors"),
            &["model.a", "../m-2.safetensors", "plain file name"],
        ),
        (
            with("model.a", "/etc/passwd"),
            &["model.a", "/etc/passwd", "plain file name"],
        ),
        (with("model.a", ".."), &["model.a", "plain file name"]),
        (
            with("model.a", "sub/m.safetensors"),
            &["sub/m.safetensors", "plain file name"],
        ),
    ];
    for (map, words) in cases {
        let folder = tempfile::tempdir().expect("temp folder");
        write_sharded(folder.path());
        write_index(folder.path(), &map);
        let error = Checkpoint::open(folder.path()).expect_err(&format!("{map:?}"));
        check_words(&error, words);
    }
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let folder = tempfile::tempdir().expect("temp folder");
    write_sharded(folder.path());
    write_safetensors(&folder.path().join("m-1.safetensors"), &tensors()[..2]);
    let error = Checkpoint::open(folder.path()).expect_err("twice");
    check_words(
        &error,
        &["model.a", "m-1.safetensors", "m-2.safetensors", "once"],
    );
}

#[test]
fn an_index_that_is_none_is_refused() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("model.safetensors.index.json");
    let twice = r#"{"weight_map": {"a": "x", "a": "y"}}"#;
    let cases = [
        (twice, "`a` stands there twice"),
        ("{}", "weight_map"),
        ("[", "not an index"),
    ];
    for (text, words) in cases {
        fs::write(&path, text).expect("write");
        let error = Checkpoint::open(&path).expect_err(words);
        check_words(&error, &["model.safetensors.index.json", words]);
    }
}

#[test]
fn other_formats_are_named_with_a_way_out() {
    let folder = tempfile::tempdir().expect("temp folder");
    let cases: [(&str, &[u8], &[&str]); 5] = [
        (
            "m.safetensors",
            b"PK\x03\x04 and so on",
            &["PyTorch", "safe_serialization"],
        ),
        (
            "m.pt",
            b"\x80\x02}q\x00 and so on",
            &["PyTorch", "safe_serialization"],
        ),
        (
            "m.bin",
            b"PK\x03\x04 and so on",
            &["PyTorch", "safe_serialization"],
        ),
        (
            "m.gguf",
            b"GGUF\x03\0\0\0 and so on",
            &["GGUF", "checkpoint"],
        ),
        (
            "l.safetensors",
            b"version https://git-lfs.github.com/spec/v1",
            &["git-lfs", "git lfs pull"],
        ),
    ];
    for (name, bytes, words) in cases {
        let path = folder.path().join(name);
        fs::write(&path, bytes).expect("write");
        check_words(&Model::open(&path).expect_err(name), words);
    }
    let folder = tempfile::tempdir().expect("temp folder");
    fs::write(folder.path().join("pytorch_model.bin"), "PK").expect("write");
    let error = Checkpoint::open(folder.path()).expect_err("pytorch");
    check_words(
        &error,
        &["pytorch_model.bin", "PyTorch", "safe_serialization"],
    );
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Model::open(Path::new("no/such.safetensors")).expect_err("missing");
    check_words(
        &error,
        &["cannot open `no/such.safetensors`", "No such file"],
    );
}

#[test]
fn the_safetensors_crate_reads_what_we_write_as_a_stream() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("m.safetensors");
    let tensors = tensors();
    let entries = tensors
        .iter()
        .map(|(name, dtype, shape, _)| ((*name).to_owned(), *dtype, shape.clone()));
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let mut writer = SafetensorsWriter::create(&path, entries.collect(), metadata).expect("create");
    for (name, _, _, bytes) in &tensors {
        for piece in bytes.chunks(5) {
            writer.write(name, piece).expect("write");
        }
    }
    writer.finish().expect("finish");
    let bytes = fs::read(&path).expect("read");
    let oracle = safetensors::SafeTensors::deserialize(&bytes).expect("a valid file");
    for (name, _, shape, bytes) in &tensors {
        let tensor = oracle.tensor(name).expect("there");
        assert_eq!((tensor.shape(), tensor.data()), (&shape[..], &bytes[..]));
    }
    assert_eq!(list(folder.path()), ["m.safetensors"]);
}

#[test]
fn we_read_what_the_safetensors_crate_writes() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("m.safetensors");
    let data = tensors();
    let views = data.iter().map(|(name, dtype, shape, bytes)| {
        let dtype = match dtype {
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::F32 => safetensors::Dtype::F32,
            _ => safetensors::Dtype::U8,
        };
        let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes);
        (*name, view.expect("a view"))
    });
    let bytes = safetensors::serialize(views, None).expect("serialize");
    fs::write(&path, bytes).expect("write");
    let checkpoint = Checkpoint::open(&path).expect("open");
    for (name, _, shape, bytes) in &data {
        let tensor = checkpoint.tensor(name).expect("there");
        assert_eq!((tensor.shape, tensor.bytes), (&shape[..], &bytes[..]));
    }
}

#[test]
#[should_panic(expected = "tensors come in order")]
fn a_stream_keeps_its_order() {
    let folder = tempfile::tempdir().expect("temp folder");
    let entries = ["a", "b"].map(|name| (name.to_owned(), Dtype::U8, vec![2]));
    let path = folder.path().join("m.safetensors");
    let mut writer =
        SafetensorsWriter::create(&path, entries.into(), Default::default()).expect("create");
    writer.write("a", &[1]).expect("write");
    writer.write("b", &[1]).expect("write");
}
