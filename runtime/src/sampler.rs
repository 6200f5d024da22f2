//! Choosing the next token from its logits.

use crate::RuntimeError;
use crate::kernels::Isa;
use crate::kernels::logits::{argmax, likelihoods};
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
    isa: Isa,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// # Errors
    /// A sampling parameter outside its range.
    pub fn new(sampling: Sampling, isa: Isa) -> Result<Self, RuntimeError> {
        sampling.check()?;
        Ok(Self {
            sampling,
            isa,
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
            return argmax(self.isa, logits);
        }
        let (likelihoods, sum) = likelihoods(self.isa, logits, self.sampling.temperature);
        let mut ranking = Ranking::new(likelihoods);
        let (kept, total) = self.filter(&mut ranking, sum);
        let mut at = self.rng.random::<f32>() * total;
        let mut last = None;
        for rank in 0..kept {
            let Some((id, likelihood)) = ranking.get(rank) else {
                break;
            };
            at -= likelihood;
            last = Some(id);
            if at < 0.0 {
                break;
            }
        }
        // Only logits of which none is a number leave nothing to choose from.
        last.unwrap_or(0)
    }

    /// How many of the most likely tokens pass the filters, and the sum of their likelihoods; `sum` is that of all.
    fn filter(&self, ranking: &mut Ranking, sum: f32) -> (usize, f32) {
        let Sampling {
            top_k,
            top_p,
            min_p,
            ..
        } = self.sampling;
        let len = ranking.likelihoods.len();
        let (limit, mut total) = match top_k {
            0 => (len, sum),
            k if k >= len => (len, sum),
            k => (
                k,
                (0..k)
                    .filter_map(|rank| ranking.get(rank))
                    .map(|(_, p)| p)
                    .sum(),
            ),
        };
        if top_p == 1.0 && min_p == 0.0 {
            return (limit, total);
        }
        let enough = top_p * total;
        let mut kept = 0;
        total = 0.0;
        while kept < limit && (kept == 0 || total < enough) {
            match ranking.get(kept) {
                Some((_, likelihood)) if likelihood >= min_p => total += likelihood,
                _ => break,
            }
            kept += 1;
        }
        (kept, total)
    }
}

/// Tokens by falling likelihood, as far down as somebody asks: sorting a whole vocabulary takes longer than computing
/// its logits.
struct Ranking {
    /// By id, relative to the most likely.
    likelihoods: Vec<f32>,
    /// The most likely ones, in order: all with a likelihood of at least `floor`.
    ranked: Vec<(u32, f32)>,
    floor: f32,
}

impl Ranking {
    fn new(likelihoods: Vec<f32>) -> Self {
        Self {
            likelihoods,
            ranked: Vec::new(),
            floor: f32::INFINITY,
        }
    }

    /// The token of this rank with its likelihood.
    fn get(&mut self, rank: usize) -> Option<(u32, f32)> {
        while rank >= self.ranked.len() && self.floor > 0.0 {
            self.lower();
        }
        self.ranked.get(rank).copied()
    }

    /// Ranks the next band of likelihoods.
    fn lower(&mut self) {
        let above = self.floor;
        // The last band holds everything that is left.
        self.floor = match above {
            f32::INFINITY => 1.0 / 16.0,
            _ if above > 1e-6 => above / 16.0,
            _ => 0.0,
        };
        let start = self.ranked.len();
        let band = self.floor..above;
        let all = self.likelihoods.iter().enumerate();
        let found = all.filter(|(_, likelihood)| band.contains(*likelihood));
        self.ranked.extend(found.map(|(id, &p)| (id as u32, p)));
        // Stable, so that smaller ids stay first.
        self.ranked[start..].sort_by(|a, b| b.1.total_cmp(&a.1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(sampling: Sampling, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(sampling, Isa::detect()).expect("valid parameters");
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
    fn ranks_are_those_of_a_sort() {
        let likelihoods: Vec<f32> = (0..3000)
            .map(|i| (-((i * 7919 % 2003) as f32) * 0.05).exp())
            .collect();
        let mut sorted: Vec<(u32, f32)> = (0..).zip(likelihoods.iter().copied()).collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let mut ranking = Ranking::new(likelihoods);
        for (rank, expected) in sorted.iter().enumerate() {
            assert_eq!(ranking.get(rank), Some(*expected), "{rank}");
        }
        assert_eq!(ranking.get(sorted.len()), None);
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
            assert!(Sampler::new(bad, Isa::detect()).is_err(), "{bad:?}");
        }
    }
}
