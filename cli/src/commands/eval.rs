//! `qbin eval perplexity` and `qbin eval compare`.

use crate::args::TextArgs;
use crate::commands::Show;
use crate::error::CliError;
use crate::machine::Machine;
use crate::progress::Progress;
use crate::{loaded, render};
use qbin_format::{Model, sha256_hex};
use qbin_runtime::eval::{self, Comparison, Perplexity, Protocol};
use qbin_runtime::{Cpu, Decoder, ModelConfig, Parts, Path as Arithmetic};
use serde::Serialize;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

/// A figure with what it was measured on.
#[derive(Serialize)]
struct Measured<T> {
    #[serde(flatten)]
    result: T,
    /// Which arithmetic the model ran on; a base always ran on the reference path.
    path: &'static str,
    isa: &'static str,
    threads: usize,
    text_sha256: String,
    seconds: f64,
}

/// A text in windows of its protocol.
struct Text {
    protocol: Protocol,
    windows: Vec<Vec<u32>>,
    sha256: String,
}

pub(crate) fn perplexity(
    path: &Path,
    args: &TextArgs,
    machine: Machine,
    show: Show,
) -> Result<ExitCode, CliError> {
    let start = Instant::now();
    let model = Model::open(path)?;
    let cpu = machine.cpu(args.path);
    let parts = Parts::new(&model, &cpu)?;
    let text = Text::load(&model, &parts.config, path, args)?;
    let decoder = Decoder::new(&parts)?;
    let mut progress = Progress::new("evaluating", show.quiet);
    let result = eval::perplexity(
        &decoder,
        &text.protocol,
        &text.windows,
        &mut |done, total| progress.set(done as u64, total as u64, ""),
    )?;
    progress.finish();
    show.print(&text.measured(result, &cpu, start), |measured| {
        describe_perplexity(&measured.result)
    })?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn compare(
    base_path: &Path,
    path: &Path,
    args: &TextArgs,
    machine: Machine,
    show: Show,
) -> Result<ExitCode, CliError> {
    let start = Instant::now();
    let (base, model) = (Model::open(base_path)?, Model::open(path)?);
    let cpu = machine.cpu(args.path);
    let base_parts = Parts::new(&base, &cpu.with_path(Arithmetic::Reference))?;
    let parts = Parts::new(&model, &cpu)?;
    let text = Text::load(&base, &base_parts.config, base_path, args)?;
    let (base, model) = (Decoder::new(&base_parts)?, Decoder::new(&parts)?);
    let mut progress = Progress::new("comparing", show.quiet);
    let mut tick = |done: usize, total: usize| progress.set(done as u64, total as u64, "");
    let result = eval::compare(&base, &model, &text.protocol, &text.windows, &mut tick)?;
    progress.finish();
    show.print(&text.measured(result, &cpu, start), |measured| {
        describe_comparison(&measured.result)
    })?;
    Ok(ExitCode::SUCCESS)
}

impl Text {
    fn load(
        model: &Model,
        config: &ModelConfig,
        path: &Path,
        args: &TextArgs,
    ) -> Result<Self, CliError> {
        let protocol = Protocol::parse(&args.protocol)?;
        let tokenizer = loaded::need_tokenizer(model, config, path)?;
        let text = loaded::text(&args.data)?;
        config.check_context(protocol.window())?;
        let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
        let windows = protocol.windows(&tokenizer.encode(&text)?, args.windows, bos)?;
        Ok(Self {
            protocol,
            windows,
            sha256: sha256_hex(text.as_bytes()),
        })
    }

    fn measured<T>(self, result: T, cpu: &Cpu, start: Instant) -> Measured<T> {
        Measured {
            result,
            path: cpu.path.name(),
            isa: cpu.isa.level().name(),
            threads: cpu.pool.threads(),
            text_sha256: self.sha256,
            seconds: start.elapsed().as_secs_f64(),
        }
    }
}

fn describe_perplexity(p: &Perplexity) -> String {
    let perplexity = render::with_error(p.perplexity, p.perplexity_error, 4);
    format!(
        "perplexity {perplexity}  (protocol {}, {} windows, {} tokens)\n",
        p.protocol, p.windows, p.tokens
    )
}

fn describe_comparison(c: &Comparison) -> String {
    let row = |name: &str, value: String| vec![name.to_string(), value];
    let p = &c.kl_percentiles;
    let rows = [
        row(
            "mean KL divergence, nats",
            render::with_error(c.kl_mean, c.kl_error, 5),
        ),
        row("  median", format!("{:.5}", p.p50)),
        row("  90% / 95%", format!("{:.5} / {:.5}", p.p90, p.p95)),
        row("  99% / 99.9%", format!("{:.5} / {:.5}", p.p99, p.p99_9)),
        row("  maximum", format!("{:.5}", p.max)),
        row(
            "same most likely token, %",
            render::with_error(100.0 * c.top1, c.top1_error.map(|e| 100.0 * e), 2),
        ),
        row(
            "ln perplexity ratio",
            render::with_error(c.ln_ppl_ratio, c.ln_ppl_ratio_error, 5),
        ),
        row(
            "RMS change of p(true token), %",
            format!("{:.3}", 100.0 * c.rms_delta_p),
        ),
        row(
            "perplexity of the base",
            render::with_error(c.base.perplexity, c.base.perplexity_error, 4),
        ),
        row(
            "perplexity of the model",
            render::with_error(c.model.perplexity, c.model.perplexity_error, 4),
        ),
    ];
    let head = format!(
        "protocol {}, {} windows, {} tokens",
        c.protocol, c.windows, c.tokens
    );
    render::table(&[&head, ""], &rows)
}
