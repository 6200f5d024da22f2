//! The output appears under its name whole, or not at all.

use std::fs;
use std::iter::once;
use std::os::unix::fs::symlink;
use std::path::Path;

use half::f16;
use qbin_format::{Artifact, ArtifactWriter, Checkpoint, Dtype, Fate, Planned, check_output};

use crate::common::{check_words, list, small, write_safetensors};

#[test]
fn a_writer_that_is_dropped_leaves_nothing() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("m.qbin");
    let small = small();
    let mut writer = small.writer(&path, 1000);
    assert_eq!(list(folder.path()), ["m.qbin.partial"]);
    small.fill(&mut writer).expect("write");
    drop(writer);
    assert!(list(folder.path()).is_empty());
}

#[test]
fn a_failed_write_leaves_the_old_artifact() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("m.qbin");
    let mut small = small();
    small.write(&path).expect("write");
    let before = fs::read(&path).expect("read");

    // The manifest names a tensor that was not planned: found when the file is read back.
    let good = small.manifest.clone();
    let alias = Fate::Alias {
        of: "nowhere".to_owned(),
        reason: "tied".to_owned(),
    };
    small
        .manifest
        .tensors
        .get_mut("tied.weight")
        .expect("there")
        .fate = alias;
    let error = small.write(&path).expect_err("a bad alias");
    check_words(&error, &["`tied.weight`", "`nowhere`"]);
    assert_eq!(list(folder.path()), ["m.qbin"]);

    small.manifest = good;
    small.matrices[0].1.scales[5] = f16::INFINITY;
    let error = small.write(&path).expect_err("infinite");
    check_words(&error, &["`a.weight`", "group 2 in row 1", "inf", "finite"]);
    small.matrices[0].1.scales[5] = f16::NAN;
    let (name, matrix) = &small.matrices[0];
    let mut writer = small.writer(&path, 1000);
    writer
        .write_quantized(name, matrix)
        .expect_err("not a number");
    drop(writer);
    assert_eq!(list(folder.path()), ["m.qbin"]);
    assert!(fs::read(&path).expect("read") == before);
}

#[test]
fn two_runs_do_not_write_the_same_file() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("m.qbin");
    let small = small();
    let first = small.writer(&path, 1000);
    let error = ArtifactWriter::create(&path, small.planned(), 1000).expect_err("busy");
    check_words(&error, &["another run", "m.qbin", "another output path"]);
    assert_eq!(list(folder.path()), ["m.qbin.partial"]);
    drop(first);
    small.write(&path).expect("free again");
}

#[test]
fn what_a_crash_left_is_taken_over() {
    let folder = tempfile::tempdir().expect("temp folder");
    let small = small();
    let clean = folder.path().join("clean.qbin");
    small.write(&clean).expect("write");
    let path = folder.path().join("m.qbin");
    fs::write(folder.path().join("m.qbin.partial"), vec![0xff; 1 << 20]).expect("leftover");
    small.write(&path).expect("write");
    assert!(fs::read(&path).expect("read") == fs::read(&clean).expect("read"));
    assert_eq!(list(folder.path()), ["clean.qbin", "m.qbin"]);
}

#[test]
fn an_output_larger_than_the_disk_is_refused_before_any_work() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("m.qbin");
    let planned = vec![Planned::Dense {
        name: "w".to_owned(),
        dtype: Dtype::U8,
        shape: vec![1 << 55],
    }];
    let error = ArtifactWriter::create(&path, planned, 1000).expect_err("too large");
    check_words(
        &error,
        &["m.qbin", "needs 360287970", "free", "another disk"],
    );
    assert!(list(folder.path()).is_empty());
}

#[test]
fn an_output_that_cannot_be_created_is_named() {
    let folder = tempfile::tempdir().expect("temp folder");
    let small = small();
    let create =
        |path: &Path| ArtifactWriter::create(path, small.planned(), 1000).expect_err("bad");
    check_words(&create(folder.path()), &["is a folder"]);
    let missing = folder.path().join("no/such/m.qbin");
    check_words(
        &create(&missing),
        &["cannot create", "m.qbin", "No such file"],
    );
}

#[test]
fn an_input_is_not_overwritten() {
    let folder = tempfile::tempdir().expect("temp folder");
    let at = |name: &str| folder.path().join(name);
    write_safetensors(&at("in.safetensors"), &[("a", Dtype::U8, vec![1], vec![1])]);
    let checkpoint = Checkpoint::open(&at("in.safetensors")).expect("open");
    fs::hard_link(at("in.safetensors"), at("hard")).expect("link");
    symlink(at("in.safetensors"), at("soft")).expect("link");
    fs::copy(at("in.safetensors"), at("copy")).expect("copy");
    fs::create_dir(at("sub")).expect("folder");

    let refused = ["in.safetensors", "hard", "soft", "sub/../in.safetensors"];
    for name in refused {
        let error = check_output(&at(name), checkpoint.input_paths()).expect_err(name);
        check_words(&error, &["in.safetensors", "same file", "another output"]);
    }
    for name in ["copy", "new.qbin"] {
        check_output(&at(name), checkpoint.input_paths()).expect(name);
    }
    // The temporary file counts as well.
    fs::rename(at("copy"), at("x.partial")).expect("rename");
    for name in ["x.partial", "sub/../x.partial"] {
        check_output(&at("x"), once(at(name).as_path())).expect_err(name);
    }
}

#[test]
#[should_panic(expected = "`a.weight.codes` was not written in full")]
fn a_forgotten_tensor_is_our_mistake() {
    let folder = tempfile::tempdir().expect("temp folder");
    let small = small();
    let writer = small.writer(&folder.path().join("m.qbin"), 1000);
    writer.finish(small.manifest.clone()).ok();
}

#[test]
#[should_panic(expected = "rows come in order")]
fn a_tensor_written_twice_is_our_mistake() {
    let folder = tempfile::tempdir().expect("temp folder");
    let small = small();
    let mut writer = small.writer(&folder.path().join("m.qbin"), 1000);
    for _ in 0..2 {
        writer
            .write_quantized("b.weight", &small.matrices[1].1)
            .expect("write");
    }
}

#[test]
fn the_file_is_readable_by_others_as_the_umask_says() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("m.qbin");
    small().write(&path).expect("write");
    let plain = folder.path().join("plain");
    fs::write(&plain, "").expect("write");
    let mode = |path: &Path| fs::metadata(path).expect("metadata").permissions();
    assert_eq!(mode(&path), mode(&plain));
    Artifact::open(&path).expect("open");
}
