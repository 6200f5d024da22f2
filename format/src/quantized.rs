//! One quantized weight matrix in plain row-major form, before packing and after unpacking.

use half::f16;

/// How the codes of one weight matrix are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scheme {
    /// Width of the stored code: 4 or 8.
    pub bits: u8,
    /// Columns that share one scale; `None` is one scale per output row ("per channel").
    pub group_size: Option<usize>,
    /// Whether the zero point is the constant `2^(bits-1)` and therefore not stored.
    pub symmetric: bool,
}

impl Scheme {
    /// Number of scales in a row of `cols` columns; the last group may be short.
    #[inline]
    pub fn groups(&self, cols: usize) -> usize {
        self.group_size.map_or(1, |group| cols.div_ceil(group))
    }

    /// Group of column `col`.
    #[inline]
    pub fn group_of(&self, col: usize) -> usize {
        self.group_size.map_or(0, |group| col / group)
    }

    /// The zero point of a symmetric grid.
    pub fn mid(&self) -> u8 {
        1 << (self.bits - 1)
    }
}

/// A quantized matrix `W[rows, cols]`: `w = scale · (code − zero_point)`, codes unsigned.
///
/// `codes` is `[rows, cols]`, one code per byte; `scales` is `[rows, groups]`; `zero_points` is
/// `[rows, groups]` where the scheme is asymmetric and empty where it is symmetric.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedMatrix {
    /// How to read the codes.
    pub scheme: Scheme,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Unsigned codes, `[rows, cols]`.
    pub codes: Vec<u8>,
    /// Scales as stored, `[rows, groups]`.
    pub scales: Vec<f16>,
    /// Zero points, `[rows, groups]`, or empty.
    pub zero_points: Vec<u8>,
}

impl QuantizedMatrix {
    /// The matrix in f32, `[rows, cols]` row major: one subtraction (exact) and one multiplication.
    pub fn dequantize(&self) -> Vec<f32> {
        let groups = self.scheme.groups(self.cols);
        let mut out = Vec::with_capacity(self.rows * self.cols);
        for row in 0..self.rows {
            for col in 0..self.cols {
                let at = row * groups + self.scheme.group_of(col);
                let zero = self
                    .zero_points
                    .get(at)
                    .copied()
                    .unwrap_or(self.scheme.mid());
                let code = i32::from(self.codes[row * self.cols + col]) - i32::from(zero);
                out.push(self.scales[at].to_f32() * code as f32);
            }
        }
        out
    }
}
