//! What the product needs of an instruction set.

use super::reads::Reads;
use crate::kernels::isa::Vectorized;

/// Vectors over the 16 rows of a panel. A value of an implementation is the proof that its instructions may be
/// executed; its methods are `#[inline(always)]`, so that they are compiled for the features of their caller.
pub(super) trait Vectors: Copy {
    /// Codes of 16 rows × 4 columns, one per byte.
    type Codes: Copy;
    /// Four activations, once for each row.
    type Quad: Copy;
    /// A sum in progress for each row.
    type Sum: Copy;
    /// One i32 for each row.
    type Int: Copy;
    /// One f32 for each row.
    type Float: Copy;

    /// What [`Self::dot`] takes off each code.
    const CENTRE: i32;
    /// Panels of the largest block whose sums stay in registers.
    const PANELS: usize;
    /// Tokens of that block.
    const TOKENS: usize;
    /// Sums that stay in registers whole. A larger block may leave parts that it seldom needs in memory.
    const SUMS: usize;
    /// How a core other than Intel's reads best with few products of one vector's codes, and with many.
    const READS: [Reads; 2];
    /// Products of one vector's codes above which they are many.
    const READS_BUSY: usize;

    /// Runs work compiled for these instructions.
    fn run<W: Vectorized>(self, work: W) -> W::Output;
    /// Codes as they are stored with 8 bits.
    fn codes(self, bytes: &[u8; 64]) -> Self::Codes;
    /// Codes from the low nibbles.
    fn low(self, bytes: &[u8; 64]) -> Self::Codes;
    /// Codes from the high nibbles.
    fn high(self, bytes: &[u8; 64]) -> Self::Codes;
    /// Codes from the high nibbles as they are there, sixteenfold, if their products are exact, too.
    #[inline(always)]
    fn high_in_place(self, bytes: &[u8; 64]) -> Self::Codes {
        self.high(bytes)
    }
    /// What sums of their products are of those of the codes.
    #[inline(always)]
    fn of_high_in_place(self, sums: Self::Int) -> Self::Int {
        sums
    }
    /// Four activations for every row.
    fn quad(self, activations: &[i8; 4]) -> Self::Quad;
    /// A sum that begins with `start`.
    fn start(self, start: Self::Int) -> Self::Sum;
    /// Adds `(code − CENTRE) · activation` of four columns, exactly.
    fn dot(self, sum: Self::Sum, codes: Self::Codes, quad: Self::Quad) -> Self::Sum;
    /// To be called after every 32 columns: an implementation may sum that many in fewer bits.
    fn carry(self, sum: Self::Sum) -> Self::Sum;
    /// The sum, from now on as it is: where sums take nearly all registers, products must be added one after the other,
    /// but the compiler likes trees.
    #[inline(always)]
    fn in_turn(self, sum: Self::Sum) -> Self::Sum {
        sum
    }
    /// Bytes to be loaded anew, where sums take nearly all registers, but the compiler would keep what it loaded before.
    #[inline(always)]
    fn anew(self, bytes: &[u8; 64]) -> &[u8; 64] {
        bytes
    }
    /// The sum after a [`Self::carry`], or as it began.
    fn total(self, sum: Self::Sum) -> Self::Int;
    /// The same integer for each row.
    fn splat(self, value: i32) -> Self::Int;
    /// `a + b`.
    fn plus(self, a: Self::Int, b: Self::Int) -> Self::Int;
    /// `zero_points · sum` for a sum of activations of at most 128 columns, which fits i16.
    fn times(self, zero_points: Self::Int, sum: i32) -> Self::Int;
    /// Stored zero points less [`Self::CENTRE`].
    fn zero_points(self, bytes: &[u8; 16]) -> Self::Int;
    /// Stored f16 scales.
    fn scales(self, bytes: &[u8; 32]) -> Self::Float;
    /// 0 for each row.
    fn zero(self) -> Self::Float;
    /// `fma(scales · scale, f32(sums), y)`.
    fn add(self, y: Self::Float, scales: Self::Float, scale: f32, sums: Self::Int) -> Self::Float;
    /// One value for each row.
    fn values(self, rows: &[f32; 16]) -> Self::Float;
    /// The values of the rows.
    fn rows(self, y: Self::Float) -> [f32; 16];
    /// Asks for the cache line at an address, which need not be valid, to be in the second cache.
    fn prefetch(self, address: *const u8);
    /// The same for the first cache.
    fn prefetch_near(self, address: *const u8);
}
