//! A model file with its tokenizer, checked against each other.

use crate::error::CliError;
use qbin_calib_data::Tokenizer;
use qbin_format::Model;
use qbin_runtime::{ModelConfig, RuntimeError};
use std::path::Path;

/// A model to run, copied into huge pages if that was asked for.
pub(crate) fn model(path: &Path, huge_pages: bool) -> Result<Model, CliError> {
    let model = Model::open(path)?;
    Ok(match huge_pages {
        true => model.in_huge_pages()?,
        false => model,
    })
}

/// The config inside a model.
pub(crate) fn config(model: &Model) -> Result<ModelConfig, CliError> {
    let text = model
        .file("config.json")
        .ok_or(RuntimeError::MissingFile("config.json"))?;
    Ok(ModelConfig::from_json(text)?)
}

/// The tokenizer inside a model, if there is one; its ids fit the embedding.
pub(crate) fn tokenizer(
    model: &Model,
    config: &ModelConfig,
) -> Result<Option<Tokenizer>, CliError> {
    let Some(json) = model.file("tokenizer.json") else {
        return Ok(None);
    };
    let tokenizer = Tokenizer::from_files(
        json,
        model.file("tokenizer_config.json"),
        model.file("special_tokens_map.json"),
        model.file("chat_template.jinja"),
        model.file("generation_config.json"),
    )?;
    if tokenizer.vocab_size() > config.vocab_size {
        return Err(CliError::TokenizerTooLarge {
            tokenizer: tokenizer.vocab_size(),
            vocab: config.vocab_size,
        });
    }
    Ok(Some(tokenizer))
}

/// [`tokenizer`], where the command cannot do without.
pub(crate) fn need_tokenizer(
    model: &Model,
    config: &ModelConfig,
    path: &Path,
) -> Result<Tokenizer, CliError> {
    tokenizer(model, config)?.ok_or_else(|| CliError::NoTokenizer { path: path.into() })
}

/// A text file as it stands.
pub(crate) fn text(path: &Path) -> Result<String, CliError> {
    let bytes = std::fs::read(path).map_err(|source| CliError::Read {
        path: path.into(),
        source,
    })?;
    String::from_utf8(bytes).map_err(|error| CliError::NotText {
        path: path.into(),
        at: error.utf8_error().valid_up_to(),
    })
}
