//! Sums over tokens of outer products, `Σ x·xᵀ`, of inputs rounded to eight bits.
//!
//! Each feature of a slab of tokens is rounded to int8 with a scale of its own, its largest magnitude over 127; the
//! integer sums are then exact, so that a result depends neither on the instruction set nor on the order of the work.
//! The rounded inputs' moments are those of some inputs, hence positive semidefinite like the exact ones.
//!
//! Tokens with a feature beyond sixteen times its usual size are not rounded, since the step would then be too coarse for
//! all others: their products are added in f64, element by element in a fixed order. At most one token of thirty-two
//! is treated so, the most extreme ones.

mod add;
#[cfg(target_arch = "x86_64")]
mod amx;
mod massive;
mod round;
mod tile;

use super::gemm::{Store, View, product};
use super::isa::{Isa, Vectorized};
use super::pages;
use rayon::prelude::*;
use round::{LARGEST, PANELS, Rounding};
use tile::{Sums, WIDTH};

pub use add::add;

/// Tokens of the bytes of one code word.
const QUAD: usize = 4;
/// The most tokens of a slab: their sums of products of codes fit 32 bits (`255·127·65536 < 2³¹`).
const MOST_TOKENS: usize = 1 << 16;

/// A slab of tokens, rounded feature by feature.
#[derive(Clone, Debug, PartialEq)]
pub struct Slab {
    features: usize,
    /// Code words of a panel of features.
    panel_len: usize,
    /// `[panels][quads][WIDTH]`: bytes are four tokens' codes of one feature, plus 128.
    words: Vec<u32>,
    /// What a step of the code is worth, per feature.
    scales: Vec<f32>,
    /// `Σ codes` per feature.
    sums: Vec<i32>,
    abs_sums: Vec<f64>,
    square_sums: Vec<f64>,
    /// The tokens kept whole, `[massive, features]`; their codes are zero.
    massive: Vec<f32>,
}

impl Slab {
    /// [`Slab::fill`] into memory of its own.
    ///
    /// # Panics
    /// As [`Slab::fill`].
    pub fn new(isa: Isa, x: &[f32], features: usize) -> Self {
        let mut slab = Self::empty(features);
        slab.fill(isa, x);
        slab
    }

    /// No tokens.
    pub fn empty(features: usize) -> Self {
        let padded = features.next_multiple_of(WIDTH);
        Self {
            features,
            panel_len: 0,
            words: Vec::new(),
            scales: vec![0.0; padded],
            sums: vec![0; padded],
            abs_sums: vec![0.0; padded],
            square_sums: vec![0.0; padded],
            massive: Vec::new(),
        }
    }

    /// Rounds `x` (`[tokens, features]`, row major, finite), massive tokens apart, in place of what the slab held.
    ///
    /// # Panics
    /// If `x` is not a whole number of tokens, or more than 65536 of them.
    pub fn fill(&mut self, isa: Isa, x: &[f32]) {
        let features = self.features;
        assert!(
            x.len().is_multiple_of(features),
            "x is not [tokens, features]"
        );
        let tokens = x.len() / features;
        assert!(tokens <= MOST_TOKENS, "{tokens} tokens overflow 32 bits");
        self.panel_len = tokens.div_ceil(QUAD) * WIDTH;
        self.massive.clear();
        self.scales.fill(0.0);
        self.sums.fill(0);
        self.abs_sums.fill(0.0);
        self.square_sums.fill(0.0);
        let words = self.scales.len() / WIDTH * self.panel_len;
        if self.words.len() != words {
            self.words = pages::zeros(words);
        }
        if tokens == 0 {
            return;
        }
        self.round(isa, x);
        let largest = self.scales[..features].iter();
        let largest = largest.map(|&scale| f64::from(scale * LARGEST));
        let massive = massive::massive(x, features, largest, &self.abs_sums);
        // Mostly there are none, and the rounding stands.
        if !massive.is_empty() {
            self.keep(isa, x, &massive);
        }
    }

    /// Rounds all tokens.
    fn round(&mut self, isa: Isa, x: &[f32]) {
        let features = self.features;
        (
            self.words.par_chunks_mut(PANELS * self.panel_len),
            self.scales.par_chunks_mut(PANELS * WIDTH),
            self.sums.par_chunks_mut(PANELS * WIDTH),
            self.abs_sums.par_chunks_mut(PANELS * WIDTH),
            self.square_sums.par_chunks_mut(PANELS * WIDTH),
        )
            .into_par_iter()
            .enumerate()
            .for_each(|(task, (words, scales, sums, abs_sums, square_sums))| {
                isa.run(Rounding {
                    x,
                    features,
                    first: task * PANELS * WIDTH,
                    words,
                    scales,
                    sums,
                    abs_sums,
                    square_sums,
                });
            });
    }

    /// Takes the tokens `massive` out of the codes, and keeps them whole.
    fn keep(&mut self, isa: Isa, x: &[f32], massive: &[usize]) {
        let n = self.features;
        for token in massive {
            self.massive.extend(&x[token * n..][..n]);
        }
        (
            self.words.par_chunks_mut(self.panel_len),
            self.scales.par_chunks_mut(WIDTH),
            self.sums.par_chunks_mut(WIDTH),
        )
            .into_par_iter()
            .enumerate()
            .for_each(|(panel, (words, scales, sums))| {
                let first = panel * WIDTH;
                let width = WIDTH.min(n - first);
                let sets_scale = |&token: &usize| {
                    let values = x[token * n + first..][..width].iter().zip(&*scales);
                    values.fold(false, |sets, (x, &scale)| {
                        sets | (scale > 0.0 && x.abs() / LARGEST >= scale)
                    })
                };
                if !massive.iter().any(sets_scale) {
                    return round::clear(words, sums, massive);
                }
                let mut rest = Vec::with_capacity(x.len() / n * width);
                for row in x.chunks_exact(n) {
                    rest.extend_from_slice(&row[first..][..width]);
                }
                for token in massive {
                    rest[token * width..][..width].fill(0.0);
                }
                isa.run(Rounding {
                    x: &rest,
                    features: width,
                    first: 0,
                    words,
                    scales,
                    sums,
                    // Those of all tokens are known.
                    abs_sums: &mut [0.0; WIDTH],
                    square_sums: &mut [0.0; WIDTH],
                });
            });
    }

    /// `Σ |x|` over the tokens, `[features]`, before rounding.
    pub fn abs_sums(&self) -> &[f64] {
        &self.abs_sums[..self.features]
    }

    /// `Σ x²` over the tokens, `[features]`, before rounding.
    pub fn square_sums(&self) -> &[f64] {
        &self.square_sums[..self.features]
    }

    /// `Σ x·M·xᵀ` over the tokens for a symmetric `m` (`[features, features]`). The squares on the diagonal of `Σ xᵀ·x`
    /// are taken from the inputs as they were, so that rounding, which is about independent from feature to feature,
    /// adds nothing in the mean.
    ///
    /// # Panics
    /// If `m` has another shape.
    pub fn quadratic(&self, isa: Isa, m: &[f32]) -> f64 {
        let n = self.features;
        assert_eq!(m.len(), n * n, "m is not [features, features]");
        if self.words.is_empty() {
            return 0.0;
        }
        let diagonal = m.iter().step_by(n + 1).zip(&self.square_sums);
        let squares: f64 = diagonal.map(|(&m, square)| f64::from(m) * square).sum();
        let parts: Vec<f64> = m
            .par_chunks(WIDTH * n)
            .enumerate()
            .map(|(left, rows)| self.quadratic_rows(isa, left, rows))
            .collect();
        // In the order of the panels, so that the sum is the same for every number of threads.
        squares + 2.0 * parts.iter().sum::<f64>()
    }

    /// The part of panel `left` with the features before each of its own; `rows` are those of `m`.
    fn quadratic_rows(&self, isa: Isa, left: usize, rows: &[f32]) -> f64 {
        let mut sums: Sums = [[0; WIDTH]; WIDTH];
        let mut total = 0.0;
        for right in 0..=left {
            tile::products(isa, self.panel(left), self.panel(right), &[], &mut sums);
            total += isa.run(Weighted {
                slab: self,
                left,
                right,
                sums: &sums,
                rows,
            });
        }
        total + self.quadratic_massive(isa, left * WIDTH, rows) / 2.0
    }

    /// The part of the massive tokens' features from `first` on with all others; `rows` are those of `m`.
    fn quadratic_massive(&self, isa: Isa, first: usize, rows: &[f32]) -> f64 {
        let n = self.features;
        let (tokens, width) = (self.massive.len() / n, rows.len() / n);
        let x = View::row_major(&self.massive, tokens, n);
        let m = View::row_major(rows, width, n).transpose();
        let mut products = vec![0f32; tokens * width];
        product(isa, &mut products, width, Store::Replace, x, m);
        let mut total = 0.0;
        for (x, products) in self.massive.chunks(n).zip(products.chunks(width)) {
            for (at, (&x, &product)) in x[first..].iter().zip(products).enumerate() {
                let own = f64::from(rows[at * n + first + at]) * f64::from(x);
                total += f64::from(x) * (f64::from(product) - own);
            }
        }
        total
    }

    fn panel(&self, panel: usize) -> &[u32] {
        &self.words[panel * self.panel_len..][..self.panel_len]
    }
}

/// The products of panels `left` × `right`, weighted with the rows of a matrix, below the diagonal only.
struct Weighted<'a> {
    slab: &'a Slab,
    left: usize,
    right: usize,
    sums: &'a Sums,
    /// `[rows of the panel, features]`.
    rows: &'a [f32],
}

impl Vectorized for Weighted<'_> {
    type Output = f64;

    #[inline(always)]
    fn run(self) -> f64 {
        let slab = self.slab;
        let start = self.right * WIDTH;
        let mut totals = [0f64; WIDTH];
        for (at, (row, sums)) in self.rows.chunks(slab.features).zip(self.sums).enumerate() {
            let feature = self.left * WIDTH + at;
            let end = (start + WIDTH).min(feature);
            let scale = f64::from(slab.scales[feature]);
            let others = slab.scales[start..end].iter().zip(&slab.sums[start..end]);
            let terms = row[start..end].iter().zip(sums).zip(others);
            for (total, ((&m, &sum), (&other, &codes))) in totals.iter_mut().zip(terms) {
                let product = scale * f64::from(other) * f64::from(sum - 128 * codes);
                *total += f64::from(m) * product;
            }
        }
        totals.iter().sum()
    }
}

#[cfg(test)]
mod tests;
