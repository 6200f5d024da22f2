//! Rounding of inputs to int8, feature by feature.

use std::ops::Range;

use super::QUAD;
use super::tile::WIDTH;
use crate::kernels::ahead;
use crate::kernels::isa::Vectorized;

/// The largest code.
pub(super) const LARGEST: f32 = 127.0;
/// `1.5 · 2²³`: what is added to it is rounded to an integer, ties to even, that stands in the lowest bits.
const TO_INTEGER: f32 = 12_582_912.0;
/// Flips the top bit of each byte: adds 128 to four signed codes.
const OFFSET: u32 = 0x8080_8080;

/// Panels rounded together: a row of the inputs is then read in long runs.
pub(super) const PANELS: usize = 8;
/// Tokens copied at once, whole quads: with these panels they stay in the first cache, where in the inputs themselves
/// rows a power of two apart drive each other out.
const TOKENS: usize = 4 * QUAD;

/// Some tokens of some panels, zeros beyond the features.
type Piece = [[f32; PANELS * WIDTH]; TOKENS];

/// The features of at most [`PANELS`] panels of a slab from `first` on.
pub(super) struct Rounding<'a> {
    /// `[tokens, features]`.
    pub(super) x: &'a [f32],
    pub(super) features: usize,
    pub(super) first: usize,
    /// `[panels][quads][WIDTH]`.
    pub(super) words: &'a mut [u32],
    /// `[panels][WIDTH]`, as all that follow.
    pub(super) scales: &'a mut [f32],
    pub(super) sums: &'a mut [i32],
    pub(super) abs_sums: &'a mut [f64],
    pub(super) square_sums: &'a mut [f64],
}

impl Vectorized for Rounding<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let mut piece: Piece = [[0.0; PANELS * WIDTH]; TOKENS];
        let width = (PANELS * WIDTH).min(self.features - self.first);
        let columns = self.first..self.first + width;
        let largest = self.scales.as_chunks_mut::<WIDTH>().0;
        let abs_sums = self.abs_sums.as_chunks_mut::<WIDTH>().0;
        let square_sums = self.square_sums.as_chunks_mut::<WIDTH>().0;
        largest.fill([0.0; WIDTH]);
        for (at, rows) in self.x.chunks(TOKENS * self.features).enumerate() {
            let ahead = self.x.get((at + 1) * TOKENS * self.features..);
            fetch(ahead.unwrap_or_default(), self.features, columns.clone());
            let tokens = copy(rows, self.features, columns.clone(), &mut piece);
            let sums = abs_sums.iter_mut().zip(&mut *square_sums);
            for (panel, (largest, sums)) in largest.iter_mut().zip(sums).enumerate() {
                measure(&piece[..tokens], panel, largest, sums);
            }
        }
        let sums = self.sums.as_chunks_mut::<WIDTH>().0;
        sums.fill([0; WIDTH]);
        let quads = self.words.len() / WIDTH / largest.len();
        let words = self.words.as_chunks_mut::<WIDTH>().0;
        for (at, rows) in self.x.chunks(TOKENS * self.features).enumerate() {
            let ahead = self.x.get((at + 1) * TOKENS * self.features..);
            fetch(ahead.unwrap_or_default(), self.features, columns.clone());
            let tokens = copy(rows, self.features, columns.clone(), &mut piece);
            for (panel, (largest, sums)) in largest.iter().zip(&mut *sums).enumerate() {
                let words = &mut words[panel * quads..][..quads][at * TOKENS / QUAD..];
                encode(
                    &piece[..tokens.next_multiple_of(QUAD)],
                    panel,
                    largest,
                    words,
                    sums,
                );
            }
        }
        for scale in largest.as_flattened_mut() {
            *scale /= LARGEST;
        }
    }
}

/// Fetches the `columns` of the next tokens.
#[inline(always)]
fn fetch(rows: &[f32], features: usize, columns: Range<usize>) {
    for row in rows.chunks_exact(features).take(TOKENS) {
        ahead::fetch(&row[columns.clone()]);
    }
}

/// Copies the `columns` of some tokens (`[tokens, features]`), with zeros up to a whole quad, and counts the tokens.
#[inline(always)]
fn copy(rows: &[f32], features: usize, columns: Range<usize>, piece: &mut Piece) -> usize {
    for (copy, row) in piece.iter_mut().zip(rows.chunks_exact(features)) {
        copy[..columns.len()].copy_from_slice(&row[columns.clone()]);
    }
    let tokens = rows.len() / features;
    piece[tokens..tokens.next_multiple_of(QUAD)].fill([0.0; PANELS * WIDTH]);
    tokens
}

/// Takes some tokens of a panel into its largest magnitudes, and sums of magnitudes and squares.
#[inline(always)]
fn measure(
    tokens: &[[f32; PANELS * WIDTH]],
    panel: usize,
    largest: &mut [f32; WIDTH],
    (abs_sums, square_sums): (&mut [f64; WIDTH], &mut [f64; WIDTH]),
) {
    let (mut most, mut abs, mut square) = (*largest, *abs_sums, *square_sums);
    for token in tokens {
        let x = &token.as_chunks::<WIDTH>().0[panel];
        for i in 0..WIDTH {
            most[i] = most[i].max(x[i].abs());
            let magnitude = f64::from(x[i].abs());
            abs[i] += magnitude;
            square[i] = magnitude.mul_add(magnitude, square[i]);
        }
    }
    (*largest, *abs_sums, *square_sums) = (most, abs, square);
}

/// Writes the code words of some tokens of a panel, whole quads, and adds the codes to its sums.
#[inline(always)]
fn encode(
    tokens: &[[f32; PANELS * WIDTH]],
    panel: usize,
    largest: &[f32; WIDTH],
    words: &mut [[u32; WIDTH]],
    sums: &mut [i32; WIDTH],
) {
    let mut inverse = [0f32; WIDTH];
    for (inverse, largest) in inverse.iter_mut().zip(largest) {
        // Of zeros, and of values too small to matter in any sum, the code is zero.
        let exact = LARGEST / largest;
        *inverse = if exact.is_finite() { exact } else { 0.0 };
    }
    let mut total = *sums;
    for (tokens, words) in tokens.as_chunks::<QUAD>().0.iter().zip(words) {
        let quad = tokens
            .each_ref()
            .map(|token| &token.as_chunks::<WIDTH>().0[panel]);
        for i in 0..WIDTH {
            let codes = quad.map(|x| (x[i] * inverse[i] + TO_INTEGER).to_bits());
            let bytes = codes.map(|code| code & 0xff);
            words[i] = OFFSET ^ (bytes[0] | bytes[1] << 8 | bytes[2] << 16 | bytes[3] << 24);
            // The integer is added to what stands for zero.
            for code in codes {
                total[i] = total[i].wrapping_add(code.wrapping_sub(TO_INTEGER.to_bits()) as i32);
            }
        }
    }
    *sums = total;
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
