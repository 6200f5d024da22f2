//! The commands of qbin: reads what was typed, lets the libraries work, shows what came out.
//!
//! Exit status: 0 done, 1 a check was not met (a digest, for example), 2 could not do it.
#![forbid(unsafe_code)]

mod args;
mod calibration;
mod commands;
mod error;
mod host;
mod loaded;
mod machine;
mod plan;
mod progress;
mod recipe;
mod render;
mod source;

use args::{Cli, Command, EvalCommand};
use clap::Parser as _;
use error::CliError;
use machine::Machine;
use std::ffi::OsString;
use std::process::ExitCode;

/// Runs the command line `args`, the program's name first.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    // clap prints help and usage errors itself and exits with 2 for the latter.
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let filter = if cli.quiet {
        tracing::Level::ERROR
    } else {
        tracing::Level::WARN
    };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(filter)
        .without_time()
        .with_target(false)
        .init();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            render::error(&error, error.hint());
            ExitCode::from(2)
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode, CliError> {
    let show = commands::Show {
        json: cli.json,
        quiet: cli.quiet,
    };
    let machines = Machine::all(&cli.isa, &cli.threads)?;
    if let [threads] = *cli.threads {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.into())
            .build_global();
        pool.expect("the pool is built once, before its first use");
    }
    let machine = || match *machines {
        [machine] => Ok(machine),
        _ => Err(CliError::SeveralMachines),
    };
    match cli.command {
        Command::Bench(args) => commands::bench::run(&args, &machines, show),
        Command::Quantize(args) => commands::quantize::run(&args, machine()?, show),
        Command::Prune(args) => commands::prune::run(&args, machine()?, show),
        Command::Plan(args) => commands::plan::run(&args, show),
        Command::Inspect(args) => commands::inspect::run(&args, show),
        Command::Verify { artifact } => commands::verify::run(&artifact, show),
        Command::Eval(EvalCommand::Perplexity { model, text }) => {
            commands::eval::perplexity(&model, &text, machine()?, show)
        }
        Command::Eval(EvalCommand::Compare { base, model, text }) => {
            commands::eval::compare(&base, &model, &text, machine()?, show)
        }
        Command::Run(args) => commands::run::run(&args, machine()?, show),
        Command::Completions { shell } => commands::shell::completions(shell),
        Command::Man { dir } => commands::shell::man(&dir),
        Command::Synth(args) => commands::synth::run(&args, show),
    }
}
