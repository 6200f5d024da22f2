//! Reductions over the logits of one position, on vectors: the vocabulary is long.
//!
//! Sums run in [`LANES`] lanes, element `i` in lane `i mod LANES`, and the lanes are added in order.

use super::isa::{Isa, Vectorized};
use crate::math;

const LANES: usize = 16;

/// Index of the largest value; the first of equals, 0 if there is no number.
pub(crate) fn argmax(isa: Isa, values: &[f32]) -> u32 {
    let largest = max(isa, values);
    let first = values.iter().position(|&value| value == largest);
    first.unwrap_or(0) as u32
}

/// The largest value; −∞ if there is none. NaNs are passed over.
pub(crate) fn max(isa: Isa, values: &[f32]) -> f32 {
    isa.run(Max(values))
}

struct Max<'a>(&'a [f32]);

impl Vectorized for Max<'_> {
    type Output = f32;

    #[inline(always)]
    fn run(self) -> f32 {
        math::max(self.0)
    }
}

/// `exp((logit − max) / temperature)` of every logit, and their sum.
pub(crate) fn likelihoods(isa: Isa, logits: &[f32], temperature: f32) -> (Vec<f32>, f32) {
    let mut out = vec![0.0; logits.len()];
    let max = max(isa, logits);
    let sum = isa.run(Likelihoods {
        logits,
        max,
        temperature,
        out: &mut out,
    });
    (out, sum)
}

struct Likelihoods<'a> {
    logits: &'a [f32],
    max: f32,
    temperature: f32,
    out: &'a mut [f32],
}

impl Vectorized for Likelihoods<'_> {
    type Output = f32;

    #[inline(always)]
    fn run(self) -> f32 {
        for (out, logit) in self.out.iter_mut().zip(self.logits) {
            *out = math::exp((logit - self.max) / self.temperature);
        }
        math::sum(self.out, |value| value)
    }
}

/// `ln Σ exp(logit)`, summed in f64: the differences of close models live in the last digits.
pub(crate) fn log_sum_exp(isa: Isa, logits: &[f32]) -> f64 {
    let max = max(isa, logits);
    f64::from(max) + isa.run(SumExp { logits, max }).ln()
}

struct SumExp<'a> {
    logits: &'a [f32],
    max: f32,
}

impl Vectorized for SumExp<'_> {
    type Output = f64;

    #[inline(always)]
    fn run(self) -> f64 {
        let term = |logit: f32| f64::from(math::exp(logit - self.max));
        let (chunks, tail) = self.logits.as_chunks::<LANES>();
        let mut lanes = [0f64; LANES];
        for chunk in chunks {
            for (lane, &logit) in lanes.iter_mut().zip(chunk) {
                *lane += term(logit);
            }
        }
        lanes.iter().sum::<f64>() + tail.iter().map(|&logit| term(logit)).sum::<f64>()
    }
}

/// `Σ p (ln p − ln q)` of the distributions of two rows of logits, given their [`log_sum_exp`].
pub(crate) fn divergence(
    isa: Isa,
    (p, p_shift): (&[f32], f64),
    (q, q_shift): (&[f32], f64),
) -> f64 {
    isa.run(Divergence {
        p,
        p_shift,
        q,
        q_shift,
    })
}

struct Divergence<'a> {
    p: &'a [f32],
    p_shift: f64,
    q: &'a [f32],
    q_shift: f64,
}

impl Vectorized for Divergence<'_> {
    type Output = f64;

    #[inline(always)]
    fn run(self) -> f64 {
        let term = |p: f32, q: f32| {
            let (ln_p, ln_q) = (f64::from(p) - self.p_shift, f64::from(q) - self.q_shift);
            f64::from(math::exp(ln_p as f32)) * (ln_p - ln_q)
        };
        let (p, p_tail) = self.p.as_chunks::<LANES>();
        let (q, q_tail) = self.q.as_chunks::<LANES>();
        let mut lanes = [0f64; LANES];
        for (p, q) in p.iter().zip(q) {
            for (lane, (&p, &q)) in lanes.iter_mut().zip(p.iter().zip(q)) {
                *lane += term(p, q);
            }
        }
        let tail = p_tail.iter().zip(q_tail).map(|(&p, &q)| term(p, q));
        lanes.iter().sum::<f64>() + tail.sum::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_agrees_with_f64() {
        for len in [1, 15, 16, 40, 1000] {
            let p: Vec<f32> = (0..len)
                .map(|i| ((i * 37 % 101) as f32 * 0.11).sin() * 8.0)
                .collect();
            let q: Vec<f32> = p.iter().map(|p| p + (p * 9.0).cos() * 0.1).collect();
            let exact = |logits: &[f32]| {
                let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
                sum.ln()
            };
            let (p_shift, q_shift) = (exact(&p), exact(&q));
            let kl: f64 = p
                .iter()
                .zip(&q)
                .map(|(&p, &q)| {
                    let ln_p = f64::from(p) - p_shift;
                    ln_p.exp() * (ln_p - (f64::from(q) - q_shift))
                })
                .sum();
            // The exponential is good to 2⁻²², and so are the sums of its values; |ln p − ln q| is below 0.4.
            let tolerance = 2f64.powi(-21);
            for isa in Isa::available() {
                assert!((log_sum_exp(isa, &p) - p_shift).abs() <= tolerance);
                let got = divergence(isa, (&p, p_shift), (&q, q_shift));
                assert!((got - kl).abs() <= 0.4 * tolerance, "{got} {kl}");
                assert_eq!(
                    got.to_bits(),
                    divergence(Isa::available()[0], (&p, p_shift), (&q, q_shift)).to_bits()
                );
                let (values, sum) = likelihoods(isa, &p, 0.7);
                let top = max(isa, &p);
                let exact = |p: f32| f64::from((p - top) / 0.7).exp();
                for (&p, &value) in p.iter().zip(&values) {
                    assert!((f64::from(value) - exact(p)).abs() <= tolerance * exact(p));
                }
                let total: f64 = p.iter().map(|&p| exact(p)).sum();
                assert!((f64::from(sum) - total).abs() <= len as f64 * tolerance * total);
            }
        }
    }

    #[test]
    fn the_first_of_the_largest() {
        for isa in Isa::available() {
            assert_eq!(argmax(isa, &[0.0, 3.0, 3.0]), 1);
            assert_eq!(argmax(isa, &[f32::NAN, -2.0, f32::NAN]), 1);
            assert_eq!(argmax(isa, &[f32::NAN]), 0);
            let mut long = vec![-1.0; 100];
            long[77] = -0.5;
            assert_eq!(argmax(isa, &long), 77);
        }
    }
}
