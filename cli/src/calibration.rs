//! Calibration windows for `quantize`: from files, from the built-in corpus, or written by the model itself.

use crate::args::CalibrationArgs;
use crate::commands::Show;
use crate::error::CliError;
use crate::loaded;
use crate::progress::Progress;
use qbin_calib_data::{Generator, Source, Tokenizer, WindowSpec, Windows};
use qbin_format::CalibrationInfo;
use qbin_runtime::generate::{Request, generate};
use qbin_runtime::walk::PassError;
use qbin_runtime::{Decoder, Parts, Sampling};
use std::path::Path;

/// Calibration windows as asked for; the model writes them itself where nothing is given.
pub(crate) fn windows(
    args: &CalibrationArgs,
    input: &Path,
    parts: &Parts<'_>,
    show: Show,
) -> Result<Windows, CliError> {
    let config = &parts.config;
    let tokens = args.calib_tokens.unwrap_or(config.max_positions.min(512));
    if tokens > config.max_positions {
        return Err(CliError::WindowTooLong {
            tokens,
            max_positions: config.max_positions,
        });
    }
    let spec = WindowSpec {
        windows: args.calib_windows,
        tokens,
        seed: args.seed,
    };
    let tokenizer = loaded::tokenizer(parts.model, config)?;
    let mut progress = Progress::new("calibration", show.quiet);
    let mut tick = |done, total| progress.set(done, total, "");
    let named = |name: &str| args.calib.iter().any(|source| source == name);
    if let Some(name) = ["self", "builtin"]
        .into_iter()
        .find(|name| named(name) && args.calib.len() > 1)
    {
        return Err(CliError::CalibSources {
            source_name: name.into(),
        });
    }
    let mut writer;
    let source = if named("builtin") {
        Source::Builtin
    } else if named("self") {
        let tokenizer = tokenizer
            .as_ref()
            .ok_or_else(|| CliError::NoTokenizer { path: input.into() })?;
        writer = SelfWriter {
            decoder: Decoder::new(parts)?,
            tokenizer,
        };
        Source::SelfGenerated(&mut writer)
    } else {
        Source::Files(args.calib.iter().map(Into::into).collect())
    };
    let windows = qbin_calib_data::load(
        source,
        tokenizer.as_ref(),
        &spec,
        &args.calib_field,
        config.vocab_size,
        &mut tick,
    )?;
    progress.finish();
    Ok(windows)
}

/// The model as the author of its own calibration text.
struct SelfWriter<'m, 't> {
    decoder: Decoder<'m>,
    tokenizer: &'t Tokenizer,
}

impl Generator for SelfWriter<'_, '_> {
    fn generate(
        &mut self,
        requests: &[qbin_calib_data::Request],
        max_tokens: usize,
    ) -> Result<Vec<Vec<u32>>, PassError> {
        let requests: Vec<Request> = requests
            .iter()
            .map(|request| Request {
                prompt: request.prompt.clone(),
                sampling: Sampling {
                    temperature: request.temperature,
                    seed: request.seed,
                    ..Sampling::default()
                },
            })
            .collect();
        Ok(generate(
            &self.decoder,
            &requests,
            max_tokens,
            self.tokenizer.eos(),
            |_, _| true,
        )?)
    }
}

/// What the manifest says of them.
pub(crate) fn info(windows: &Windows) -> CalibrationInfo {
    CalibrationInfo {
        source: windows.source.clone(),
        windows: windows.windows(),
        window_tokens: windows.tokens(),
        tokens: windows.ids().len() as u64,
        sha256: windows.sha256(),
    }
}
