//! Numbers rounded to bf16, alone and in pairs, so that products of them have the same bits with and without an instruction
//! for them.
//!
//! `vdpbf16ps` adds two products to a sum, that of the high halves first, each as a fused multiply-add rounded to nearest
//! even (Intel's manual at `VDPBF16PS`; Zen 4 and a Xeon were found to do the same), so the earlier term of a pair is packed
//! into the high half. It also takes subnormal operands for zeros and flushes subnormal sums, as do AMX's tiles
//! (`tdpbf16ps`), but there are none: elements below 2⁻⁵⁶ count as zero, hence every product, and every rounded sum of
//! products, in whatever order, is a multiple of 2⁻¹²⁶, the smallest normal number.
//!
//! Products are summed in the order of the tiles: those of linears ([`gemm`](super::gemm::product_rounded)) and those of
//! attention.

/// Bits of 2⁻⁵⁶: what is smaller counts as zero.
const SMALLEST: u32 = (127 - 56) << 23;

/// The bits of a pair's earlier term.
pub(crate) const EARLY: u32 = 0xffff_0000;

/// The bits of the nearest bf16 in the upper half, ties to even, zeros below; what is smaller than 2⁻⁵⁶ is zero, and NaN
/// stays NaN.
#[inline(always)]
pub(crate) fn round(x: f32) -> u32 {
    const INFINITY: u32 = 0xff << 23;
    const QUIET: u32 = 1 << 22;
    let bits = x.to_bits();
    let magnitude = bits & !(1 << 31);
    if magnitude > INFINITY {
        (bits | QUIET) & EARLY
    } else if magnitude < SMALLEST {
        0
    } else {
        round_normal(x)
    }
}

/// The same of 0, a number of at least 2⁻⁵⁶, or a NaN that some arithmetic with bf16 made.
#[inline(always)]
pub(crate) fn round_normal(x: f32) -> u32 {
    let bits = x.to_bits();
    bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & EARLY
}

/// Two terms, rounded.
#[inline(always)]
pub(crate) fn pair(early: f32, late: f32) -> u32 {
    round(early) | round(late) >> 16
}
