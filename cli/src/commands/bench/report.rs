//! What a benchmark found, as JSON and as Markdown.

use super::figures::{Speed, Work, cost_per_million, peak};
use super::{Plan, Times};
use crate::host::{Host, Resident};
use crate::render;
use qbin_runtime::Path;
use qbin_runtime::kernels::limits::Limits;
use serde::Serialize;

/// Everything, in bytes, seconds, and units per second.
#[derive(Serialize)]
pub(super) struct Report {
    pub(super) model: String,
    pub(super) file_bytes: u64,
    /// Bytes of all weights that a step reads.
    pub(super) weight_bytes: u64,
    /// Keys and values of the largest batch.
    pub(super) cache_bytes: u64,
    pub(super) path: &'static str,
    #[serde(flatten)]
    pub(super) plan: Plan,
    pub(super) price_per_hour: Option<f64>,
    pub(super) cold: ColdStart,
    /// Behind all measurements, before the limits were measured.
    pub(super) resident: Resident,
    pub(super) results: Vec<Row>,
    pub(super) host: Host,
}

/// The first prompt of the first setting, from the start of the command.
#[derive(Serialize)]
pub(super) struct ColdStart {
    /// Until the model could run.
    pub(super) load_seconds: f64,
    /// Until the first token was chosen.
    pub(super) first_token_seconds: f64,
}

/// What all settings have in common.
pub(super) struct Facts {
    pub(super) plan: Plan,
    pub(super) path: Path,
    pub(super) work: Work,
    pub(super) price_per_hour: Option<f64>,
}

/// One setting.
#[derive(Serialize)]
pub(super) struct Row {
    isa: &'static str,
    threads: usize,
    batch: usize,
    /// Tokens of the prompts per second, up to the choice of each first token.
    prompt_tokens_per_second: Speed,
    /// Median time to the first token, the model being loaded.
    first_token_seconds: f64,
    /// Operations of the linears per second, of the median.
    prompt_operations_per_second: f64,
    prompt_share_of_peak: Option<f64>,
    /// Generated tokens of all sequences per second.
    generated_tokens_per_second: Speed,
    /// Bytes read for each of them.
    bytes_per_token: f64,
    /// Of the median.
    bytes_per_second: f64,
    share_of_read_limit: Option<f64>,
    cost_per_million_prompt_tokens: Option<f64>,
    cost_per_million_generated_tokens: Option<f64>,
    limits: Option<MachineLimits>,
}

/// The limits for a setting's instruction set and threads, per second.
#[derive(Clone, Copy, Serialize)]
struct MachineLimits {
    plain_read_bytes: f64,
    read_bytes: f64,
    weight_read_bytes: f64,
    int8_operations: Option<f64>,
    f32_operations: Option<f64>,
    bf16_operations: Option<f64>,
}

impl Row {
    pub(super) fn new(facts: &Facts, times: &Times, limits: Option<&Limits>) -> Self {
        let (plan, work, batch) = (&facts.plan, &facts.work, times.batch);
        let prompt = Speed::new((batch * plan.prompt) as f64, &times.prompt);
        let generated = Speed::new((batch * plan.generate) as f64, &times.generate);
        let first_token_seconds = (batch * plan.prompt) as f64 / prompt.median;
        let operations = work.prompt_operations(batch, plan.prompt) / first_token_seconds;
        let bytes_per_token = work.step_bytes(batch, plan.depth, plan.generate) / batch as f64;
        let bytes_per_second = bytes_per_token * generated.median;
        let cost = |speed: Speed| Some(cost_per_million(facts.price_per_hour?, speed.median));
        Self {
            isa: times.machine.isa.level().name(),
            threads: times.machine.threads,
            batch,
            prompt_tokens_per_second: prompt,
            first_token_seconds,
            prompt_operations_per_second: operations,
            prompt_share_of_peak: limits
                .and_then(|limits| Some(operations / peak(facts.path, limits)?)),
            generated_tokens_per_second: generated,
            bytes_per_token,
            bytes_per_second,
            share_of_read_limit: limits.map(|limits| bytes_per_second / limits.read),
            cost_per_million_prompt_tokens: cost(prompt),
            cost_per_million_generated_tokens: cost(generated),
            limits: limits.map(|limits| MachineLimits {
                plain_read_bytes: limits.read_plain,
                read_bytes: limits.read,
                weight_read_bytes: limits.read_weights,
                int8_operations: limits.int8,
                f32_operations: limits.f32,
                bf16_operations: limits.bf16,
            }),
        }
    }

    /// The setting's cells of every table.
    fn setting(&self) -> Vec<String> {
        vec![
            self.isa.into(),
            self.threads.to_string(),
            self.batch.to_string(),
        ]
    }
}

impl Report {
    /// A page of Markdown.
    pub(super) fn markdown(&self) -> String {
        let mut text = self.heading();
        text += &self.prompt_table();
        text += "\n";
        text += &self.generation_table();
        if let Some(limits) = self.limits_table() {
            text += "\n";
            text += &limits;
        }
        text
    }

    fn heading(&self) -> String {
        let Plan {
            prompt,
            generate,
            depth,
            repeat,
            ..
        } = self.plan;
        let known = |bytes: Option<u64>| bytes.map_or("unknown".into(), render::bytes);
        let caches: Vec<String> = self
            .host
            .caches
            .iter()
            .map(|c| format!("L{} {}", c.level, render::bytes(c.bytes as u64)))
            .collect();
        format!(
            "{cpu}, {cpus} CPUs, {caches}, memory {memory}\n\n\
             {model}: file {file}, weights that a step reads {weights}, {path} path; \
             prompts of {prompt} tokens, {generate} tokens generated behind {depth}; median of {repeat}\n\n\
             Cold start: loaded after {load:.0} ms, first token after {first:.0} ms. \
             Resident: {peak} at most (at the end {anonymous} of its own, {mapped} of the file), caches {cached}.\n\n",
            cpu = self.host.cpu.as_deref().unwrap_or("unknown CPU"),
            cpus = self.host.cpus,
            caches = caches.join(", "),
            memory = known(self.host.memory_bytes),
            model = self.model,
            file = render::bytes(self.file_bytes),
            weights = render::bytes(self.weight_bytes),
            path = self.path,
            load = 1e3 * self.cold.load_seconds,
            first = 1e3 * self.cold.first_token_seconds,
            peak = known(self.resident.peak_bytes),
            anonymous = known(self.resident.anonymous_bytes),
            mapped = known(self.resident.file_bytes),
            cached = render::bytes(self.cache_bytes),
        )
    }

    fn prompt_table(&self) -> String {
        let rows = self.results.iter().map(|row| {
            let mut cells = row.setting();
            cells.extend(speed(row.prompt_tokens_per_second));
            cells.push(format!("{:.1}", 1e3 * row.first_token_seconds));
            cells.push(format!("{:.0}", 1e-9 * row.prompt_operations_per_second));
            cells.push(percent(row.prompt_share_of_peak));
            cells.extend(
                row.cost_per_million_prompt_tokens
                    .map(|cost| format!("{cost:.4}")),
            );
            cells
        });
        let columns = [
            "prompt tokens/s",
            "best",
            "spread",
            "first token ms",
            "GOP/s",
            "of peak",
        ];
        self.table(&columns, "cost of 1M prompt tokens", rows.collect())
    }

    fn generation_table(&self) -> String {
        let rows = self.results.iter().map(|row| {
            let mut cells = row.setting();
            cells.extend(speed(row.generated_tokens_per_second));
            cells.push(format!("{:.1}", 1e-6 * row.bytes_per_token));
            cells.push(format!("{:.2}", 1e-9 * row.bytes_per_second));
            cells.push(percent(row.share_of_read_limit));
            cells.extend(
                row.cost_per_million_generated_tokens
                    .map(|cost| format!("{cost:.4}")),
            );
            cells
        });
        let columns = [
            "generated tokens/s",
            "best",
            "spread",
            "MB per token",
            "GB/s",
            "of read limit",
        ];
        self.table(&columns, "cost of 1M generated tokens", rows.collect())
    }

    /// The limits of every setting but the batch.
    fn limits_table(&self) -> Option<String> {
        let mut rows: Vec<Vec<String>> = Vec::new();
        for row in &self.results {
            let limits = row.limits?;
            let giga = |value: Option<f64>| {
                value.map_or("–".into(), |value| format!("{:.0}", 1e-9 * value))
            };
            let mut cells = row.setting();
            cells.truncate(2);
            cells.push(format!("{:.2}", 1e-9 * limits.plain_read_bytes));
            cells.push(format!("{:.2}", 1e-9 * limits.read_bytes));
            cells.push(format!("{:.2}", 1e-9 * limits.weight_read_bytes));
            cells.extend(
                [
                    limits.int8_operations,
                    limits.f32_operations,
                    limits.bf16_operations,
                ]
                .map(giga),
            );
            rows.push(cells);
        }
        rows.dedup();
        let header = [
            "isa",
            "threads",
            "read limit GB/s, plain",
            "with prefetch",
            "of these weights",
            "int8 peak GOP/s",
            "f32 peak GFLOP/s",
            "bf16 peak GFLOP/s",
        ];
        Some(render::markdown_table(&header, &rows))
    }

    fn table(&self, columns: &[&str], cost: &'static str, rows: Vec<Vec<String>>) -> String {
        let mut header = vec!["isa", "threads", "batch"];
        header.extend(columns);
        header.extend(self.price_per_hour.map(|_| cost));
        render::markdown_table(&header, &rows)
    }
}

fn speed(speed: Speed) -> [String; 3] {
    [
        format!("{:.2}", speed.median),
        format!("{:.2}", speed.best),
        percent(Some(speed.spread)),
    ]
}

fn percent(share: Option<f64>) -> String {
    share.map_or("–".into(), |share| format!("{:.1}%", 100.0 * share))
}
