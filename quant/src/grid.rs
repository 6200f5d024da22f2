//! The set of values a weight may take, and the choice of its scale and zero point.

mod search;

use std::ops::Range;

use qbin_format::Scheme;
use qbin_runtime::kernels::{Isa, Vectorized};
use serde::{Deserialize, Serialize};

use crate::error::QuantError;
use search::Search;

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

/// `1.5 · 2²³`: adding and subtracting it rounds |x| < 2²² to an integer, ties to even. The same result
/// as `round_ties_even`, which is a library call per element on baseline x86-64.
const TO_INTEGER: f32 = 12_582_912.0;
/// The least magnitude of an f16, of a normal one, and the most.
const LEAST_F16: f32 = 1.0 / (1 << 24) as f32;
const NORMAL_F16: f32 = 1.0 / (1 << 14) as f32;
const MOST_F16: f32 = 65504.0;
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
    #[inline]
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
        isa.run(Choice {
            grid: self,
            weights,
            importance,
        })
    }

    /// Min/max parameters of the range `low ..= high`, `low ≤ 0 ≤ high`.
    #[inline(always)]
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
    #[inline(always)]
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

/// The nearest magnitude that f16 can hold and that is neither zero nor infinite. Written out, since a conversion there and
/// back is two calls per candidate of a search.
#[inline(always)]
pub(crate) fn storable(scale: f32) -> f32 {
    let magnitude = scale.abs().clamp(LEAST_F16, MOST_F16);
    let rounded = if magnitude < NORMAL_F16 {
        // Multiples of 2⁻²⁴, which is what f32 can hold from 0.5 to 1.
        (magnitude + 0.5) - 0.5
    } else {
        // Thirteen bits less, ties to even.
        let bits = magnitude.to_bits();
        f32::from_bits((bits + 0xfff + (bits >> 13 & 1)) & !0x1fff)
    };
    rounded.copysign(scale)
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
        let level = weight / self.scale;
        // Comparisons instead of `max` and `min`, which take care of NaN at the cost of two more instructions each.
        let inside = if level > self.low { level } else { self.low };
        let inside = if inside < self.high {
            inside
        } else {
            self.high
        };
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

/// The choice of a group's parameters.
struct Choice<'a> {
    grid: &'a Grid,
    weights: &'a [f32],
    importance: Option<&'a [f32]>,
}

impl Vectorized for Choice<'_> {
    type Output = GroupParams;

    #[inline(always)]
    fn run(self) -> GroupParams {
        let (low, high) = Extremes(self.weights).run();
        let plain = self.grid.range_params(low, high);
        if self.grid.search == ScaleSearch::None || (low == 0.0 && high == 0.0) {
            return plain;
        }
        let ones;
        let importance = match self.importance {
            Some(importance) => importance,
            None => {
                ones = vec![1.0; self.weights.len()];
                &ones
            }
        };
        assert_eq!(
            importance.len(),
            self.weights.len(),
            "one importance per weight"
        );
        Search {
            grid: self.grid,
            weights: self.weights,
            importance,
        }
        .run(plain, low, high)
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn what_is_storable_is_the_nearest_f16() {
        // Every f16 but zero, the middle to the next one, which is a tie, and what lies beside that.
        for bits in 1..f16::MAX.to_bits() {
            let [value, next] = [bits, bits + 1].map(|bits| f16::from_bits(bits).to_f32());
            let middle = (value + next) / 2.0;
            for scale in [value, middle.next_down(), middle, middle.next_up()] {
                let expected = f16::from_f32(scale).to_f32();
                assert_eq!(storable(scale).to_bits(), expected.to_bits(), "{scale:e}");
                assert_eq!(storable(-scale).to_bits(), (-expected).to_bits());
            }
        }
        assert_eq!(storable(0.0), f16::from_bits(1).to_f32());
        assert_eq!(storable(-1e-30), -f16::from_bits(1).to_f32());
        assert_eq!(storable(f32::MAX), f16::MAX.to_f32());
    }
}
