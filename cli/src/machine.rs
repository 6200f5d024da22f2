//! Which instructions and how many threads a command uses.

use crate::error::CliError;
use qbin_runtime::kernels::{Isa, Level, default_threads};
use qbin_runtime::{Cpu, Path};

/// What the command line says of the machine, checked against it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine {
    pub(crate) isa: Isa,
    pub(crate) threads: usize,
}

impl Machine {
    /// The instruction set and the threads asked for, or the best there are.
    pub(crate) fn new(level: Option<Level>, threads: Option<u16>) -> Result<Self, CliError> {
        Ok(Self {
            isa: level.map_or_else(|| Ok(Isa::detect()), Isa::at)?,
            threads: threads.map_or_else(default_threads, usize::from),
        })
    }

    /// The same for a model.
    pub(crate) fn cpu(self, path: Path) -> Cpu {
        Cpu::new(path, self.isa, self.threads)
    }
}
