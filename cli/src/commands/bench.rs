//! `qbin bench`: how fast a model runs here, how much memory it takes, and how near that is to what the machine can do.

mod figures;
mod report;

use crate::args::BenchArgs;
use crate::commands::Show;
use crate::error::CliError;
use crate::host::{self, Host, Resident};
use crate::loaded;
use crate::machine::Machine;
use crate::progress::Progress;
use figures::{Work, step_weights};
use qbin_format::{Model, Weight};
use qbin_runtime::kernels::limits::{self, Buffer, Limits};
use qbin_runtime::{
    Decoder, KvCache, KvDtype, ModelConfig, Parts, RuntimeError, Sampler, Sampling,
};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use report::{ColdStart, Facts, Report, Row};
use serde::Serialize;
use std::process::ExitCode;
use std::time::Instant;

/// What is measured of every setting.
#[derive(Clone, Copy, Debug, Serialize)]
struct Plan {
    /// Tokens of a prompt.
    prompt: usize,
    /// Tokens generated.
    generate: usize,
    /// Positions in the cache before the first of them.
    depth: usize,
    /// Measurements that count.
    repeat: usize,
    /// Seed of the token ids.
    seed: u64,
}

/// Seconds of the measurements of one setting.
struct Times {
    machine: Machine,
    batch: usize,
    prompt: Vec<f64>,
    generate: Vec<f64>,
}

pub(crate) fn run(
    args: &BenchArgs,
    machines: &[Machine],
    show: Show,
) -> Result<ExitCode, CliError> {
    let plan = Plan {
        prompt: args.prompt,
        generate: args.generate,
        depth: args.depth.unwrap_or(args.prompt),
        repeat: args.repeat,
        seed: args.seed,
    };
    let start = Instant::now();
    let model = loaded::model(&args.model, args.huge_pages)?;
    let config = loaded::config(&model)?;
    config.check_context(plan.positions())?;
    let work = Work::new(&model, &config, KvDtype::of(args.path));
    let largest = args.batch.iter().copied().max().unwrap_or(1);
    plan.check_memory(&config, &work, largest)?;

    let mut progress = Progress::new("measuring", show.quiet);
    let runs = plan.runs() * machines.len() * args.batch.len();
    let mut done = 0;
    let mut cold = None;
    let mut times = Vec::new();
    for &machine in machines {
        let parts = Parts::new(&model, &machine.cpu(args.path))?;
        let decoder = Decoder::new(&parts)?;
        let load_seconds = start.elapsed().as_secs_f64();
        for &batch in &args.batch {
            let mut sequences = Sequences::new(&decoder, &plan, batch)?;
            sequences.prompt()?;
            cold.get_or_insert_with(|| ColdStart {
                load_seconds,
                first_token_seconds: start.elapsed().as_secs_f64(),
            });
            times.push(sequences.measure(machine, &mut || {
                done += 1;
                progress.set(done, runs as u64, &format!("{machine}, batch {batch}"));
            })?);
        }
    }
    progress.finish();

    // Before the limits are measured: their buffer is no memory of the model's.
    let resident = Resident::read();
    let host = Host::read();
    let limits = match args.no_limits {
        true => Vec::new(),
        false => measure_limits(machines, &host, &step_weights(&model, &config)),
    };
    let facts = Facts {
        plan,
        path: args.path,
        work,
        price_per_hour: args.price_per_hour,
    };
    let row = |times: &Times| {
        let at = machines
            .iter()
            .position(|machine| *machine == times.machine);
        Row::new(&facts, times, at.and_then(|at| limits.get(at)))
    };
    let report = Report {
        model: args.model.display().to_string(),
        file_bytes: file_bytes(&model),
        weight_bytes: facts.work.weight_bytes,
        cache_bytes: largest as u64 * facts.work.cache_bytes(plan.positions()),
        path: args.path.name(),
        plan,
        price_per_hour: args.price_per_hour,
        cold: cold.expect("clap asks for a batch, and there is a machine"),
        resident,
        results: times.iter().map(row).collect(),
        host,
    };
    show.print(&report, Report::markdown)?;
    Ok(ExitCode::SUCCESS)
}

impl Plan {
    fn positions(&self) -> usize {
        self.prompt.max(self.depth + self.generate)
    }

    /// Measurements of one setting.
    fn runs(&self) -> usize {
        2 * self.repeat
    }

    /// Refuses what would not fit into memory: the caches and the widest activations of the prompts.
    fn check_memory(
        &self,
        config: &ModelConfig,
        work: &Work,
        batch: usize,
    ) -> Result<(), CliError> {
        let width = 4 * config.hidden_size
            + config.q_dim()
            + 2 * config.kv_dim()
            + 2 * config.intermediate_size;
        let activations = 4 * (self.prompt.max(self.depth) * width + config.vocab_size) as u64;
        let need = (batch as u64).saturating_mul(work.cache_bytes(self.positions()) + activations);
        match host::available_bytes() {
            Some(available) if need > available => Err(CliError::BatchTooLarge {
                batch,
                positions: self.positions(),
                need,
                available,
            }),
            _ => Ok(()),
        }
    }
}

/// The sequences of one batch, which are run again and again in the same caches.
struct Sequences<'a> {
    decoder: &'a Decoder<'a>,
    plan: &'a Plan,
    caches: Vec<KvCache>,
    /// Token ids, `[batch, positions]`.
    tokens: Vec<Vec<u32>>,
    sampler: Sampler,
}

impl<'a> Sequences<'a> {
    fn new(decoder: &'a Decoder<'a>, plan: &'a Plan, batch: usize) -> Result<Self, RuntimeError> {
        let mut rng = ChaCha8Rng::seed_from_u64(plan.seed);
        let vocab = decoder.config().vocab_size as u32;
        let sequence = |_| {
            (0..plan.positions())
                .map(|_| rng.random_range(..vocab))
                .collect()
        };
        Ok(Self {
            decoder,
            plan,
            caches: (0..batch)
                .map(|_| decoder.cache(plan.positions()))
                .collect(),
            tokens: (0..batch).map(sequence).collect(),
            sampler: Sampler::new(Sampling::default(), decoder.cpu().isa)?,
        })
    }

    /// The measurements that count, after the prompts were run once. `tick` is called behind each.
    fn measure(&mut self, machine: Machine, tick: &mut dyn FnMut()) -> Result<Times, RuntimeError> {
        let mut seconds = |run: &mut dyn FnMut() -> Result<(), RuntimeError>| {
            let start = Instant::now();
            run()?;
            let seconds = start.elapsed().as_secs_f64();
            tick();
            Ok::<_, RuntimeError>(seconds)
        };
        let repeat = self.plan.repeat;
        let prompt = (0..repeat)
            .map(|_| seconds(&mut || self.prompt()))
            .collect::<Result<_, _>>()?;
        self.fill()?;
        self.generate(1)?;
        let generate = (0..repeat)
            .map(|_| seconds(&mut || self.generate(self.plan.generate)))
            .collect::<Result<_, _>>()?;
        Ok(Times {
            machine,
            batch: self.caches.len(),
            prompt,
            generate,
        })
    }

    /// Runs the prompts in empty caches, as far as the first token of each.
    fn prompt(&mut self) -> Result<(), RuntimeError> {
        self.truncate(0);
        self.next(0..self.plan.prompt).map(drop)
    }

    /// Brings the caches to the depth at which generation starts.
    fn fill(&mut self) -> Result<(), RuntimeError> {
        let (there, depth) = (self.plan.prompt, self.plan.depth);
        if there < depth {
            self.next(there..depth)?;
        }
        Ok(())
    }

    /// Generates `tokens` tokens behind `depth` positions, each the most likely one behind those before it.
    fn generate(&mut self, tokens: usize) -> Result<(), RuntimeError> {
        let depth = self.plan.depth;
        self.truncate(depth);
        for position in depth..depth + tokens {
            let chosen = self.next(position..position + 1)?;
            // Beyond the last there is no place, and no step that would read it.
            for (sequence, id) in self.tokens.iter_mut().zip(chosen) {
                if let Some(next) = sequence.get_mut(position + 1) {
                    *next = id;
                }
            }
        }
        Ok(())
    }

    /// Runs these positions of every sequence and chooses the token behind them.
    fn next(&mut self, positions: std::ops::Range<usize>) -> Result<Vec<u32>, RuntimeError> {
        let inputs: Vec<&[u32]> = self
            .tokens
            .iter()
            .map(|tokens| &tokens[positions.clone()])
            .collect();
        let last = vec![positions.len() - 1..positions.len(); inputs.len()];
        let caches = Some(self.caches.as_mut_slice());
        let hidden = self.decoder.forward_for(&inputs, caches, &last)?;
        let config = self.decoder.config();
        let logits = self.decoder.logits(&hidden);
        let logits = logits.chunks_exact(config.vocab_size);
        Ok(logits.map(|logits| self.sampler.choose(logits)).collect())
    }

    fn truncate(&mut self, len: usize) {
        self.caches.iter_mut().for_each(|cache| cache.truncate(len));
    }
}

/// The limits of every machine setting, in order.
fn measure_limits(machines: &[Machine], host: &Host, weights: &[Weight]) -> Vec<Limits> {
    let wanted = Buffer::bytes_beyond(host.last_cache_bytes());
    // Never more than a quarter of what is free, and at least a page.
    let free =
        host::available_bytes().map_or(wanted, |free| usize::try_from(free / 4).unwrap_or(wanted));
    let buffer = Buffer::new(wanted.min(free).max(1 << 20));
    let weights: Vec<&[u8]> = weights.iter().flat_map(Weight::stored).collect();
    let measure =
        |machine: &Machine| limits::measure(machine.isa, machine.threads, &buffer, &weights);
    machines.iter().map(measure).collect()
}

/// Bytes of the files a model was read from.
fn file_bytes(model: &Model) -> u64 {
    match model {
        Model::Artifact(artifact) => artifact.file_bytes(),
        Model::Checkpoint(checkpoint) => checkpoint.total_bytes(),
    }
}
