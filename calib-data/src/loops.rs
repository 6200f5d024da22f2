//! When is generated text a degenerate loop?

use std::collections::HashSet;

/// Shorter sequences say too little about looping.
const LEAST_JUDGED: usize = 32;
/// Part of different 3-grams below which a sequence repeats itself. Ordinary prose has 0.9 and more,
/// code and tables 0.6 and more.
const LEAST_DISTINCT: f64 = 0.5;
/// Longest period looked for at the end.
const LONGEST_PERIOD: usize = 64;
/// Repetitions of one period at the end that make a loop…
const LEAST_REPETITIONS: usize = 4;
/// … if they are at least this many tokens, so that a row of dashes is none.
const LEAST_TAIL: usize = 32;

/// True if the sequence repeats itself: fewer than half of its 3-grams differ, or it ends in at least
/// four repetitions of one period of up to 64 tokens, 32 tokens or more together.
pub(crate) fn is_loop(ids: &[u32]) -> bool {
    ids.len() >= LEAST_JUDGED && (distinct_trigrams(ids) < LEAST_DISTINCT || ends_in_period(ids))
}

/// Different 3-grams over all 3-grams.
fn distinct_trigrams(ids: &[u32]) -> f64 {
    let distinct: HashSet<&[u32]> = ids.windows(3).collect();
    distinct.len() as f64 / (ids.len() - 2) as f64
}

fn ends_in_period(ids: &[u32]) -> bool {
    (1..=LONGEST_PERIOD.min(ids.len() / LEAST_REPETITIONS)).any(|period| {
        let repeated = (period..ids.len())
            .rev()
            .take_while(|&i| ids[i] == ids[i - period])
            .count();
        repeated + period >= LEAST_TAIL.max(LEAST_REPETITIONS * period)
    })
}

#[cfg(test)]
mod tests {
    use super::is_loop;

    fn looping(start: &[u32], period: &[u32], times: usize) -> Vec<u32> {
        start
            .iter()
            .chain(period.iter().cycle().take(period.len() * times))
            .copied()
            .collect()
    }

    #[test]
    fn text_without_repetition_is_no_loop() {
        assert!(!is_loop(&(0..512).collect::<Vec<_>>()));
    }

    #[test]
    fn short_sequences_are_not_judged() {
        assert!(!is_loop(&[7; 31]));
        assert!(is_loop(&[7; 32]));
    }

    #[test]
    fn a_loop_at_the_end_is_found_for_every_period() {
        let start: Vec<u32> = (1000..1400).collect();
        for period in 1..=64_u32 {
            let period: Vec<u32> = (0..period).collect();
            let times = 4.max(32_usize.div_ceil(period.len()));
            assert!(
                is_loop(&looping(&start, &period, times)),
                "period {}",
                period.len()
            );
            let fewer = looping(&start, &period, times - 1);
            assert!(
                !is_loop(&fewer),
                "period {} too short to judge",
                period.len()
            );
        }
    }

    #[test]
    fn repetition_spread_over_the_sequence_is_a_loop() {
        // The same ten tokens over and over, a new number after each: no period at the end.
        let ids: Vec<u32> = (0..40).flat_map(|i| (0..10).chain([1000 + i])).collect();
        assert!(is_loop(&ids));
    }
}
