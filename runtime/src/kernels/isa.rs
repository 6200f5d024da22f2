//! Which instructions this machine has, found out once, and work compiled for each of them.

#[cfg(target_arch = "x86_64")]
use super::gemm;
use std::fmt;
use std::str::FromStr;
#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

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

/// A level that this machine does not have.
#[derive(Debug, thiserror::Error)]
#[error(
    "instruction set `{asked}` is not available here: this machine offers {}",
    offered.iter().map(|level| level.name()).collect::<Vec<_>>().join(", ")
)]
pub struct UnsupportedLevel {
    /// What was asked for.
    pub asked: Level,
    /// What there is.
    pub offered: Vec<Level>,
}

/// Proof that the instructions of its level may be executed: only detection makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa {
    level: Level,
    vbmi2: bool,
    bf16: bool,
}

impl Isa {
    /// The highest level of this machine.
    pub fn detect() -> Self {
        let highest = Self::available().pop();
        highest.expect("the scalar level is always there")
    }

    /// Exactly `level`.
    ///
    /// # Errors
    /// If this machine does not have it.
    pub fn at(level: Level) -> Result<Self, UnsupportedLevel> {
        let available = Self::available();
        let found = available.iter().find(|isa| isa.level == level);
        found.copied().ok_or_else(|| UnsupportedLevel {
            asked: level,
            offered: available.iter().map(|isa| isa.level).collect(),
        })
    }

    /// Every level of this machine, lowest first; the first is scalar.
    pub fn available() -> Vec<Self> {
        let mut levels = vec![Self::plain(Level::Scalar)];
        levels.extend(native());
        levels
    }

    /// A level without extras.
    const fn plain(level: Level) -> Self {
        Self {
            level,
            vbmi2: false,
            bf16: false,
        }
    }

    /// The level.
    pub fn level(self) -> Level {
        self.level
    }

    /// Whether VBMI and VBMI2 (byte permutation and expansion) may be used at 512 bits.
    pub fn has_vbmi2(self) -> bool {
        self.vbmi2
    }

    /// Whether the dot product of bf16 pairs may be used at 512 bits: it is there and sums in the order that
    /// [`gemm`](super::gemm) defines.
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

/// The levels above scalar, lowest first.
#[cfg(target_arch = "x86_64")]
fn native() -> Vec<Isa> {
    let mut found = Vec::new();
    if is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
    {
        found.push(Isa::plain(Level::Avx2));
        if is_x86_feature_detected!("avxvnni") {
            found.push(Isa::plain(Level::AvxVnni));
        }
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
        {
            let vbmi2 =
                is_x86_feature_detected!("avx512vbmi") && is_x86_feature_detected!("avx512vbmi2");
            let mut avx512 = Isa {
                level: Level::Avx512,
                vbmi2,
                bf16: is_x86_feature_detected!("avx512bf16"),
            };
            avx512.bf16 = avx512.bf16 && sums_pairs_in_order(avx512);
            found.push(avx512);
            let amx = Isa {
                level: Level::Amx,
                ..avx512
            };
            if amx::granted(amx) {
                found.push(amx);
            }
        }
    }
    found
}

#[cfg(target_arch = "aarch64")]
fn native() -> Vec<Isa> {
    let dotprod = std::arch::is_aarch64_feature_detected!("dotprod");
    dotprod
        .then_some(Isa::plain(Level::Neon))
        .into_iter()
        .collect()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn native() -> Vec<Isa> {
    Vec::new()
}

/// Whether the dot product of bf16 pairs gives the bits of the definition; asked once.
#[cfg(target_arch = "x86_64")]
fn sums_pairs_in_order(isa: Isa) -> bool {
    static AGREES: OnceLock<bool> = OnceLock::new();
    *AGREES.get_or_init(|| gemm::agrees(isa, Isa::plain(Level::Scalar)))
}

/// Whether AMX may be used: the CPU has it, Linux gives this process the tiles' state, and it multiplies right.
#[cfg(target_arch = "x86_64")]
mod amx {
    use std::sync::OnceLock;

    use super::{Isa, Level};
    use crate::kernels::quantized;

    /// CPUID leaf 7, EDX: BF16 tiles, tiles, INT8 tiles.
    const CPUID_AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;

    /// Asks once; the answer holds for all threads of the process.
    pub(super) fn granted(amx: Isa) -> bool {
        static GRANTED: OnceLock<bool> = OnceLock::new();
        *GRANTED.get_or_init(|| {
            let leaves = std::arch::x86_64::__cpuid(0).eax;
            let has_amx =
                leaves >= 7 && std::arch::x86_64::__cpuid_count(7, 0).edx & CPUID_AMX == CPUID_AMX;
            has_amx && request_tiles() && quantized::agrees(amx, Isa::plain(Level::Scalar))
        })
    }

    /// `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`: the kernel's answer counts, not CPUID's, because
    /// sandboxes and hypervisors may withhold the state.
    #[cfg(target_os = "linux")]
    fn request_tiles() -> bool {
        const SYS_ARCH_PRCTL: isize = 158;
        const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
        const XFEATURE_XTILEDATA: usize = 18;
        let result: isize;
        // SAFETY: this system call reads two integers and changes no memory of the process; `syscall` overwrites
        // only rax, rcx and r11.
        unsafe {
            std::arch::asm!(
                "syscall",
                inlateout("rax") SYS_ARCH_PRCTL => result,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XFEATURE_XTILEDATA,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack),
            );
        }
        result == 0
    }

    #[cfg(not(target_os = "linux"))]
    fn request_tiles() -> bool {
        false
    }
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
    fn a_level_is_had_or_refused() {
        let available = Isa::available();
        assert_eq!(available[0].level(), Level::Scalar);
        assert!(available.is_sorted_by_key(|isa| isa.level()));
        for level in Level::ALL {
            let there = available.iter().any(|isa| isa.level() == level);
            match Isa::at(level) {
                Ok(isa) => assert!(there && isa.level() == level),
                Err(error) => assert!(!there && error.to_string().contains(level.name())),
            }
        }
    }

    // Without this, a wrong kernel would only be refused by detection, and nothing would show it.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn bf16_pairs_sum_as_defined_where_the_instruction_is() {
        for isa in Isa::available() {
            let expected = isa.level() >= Level::Avx512 && is_x86_feature_detected!("avx512bf16");
            assert_eq!(isa.has_bf16(), expected, "{}", isa.level());
        }
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
