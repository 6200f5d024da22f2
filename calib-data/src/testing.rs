//! What the tests share: the tiny model's tokenizer, and files in a temporary folder.

use std::error::Error as _;
use std::path::PathBuf;

use proptest::test_runner::{Config as ProptestConfig, RngSeed};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::error::Error;
use crate::tokenizer::Tokenizer;

pub(crate) const BOS: u32 = 0;
pub(crate) const EOS: u32 = 1;
/// Entries of the tiny model's tokenizer.
pub(crate) const VOCAB: usize = 4096;

macro_rules! tiny_file {
    ($name:literal) => {
        include_bytes!(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/models/tiny-1m/",
            $name
        ))
    };
}

pub(crate) const TOKENIZER_JSON: &[u8] = tiny_file!("tokenizer.json");

/// Property tests draw the same cases on every run.
pub(crate) fn seeded() -> ProptestConfig {
    ProptestConfig {
        rng_seed: RngSeed::Fixed(0x71_62_69_6e),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// The tiny model's tokenizer with all its files.
pub(crate) fn tiny() -> Tokenizer {
    Tokenizer::from_files(
        TOKENIZER_JSON,
        Some(tiny_file!("tokenizer_config.json")),
        Some(tiny_file!("special_tokens_map.json")),
        None,
        Some(tiny_file!("generation_config.json")),
    )
    .unwrap()
}

/// `tokenizer.json` with `<|start|>` (4096) and `<|end|>` (4097) added, as chat models have them.
pub(crate) fn chat_tokenizer_json() -> Vec<u8> {
    let mut json: Value = serde_json::from_slice(TOKENIZER_JSON).unwrap();
    for (id, content) in [(4096, "<|start|>"), (4097, "<|end|>")] {
        json["added_tokens"].as_array_mut().unwrap().push(json!({
            "id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        }));
    }
    serde_json::to_vec(&json).unwrap()
}

/// A tokenizer with `<|bos|>` and `<|eos|>` (also ended by `<|end|>`) and this chat template.
pub(crate) fn with_template(template: &str) -> Tokenizer {
    let config = json!({
        "bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}, "chat_template": template,
    });
    Tokenizer::from_files(
        &chat_tokenizer_json(),
        Some(config.to_string().as_bytes()),
        None,
        None,
        Some(br#"{"eos_token_id": [1, 4097]}"#),
    )
    .unwrap()
}

/// A folder with one file.
pub(crate) fn file(name: &str, bytes: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    (folder, path)
}

/// The error's whole text, causes and way out included.
pub(crate) fn whole(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    format!("{text}; {}", error.hint().unwrap_or_default())
}

/// The error says all of `words`.
#[track_caller]
pub(crate) fn says<T>(result: Result<T, Error>, words: &[&str]) {
    let text = whole(&result.err().expect("an error"));
    for word in words {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
}
