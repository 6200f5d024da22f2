//! Sets of instructions, and work compiled for each of them.

use std::fmt;
use std::str::FromStr;

/// A set of instructions, each including those before it on the same architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Portable Rust: the definition of every kernel.
    Scalar,
    /// AArch64 with `dotprod`.
    Neon,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX2 with the 256-bit byte dot product.
    AvxVnni,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// AVX-512 and the INT8 and BF16 tiles of AMX, granted by the operating system.
    Amx,
}

impl Level {
    /// All of them, lowest first.
    pub const ALL: [Self; 6] = [
        Self::Scalar,
        Self::Neon,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512,
        Self::Amx,
    ];

    /// The name that `--isa` takes.
    pub fn name(self) -> &'static str {
        ["scalar", "neon", "avx2", "avxvnni", "avx512", "amx"][self as usize]
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that belongs to no [`Level`].
#[derive(Debug, thiserror::Error)]
#[error("unknown instruction set `{0}`, expected scalar, neon, avx2, avxvnni, avx512 or amx")]
pub struct UnknownLevel(String);

impl FromStr for Level {
    type Err = UnknownLevel;

    fn from_str(name: &str) -> Result<Self, UnknownLevel> {
        let found = Self::ALL.into_iter().find(|level| level.name() == name);
        found.ok_or_else(|| UnknownLevel(name.into()))
    }
}

/// Proof that the instructions of its level may be executed: only [detection](Isa::detect) makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa {
    level: Level,
    vbmi2: bool,
    bf16: bool,
}

impl Isa {
    /// Portable Rust, which every machine executes.
    pub(super) const SCALAR: Self = Self {
        level: Level::Scalar,
        vbmi2: false,
        bf16: false,
    };

    /// A level with its extras: [`Self::has_vbmi2`], [`Self::has_bf16`].
    ///
    /// # Safety
    /// This machine has these instructions, and its system lets this process execute them.
    pub(super) const unsafe fn new(level: Level, vbmi2: bool, bf16: bool) -> Self {
        Self { level, vbmi2, bf16 }
    }

    /// The level.
    pub fn level(self) -> Level {
        self.level
    }

    /// Whether VBMI and VBMI2 (byte permutation and expansion) may be used at 512 bits.
    pub fn has_vbmi2(self) -> bool {
        self.vbmi2
    }

    /// Whether the dot product of bf16 pairs may be used at 512 bits: it is there and gives the bits that
    /// [`product_rounded`](super::gemm::product_rounded) defines.
    pub fn has_bf16(self) -> bool {
        self.bf16
    }

    /// Runs work compiled for this level's vectors. The compiler neither reorders nor fuses float operations, so the
    /// result is the same at every level.
    #[inline]
    pub fn run<W: Vectorized>(self, work: W) -> W::Output {
        match self.level {
            // SAFETY: an `Isa` of this level exists only where detection found these features.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Amx => unsafe { run_avx512(work) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::AvxVnni => unsafe { run_avx2(work) },
            // Without the instruction every multiply-add is a library call, with the same result.
            // SAFETY: just detected.
            #[cfg(target_arch = "x86_64")]
            Level::Scalar if is_x86_feature_detected!("fma") => unsafe { run_fma(work) },
            // NEON itself is part of every AArch64 target, so the portable code already uses it.
            _ => work.run(),
        }
    }
}

/// Work written in portable Rust that is compiled again for each instruction set by [`Isa::run`].
pub trait Vectorized {
    /// What it returns.
    type Output;

    /// The work. Implementations are `#[inline(always)]`: only then they are compiled for the caller's level.
    fn run(self) -> Self::Output;
}

/// # Safety
/// The CPU has these features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn run_avx512<W: Vectorized>(work: W) -> W::Output {
    work.run()
}

/// # Safety
/// The CPU has these features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<W: Vectorized>(work: W) -> W::Output {
    work.run()
}

/// # Safety
/// The CPU has this feature.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "fma")]
unsafe fn run_fma<W: Vectorized>(work: W) -> W::Output {
    work.run()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for level in Level::ALL {
            assert_eq!(level.name().parse::<Level>().expect("a known name"), level);
        }
        let error = "sse9".parse::<Level>().expect_err("no such level");
        assert!(error.to_string().contains("`sse9`"), "{error}");
    }

    #[test]
    fn work_gives_the_same_bits_at_every_level() {
        struct Dot<'a>(&'a [f32], &'a [f32]);
        impl Vectorized for Dot<'_> {
            type Output = f32;
            #[inline(always)]
            fn run(self) -> f32 {
                let pairs = self.0.iter().zip(self.1);
                pairs.fold(0.0, |sum, (a, b)| a.mul_add(*b, sum * 0.999))
            }
        }
        let a: Vec<f32> = (0..100).map(|i| (i as f32).sin()).collect();
        let b: Vec<f32> = (0..100).map(|i| (i as f32).cos()).collect();
        let expected = Dot(&a, &b).run();
        for isa in Isa::available() {
            assert_eq!(isa.run(Dot(&a, &b)).to_bits(), expected.to_bits());
        }
    }
}
