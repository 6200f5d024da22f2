//! Rounding of inputs to int8, feature by feature.

use super::QUAD;
use super::tile::WIDTH;
use crate::kernels::isa::Vectorized;

/// The largest code.
pub(super) const LARGEST: f32 = 127.0;
/// `1.5 · 2²³`: what is added to it is rounded to an integer, ties to even, that stands in the lowest bits.
const TO_INTEGER: f32 = 12_582_912.0;
/// Flips the top bit of each byte: adds 128 to four signed codes.
const OFFSET: u32 = 0x8080_8080;

/// The features `first .. first + WIDTH` of a slab.
pub(super) struct PanelRounding<'a> {
    /// `[tokens, features]`.
    pub(super) x: &'a [f32],
    pub(super) features: usize,
    pub(super) first: usize,
    /// `[quads][WIDTH]`.
    pub(super) words: &'a mut [u32],
    pub(super) scales: &'a mut [f32],
    pub(super) sums: &'a mut [i32],
    pub(super) abs_sums: &'a mut [f64],
    pub(super) square_sums: &'a mut [f64],
}

impl Vectorized for PanelRounding<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let width = WIDTH.min(self.features - self.first);
        let token = |row: &[f32]| -> [f32; WIDTH] {
            let row = &row[self.first..][..width];
            match row.as_array() {
                Some(row) => *row,
                None => std::array::from_fn(|i| row.get(i).copied().unwrap_or(0.0)),
            }
        };
        let mut largest = [0f32; WIDTH];
        let (mut abs_sums, mut square_sums) = ([0f64; WIDTH], [0f64; WIDTH]);
        for row in self.x.chunks_exact(self.features) {
            let sums = abs_sums.iter_mut().zip(&mut square_sums);
            for ((largest, (abs_sum, square_sum)), x) in
                largest.iter_mut().zip(sums).zip(token(row))
            {
                *largest = largest.max(x.abs());
                *abs_sum += f64::from(x.abs());
                *square_sum = f64::from(x).mul_add(f64::from(x), *square_sum);
            }
        }
        // Of zeros, and of values too small to matter in any sum, the code is zero.
        let inverse = largest.map(|largest| {
            let inverse = LARGEST / largest;
            if inverse.is_finite() { inverse } else { 0.0 }
        });
        let mut sums = [0i32; WIDTH];
        for (rows, words) in self
            .x
            .chunks(QUAD * self.features)
            .zip(self.words.chunks_exact_mut(WIDTH))
        {
            let mut quad = [0u32; WIDTH];
            for (i, row) in rows.chunks_exact(self.features).enumerate() {
                for (((word, sum), x), &inverse) in
                    quad.iter_mut().zip(&mut sums).zip(token(row)).zip(&inverse)
                {
                    let code = (x * inverse + TO_INTEGER).to_bits();
                    *word |= (code & 0xff) << (8 * i);
                    *sum += i32::from(code as i8);
                }
            }
            for (word, code) in words.iter_mut().zip(quad) {
                *word = code ^ OFFSET;
            }
        }
        self.sums.copy_from_slice(&sums);
        self.abs_sums.copy_from_slice(&abs_sums);
        self.square_sums.copy_from_slice(&square_sums);
        for (scale, largest) in self.scales.iter_mut().zip(largest) {
            *scale = largest / LARGEST;
        }
    }
}

/// Sets the codes of `tokens` in one panel's `words` to zero, and takes them from its `sums`.
pub(super) fn clear(words: &mut [u32], sums: &mut [i32], tokens: &[usize]) {
    for token in tokens {
        let shift = 8 * (token % QUAD);
        let quad = &mut words[token / QUAD * WIDTH..][..WIDTH];
        for (word, sum) in quad.iter_mut().zip(&mut *sums) {
            let code = (*word ^ OFFSET) >> shift & 0xff;
            *sum -= i32::from(code as u8 as i8);
            *word ^= code << shift;
        }
    }
}
