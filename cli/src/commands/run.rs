//! `qbin run`: text generation, streamed.

use crate::args::RunArgs;
use crate::commands::Show;
use crate::error::CliError;
use crate::machine::Machine;
use crate::{loaded, render};
use qbin_calib_data::Message;
use qbin_runtime::generate::{Request, generate};
use qbin_runtime::{Decoder, Parts, Sampling};
use serde::Serialize;
use std::process::ExitCode;
use std::time::Instant;

#[derive(Serialize)]
struct Generated {
    prompt_tokens: usize,
    tokens: usize,
    text: String,
    /// `stop` at an end token, `length` at `--max-tokens`, `context` at the end of the model's context.
    finish: &'static str,
    seconds: f64,
    path: &'static str,
    isa: &'static str,
    threads: usize,
}

pub(crate) fn run(args: &RunArgs, machine: Machine, show: Show) -> Result<ExitCode, CliError> {
    let model = loaded::model(&args.model, args.huge_pages)?;
    let cpu = machine.cpu(args.path);
    let parts = Parts::new(&model, &cpu)?;
    let tokenizer = loaded::need_tokenizer(&model, &parts.config, &args.model)?;
    let mut prompt = match args.chat {
        true => tokenizer.encode_chat(&[Message::user(args.prompt.as_str())], true)?,
        false => tokenizer.encode(&args.prompt)?,
    };
    if !args.chat && (tokenizer.adds_bos() || prompt.is_empty()) {
        prompt.splice(0..0, tokenizer.bos());
    }
    if prompt.is_empty() {
        return Err(CliError::EmptyPrompt);
    }
    parts.config.check_context(prompt.len() + 1)?;
    let max_tokens = args
        .max_tokens
        .min(parts.config.max_positions - prompt.len());
    let decoder = Decoder::new(&parts)?;
    let (temperature, top_k, top_p, min_p, seed) = (
        args.temperature,
        args.top_k,
        args.top_p,
        args.min_p,
        args.seed,
    );
    let request = Request {
        prompt,
        sampling: Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
        },
    };
    let prompt_tokens = request.prompt.len();

    let start = Instant::now();
    let mut stream = tokenizer.decode_stream();
    let mut text = String::new();
    let mut failed: Option<CliError> = None;
    let mut emit = |piece: Option<String>| -> Result<(), CliError> {
        let piece = piece.unwrap_or_default();
        text.push_str(&piece);
        if show.json {
            Ok(())
        } else {
            render::print(&piece).map_err(CliError::Stdout)
        }
    };
    let done = generate(
        &decoder,
        &[request],
        max_tokens,
        tokenizer.eos(),
        |_, id| match stream.push(id).map_err(CliError::from).and_then(&mut emit) {
            Ok(()) => true,
            Err(error) => {
                failed = Some(error);
                false
            }
        },
    )?;
    if let Some(error) = failed {
        return Err(error);
    }
    emit(stream.finish()?)?;
    let tokens = done[0].len();
    let stopped = done[0]
        .last()
        .is_some_and(|id| tokenizer.eos().contains(id));
    let finish = match stopped {
        true => "stop",
        false if max_tokens < args.max_tokens => "context",
        false => "length",
    };
    let seconds = start.elapsed().as_secs_f64();
    show.print(
        &Generated {
            prompt_tokens,
            tokens,
            text,
            finish,
            seconds,
            path: cpu.path.name(),
            isa: cpu.isa.level().name(),
            threads: cpu.pool.threads(),
        },
        |_| "\n".into(),
    )?;
    if !show.json && !show.quiet {
        eprintln!(
            "{tokens} tokens in {seconds:.2} s, {:.1} tokens/s ({} path, {}, threads: {})",
            tokens as f64 / seconds,
            cpu.path,
            cpu.isa.level(),
            cpu.pool.threads(),
        );
    }
    Ok(ExitCode::SUCCESS)
}
