//! The `quantize` command: `qbin quantize` under its own name.

fn main() -> std::process::ExitCode {
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_else(|| "quantize".into());
    qbin_cli::main([name, "quantize".into()].into_iter().chain(args))
}
