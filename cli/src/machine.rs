//! Which instructions and how many threads a command uses.

use crate::error::CliError;
use qbin_runtime::kernels::{Isa, Level, default_threads};
use qbin_runtime::{Cpu, Path};
use std::fmt;

/// What the command line says of the machine, checked against it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Machine {
    pub(crate) isa: Isa,
    pub(crate) threads: usize,
}

impl Machine {
    /// Every combination of the instruction sets and numbers of threads asked for; where none is named, the best
    /// there is.
    pub(crate) fn all(levels: &[Level], threads: &[u16]) -> Result<Vec<Self>, CliError> {
        let isas = match levels {
            [] => vec![Isa::detect()],
            _ => levels
                .iter()
                .map(|&level| Isa::at(level))
                .collect::<Result<_, _>>()?,
        };
        let threads = match threads {
            [] => vec![default_threads()],
            _ => threads
                .iter()
                .map(|&threads| usize::from(threads))
                .collect(),
        };
        let with = |isa| threads.iter().map(move |&threads| Self { isa, threads });
        Ok(isas.into_iter().flat_map(with).collect())
    }

    /// The same for a model.
    pub(crate) fn cpu(self, path: Path) -> Cpu {
        Cpu::new(path, self.isa, self.threads)
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, threads: {}", self.isa.level(), self.threads)
    }
}
