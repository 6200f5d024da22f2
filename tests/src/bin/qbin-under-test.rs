//! The program `qbin` as the tests of this package start it: a package finds only its own programs.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    qbin_cli::main(std::env::args_os())
}
