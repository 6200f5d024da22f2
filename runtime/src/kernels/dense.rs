//! Products of dense weights as they are stored, f32, f16 or bf16, with f32 activations.
//!
//! Definition: the products of a row are summed in [`LANES`] chains of FMAs, column `k` in chain `k mod LANES`, and
//! the chains in order. So a result does not depend on how many tokens are computed together. For one token it is
//! bound by reading the weights.

use super::columns::Columns;
use super::isa::{Isa, Vectorized};
use qbin_format::{Dtype, TensorView};
use std::ops::Range;

/// Chains of a sum: two vectors of AVX-512, four of AVX2, so that the additions do not wait for each other.
const LANES: usize = 32;

/// Tokens for which a row of weights is taken from registers at once.
const TOKENS: usize = 4;

/// Rows of a dense matrix in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Dense<'a> {
    /// A tensor as it is stored, of a type that [`Dtype::is_float_weight`].
    Stored(TensorView<'a>),
    /// f32.
    Owned(&'a [f32]),
}

/// Writes rows `rows` of `W·x` for every token of `x[tokens, cols]`.
///
/// # Panics
/// If the shapes do not fit, or the type of the weights is no float.
pub(crate) fn matmul_dense(
    isa: Isa,
    weight: Dense<'_>,
    rows: Range<usize>,
    x: &[f32],
    cols: usize,
    out: &mut Columns<'_>,
) {
    assert_eq!(x.len(), out.rows() * cols, "activations of {cols} columns");
    assert_eq!(out.width(), rows.len(), "columns for rows {rows:?}");
    for (at, row) in rows.enumerate() {
        let elements = row * cols..(row + 1) * cols;
        let mut write = |token: usize, y: f32| out.put(token, at, y);
        match weight {
            Dense::Owned(values) => isa.run(Row {
                weights: F32(&values[elements]),
                x,
                write: &mut write,
            }),
            Dense::Stored(view) => {
                let size = view.dtype.size();
                let bytes = &view.bytes[elements.start * size..elements.end * size];
                match view.dtype {
                    Dtype::F32 => isa.run(Row {
                        weights: F32Bytes(bytes.as_chunks().0),
                        x,
                        write: &mut write,
                    }),
                    Dtype::Bf16 => isa.run(Row {
                        weights: Bf16(bytes.as_chunks().0),
                        x,
                        write: &mut write,
                    }),
                    Dtype::F16 => isa.run(Row {
                        weights: F16(bytes.as_chunks().0),
                        x,
                        write: &mut write,
                    }),
                    other => panic!("tensor `{}`: {other} is no float", view.name),
                }
            }
        }
    }
}

/// One row of weights in some type.
trait Weights: Copy {
    fn len(self) -> usize;
    fn at(self, index: usize) -> f32;
    /// `LANES` weights from `start` on.
    fn lanes(self, start: usize) -> [f32; LANES];
}

macro_rules! weights {
    ($name:ident, $element:ty, |$value:ident| $read:expr) => {
        #[derive(Clone, Copy)]
        struct $name<'a>(&'a [$element]);

        impl Weights for $name<'_> {
            #[inline(always)]
            fn len(self) -> usize {
                self.0.len()
            }

            #[inline(always)]
            fn at(self, index: usize) -> f32 {
                let $value = self.0[index];
                $read
            }

            // A loop over an array: `from_fn` would not be compiled into the caller, for its vectors.
            #[inline(always)]
            fn lanes(self, start: usize) -> [f32; LANES] {
                let stored: &[$element; LANES] = self.0[start..][..LANES]
                    .try_into()
                    .expect("that many lanes");
                let mut lanes = [0.0; LANES];
                for (lane, &$value) in lanes.iter_mut().zip(stored) {
                    *lane = $read;
                }
                lanes
            }
        }
    };
}

weights!(F32, f32, |value| value);
weights!(F32Bytes, [u8; 4], |value| f32::from_le_bytes(value));
weights!(Bf16, [u8; 2], |value| f32::from_bits(
    u32::from(u16::from_le_bytes(value)) << 16
));
weights!(F16, [u8; 2], |value| f16_to_f32(u16::from_le_bytes(value)));

/// The exact value, without branches, so that it is computed on vectors.
#[inline(always)]
fn f16_to_f32(half: u16) -> f32 {
    const EXPONENT: u32 = 0x1f << 23;
    let magnitude = u32::from(half & 0x7fff) << 13;
    let exponent = magnitude & EXPONENT;
    // Rebias 15 to 127; infinity and NaN (all ones) go on to the top.
    let rebiased = magnitude + ((127 - 15) << 23);
    let special = rebiased + ((128 - 16) << 23);
    // Without a leading one: give it one, and take it away again as a number.
    let subnormal = f32::from_bits(rebiased + (1 << 23)) - f32::from_bits((127 - 14) << 23);
    let bits = if exponent == 0 {
        subnormal.to_bits()
    } else if exponent == EXPONENT {
        special
    } else {
        rebiased
    };
    f32::from_bits(bits | u32::from(half & 0x8000) << 16)
}

/// One row for all tokens.
struct Row<'a, W, F> {
    weights: W,
    x: &'a [f32],
    write: &'a mut F,
}

impl<W: Weights, F: FnMut(usize, f32)> Vectorized for Row<'_, W, F> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let cols = self.weights.len();
        let mut token = 0;
        for x in self.x.chunks(TOKENS * cols) {
            match x.len() / cols {
                TOKENS => {
                    for (at, y) in dots::<W, TOKENS>(self.weights, x).into_iter().enumerate() {
                        (self.write)(token + at, y);
                    }
                }
                _ => {
                    for (at, x) in x.chunks_exact(cols).enumerate() {
                        let [y] = dots::<W, 1>(self.weights, x);
                        (self.write)(token + at, y);
                    }
                }
            }
            token += TOKENS;
        }
    }
}

/// The products of one row with `N` tokens. Columns behind the last whole step are filled up with zeros: one
/// access to a chain by a number that is not a constant, and none of them would stay in a register.
#[inline(always)]
fn dots<W: Weights, const N: usize>(weights: W, x: &[f32]) -> [f32; N] {
    let cols = weights.len();
    let mut sums = [[0f32; LANES]; N];
    let whole = cols / LANES * LANES;
    let mut at = 0;
    while at < whole {
        let w = weights.lanes(at);
        for (token, sums) in sums.iter_mut().enumerate() {
            let x: &[f32; LANES] = x[token * cols + at..][..LANES]
                .try_into()
                .expect("that many lanes");
            step(sums, &w, x);
        }
        at += LANES;
    }
    if whole < cols {
        let mut w = [0.0; LANES];
        (whole..cols).for_each(|at| w[at - whole] = weights.at(at));
        for (token, sums) in sums.iter_mut().enumerate() {
            let mut rest = [0.0; LANES];
            rest[..cols - whole].copy_from_slice(&x[token * cols + whole..(token + 1) * cols]);
            step(sums, &w, &rest);
        }
    }
    let mut out = [0.0; N];
    for (out, sums) in out.iter_mut().zip(&sums) {
        // In order, although by halves would take fewer steps: those make the compiler give up vectors above.
        *out = sums.iter().fold(0.0, |sum, lane| sum + lane);
    }
    out
}

#[inline(always)]
fn step(sums: &mut [f32; LANES], w: &[f32; LANES], x: &[f32; LANES]) {
    for lane in 0..LANES {
        sums[lane] = w[lane].mul_add(x[lane], sums[lane]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn every_half_value_converts_exactly() {
        for bits in 0..=u16::MAX {
            let (got, expected) = (f16_to_f32(bits), f16::from_bits(bits).to_f32());
            assert!(
                got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan(),
                "{bits:#06x}: {got} {expected}"
            );
        }
    }

    #[test]
    fn every_type_level_and_batch_agrees_with_the_definition() {
        let rows = 5;
        for cols in [1, 31, 32, 33, 100] {
            let weights: Vec<f32> = (0..rows * cols)
                .map(|i| f16::from_f32(bf16::from_f32((i as f32 * 0.7).sin()).to_f32()).to_f32())
                .collect();
            let x: Vec<f32> = (0..7 * cols).map(|i| (i as f32 * 0.3).cos()).collect();
            let shape = [rows, cols];
            let bytes = [
                weights
                    .iter()
                    .flat_map(|w| w.to_le_bytes())
                    .collect::<Vec<u8>>(),
                weights
                    .iter()
                    .flat_map(|w| bf16::from_f32(*w).to_le_bytes())
                    .collect(),
                weights
                    .iter()
                    .flat_map(|w| f16::from_f32(*w).to_le_bytes())
                    .collect(),
            ];
            let views = [Dtype::F32, Dtype::Bf16, Dtype::F16]
                .into_iter()
                .zip(&bytes);
            let stored = views.map(|(dtype, bytes)| {
                Dense::Stored(TensorView {
                    name: "w",
                    dtype,
                    shape: &shape,
                    bytes,
                })
            });
            let all: Vec<Dense<'_>> = stored.chain([Dense::Owned(&weights)]).collect();
            let mut expected = None;
            for isa in Isa::available() {
                for weight in &all {
                    let mut out = vec![f32::NAN; 7 * rows];
                    for (x, out) in x.chunks(5 * cols).zip(out.chunks_mut(5 * rows)) {
                        let mut columns = Columns::whole(out, rows);
                        matmul_dense(isa, *weight, 0..rows, x, cols, &mut columns);
                    }
                    for (at, y) in out.iter().enumerate() {
                        let (token, row) = (at / rows, at % rows);
                        let terms = (0..cols).map(|k| {
                            f64::from(weights[row * cols + k]) * f64::from(x[token * cols + k])
                        });
                        let size: f64 = terms.clone().map(f64::abs).sum();
                        let error = (f64::from(*y) - terms.sum::<f64>()).abs();
                        assert!(error <= cols as f64 * f64::from(f32::EPSILON) * size);
                    }
                    let bits: Vec<u32> = out.iter().map(|y| y.to_bits()).collect();
                    assert_eq!(
                        *expected.get_or_insert_with(|| bits.clone()),
                        bits,
                        "{weight:?}"
                    );
                }
            }
        }
    }
}
