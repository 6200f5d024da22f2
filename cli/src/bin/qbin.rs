//! The `qbin` command.

fn main() -> std::process::ExitCode {
    qbin_cli::main(std::env::args_os())
}
