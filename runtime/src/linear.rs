//! One linear layer: `y = x · Wᵀ + b`.

use crate::buffers::{Buffer, with_own};
use crate::input::{Input, Room};
use crate::kernels::dense::{Dense, matmul_dense};
use crate::kernels::gemm::{Store, View, product, product_rounded};
use crate::kernels::{Columns, Isa, activation_group, elementwise, matmul};
use crate::{Cpu, Path, RuntimeError};
use qbin_format::Weight;
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// Rows of W per unit of parallel work, at least. The reference path dequantizes them for all tokens; what many tokens make of
/// packed weights stays in the second cache.
const CHUNK_ROWS: usize = 128;

/// Tokens up to which memory bounds a product of packed weights. A stream of weights pauses where a unit of work begins, for
/// some 0.4 µs on Zen 4, a tenth of what 128 rows take: so units are as large as the threads allow.
const STREAMED_TOKENS: usize = 6;

/// Rows of a unit for which activations come from beyond the second cache: twice as many read them half as often.
const WIDE_ROWS: usize = 2 * CHUNK_ROWS;

/// Codes of activations that stay in the second cache beside what is made of them.
const NEAR_CODES: usize = 1 << 20;

/// Units that a thread takes of one linear where they are larger: some, for threads are not equally fast.
const STREAMS_PER_THREAD: usize = 4;

/// A weight matrix `[rows, cols]`, row major.
pub enum Matrix<'m> {
    /// As it lies in the mapped file; read panel by panel, never held as a whole.
    Stored(Weight<'m>),
    /// In memory, because a pass changes it.
    Owned(Vec<f32>),
}

/// A weight matrix with its bias.
pub struct Linear<'m> {
    /// Name of the weight's tensor.
    pub name: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// `W[rows, cols]`.
    pub weight: Matrix<'m>,
    /// `b[rows]`.
    pub bias: Option<Vec<f32>>,
}

impl Linear<'_> {
    /// `x[tokens, cols]` to `[tokens, rows]`.
    ///
    /// # Panics
    /// If `x` is not a whole number of rows of `cols`.
    pub fn apply(&self, cpu: &Cpu, x: &[f32]) -> Vec<f32> {
        let mut out = Buffer::default();
        let len = self.apply_in(cpu, x, &mut out).len();
        out.into_vec(len)
    }

    /// The same in a buffer.
    ///
    /// # Panics
    /// As [`Self::apply`].
    pub(crate) fn apply_in<'b>(&self, cpu: &Cpu, x: &[f32], out: &'b mut Buffer) -> &'b [f32] {
        let mut room = Room::default();
        let input = room.hold(cpu, x, &[self]);
        let out = out.get(input.tokens() * self.rows);
        let ranges = self.chunks(cpu, input.tokens());
        cpu.pool.columns(out, self.rows, &ranges, |chunk, mut out| {
            self.rows(cpu, &input, ranges[chunk].clone(), &mut out);
        });
        out
    }

    /// `y += x · Wᵀ + b`, with `x[tokens, cols]` the input and `y[tokens, rows]`.
    ///
    /// # Panics
    /// If the shapes do not fit, or the input was not made for this linear.
    pub(crate) fn add_to(&self, cpu: &Cpu, input: &Input<'_>, y: &mut [f32]) {
        let tokens = input.tokens();
        assert_eq!(y.len(), tokens * self.rows, "{}: outputs", self.name);
        let ranges = self.chunks(cpu, input.tokens());
        cpu.pool.columns(y, self.rows, &ranges, |chunk, mut y| {
            let width = y.width();
            with_own(Columns::room(tokens, width), |room| {
                let mut sums = Columns::in_room(room, tokens, width);
                self.rows(cpu, input, ranges[chunk].clone(), &mut sums);
                elementwise::add_columns(cpu.isa, &mut y, &mut sums);
            });
        });
    }

    /// The rows in units of parallel work, for so many tokens; results do not depend on them.
    pub(crate) fn chunks(&self, cpu: &Cpu, tokens: usize) -> Vec<Range<usize>> {
        let most = match cpu.path {
            Path::Fast if tokens <= STREAMED_TOKENS => usize::MAX,
            Path::Fast if tokens * self.cols > NEAR_CODES => WIDE_ROWS,
            _ => CHUNK_ROWS,
        };
        let rows = match cpu.pool.threads() {
            1 => most.min(self.rows),
            threads => {
                let chunks = self.rows / CHUNK_ROWS / (threads * STREAMS_PER_THREAD);
                (chunks.max(1) * CHUNK_ROWS).min(most)
            }
        };
        let starts = (0..self.rows).step_by(rows);
        starts
            .map(|first| first..(first + rows).min(self.rows))
            .collect()
    }

    /// Output features `rows`, one of [`Linear::chunks`], for all tokens.
    pub(crate) fn rows(
        &self,
        cpu: &Cpu,
        input: &Input<'_>,
        rows: Range<usize>,
        out: &mut Columns<'_>,
    ) {
        match (cpu.path, &self.weight) {
            (Path::Reference | Path::Bf16, _) => {
                self.dequantized(cpu.isa, input, rows.clone(), out)
            }
            (Path::Fast, Matrix::Stored(Weight::Quantized(view))) => {
                let group = activation_group(view.scheme, self.cols);
                matmul(cpu.isa, view, rows.clone(), input.codes(group), out);
            }
            (Path::Fast, Matrix::Stored(Weight::Dense(view))) => {
                let weight = Dense::Stored(*view);
                matmul_dense(
                    cpu.isa,
                    weight,
                    rows.clone(),
                    input.values(),
                    self.cols,
                    out,
                );
            }
            (Path::Fast, Matrix::Owned(weight)) => {
                let weight = Dense::Owned(weight);
                matmul_dense(
                    cpu.isa,
                    weight,
                    rows.clone(),
                    input.values(),
                    self.cols,
                    out,
                );
            }
        }
        if let Some(bias) = &self.bias {
            for token in 0..out.rows() {
                let mut bias = &bias[rows.clone()];
                for piece in out.pieces(token) {
                    let now;
                    (now, bias) = bias.split_at(piece.len());
                    elementwise::add(cpu.isa, piece, now);
                }
            }
        }
    }

    /// The same with the weights in f32, or, where the inputs are rounded to bf16, rounded like them.
    fn dequantized(&self, isa: Isa, input: &Input<'_>, rows: Range<usize>, out: &mut Columns<'_>) {
        let (tokens, width) = (input.tokens(), rows.len());
        let weight = match &self.weight {
            Matrix::Owned(weight) => {
                Cow::Borrowed(&weight[rows.start * self.cols..rows.end * self.cols])
            }
            Matrix::Stored(stored) => {
                let mut panel = vec![0.0; width * self.cols];
                stored.read_rows_f32(rows, &mut panel);
                Cow::Owned(panel)
            }
        };
        with_own(tokens * width, |panel| {
            match input.rounded() {
                Some(x) => product_rounded(isa, panel, x, &weight),
                None => {
                    let x = View::row_major(input.values(), tokens, self.cols);
                    let weight = View::row_major(&weight, width, self.cols).transpose();
                    product(isa, panel, width, Store::Replace, x, weight);
                }
            }
            for (token, panel) in panel.chunks_exact(width).enumerate() {
                out.write(token, panel);
            }
        });
    }

    /// Brings the weight into memory, so that it can be changed, and checks that it is finite.
    ///
    /// # Errors
    /// [`RuntimeError::NonFinite`].
    pub fn own(&mut self) -> Result<&mut Vec<f32>, RuntimeError> {
        if let Matrix::Stored(stored) = &self.weight {
            let mut weight = vec![0.0; self.rows * self.cols];
            let cols = self.cols;
            weight
                .par_chunks_mut(CHUNK_ROWS * cols)
                .enumerate()
                .for_each(|(panel, out)| {
                    let first = panel * CHUNK_ROWS;
                    stored.read_rows_f32(first..first + out.len() / cols, out);
                });
            check_finite(&self.name, &weight)?;
            self.weight = Matrix::Owned(weight);
        }
        match &mut self.weight {
            Matrix::Owned(weight) => Ok(weight),
            Matrix::Stored(_) => unreachable!("owned just above"),
        }
    }
}

/// # Errors
/// [`RuntimeError::NonFinite`] for the first NaN or infinity.
pub(crate) fn check_finite(tensor: &str, values: &[f32]) -> Result<(), RuntimeError> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => Err(RuntimeError::NonFinite {
            tensor: tensor.into(),
            index,
            value: values[index],
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bf16_path_is_the_reference_path_of_rounded_values() {
        let (rows, cols, tokens) = (130, 77, 11);
        let values = |len: usize, step: f32| -> Vec<f32> {
            (0..len).map(|i| (i as f32 * step).sin()).collect()
        };
        let round = |values: &[f32]| -> Vec<f32> {
            let rounded = values.iter().map(|&value| half::bf16::from_f32(value));
            rounded.map(half::bf16::to_f32).collect()
        };
        let apply = |path, weight: &[f32], x: &[f32]| {
            let linear = Linear {
                name: "w".into(),
                rows,
                cols,
                weight: Matrix::Owned(weight.to_vec()),
                bias: Some(values(rows, 0.3)),
            };
            linear.apply(&Cpu::new(path, Isa::detect(), 2), x)
        };
        let (weight, x) = (values(rows * cols, 0.7), values(tokens * cols, 0.9));
        let got = apply(Path::Bf16, &weight, &x);
        assert_eq!(got, apply(Path::Bf16, &round(&weight), &round(&x)));
        // Sums of another order, but of the same terms.
        let distance = |other: &[f32]| {
            let distances = got.iter().zip(other).map(|(a, b)| (a - b).abs());
            // A NaN stays the largest.
            distances.fold(0.0, |most, now| if now <= most { most } else { now })
        };
        let rounded = distance(&apply(Path::Reference, &round(&weight), &round(&x)));
        // Each sum is of `cols` products of at most 1.
        assert!(rounded < cols as f32 * f32::EPSILON, "{rounded}");
        assert!(distance(&apply(Path::Reference, &weight, &x)) > 1e-3);
    }
}
