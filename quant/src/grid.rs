//! The set of values a weight may take, and the choice of its scale and zero point.

use std::ops::Range;

use half::f16;
use qbin_format::Scheme;
use qbin_runtime::kernels::{Isa, Vectorized};
use serde::{Deserialize, Serialize};

use crate::error::QuantError;

/// Columns that share one scale and zero point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granularity {
    /// Runs of this many columns; the last one of a row may be shorter.
    Group(usize),
    /// The whole row.
    Channel,
}

/// How the range of a group is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleSearch {
    /// From the smallest and the largest weight.
    None,
    /// The narrowed range and refitted scale with the least `Σ h·(w − ŵ)²`; never worse than `None`
    /// by that measure. A symmetric scale may come out negative: the grid has one level more on the
    /// negative side, and the sign decides which weights get it.
    Weighted,
}

/// A family of grids: the width of the codes and how their parameters are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// 3, 4 or 8. Three bits use eight of the sixteen codes of a 4-bit container.
    pub bits: u8,
    /// Whether the zero point is the fixed middle code.
    pub symmetric: bool,
    /// Columns that share one scale.
    pub granularity: Granularity,
    /// How that scale is chosen.
    pub search: ScaleSearch,
}

/// Scale and zero point of one group: `w ≈ scale · (code − zero_point)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupParams {
    /// Exactly representable in f16, finite, never zero; negative only from
    /// [`ScaleSearch::Weighted`] on a symmetric grid.
    pub scale: f32,
    /// The code of real zero.
    pub zero_point: u8,
}

/// Ranges tried.
const SHRINK_STEPS: u32 = 9;
/// Part of the range that each step takes off.
const SHRINK: f32 = 0.05;
/// Where the symmetric candidates begin, in units of "the largest magnitude has the lowest code".
const WIDEST: f32 = 1.15;
/// Rounds of "refit the scale to the codes, then the codes to the scale".
const REFITS: usize = 3;
/// `1.5 · 2²³`: adding and subtracting it rounds |x| < 2²² to an integer, ties to even. The same result
/// as `round_ties_even`, which is a library call per element on baseline x86-64.
const TO_INTEGER: f32 = 12_582_912.0;
/// Accumulators of a sum; fixed, because the order of additions is part of the result.
const LANES: usize = 16;

impl Grid {
    /// Checks width and group against a row of `cols` columns.
    ///
    /// # Errors
    /// [`QuantError::Bits`], [`QuantError::GroupSize`].
    pub fn check(&self, cols: usize) -> Result<(), QuantError> {
        if !matches!(self.bits, 3 | 4 | 8) {
            return Err(QuantError::Bits { bits: self.bits });
        }
        match self.granularity {
            Granularity::Group(group_size) if group_size == 0 || group_size > cols => {
                Err(QuantError::GroupSize { group_size, cols })
            }
            _ => Ok(()),
        }
    }

    /// How the codes are stored.
    pub fn scheme(&self) -> Scheme {
        Scheme {
            bits: if self.bits == 3 { 4 } else { self.bits },
            group_size: match self.granularity {
                Granularity::Group(group_size) => Some(group_size),
                Granularity::Channel => None,
            },
            symmetric: self.symmetric,
        }
    }

    /// The columns of group `group` in a row of `cols`.
    pub fn columns(&self, group: usize, cols: usize) -> Range<usize> {
        match self.granularity {
            Granularity::Group(size) => group * size..cols.min((group + 1) * size),
            Granularity::Channel => 0..cols,
        }
    }

    /// The lowest and the highest code in use.
    pub fn codes(&self) -> (u8, u8) {
        let last = u8::MAX >> (8 - self.bits);
        if self.symmetric {
            let low = self.scheme().mid() - (1 << (self.bits - 1));
            (low, low + last)
        } else {
            (0, last)
        }
    }

    /// Parameters for the weights of one group; `importance` (one value ≥ 0 per weight, `None` = all
    /// ones) is read only by [`ScaleSearch::Weighted`].
    ///
    /// Asymmetric: the range always contains 0, which has an integer code. Symmetric: the largest
    /// magnitude lies half a step beyond the last level on either side. The scale is rounded to f16
    /// first and everything else follows from the rounded one. A group of zeros has scale `2/(2^b−1)`.
    ///
    /// # Panics
    /// If `importance` has another length than `weights`.
    pub fn params(&self, weights: &[f32], importance: Option<&[f32]>) -> GroupParams {
        self.params_at(Isa::detect(), weights, importance)
    }

    /// [`Self::params`] on the instruction set at hand, which changes its speed only.
    pub(crate) fn params_at(
        &self,
        isa: Isa,
        weights: &[f32],
        importance: Option<&[f32]>,
    ) -> GroupParams {
        let (low, high) = isa.run(Extremes(weights));
        let plain = self.range_params(low, high);
        if self.search == ScaleSearch::None || (low == 0.0 && high == 0.0) {
            return plain;
        }
        let ones;
        let importance = match importance {
            Some(importance) => importance,
            None => {
                ones = vec![1.0; weights.len()];
                &ones
            }
        };
        assert_eq!(importance.len(), weights.len(), "one importance per weight");
        Search {
            isa,
            grid: self,
            weights,
            importance,
        }
        .run(plain, low, high)
    }

    /// Min/max parameters of the range `low ..= high`, `low ≤ 0 ≤ high`.
    fn range_params(&self, low: f32, high: f32) -> GroupParams {
        let (low, high) = if low == 0.0 && high == 0.0 {
            (-1.0, 1.0)
        } else {
            (low, high)
        };
        let (first, last) = self.codes();
        let steps = f32::from(last - first);
        if self.symmetric {
            let scale = storable(2.0 * (high.max(-low) / steps));
            return GroupParams {
                scale,
                zero_point: self.scheme().mid(),
            };
        }
        // Divided before subtracted: `high - low` of huge weights would be infinite.
        let scale = storable(high / steps - low / steps);
        let zero_point = (-low / scale).round_ties_even().clamp(0.0, steps) as u8;
        GroupParams { scale, zero_point }
    }

    /// The rounding that `params` define.
    pub fn rounder(&self, params: GroupParams) -> Rounder {
        let (first, last) = self.codes();
        let zero = f32::from(params.zero_point);
        Rounder {
            scale: params.scale,
            zero,
            low: f32::from(first) - zero,
            high: f32::from(last) - zero,
        }
    }
}

impl GroupParams {
    /// The weight that `code` stands for.
    #[inline(always)]
    pub fn value(&self, code: u8) -> f32 {
        self.scale * (f32::from(code) - f32::from(self.zero_point))
    }
}

/// The nearest magnitude that f16 can hold and that is neither zero nor infinite.
pub(crate) fn storable(scale: f32) -> f32 {
    let smallest = f16::from_bits(1).to_f32();
    let magnitude = scale.abs().clamp(smallest, f16::MAX.to_f32());
    f16::from_f32(magnitude).to_f32().copysign(scale)
}

/// Rounds weights of one group to its grid.
#[derive(Clone, Copy, Debug)]
pub struct Rounder {
    scale: f32,
    zero: f32,
    low: f32,
    high: f32,
}

impl Rounder {
    /// The nearest level as `code − zero_point`, ties to even, clamped to the grid.
    #[inline(always)]
    pub fn steps(&self, weight: f32) -> f32 {
        let inside = (weight / self.scale).max(self.low).min(self.high);
        (inside + TO_INTEGER) - TO_INTEGER
    }

    /// The stored code of a level.
    #[inline(always)]
    pub fn code(&self, steps: f32) -> u8 {
        (steps + self.zero) as u8
    }

    /// The weight a level stands for; the same product that reading the code back gives.
    #[inline(always)]
    pub fn value(&self, steps: f32) -> f32 {
        self.scale * steps
    }

    /// Whether `weight` lies beyond the outermost level by more than rounding explains.
    #[inline(always)]
    pub fn clips(&self, weight: f32, steps: f32) -> bool {
        (weight - self.value(steps)).abs() > 0.501 * self.scale.abs()
    }
}

/// The weighted squared errors of rounding a group.
struct Errors<'a> {
    rounder: Rounder,
    weights: &'a [f32],
    importance: &'a [f32],
}

impl Vectorized for Errors<'_> {
    /// `Σ h·e²`, `Σ h·e·n`, `Σ h·n²` with the levels `n` and the errors `e = w − scale·n`.
    type Output = [f32; 3];

    #[inline(always)]
    fn run(self) -> [f32; 3] {
        let (mut ee, mut en, mut nn) = ([0f32; LANES], [0f32; LANES], [0f32; LANES]);
        let (weights, w_rest) = self.weights.as_chunks::<LANES>();
        let (importance, h_rest) = self.importance.as_chunks::<LANES>();
        let mut add = |w: &[f32; LANES], h: &[f32; LANES]| {
            for lane in 0..LANES {
                let n = self.rounder.steps(w[lane]);
                let e = w[lane] - self.rounder.value(n);
                let he = h[lane] * e;
                ee[lane] = he.mul_add(e, ee[lane]);
                en[lane] = he.mul_add(n, en[lane]);
                nn[lane] = (h[lane] * n).mul_add(n, nn[lane]);
            }
        };
        for (w, h) in weights.iter().zip(importance) {
            add(w, h);
        }
        if !w_rest.is_empty() {
            // Weights of no importance leave the sums as they are.
            let padded =
                |rest: &[f32]| std::array::from_fn(|i| rest.get(i).copied().unwrap_or(0.0));
            add(&padded(w_rest), &padded(h_rest));
        }
        [ee, en, nn].map(total)
    }
}

/// The sum of the lanes, the upper half to the lower until one is left.
#[inline(always)]
fn total(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// The least and the largest of some weights and zero.
struct Extremes<'a>(&'a [f32]);

impl Vectorized for Extremes<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    fn run(self) -> (f32, f32) {
        let (mut low, mut high) = ([0f32; LANES], [0f32; LANES]);
        let (chunks, rest) = self.0.as_chunks::<LANES>();
        for chunk in chunks.iter().map(|chunk| &chunk[..]).chain([rest]) {
            for ((low, high), &w) in low.iter_mut().zip(&mut high).zip(chunk) {
                *low = low.min(w);
                *high = high.max(w);
            }
        }
        let least = low.iter().fold(0f32, |m, &w| m.min(w));
        (least, high.iter().fold(0f32, |m, &w| m.max(w)))
    }
}

/// The search of [`ScaleSearch::Weighted`] over one group.
struct Search<'a> {
    isa: Isa,
    grid: &'a Grid,
    weights: &'a [f32],
    importance: &'a [f32],
}

impl Search<'_> {
    /// Best candidate by the closed-form refit, then refits until they stop helping; `plain` stays unless
    /// something is strictly better by the measured error.
    fn run(&self, plain: GroupParams, low: f32, high: f32) -> GroupParams {
        let mut best = (self.error(plain), plain);
        let mut start = (f32::INFINITY, plain);
        for candidate in self.candidates(low, high) {
            let (_, error) = self.refit(candidate);
            // False for NaN too: no weight counts, or the sums overflowed.
            if error < start.0 {
                start = (error, candidate);
            }
        }
        self.improve(start.1, &mut best);
        if !self.grid.symmetric {
            let (first, last) = self.grid.codes();
            let zero = best.1.zero_point;
            for zero_point in [
                zero.saturating_sub(1).max(first),
                zero.saturating_add(1).min(last),
            ] {
                self.improve(
                    GroupParams {
                        zero_point,
                        ..best.1
                    },
                    &mut best,
                );
            }
        }
        best.1
    }

    /// Narrowed ranges: at both ends and at either for the asymmetric grid, with both signs of the scale for
    /// the symmetric.
    fn candidates(&self, low: f32, high: f32) -> impl Iterator<Item = GroupParams> {
        let grid = self.grid;
        let half = f32::from(1u8 << (grid.bits - 1));
        let largest = high.max(-low);
        (0..SHRINK_STEPS).flat_map(move |step| {
            let part = 1.0 - SHRINK * step as f32;
            let all = if grid.symmetric {
                // Of either sign, since +largest has a level at `half` steps only where it is negative.
                let scale = storable(WIDEST * part * largest / half);
                let zero_point = grid.scheme().mid();
                [Some(scale), Some(-scale), None]
                    .map(|scale| scale.map(|scale| GroupParams { scale, zero_point }))
            } else {
                [(part, part), (part, 1.0), (1.0, part)]
                    .map(|(l, h)| Some(grid.range_params(l * low, h * high)))
            };
            all.into_iter().flatten()
        })
    }

    /// Refits the scale to the codes while that lowers the error, and keeps the best in `best`.
    fn improve(&self, start: GroupParams, best: &mut (f32, GroupParams)) {
        let mut params = start;
        for _ in 0..REFITS {
            let (scale, _) = self.refit(params);
            if !scale.is_finite() || scale == 0.0 {
                return;
            }
            params.scale = storable(scale);
            let error = self.error(params);
            if error.total_cmp(&best.0).is_ge() {
                return;
            }
            *best = (error, params);
        }
    }

    /// `Σ h·(w − ŵ)²`.
    fn error(&self, params: GroupParams) -> f32 {
        self.errors(params)[0]
    }

    /// The scale that suits the present codes best, and the weighted error it leaves with them.
    ///
    /// With the levels `n` and errors `e = w − scale·n`: `scale + Σ h·e·n / Σ h·n²` leaves
    /// `Σ h·e² − (Σ h·e·n)² / Σ h·n²`. Written with `e`, since `w` itself would cancel at eight bits.
    /// NaN where no weight counts.
    fn refit(&self, params: GroupParams) -> (f32, f32) {
        let [ee, en, nn] = self.errors(params);
        (params.scale + en / nn, ee - en * (en / nn))
    }

    fn errors(&self, params: GroupParams) -> [f32; 3] {
        self.isa.run(Errors {
            rounder: self.grid.rounder(params),
            weights: self.weights,
            importance: self.importance,
        })
    }
}
