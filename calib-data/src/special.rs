//! What the files beside `tokenizer.json` say about special tokens and the chat template.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// `tokenizer_config.json`, the conventional name.
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
const GENERATION_CONFIG: &str = "generation_config.json";

/// The parts of the files beside `tokenizer.json` that we use.
#[derive(Debug, Default)]
pub(crate) struct Special {
    /// Named special tokens (`bos_token`, `eos_token`, …) as text.
    pub(crate) tokens: Vec<(String, String)>,
    /// Tokens added beside the ones of `tokenizer.json`, by rising id.
    pub(crate) added: Vec<(u32, tokenizers::AddedToken)>,
    /// `add_bos_token`, where it is set.
    pub(crate) add_bos: Option<bool>,
    /// The chat template of `tokenizer_config.json`.
    pub(crate) chat_template: Option<String>,
    /// `bos_token_id` of `generation_config.json`.
    pub(crate) generation_bos: Option<u32>,
    /// `eos_token_id` of `generation_config.json`, one or several.
    pub(crate) generation_eos: Vec<u32>,
}

impl Special {
    /// Reads the three files, each `None` where the model has none. `tokenizer_config.json` has
    /// precedence over `special_tokens_map.json`, as in `transformers`.
    pub(crate) fn from_files(
        tokenizer_config: Option<&[u8]>,
        special_tokens_map: Option<&[u8]>,
        generation_config: Option<&[u8]>,
    ) -> Result<Self> {
        let mut special = Self::default();
        if let Some(bytes) = tokenizer_config {
            let config = object(bytes, TOKENIZER_CONFIG)?;
            special.read_named_tokens(&config, TOKENIZER_CONFIG)?;
            special.add_bos = flag(&config, "add_bos_token")?;
            special.chat_template = chat_template(&config)?;
            special.added = added_tokens(&config)?;
        }
        if let Some(bytes) = special_tokens_map {
            let map = object(bytes, SPECIAL_TOKENS_MAP)?;
            special.read_named_tokens(&map, SPECIAL_TOKENS_MAP)?;
        }
        if let Some(bytes) = generation_config {
            let config = object(bytes, GENERATION_CONFIG)?;
            special.generation_bos = ids(&config, "bos_token_id")?.first().copied();
            special.generation_eos = ids(&config, "eos_token_id")?;
        }
        Ok(special)
    }

    /// The text of a named special token such as `bos_token`.
    pub(crate) fn token(&self, key: &str) -> Option<&str> {
        self.tokens
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, text)| text.as_str())
    }

    fn read_named_tokens(&mut self, config: &Map<String, Value>, file: &'static str) -> Result<()> {
        for key in [
            "bos_token",
            "eos_token",
            "unk_token",
            "pad_token",
            "sep_token",
            "cls_token",
        ] {
            let Some(value) = config.get(key) else {
                continue;
            };
            let text = match value {
                Value::Null => continue,
                Value::String(text) => text,
                Value::Object(token) => match token.get("content") {
                    Some(Value::String(text)) => text,
                    _ => return Err(unexpected(file, key, value, "a token's `content`")),
                },
                _ => return Err(unexpected(file, key, value, "a token's text")),
            };
            if self.token(key).is_none() {
                self.tokens.push((key.to_owned(), text.clone()));
            }
        }
        Ok(())
    }
}

fn object(bytes: &[u8], file: &'static str) -> Result<Map<String, Value>> {
    serde_json::from_slice(bytes).map_err(|source| Error::ConfigJson { file, source })
}

fn unexpected(file: &'static str, key: &str, got: &Value, expected: &str) -> Error {
    let mut got = got.to_string();
    if let Some((at, _)) = got.char_indices().nth(60) {
        got.truncate(at);
        got.push('…');
    }
    Error::ConfigValue {
        file,
        key: key.to_owned(),
        got,
        expected: expected.to_owned(),
    }
}

fn flag(config: &Map<String, Value>, key: &str) -> Result<Option<bool>> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(other) => Err(unexpected(TOKENIZER_CONFIG, key, other, "true or false")),
    }
}

/// One id, a list of ids, or nothing.
fn ids(config: &Map<String, Value>, key: &str) -> Result<Vec<u32>> {
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| unexpected(GENERATION_CONFIG, key, value, "token ids"))
    };
    match config.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(id).collect(),
        Some(value) => Ok(vec![id(value)?]),
    }
}

/// The template, given as text or as a list of named templates of which `default` is ours.
fn chat_template(config: &Map<String, Value>) -> Result<Option<String>> {
    let key = "chat_template";
    let wrong = |value| unexpected(TOKENIZER_CONFIG, key, value, "a template named `default`");
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(template)) => Ok(Some(template.clone())),
        Some(Value::Array(list)) if list.is_empty() => Ok(None),
        Some(value @ Value::Array(list)) => {
            let default = list.iter().find(|entry| entry["name"] == "default");
            let template = default.and_then(|entry| entry["template"].as_str());
            Ok(Some(template.ok_or_else(|| wrong(value))?.to_owned()))
        }
        Some(other) => Err(wrong(other)),
    }
}

/// `added_tokens_decoder`: id → token with its matching rules.
fn added_tokens(config: &Map<String, Value>) -> Result<Vec<(u32, tokenizers::AddedToken)>> {
    let key = "added_tokens_decoder";
    let entries = match config.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(other) => return Err(unexpected(TOKENIZER_CONFIG, key, other, "an object")),
    };
    let mut added = Vec::with_capacity(entries.len());
    for (id, token) in entries {
        let parsed = id.parse().ok().zip(token["content"].as_str());
        let (id, content) = parsed
            .ok_or_else(|| unexpected(TOKENIZER_CONFIG, key, token, "an id with a `content`"))?;
        let rule = |name: &str| token[name].as_bool().unwrap_or(false);
        let mut added_token = tokenizers::AddedToken::from(content, rule("special"))
            .single_word(rule("single_word"))
            .lstrip(rule("lstrip"))
            .rstrip(rule("rstrip"));
        if let Some(normalized) = token["normalized"].as_bool() {
            added_token = added_token.normalized(normalized);
        }
        added.push((id, added_token));
    }
    added.sort_by_key(|(id, _)| *id);
    Ok(added)
}
