//! What linears read, made piece by piece in the form they read it in.
//!
//! Packed weights are multiplied by int8 activations. What makes their input (a norm, attention, the gated product)
//! rounds each piece of it at once, while it is in the first cache: the f32 values are never in memory as a whole.

use crate::buffers::Buffer;
use crate::kernels::gemm::Rounded;
use crate::kernels::{ActivationCell, Activations, Columns, Isa, activation_group, whole_groups};
use crate::{Cpu, Linear, Matrix, Path};
use qbin_format::{Scheme, Weight};
use std::ops::Range;

/// Tokens whose activations one thread rounds at a time.
const TOKENS: usize = 8;

/// Activations `[tokens, cols]` in every form that some linears read.
pub(crate) struct Input<'a> {
    tokens: usize,
    /// In f32, where it was made so.
    values: Option<&'a [f32]>,
    /// For the fast path: int8, by size of group.
    codes: &'a [Activations],
    /// For the path that rounds them to bf16.
    rounded: Option<Rounded>,
}

impl<'a> Input<'a> {
    /// Rows.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// The values.
    ///
    /// # Panics
    /// If a linear among the readers that were named does not read them.
    pub(crate) fn values(&self) -> &'a [f32] {
        self.values.expect("made for readers of values")
    }

    /// As int8, in groups of `group` columns.
    ///
    /// # Panics
    /// If no reader that was named reads them so.
    pub(crate) fn codes(&self, group: usize) -> &'a Activations {
        let mut codes = self.codes.iter();
        codes
            .find(|codes| codes.group() == group)
            .expect("made for readers of such groups")
    }

    /// Rounded to bf16, on the path where they are.
    pub(crate) fn rounded(&self) -> Option<&Rounded> {
        self.rounded.as_ref()
    }
}

/// Memory for an input, kept from one to the next.
#[derive(Default)]
pub(crate) struct Room {
    values: Buffer,
    codes: Vec<Activations>,
}

impl Room {
    /// The input `x` of some linears.
    ///
    /// # Panics
    /// If the linears have inputs of different widths, or `x` is not a whole number of rows.
    pub(crate) fn hold<'a>(
        &'a mut self,
        cpu: &Cpu,
        x: &'a [f32],
        readers: &[&Linear<'_>],
    ) -> Input<'a> {
        hold(cpu, x, readers[0].cols, readers, &mut self.codes)
    }

    /// The input `[tokens, cols]` of some linears, or values for no linear, made in the pieces of a grid by
    /// `make(row number, column number, piece)`, on all threads.
    ///
    /// # Panics
    /// If ranges overlap, do not rise, or leave the input, or linears have inputs of another width.
    pub(crate) fn make(
        &mut self,
        cpu: &Cpu,
        [tokens, cols]: [usize; 2],
        readers: &[&Linear<'_>],
        [rows, columns]: [&[Range<usize>]; 2],
        make: impl Fn(usize, usize, Piece<'_>) + Sync,
    ) -> Input<'_> {
        let schemes = schemes(cpu, readers, cols);
        if let [Some(scheme)] = *schemes
            && whole_groups(columns, activation_group(scheme, cols), cols)
        {
            let codes = rooms(&mut self.codes, 1);
            codes[0].reset(cpu.isa, tokens, cols, scheme);
            codes[0].grid(&cpu.pool, rows, columns, |row, column, cell| {
                let values = vec![0.0; cell.width()];
                make(row, column, Piece::Codes(cell, values));
            });
            return Input {
                tokens,
                values: None,
                codes,
                rounded: None,
            };
        }
        let values = self.values.get(tokens * cols);
        cpu.pool
            .grid(values, cols, rows, columns, |row, column, columns| {
                make(row, column, Piece::Values(columns));
            });
        hold(cpu, values, cols, readers, &mut self.codes)
    }

    /// The first `len` values of an input made for no linear.
    pub(crate) fn into_values(self, len: usize) -> Vec<f32> {
        self.values.into_vec(len)
    }
}

/// The input `x` of some linears, with its codes in `room`.
fn hold<'a>(
    cpu: &Cpu,
    x: &'a [f32],
    cols: usize,
    readers: &[&Linear<'_>],
    room: &'a mut Vec<Activations>,
) -> Input<'a> {
    assert!(
        x.len().is_multiple_of(cols),
        "{} inputs in rows of {cols}",
        x.len()
    );
    let tokens = x.len() / cols;
    let schemes: Vec<_> = schemes(cpu, readers, cols).into_iter().flatten().collect();
    let codes = rooms(room, schemes.len());
    for (codes, scheme) in codes.iter_mut().zip(schemes) {
        codes.reset(cpu.isa, tokens, cols, scheme);
        let parts = (0..tokens).step_by(TOKENS);
        let parts: Vec<_> = parts
            .map(|first| first..(first + TOKENS).min(tokens))
            .collect();
        let all = 0..cols;
        codes.grid(&cpu.pool, &parts, &[all], |part, _, mut cell| {
            let rows = &parts[part];
            cell.fill(
                cpu.isa,
                0..rows.len(),
                &x[rows.start * cols..rows.end * cols],
            );
        });
    }
    let rounded = !readers.is_empty() && cpu.path == Path::Bf16;
    Input {
        tokens,
        values: Some(x),
        codes,
        rounded: rounded.then(|| Rounded::new(cpu.isa, &cpu.pool, x, cols)),
    }
}

/// The schemes of packed weights that are multiplied as such, one for each size of group, and `None` if there are
/// readers of values.
///
/// # Panics
/// If a linear has not `cols` columns.
fn schemes(cpu: &Cpu, readers: &[&Linear<'_>], cols: usize) -> Vec<Option<Scheme>> {
    let mut schemes: Vec<Option<Scheme>> = Vec::new();
    for linear in readers {
        assert_eq!(linear.cols, cols, "{}: width of the input", linear.name);
        let scheme = match &linear.weight {
            Matrix::Stored(Weight::Quantized(view)) if cpu.path == Path::Fast => Some(view.scheme),
            _ => None,
        };
        let group = |scheme: Option<Scheme>| scheme.map(|scheme| activation_group(scheme, cols));
        if schemes.iter().all(|&other| group(other) != group(scheme)) {
            schemes.push(scheme);
        }
    }
    schemes
}

/// The first `count` rooms.
fn rooms(rooms: &mut Vec<Activations>, count: usize) -> &mut [Activations] {
    rooms.resize_with(rooms.len().max(count), Activations::default);
    &mut rooms[..count]
}

/// A part of an input, to be made by one thread.
pub(crate) enum Piece<'a> {
    /// As values.
    Values(Columns<'a>),
    /// As int8, with room for the values of a row.
    Codes(ActivationCell<'a>, Vec<f32>),
}

impl Piece<'_> {
    /// Rows of it.
    pub(crate) fn rows(&self) -> usize {
        match self {
            Self::Values(columns) => columns.rows(),
            Self::Codes(cell, _) => cell.rows(),
        }
    }

    /// Makes one row: `make` is given what to overwrite.
    pub(crate) fn row(&mut self, isa: Isa, row: usize, make: impl FnOnce(&mut [f32])) {
        match self {
            Self::Values(columns) => make(columns.row(row)),
            Self::Codes(cell, values) => {
                make(values);
                cell.fill(isa, row..row + 1, values);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qbin_format::{QuantizedView, Sparsity};

    const TOKENS: usize = 11;
    const COLS: usize = 320;
    const ROWS: usize = 16;

    /// Some values, in pieces of one or two rows and of 128 columns, and what a linear makes of them; and whether they
    /// are there as values.
    fn made(cpu: &Cpu, linear: &Linear<'_>, x: &[f32]) -> (Vec<f32>, bool) {
        let rows: Vec<_> = [0..2, 2..3, 3..5, 5..7, 7..9, 9..11].into();
        let columns = [0..128, 128..256, 256..COLS];
        let mut room = Room::default();
        // What is left from another input must not matter.
        room.hold(cpu, &[9.0; 2 * TOKENS * COLS], &[linear]);
        let grid: [&[Range<usize>]; 2] = [&rows, &columns];
        let input = room.make(cpu, [TOKENS, COLS], &[linear], grid, |r, c, mut piece| {
            for row in 0..piece.rows() {
                piece.row(cpu.isa, row, |out| {
                    let at = (rows[r].start + row) * COLS;
                    out.copy_from_slice(&x[at..][columns[c].clone()]);
                });
            }
        });
        let mut out = vec![0.0; TOKENS * ROWS];
        linear.add_to(cpu, &input, &mut out);
        (out, input.values.is_some())
    }

    #[test]
    fn an_input_made_in_pieces_is_the_input_of_its_values() {
        let bytes = |len: usize, limit: usize| -> Vec<u8> {
            (0..len).map(|i| (i * i % 251 % limit) as u8).collect()
        };
        let x: Vec<f32> = (0..TOKENS * COLS)
            .map(|i| (i as f32 * 0.37).sin() * (i % 17) as f32)
            .collect();
        let (codes, parameters) = (bytes(COLS * ROWS / 2, 256), bytes(2 * COLS, 60));
        let dense = bytes(COLS * ROWS, 200).into_iter().map(f32::from).collect();
        let packed = |group| {
            let scheme = Scheme {
                bits: 4,
                group_size: Some(group),
                symmetric: true,
            };
            Matrix::Stored(Weight::Quantized(QuantizedView {
                scheme,
                rows: ROWS,
                cols: COLS,
                sparsity: Sparsity::Dense,
                codes: &codes,
                scales: &parameters[..2 * ROWS * scheme.groups(COLS)],
                zero_points: &[],
            }))
        };
        // Pieces are whole groups of 32 and of 64 columns, but not of 96.
        let weights = [
            (packed(32), false),
            (packed(64), false),
            (packed(96), true),
            (Matrix::Owned(dense), true),
        ];
        for (weight, as_values) in weights {
            let linear = Linear {
                name: "w".into(),
                rows: ROWS,
                cols: COLS,
                weight,
                bias: None,
            };
            for path in [Path::Reference, Path::Bf16, Path::Fast] {
                let cpu = Cpu::new(path, Isa::detect(), 2);
                let expected = linear.apply(&cpu, &x);
                assert!(expected.iter().any(|&value| value != 0.0));
                let got = made(&cpu, &linear, &x);
                assert_eq!(got, (expected, as_values || path != Path::Fast));
            }
        }
    }
}
