//! The arithmetic of a benchmark: from seconds to speeds, from speeds to shares of limits and to cost.

use qbin_format::{Model, Weight};
use qbin_runtime::spec::{self, EMBEDDING, HEAD, LinearKind, Role};
use qbin_runtime::{KvDtype, ModelConfig, kernels::limits::Limits};
use serde::Serialize;

/// What several measurements of one speed say.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Speed {
    pub(crate) median: f64,
    pub(crate) best: f64,
    /// Best less worst, relative to the median.
    pub(crate) spread: f64,
}

impl Speed {
    /// Of `work` units done in each of these times.
    ///
    /// # Panics
    /// If there is no time.
    pub(crate) fn new(work: f64, seconds: &[f64]) -> Self {
        let mut speeds: Vec<f64> = seconds.iter().map(|seconds| work / seconds).collect();
        speeds.sort_by(f64::total_cmp);
        let (middle, odd) = (speeds.len() / 2, speeds.len() % 2 == 1);
        let median = match odd {
            true => speeds[middle],
            false => (speeds[middle - 1] + speeds[middle]) / 2.0,
        };
        let best = speeds[speeds.len() - 1];
        Self {
            median,
            best,
            spread: (best - speeds[0]) / median,
        }
    }
}

/// What a forward pass reads and multiplies, from the model's shape and the way it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Work {
    /// Bytes of all weights but the embedding, as stored.
    pub(crate) weight_bytes: u64,
    /// Elements of the blocks' linears.
    block_elements: u64,
    /// Elements of the last block's linears behind its keys and values: only the last token of a prompt needs them.
    last_elements: u64,
    /// Elements of the head.
    head_elements: u64,
    /// Bytes of keys and values of a position in one block.
    position_bytes: u64,
    /// Attention windows of the blocks.
    windows: Vec<Option<usize>>,
}

/// The weights that a step reads: all but the embedding, unless it is the head, too.
pub(crate) fn step_weights<'m>(model: &'m Model, config: &ModelConfig) -> Vec<Weight<'m>> {
    let head = model.weight(HEAD).or_else(|| model.weight(EMBEDDING));
    let specs = spec::tensors(config);
    let blocks = specs
        .iter()
        .filter(|spec| !matches!(spec.role, Role::Embedding | Role::Head));
    let blocks = blocks.filter_map(|spec| model.weight(&spec.name));
    blocks.chain(head).collect()
}

impl Work {
    /// Of a model whose tensors were accounted for.
    pub(crate) fn new(model: &Model, config: &ModelConfig, kv: KvDtype) -> Self {
        let specs = spec::tensors(config);
        let elements = |specs: &[&spec::TensorSpec]| -> u64 {
            let of = |spec: &&spec::TensorSpec| spec.shape.iter().product::<usize>() as u64;
            specs.iter().map(of).sum()
        };
        let linears: Vec<_> = specs
            .iter()
            .filter(|spec| matches!(spec.role, Role::Linear { .. }))
            .collect();
        let of_last = |spec: &&&spec::TensorSpec| match spec.role {
            Role::Linear { block, kind } => {
                block + 1 == config.num_blocks && !matches!(kind, LinearKind::K | LinearKind::V)
            }
            _ => false,
        };
        let last: Vec<_> = linears.iter().filter(of_last).copied().collect();
        let weights = step_weights(model, config);
        Self {
            weight_bytes: weights.iter().map(|w| w.stored_bytes() as u64).sum(),
            block_elements: elements(&linears),
            last_elements: elements(&last),
            head_elements: (config.vocab_size * config.hidden_size) as u64,
            position_bytes: (2 * config.kv_dim() * kv.bytes()) as u64,
            windows: config.sliding_window.clone(),
        }
    }

    /// Operations (a multiplication and an addition are two) of the linears for `sequences` prompts of `tokens`
    /// tokens, with logits of the last token of each.
    pub(crate) fn prompt_operations(&self, sequences: usize, tokens: usize) -> f64 {
        let once = self.last_elements + self.head_elements;
        let per_sequence = tokens as u64 * (self.block_elements - self.last_elements) + once;
        2.0 * sequences as f64 * per_sequence as f64
    }

    /// Bytes of a cache of `positions` positions.
    pub(crate) fn cache_bytes(&self, positions: usize) -> u64 {
        self.windows.len() as u64 * positions as u64 * self.position_bytes
    }

    /// Bytes that one step reads on average, when `tokens` tokens are generated behind `depth` positions in each of
    /// `sequences` sequences: the weights once, and every sequence's keys and values.
    pub(crate) fn step_bytes(&self, sequences: usize, depth: usize, tokens: usize) -> f64 {
        let seen = |window: &Option<usize>| -> usize {
            let window = window.unwrap_or(usize::MAX);
            (depth + 1..=depth + tokens).map(|n| n.min(window)).sum()
        };
        let positions: usize = self.windows.iter().map(seen).sum();
        let cached = (sequences * positions) as f64 * self.position_bytes as f64;
        self.weight_bytes as f64 + cached / tokens as f64
    }
}

/// Cost of a million tokens at a price per hour.
pub(crate) fn cost_per_million(price_per_hour: f64, tokens_per_second: f64) -> f64 {
    price_per_hour / 3600.0 / tokens_per_second * 1e6
}

/// The peak that the linears of a path could reach.
pub(crate) fn peak(path: qbin_runtime::Path, limits: &Limits) -> Option<f64> {
    match path {
        qbin_runtime::Path::Fast => limits.int8,
        qbin_runtime::Path::Reference => limits.f32,
        qbin_runtime::Path::Bf16 => limits.bf16,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_have_a_median() {
        let odd = Speed::new(12.0, &[1.0, 4.0, 2.0]);
        assert_eq!((odd.median, odd.best, odd.spread), (6.0, 12.0, 1.5));
        let even = Speed::new(12.0, &[1.0, 4.0, 2.0, 3.0]);
        assert_eq!((even.median, even.best), (5.0, 12.0));
        let one = Speed::new(12.0, &[3.0]);
        assert_eq!((one.median, one.best, one.spread), (4.0, 4.0, 0.0));
    }

    #[test]
    fn a_million_tokens_cost_what_their_time_costs() {
        // 1000 tokens per second are 3.6 million in an hour.
        assert!((cost_per_million(3.6, 1000.0) - 1.0).abs() <= 1e-12);
        assert_eq!(cost_per_million(0.0, 5.0), 0.0);
    }

    #[test]
    fn bytes_and_operations_follow_the_shape() {
        let work = Work {
            weight_bytes: 1000,
            block_elements: 100,
            last_elements: 40,
            head_elements: 7,
            position_bytes: 10,
            windows: vec![None, Some(4)],
        };
        assert_eq!(
            work.prompt_operations(3, 5),
            2.0 * 3.0 * (5.0 * 60.0 + 40.0 + 7.0)
        );
        assert_eq!(work.cache_bytes(6), 120);
        // Behind 2 positions the two steps see 3 and 4; behind 3, where the window cuts, 4 and 5 or 4 and 4.
        assert_eq!(work.step_bytes(1, 2, 2), 1000.0 + 10.0 * (7.0 + 7.0) / 2.0);
        assert_eq!(
            work.step_bytes(2, 3, 2),
            1000.0 + 2.0 * 10.0 * (9.0 + 8.0) / 2.0
        );
    }
}
