//! The search of [`ScaleSearch::Weighted`](super::ScaleSearch) over one group.
//!
//! Everything is inlined into the caller, which is compiled for each instruction set.

use super::{Grid, GroupParams, LANES, Rounder, storable};

/// Ranges tried beside the whole one.
const SHRINK_STEPS: usize = 8;
/// Part of the range that each step takes off.
const SHRINK: f32 = 0.05;
/// Where the symmetric candidates begin, in units of "the largest magnitude has the lowest code".
const WIDEST: f32 = 1.15;
/// Rounds of "refit the scale to the codes, then the codes to the scale".
const REFITS: usize = 3;
/// The most candidates.
const CANDIDATES: usize = 3 * SHRINK_STEPS;
/// Candidates measured at once: weights are then read once for all of them, and the divisions of one overlap with the
/// sums of another.
const TOGETHER: usize = 4;

/// What rounding leaves of a group: `Σ h·e²`, `Σ h·e·n` and `Σ h·n²`, with the levels `n` and the errors `e = w − scale·n`.
#[derive(Clone, Copy, Default)]
struct Fit {
    ee: f32,
    en: f32,
    nn: f32,
}

impl Fit {
    /// What the scale that suits the present codes best has more. NaN where no weight counts. Written with `e`, since `w`
    /// itself would cancel at eight bits.
    #[inline(always)]
    fn step(self) -> f32 {
        self.en / self.nn
    }

    /// `Σ h·e²` with that scale and these codes.
    #[inline(always)]
    fn refitted(self) -> f32 {
        self.ee - self.en * self.step()
    }
}

/// A group, and how much each weight counts.
pub(super) struct Search<'a> {
    pub(super) grid: &'a Grid,
    pub(super) weights: &'a [f32],
    pub(super) importance: &'a [f32],
}

impl Search<'_> {
    /// Best candidate by the closed-form refit, then refits until they stop helping; `plain`, the parameters of the whole
    /// range `low ..= high`, stays unless something is strictly better by the measured error.
    #[inline(always)]
    pub(super) fn run(&self, plain: GroupParams, low: f32, high: f32) -> GroupParams {
        let [fit] = self.fits(&[plain]);
        let mut best = (fit.ee, plain);
        let (start, fit) = self.start((plain, fit), low, high);
        self.improve(start, fit, &mut best);
        if !self.grid.symmetric {
            let (first, last) = self.grid.codes();
            let zero = best.1.zero_point;
            for zero_point in [
                zero.saturating_sub(1).max(first),
                zero.saturating_add(1).min(last),
            ] {
                let start = GroupParams {
                    zero_point,
                    ..best.1
                };
                let [fit] = self.fits(&[start]);
                self.improve(start, fit, &mut best);
            }
        }
        best.1
    }

    /// The candidate with the least error after a refit, and its fit.
    #[inline(always)]
    fn start(&self, plain: (GroupParams, Fit), low: f32, high: f32) -> (GroupParams, Fit) {
        let mut candidates = [plain.0; CANDIDATES];
        let count = self.candidates(&mut candidates, low, high);
        let mut best = (f32::INFINITY, plain);
        // False for NaN too: no weight counts, or the sums overflowed.
        if !self.grid.symmetric && plain.1.refitted() < best.0 {
            best.0 = plain.1.refitted();
        }
        for (batch, candidates) in candidates.as_chunks::<TOGETHER>().0.iter().enumerate() {
            if batch * TOGETHER >= count {
                break;
            }
            let fits = self.fits(candidates);
            for (at, candidate) in candidates.iter().zip(fits).enumerate() {
                let error = candidate.1.refitted();
                if batch * TOGETHER + at < count && error < best.0 {
                    best = (error, (*candidate.0, candidate.1));
                }
            }
        }
        best.1
    }

    /// Narrowed ranges: at both ends and at either for the asymmetric grid, with both signs of the scale for
    /// the symmetric, the whole one included. Tells how many there are.
    #[inline(always)]
    fn candidates(&self, out: &mut [GroupParams; CANDIDATES], low: f32, high: f32) -> usize {
        let part = |step: usize| 1.0 - SHRINK * step as f32;
        if self.grid.symmetric {
            let half = f32::from(1u8 << (self.grid.bits - 1));
            let largest = high.max(-low);
            for (step, pair) in out.as_chunks_mut::<2>().0[..=SHRINK_STEPS]
                .iter_mut()
                .enumerate()
            {
                // Of either sign, since +largest has a level at `half` steps only where it is negative.
                let scale = storable(WIDEST * part(step) * largest / half);
                (pair[0].scale, pair[1].scale) = (scale, -scale);
            }
            return 2 * (SHRINK_STEPS + 1);
        }
        for (step, three) in out.as_chunks_mut::<3>().0.iter_mut().enumerate() {
            let part = part(step + 1);
            for (params, (l, h)) in three
                .iter_mut()
                .zip([(part, part), (part, 1.0), (1.0, part)])
            {
                *params = self.grid.range_params(l * low, h * high);
            }
        }
        CANDIDATES
    }

    /// Refits the scale to the codes while that lowers the error, and keeps the best in `best`.
    #[inline(always)]
    fn improve(&self, mut params: GroupParams, mut fit: Fit, best: &mut (f32, GroupParams)) {
        for _ in 0..REFITS {
            let scale = params.scale + fit.step();
            if !scale.is_finite() || scale == 0.0 {
                return;
            }
            params.scale = storable(scale);
            [fit] = self.fits(&[params]);
            if fit.ee.total_cmp(&best.0).is_ge() {
                return;
            }
            *best = (fit.ee, params);
        }
    }

    /// What rounding to each of `params` leaves. Loops are written out: closures would not be compiled for the caller's
    /// instruction set.
    #[inline(always)]
    fn fits<const N: usize>(&self, params: &[GroupParams; N]) -> [Fit; N] {
        let mut rounders = [self.grid.rounder(params[0]); N];
        for (rounder, &params) in rounders.iter_mut().zip(params) {
            *rounder = self.grid.rounder(params);
        }
        let mut sums = [[[0f32; LANES]; 3]; N];
        let (weights, w_rest) = self.weights.as_chunks::<LANES>();
        let (importance, h_rest) = self.importance.as_chunks::<LANES>();
        for (w, h) in weights.iter().zip(importance) {
            add(&rounders, w, h, &mut sums);
        }
        if !w_rest.is_empty() {
            // Weights of no importance leave the sums as they are.
            let (mut w, mut h) = ([0f32; LANES], [0f32; LANES]);
            w[..w_rest.len()].copy_from_slice(w_rest);
            h[..h_rest.len()].copy_from_slice(h_rest);
            add(&rounders, &w, &h, &mut sums);
        }
        let mut fits = [Fit::default(); N];
        for (fit, [ee, en, nn]) in fits.iter_mut().zip(&sums) {
            (fit.ee, fit.en, fit.nn) = (total(ee), total(en), total(nn));
        }
        fits
    }
}

/// Adds the terms of some weights to the sums of every rounder.
#[inline(always)]
fn add<const N: usize>(
    rounders: &[Rounder; N],
    w: &[f32; LANES],
    h: &[f32; LANES],
    sums: &mut [[[f32; LANES]; 3]; N],
) {
    for (rounder, [ee, en, nn]) in rounders.iter().zip(sums) {
        for lane in 0..LANES {
            let n = rounder.steps(w[lane]);
            let e = w[lane] - rounder.value(n);
            let he = h[lane] * e;
            ee[lane] = he.mul_add(e, ee[lane]);
            en[lane] = he.mul_add(n, en[lane]);
            nn[lane] = (h[lane] * n).mul_add(n, nn[lane]);
        }
    }
}

/// The sum of the lanes, the upper half to the lower until one is left. A call, since the compiler would otherwise take
/// the sums of several candidates together, lane by lane from memory.
#[inline(never)]
fn total(lanes: &[f32; LANES]) -> f32 {
    let mut eight = [0f32; 8];
    for (i, sum) in eight.iter_mut().enumerate() {
        *sum = lanes[i] + lanes[i + 8];
    }
    let mut four = [0f32; 4];
    for (i, sum) in four.iter_mut().enumerate() {
        *sum = eight[i] + eight[i + 4];
    }
    (four[0] + four[2]) + (four[1] + four[3])
}
