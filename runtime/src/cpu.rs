//! What a model runs on: instructions, threads, and which arithmetic.

use crate::kernels::{Isa, Pool};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// How linears are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Weights dequantized to f32, f32 arithmetic: what comparisons are made with.
    Reference,
    /// The same with weights and activations rounded to bf16, summed in f32: what calibration data run through.
    Bf16,
    /// Quantized weights as they are, with activations as int8 per token and group; weights that are not quantized
    /// in f32. The same bits for every instruction set, batch size and number of threads.
    Fast,
}

impl Path {
    /// The name that `--path` takes.
    pub fn name(self) -> &'static str {
        ["reference", "bf16", "fast"][self as usize]
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that belongs to no [`Path`].
#[derive(Debug, thiserror::Error)]
#[error("unknown path `{0}`, expected reference, bf16 or fast")]
pub struct UnknownPath(String);

impl FromStr for Path {
    type Err = UnknownPath;

    fn from_str(name: &str) -> Result<Self, UnknownPath> {
        let found = [Self::Reference, Self::Bf16, Self::Fast]
            .into_iter()
            .find(|path| path.name() == name);
        found.ok_or_else(|| UnknownPath(name.into()))
    }
}

/// Instructions, threads and arithmetic of a forward pass. Clones share the threads.
#[derive(Clone, Debug)]
pub struct Cpu {
    /// The arithmetic.
    pub path: Path,
    /// The instructions.
    pub isa: Isa,
    /// The threads.
    pub pool: Arc<Pool>,
}

impl Cpu {
    /// With threads of its own.
    ///
    /// # Panics
    /// If `threads` is 0, or the system does not give them.
    pub fn new(path: Path, isa: Isa, threads: usize) -> Self {
        Self {
            path,
            isa,
            pool: Arc::new(Pool::new(threads)),
        }
    }

    /// The same instructions and threads on another path.
    pub fn with_path(&self, path: Path) -> Self {
        Self {
            path,
            ..self.clone()
        }
    }
}
