//! Choosing the next token from its logits.

use crate::RuntimeError;
use rand::RngExt as _;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// How tokens are chosen. Filters apply in the order of the fields, after the temperature.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy; otherwise logits are divided by it.
    pub temperature: f32,
    /// Only the `k` most likely tokens; 0 is all.
    pub top_k: usize,
    /// The smallest set of most likely tokens whose probability reaches this; 1 is all.
    pub top_p: f32,
    /// Only tokens at least this likely, relative to the most likely one; 0 is all.
    pub min_p: f32,
    /// Seed of the choice.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// # Errors
    /// [`RuntimeError::Sampling`] for a value outside its range, NaN included.
    pub fn check(&self) -> Result<(), RuntimeError> {
        let rules = [
            (
                "temperature",
                self.temperature,
                (0.0..f32::INFINITY).contains(&self.temperature),
                "a finite number from 0",
            ),
            (
                "top-p",
                self.top_p,
                self.top_p > 0.0 && self.top_p <= 1.0,
                "above 0 and at most 1",
            ),
            (
                "min-p",
                self.min_p,
                (0.0..=1.0).contains(&self.min_p),
                "from 0 to 1",
            ),
        ];
        match rules.into_iter().find(|rule| !rule.2) {
            None => Ok(()),
            Some((name, got, _, expected)) => Err(RuntimeError::Sampling {
                name,
                got,
                expected,
            }),
        }
    }
}

/// A seeded chooser of tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// # Errors
    /// A sampling parameter outside its range.
    pub fn new(sampling: Sampling) -> Result<Self, RuntimeError> {
        sampling.check()?;
        Ok(Self {
            sampling,
            rng: ChaCha8Rng::seed_from_u64(sampling.seed),
        })
    }

    /// The next token. Of equally likely tokens the one with the smaller id comes first.
    ///
    /// # Panics
    /// If `logits` is empty.
    pub fn choose(&mut self, logits: &[f32]) -> u32 {
        assert!(!logits.is_empty(), "no logits to choose from");
        if self.sampling.temperature == 0.0 {
            return argmax(logits);
        }
        let kept = self.candidates(logits);
        let total: f32 = kept.iter().map(|(_, p)| p).sum();
        let mut at = self.rng.random::<f32>() * total;
        for &(id, p) in &kept {
            at -= p;
            if at < 0.0 {
                return id;
            }
        }
        kept[kept.len() - 1].0
    }

    /// The tokens that pass the filters, most likely first, with unnormalised probabilities (the first
    /// has 1).
    fn candidates(&self, logits: &[f32]) -> Vec<(u32, f32)> {
        let max = logits[argmax(logits) as usize];
        let mut all: Vec<(u32, f32)> = logits
            .iter()
            .enumerate()
            .map(|(id, &logit)| (id as u32, ((logit - max) / self.sampling.temperature).exp()))
            .collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if self.sampling.top_k > 0 {
            all.truncate(self.sampling.top_k);
        }
        let total: f32 = all.iter().map(|(_, p)| p).sum();
        let mut sum = 0.0;
        let mut keep = 0;
        while keep < all.len() && (keep == 0 || sum < self.sampling.top_p * total) {
            sum += all[keep].1;
            keep += 1;
        }
        all.truncate(keep);
        all.retain(|(_, p)| *p >= self.sampling.min_p);
        all
    }
}

/// Index of the largest value; the first of equals.
pub(crate) fn argmax(values: &[f32]) -> u32 {
    let best = values.iter().enumerate().fold(
        0,
        |best, (i, value)| if *value > values[best] { i } else { best },
    );
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(sampling: Sampling, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(sampling).expect("valid parameters");
        let mut counts = vec![0; logits.len()];
        (0..draws).for_each(|_| counts[sampler.choose(logits) as usize] += 1);
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(counts(Sampling::default(), &[0.0, 3.0, 3.0], 5), [0, 5, 0]);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let logits = [0.0f32, 1.0, 2.0, -1.0];
        for temperature in [0.5f32, 1.0, 2.0] {
            let draws = 20_000;
            let counts = counts(
                Sampling {
                    temperature,
                    seed: 7,
                    ..Sampling::default()
                },
                &logits,
                draws,
            );
            let total: f32 = logits.iter().map(|l| (l / temperature).exp()).sum();
            for (count, logit) in counts.iter().zip(logits) {
                let p = f64::from((logit / temperature).exp() / total);
                // Five standard deviations of a binomial count.
                let tolerance = 5.0 * (draws as f64 * p * (1.0 - p)).sqrt();
                assert!(
                    (*count as f64 - draws as f64 * p).abs() <= tolerance,
                    "{counts:?} at {temperature}"
                );
            }
        }
    }

    #[test]
    fn filters_leave_out_what_they_say() {
        let logits = [2.0f32, 1.9, 0.0, -5.0];
        let hot = Sampling {
            temperature: 10.0,
            seed: 3,
            ..Sampling::default()
        };
        let seen = |sampling| {
            counts(sampling, &logits, 500)
                .iter()
                .map(|count| *count > 0)
                .collect::<Vec<_>>()
        };
        assert_eq!(seen(hot), [true, true, true, true]);
        assert_eq!(
            seen(Sampling { top_k: 2, ..hot }),
            [true, true, false, false]
        );
        assert_eq!(
            seen(Sampling { top_p: 0.5, ..hot }),
            [true, true, false, false]
        );
        assert_eq!(
            seen(Sampling { min_p: 0.8, ..hot }),
            [true, true, true, false]
        );
        assert_eq!(
            seen(Sampling { top_p: 1e-6, ..hot }),
            [true, false, false, false]
        );
    }

    #[test]
    fn parameters_out_of_range_are_refused() {
        let base = Sampling::default();
        for bad in [
            Sampling {
                temperature: -1.0,
                ..base
            },
            Sampling {
                temperature: f32::NAN,
                ..base
            },
            Sampling { top_p: 0.0, ..base },
            Sampling { min_p: 1.5, ..base },
        ] {
            assert!(Sampler::new(bad).is_err(), "{bad:?}");
        }
    }
}
