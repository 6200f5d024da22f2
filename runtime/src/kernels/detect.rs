//! Which instructions this machine has, found out once.
//!
//! Those whose results depend on more than IEEE 754 and integers are tried first: silently wrong ones would be worse than none.

#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

use super::isa::{Isa, Level};
#[cfg(target_arch = "x86_64")]
use super::{gemm, quantized};

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
        let found = available.iter().find(|isa| isa.level() == level);
        found.copied().ok_or_else(|| UnsupportedLevel {
            asked: level,
            offered: available.iter().map(|isa| isa.level()).collect(),
        })
    }

    /// Every level of this machine, lowest first; the first is scalar.
    pub fn available() -> Vec<Self> {
        let mut levels = vec![Self::SCALAR];
        levels.extend(native());
        levels
    }
}

/// The levels above scalar, lowest first.
#[cfg(target_arch = "x86_64")]
fn native() -> Vec<Isa> {
    // SAFETY: each call of it stands behind the detection of what it names.
    let detected = |level, vbmi2, bf16| unsafe { Isa::new(level, vbmi2, bf16) };
    let mut found = Vec::new();
    if is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
    {
        found.push(detected(Level::Avx2, false, false));
        if is_x86_feature_detected!("avxvnni") {
            found.push(detected(Level::AvxVnni, false, false));
        }
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
        {
            let vbmi2 =
                is_x86_feature_detected!("avx512vbmi") && is_x86_feature_detected!("avx512vbmi2");
            let bf16 = is_x86_feature_detected!("avx512bf16")
                && adds_pairs_as_defined(detected(Level::Avx512, vbmi2, true));
            found.push(detected(Level::Avx512, vbmi2, bf16));
            if amx::granted() {
                let amx = detected(Level::Amx, vbmi2, bf16);
                if multiplies_right(amx) {
                    found.push(amx);
                }
            }
        }
    }
    found
}

#[cfg(target_arch = "aarch64")]
fn native() -> Vec<Isa> {
    let dotprod = std::arch::is_aarch64_feature_detected!("dotprod");
    // SAFETY: called where it was just detected.
    let neon = || unsafe { Isa::new(Level::Neon, false, false) };
    dotprod.then(neon).into_iter().collect()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn native() -> Vec<Isa> {
    Vec::new()
}

/// Whether the dot product of bf16 pairs gives the bits of the definition; asked once.
#[cfg(target_arch = "x86_64")]
fn adds_pairs_as_defined(avx512: Isa) -> bool {
    static AGREES: OnceLock<bool> = OnceLock::new();
    *AGREES.get_or_init(|| gemm::agrees(avx512, gemm::Form::Pairs))
}

/// Whether the CPU is Intel's, for choices between ways that give the same bits. Asked once.
#[cfg(target_arch = "x86_64")]
pub(super) fn is_intel() -> bool {
    static INTEL: OnceLock<bool> = OnceLock::new();
    *INTEL.get_or_init(|| {
        let vendor = std::arch::x86_64::__cpuid(0);
        let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
        name.as_flattened() == b"GenuineIntel"
    })
}

/// It is not.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn is_intel() -> bool {
    false
}

/// Whether products of tiles are those of the definition; asked once.
#[cfg(target_arch = "x86_64")]
fn multiplies_right(amx: Isa) -> bool {
    static AGREES: OnceLock<bool> = OnceLock::new();
    *AGREES.get_or_init(|| quantized::agrees(amx) && gemm::agrees(amx, gemm::Form::Tiles))
}

/// Whether AMX is there: the CPU has it, and Linux gives this process the tiles' state.
#[cfg(target_arch = "x86_64")]
mod amx {
    use std::sync::OnceLock;

    /// CPUID leaf 7, EDX: BF16 tiles, tiles, INT8 tiles.
    const CPUID_AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;

    /// Asks once; the answer holds for all threads of the process.
    pub(super) fn granted() -> bool {
        static GRANTED: OnceLock<bool> = OnceLock::new();
        *GRANTED.get_or_init(|| {
            let leaves = std::arch::x86_64::__cpuid(0).eax;
            let has_amx =
                leaves >= 7 && std::arch::x86_64::__cpuid_count(7, 0).edx & CPUID_AMX == CPUID_AMX;
            has_amx && request_tiles()
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

    // As above.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn tiles_multiply_as_defined_where_they_are() {
        let found = Isa::available().iter().any(|isa| isa.level() == Level::Amx);
        let avx512 = Isa::at(Level::Avx512).is_ok();
        assert_eq!(found, avx512 && amx::granted());
    }
}
