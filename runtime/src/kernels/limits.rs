//! What this machine can do at most: bytes read per second, and operations per second of the instructions that the
//! kernels are made of. A measured speed means something only beside these.
//!
//! The read limit is that of memory: the buffer is several times the last cache, in large pages where the system gives
//! them, so that translating addresses limits as little as it can. Reads are tried plain, with software prefetch at several
//! distances, and in several streams at a time, because one core often reads faster so. The peaks are of independent chains
//! in registers, so that nothing but the execution units can limit them.

use crate::kernels::gemm::Form;
use crate::kernels::isa::{Isa, Level, Vectorized};
use crate::kernels::pages;
use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// Passes over the buffer, and bursts of instructions, of which the best counts.
const TRIES: usize = 4;
/// Ways to read: streams at a time, and how far ahead in each the lines are fetched, in bytes; 0 is as good as not.
const WAYS: [(usize, usize); 9] = [
    (1, 0),
    (1, 1 << 10),
    (1, 2 << 10),
    (1, 4 << 10),
    (1, 16 << 10),
    (2, 1 << 10),
    (2, 2 << 10),
    (4, 1 << 10),
    (8, 1 << 10),
];
/// Repetitions of every chain in one burst: a millisecond or two.
const STEPS: usize = 1 << 18;
/// Bytes of a cache line.
const LINE: usize = 64;

/// The limits for a number of threads that work at the same time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Threads.
    pub threads: usize,
    /// Bytes per second read from memory by plain loads, one after the other.
    pub read_plain: f64,
    /// Bytes per second read from memory, the best of some ways.
    pub read: f64,
    /// The same of the weights, where they lie: in small pages, or far from each other, they may be slower to read.
    pub read_weights: f64,
    /// 8-bit operations (a multiplication and an addition are two) per second of the level's dot product instruction.
    pub int8: Option<f64>,
    /// f32 operations per second of fused multiply-adds.
    pub f32: Option<f64>,
    /// bf16 operations per second of what multiplies rounded operands: tiles, pairs, or f32's fused multiply-adds.
    pub bf16: Option<f64>,
}

/// Memory to read: measure with one buffer for all thread counts, because filling it takes longest.
pub struct Buffer(Vec<u8>);

impl Buffer {
    /// A buffer of `bytes`, rounded down to whole pages, every page written.
    ///
    /// # Panics
    /// If that is less than a page.
    pub fn new(bytes: usize) -> Self {
        const PAGE: usize = 4096;
        let bytes = bytes / PAGE * PAGE;
        assert!(bytes > 0, "a buffer has at least a page");
        let mut values = pages::zeros(bytes);
        // No two pages alike: a system may keep those only once.
        for (page, bytes) in values.chunks_exact_mut(PAGE).enumerate() {
            bytes.fill(1);
            bytes[..8].copy_from_slice(&(page as u64).to_le_bytes());
        }
        Self(values)
    }

    /// Bytes that keep a last-level cache of `cache` bytes from holding much of it, and take little time to read.
    pub fn bytes_beyond(cache: usize) -> usize {
        (8 * cache).clamp(256 << 20, 1 << 30)
    }
}

/// Measures the limits of `threads` threads, and how fast they read as many bytes of `weights` as the buffer has; takes a
/// few seconds.
///
/// # Panics
/// If `threads` is 0.
pub fn measure(isa: Isa, threads: usize, buffer: &Buffer, weights: &[&[u8]]) -> Limits {
    assert!(threads > 0, "somebody has to work");
    let read = ways_to_read(isa, threads, &[&buffer.0]);
    let weights = beginning(weights, buffer.0.len());
    let read_plain = read[0];
    let best = |read: [f64; WAYS.len()]| read.into_iter().fold(0.0, f64::max);
    let peak = |burst: Option<Burst>| {
        let burst = burst?;
        let seconds = best_of_passes(threads, |_| (burst.run)(isa)).as_secs_f64();
        Some(threads as f64 * burst.operations as f64 / seconds)
    };
    Limits {
        threads,
        read_plain,
        read: best(read),
        read_weights: best(ways_to_read(isa, threads, &weights)),
        int8: peak(int8_burst(isa.level())),
        f32: peak(f32_burst(isa.level())),
        bf16: peak(bf16_burst(isa)),
    }
}

/// The first `len` bytes of `parts`, or all.
fn beginning<'a>(parts: &[&'a [u8]], len: usize) -> Vec<&'a [u8]> {
    let mut left = len;
    let parts = parts.iter().map(|part| {
        let part = &part[..part.len().min(left)];
        left -= part.len();
        part
    });
    parts.collect()
}

/// Bytes per second of all `memory`, each way.
fn ways_to_read(isa: Isa, threads: usize, memory: &[&[u8]]) -> [f64; WAYS.len()] {
    let bytes: usize = memory.iter().map(|part| part.len()).sum();
    WAYS.map(|(streams, distance)| {
        let pass = |thread: usize| {
            for whole in memory {
                let len = whole.len().div_ceil(threads).max(1).next_multiple_of(LINE);
                let part = whole.chunks(len).nth(thread).unwrap_or_default();
                black_box(match streams {
                    1 => isa.run(Read::<1> { part, distance }),
                    2 => isa.run(Read::<2> { part, distance }),
                    4 => isa.run(Read::<4> { part, distance }),
                    _ => isa.run(Read::<8> { part, distance }),
                });
            }
        };
        bytes as f64 / best_of_passes(threads, pass).as_secs_f64()
    })
}

/// The shortest of some passes, each from the first thread's start to the last one's end.
fn best_of_passes(threads: usize, pass: impl Fn(usize) + Sync) -> Duration {
    let barrier = Barrier::new(threads);
    let work = |thread: usize| {
        std::array::from_fn::<_, TRIES, _>(|_| {
            barrier.wait();
            let start = Instant::now();
            pass(thread);
            (start, Instant::now())
        })
    };
    let times: Vec<[(Instant, Instant); TRIES]> = std::thread::scope(|scope| {
        let work = &work;
        let others: Vec<_> = (1..threads)
            .map(|thread| scope.spawn(move || work(thread)))
            .collect();
        let mut times = vec![work(0)];
        times.extend(
            others
                .into_iter()
                .map(|other| other.join().expect("a pass does not panic")),
        );
        times
    });
    let span = |index: usize| {
        let start = times.iter().map(|thread| thread[index].0).min();
        let end = times.iter().map(|thread| thread[index].1).max();
        end.zip(start)
            .map_or(Duration::MAX, |(end, start)| end - start)
    };
    (0..TRIES).map(span).min().unwrap_or(Duration::MAX)
}

/// Reads all whole lines once, in `N` streams.
struct Read<'a, const N: usize> {
    part: &'a [u8],
    distance: usize,
}

impl<const N: usize> Vectorized for Read<'_, N> {
    type Output = u8;

    #[inline(always)]
    fn run(self) -> u8 {
        let (lines, _) = self.part.as_chunks::<LINE>();
        let len = lines.len() / N;
        let streams: [&[[u8; LINE]]; N] = std::array::from_fn(|n| &lines[n * len..][..len]);
        let mut sums = [[0; LINE]; N];
        for line in 0..len {
            for (sums, stream) in sums.iter_mut().zip(streams) {
                // At distance 0 it is the line read next, which changes nothing for memory, and keeps the compiler from
                // turning the loop into gathers.
                prefetch(stream[line].as_ptr().wrapping_add(self.distance));
                for (sum, byte) in sums.iter_mut().zip(&stream[line]) {
                    *sum ^= byte;
                }
            }
        }
        let rest = &lines[N * len..];
        let all = sums.iter().chain(rest).flatten();
        all.fold(0, |all, byte| all ^ byte)
    }
}

/// Asks for the cache line at `address`, which need not be one of ours.
#[inline(always)]
fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: every x86-64 CPU has the instruction, and it neither reads nor faults as far as a program can see.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a hint that neither reads nor faults as far as a program can see.
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// A burst of one instruction; `run` may be called with an [`Isa`] of the level it was asked for.
#[derive(Clone, Copy)]
struct Burst {
    run: fn(Isa),
    operations: u64,
}

/// Operations of [`STEPS`] steps over `chains` chains whose instruction does `each`.
const fn operations(chains: usize, each: usize) -> u64 {
    (STEPS * chains * each) as u64
}

/// The level's instruction for products of 8-bit numbers; the scalar level has none.
fn int8_burst(level: Level) -> Option<Burst> {
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => Some(x86::MADDUBS),
        #[cfg(target_arch = "x86_64")]
        Level::AvxVnni => Some(x86::DPBUSD_256),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => Some(x86::DPBUSD_512),
        #[cfg(target_arch = "x86_64")]
        Level::Amx => Some(x86::TDPBUSD),
        #[cfg(target_arch = "aarch64")]
        Level::Neon => Some(arm::SDOT),
        _ => None,
    }
}

/// The level's fused multiply-add; at the scalar level it may be a library call, which is no limit of the machine.
fn f32_burst(level: Level) -> Option<Burst> {
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 | Level::AvxVnni => Some(x86::FMA_256),
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Amx => Some(x86::FMA_512),
        #[cfg(target_arch = "aarch64")]
        Level::Neon => Some(arm::FMLA),
        _ => None,
    }
}

/// What products of operands rounded to bf16 are made of.
fn bf16_burst(isa: Isa) -> Option<Burst> {
    match Form::of(isa) {
        Form::Values => f32_burst(isa.level()),
        #[cfg(target_arch = "x86_64")]
        Form::Pairs => Some(x86::DPBF16_512),
        #[cfg(target_arch = "x86_64")]
        Form::Tiles => Some(x86::TDPBF16PS),
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Burst, STEPS, operations};
    use crate::kernels::tile_config::TileConfig;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Declares a burst: `chains` registers that start as `start` and become `step(register, operand)` again and again.
    /// The chains are as many as the registers allow, more than latency times units of any such instruction.
    macro_rules! burst {
        ($name:ident, $features:literal, $chains:literal of $each:literal, $operand:expr, $start:expr, $step:expr) => {
            pub(super) const $name: Burst = {
                #[target_feature(enable = $features)]
                fn chains() {
                    let operand = black_box($operand);
                    let mut registers = [black_box($start); $chains];
                    for _ in 0..STEPS {
                        for register in &mut registers {
                            *register = $step(*register, operand);
                        }
                    }
                    black_box(registers);
                }
                Burst {
                    // SAFETY: called with an `Isa` of the level this burst belongs to, which only detection makes.
                    run: |_| unsafe { chains() },
                    operations: operations($chains, $each),
                }
            };
        };
    }

    burst!(MADDUBS, "avx2", 12 of 64, _mm256_set1_epi8(1), _mm256_set1_epi8(1), |sum, ones| _mm256_maddubs_epi16(sum, ones));
    burst!(DPBUSD_256, "avxvnni", 12 of 64, _mm256_set1_epi8(1), _mm256_setzero_si256(),
        |sum, ones| _mm256_dpbusd_avx_epi32(sum, ones, ones));
    burst!(DPBUSD_512, "avx512f,avx512vnni", 24 of 128, _mm512_set1_epi8(1), _mm512_setzero_si512(),
        |sum, ones| _mm512_dpbusd_epi32(sum, ones, ones));
    burst!(FMA_256, "avx2,fma", 12 of 16, _mm256_set1_ps(0.5), _mm256_set1_ps(1.0),
        |sum, half| _mm256_fmadd_ps(sum, half, half));
    burst!(FMA_512, "avx512f", 24 of 32, _mm512_set1_ps(0.5), _mm512_set1_ps(1.0),
        |sum, half| _mm512_fmadd_ps(sum, half, half));
    burst!(DPBF16_512, "avx512f,avx512bf16", 24 of 64, _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5), _mm512_set1_ps(0.5)),
        _mm512_set1_ps(1.0), |sum, half| _mm512_dpbf16_ps(sum, half, half));

    /// Declares a burst: two tiles of activations times two of weights, as a kernel would hold them.
    macro_rules! tiles {
        ($name:ident, $instruction:literal, $depth:literal) => {
            pub(super) const $name: Burst = {
                /// # Safety
                /// AMX is there and granted.
                unsafe fn products() {
                    // SAFETY: the configuration is valid and lives through the block, whose tiles are zeroed before use
                    // and released at its end.
                    unsafe {
                        std::arch::asm!(
                            "ldtilecfg [{config}]",
                            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                            "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                            "2:",
                            concat!($instruction, " tmm0, tmm4, tmm6"),
                            concat!($instruction, " tmm1, tmm4, tmm7"),
                            concat!($instruction, " tmm2, tmm5, tmm6"),
                            concat!($instruction, " tmm3, tmm5, tmm7"),
                            "dec {steps}",
                            "jnz 2b",
                            "tilerelease",
                            config = in(reg) &TileConfig::WHOLE,
                            steps = inout(reg) STEPS => _,
                            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                            options(nostack),
                        );
                    }
                }
                Burst {
                    // SAFETY: called with an `Isa` of the AMX level: the CPU has the instructions and the system granted
                    // the tiles.
                    run: |_| unsafe { products() },
                    operations: operations(4, 16 * 16 * $depth * 2),
                }
            };
        };
    }

    tiles!(TDPBUSD, "tdpbusd", 64);
    tiles!(TDPBF16PS, "tdpbf16ps", 32);
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::{Burst, STEPS, operations};
    use std::arch::aarch64::{float32x4_t, vdupq_n_f32, vfmaq_f32};
    use std::hint::black_box;

    /// Sixteen registers that each take a dot product of 16 bytes.
    pub(super) const SDOT: Burst = Burst {
        // SAFETY: called with an `Isa` of the NEON level, which has `dotprod`.
        run: |_| unsafe { dot_products() },
        operations: operations(16, 32),
    };

    pub(super) const FMLA: Burst = Burst {
        run: |_| multiply_adds(),
        operations: operations(16, 8),
    };

    /// The intrinsic is not stable, so the loop is assembly.
    #[target_feature(enable = "dotprod")]
    fn dot_products() {
        // SAFETY: works in registers only, all of them declared.
        unsafe {
            std::arch::asm!(
                "2:",
                "sdot v0.4s, v16.16b, v17.16b", "sdot v1.4s, v16.16b, v17.16b",
                "sdot v2.4s, v16.16b, v17.16b", "sdot v3.4s, v16.16b, v17.16b",
                "sdot v4.4s, v16.16b, v17.16b", "sdot v5.4s, v16.16b, v17.16b",
                "sdot v6.4s, v16.16b, v17.16b", "sdot v7.4s, v16.16b, v17.16b",
                "sdot v18.4s, v16.16b, v17.16b", "sdot v19.4s, v16.16b, v17.16b",
                "sdot v20.4s, v16.16b, v17.16b", "sdot v21.4s, v16.16b, v17.16b",
                "sdot v22.4s, v16.16b, v17.16b", "sdot v23.4s, v16.16b, v17.16b",
                "sdot v24.4s, v16.16b, v17.16b", "sdot v25.4s, v16.16b, v17.16b",
                "subs {steps}, {steps}, #1",
                "b.ne 2b",
                steps = inout(reg) STEPS => _,
                out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _, out("v7") _,
                out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _, out("v22") _,
                out("v23") _, out("v24") _, out("v25") _,
                options(nomem, nostack),
            );
        }
    }

    fn multiply_adds() {
        // SAFETY: NEON is part of every AArch64 target.
        unsafe {
            let half = black_box(vdupq_n_f32(0.5));
            let mut registers: [float32x4_t; 16] = [black_box(vdupq_n_f32(1.0)); 16];
            for _ in 0..STEPS {
                for register in &mut registers {
                    *register = vfmaq_f32(half, *register, half);
                }
            }
            black_box(registers);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_read_once() {
        // Lines that are no whole number for the streams, too.
        for lines in [0, 1, 7, 8, 9, 100] {
            let part: Vec<u8> = (1..=(LINE * lines) as u64)
                .map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
                .collect();
            let expected = part.iter().fold(0, |all, byte| all ^ byte);
            let (part, distance) = (part.as_slice(), 1 << 10);
            for isa in Isa::available() {
                let read = [
                    isa.run(Read::<1> { part, distance }),
                    isa.run(Read::<2> { part, distance }),
                    isa.run(Read::<4> { part, distance }),
                    isa.run(Read::<8> { part, distance }),
                ];
                assert_eq!(read, [expected; 4], "{lines} lines");
            }
        }
    }

    #[test]
    fn every_level_has_limits() {
        let buffer = Buffer::new(1 << 20);
        let weights = [vec![1; 100_000], vec![2; 30]];
        let weights = weights.each_ref().map(Vec::as_slice);
        for isa in Isa::available() {
            for threads in [1, 3] {
                let limits = measure(isa, threads, &buffer, &weights);
                assert_eq!(limits.threads, threads);
                assert!(
                    limits.read.is_finite()
                        && limits.read >= limits.read_plain
                        && limits.read_plain > 0.0
                        && limits.read_weights.is_finite()
                        && limits.read_weights > 0.0
                );
                let scalar = isa.level() == Level::Scalar;
                for peak in [limits.int8, limits.f32, limits.bf16] {
                    assert!(
                        scalar == peak.is_none()
                            && peak.is_none_or(|peak| peak.is_finite() && peak > 0.0)
                    );
                }
            }
        }
    }

    #[test]
    fn no_more_is_read_of_the_weights_than_of_the_buffer() {
        let parts = [[1, 2, 3].as_slice(), &[4, 5], &[6]];
        let some = |len: usize| beginning(&parts, len).concat();
        assert_eq!([0, 2, 4, 6, 9].map(|len| some(len).len()), [0, 2, 4, 6, 6]);
        assert_eq!(some(4), [1, 2, 3, 4]);
    }

    #[test]
    fn the_buffer_fits_the_cache() {
        let sizes = [0, 32 << 20, 64 << 20, 480 << 20].map(Buffer::bytes_beyond);
        assert_eq!(sizes, [256 << 20, 256 << 20, 512 << 20, 1 << 30]);
        assert_eq!(Buffer::new(10_000).0.len(), 8192);
    }
}
