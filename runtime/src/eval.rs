//! Measuring a model on a text: perplexity, and the comparison with another model on the same tokens.
//!
//! Every figure belongs to a [`Protocol`], because the same words name different numbers. Errors are
//! standard errors over windows: tokens of one window are not independent of each other.

use crate::buffers::Buffer;
use crate::kernels::Isa;
use crate::kernels::logits::{argmax, divergence, log_sum_exp};
use crate::{Decoder, RuntimeError};
use serde::Serialize;

/// Tokens run at once: enough that arithmetic is the bound; of more, what a linear makes would not stay in the second cache.
const BATCH_TOKENS: usize = 512;
/// Logits held at once, per model.
const LOGITS: usize = 1 << 24;

/// Which windows are cut from a token stream, and which of their positions count.
#[derive(Clone, Debug, PartialEq)]
pub struct Protocol {
    id: String,
    window: usize,
    first_scored: usize,
    needs: usize,
    bos: bool,
}

impl Protocol {
    /// `gptq-N`: consecutive windows of N tokens, tail dropped, every token but the first of a window is
    /// scored. `llamacpp-N`: the same windows, first token replaced by BOS where the tokenizer adds one,
    /// only tokens behind the middle scored, at least two windows.
    ///
    /// # Errors
    /// [`RuntimeError::UnknownProtocol`].
    pub fn parse(id: &str) -> Result<Self, RuntimeError> {
        let unknown = || RuntimeError::UnknownProtocol(id.into());
        let (kind, window) = id.rsplit_once('-').ok_or_else(unknown)?;
        let window: usize = window
            .parse()
            .ok()
            .filter(|n| (2..=1 << 20).contains(n))
            .ok_or_else(unknown)?;
        let id = id.to_string();
        match kind {
            "gptq" => Ok(Self {
                id,
                window,
                first_scored: 1,
                needs: window,
                bos: false,
            }),
            "llamacpp" if window >= 4 => Ok(Self {
                id,
                window,
                first_scored: window / 2 + 1,
                needs: 2 * window,
                bos: true,
            }),
            _ => Err(unknown()),
        }
    }

    /// The id, as it stands beside every figure.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Tokens of a window.
    pub fn window(&self) -> usize {
        self.window
    }

    /// Cuts `tokens` into windows; `limit` asks for the first so many. `bos` is the tokenizer's, where it adds one.
    ///
    /// # Errors
    /// A text too short, or fewer windows than asked for.
    pub fn windows(
        &self,
        tokens: &[u32],
        limit: Option<usize>,
        bos: Option<u32>,
    ) -> Result<Vec<Vec<u32>>, RuntimeError> {
        if tokens.len() < self.needs {
            return Err(RuntimeError::TooFewTokens {
                got: tokens.len(),
                need: self.needs,
                protocol: self.id.clone(),
            });
        }
        let there = tokens.len() / self.window;
        let asked = limit.unwrap_or(there);
        if asked > there || asked == 0 {
            return Err(RuntimeError::TooFewWindows {
                asked,
                there,
                protocol: self.id.clone(),
            });
        }
        let mut windows: Vec<Vec<u32>> = tokens
            .chunks_exact(self.window)
            .take(asked)
            .map(<[u32]>::to_vec)
            .collect();
        if let (true, Some(bos)) = (self.bos, bos) {
            windows.iter_mut().for_each(|window| window[0] = bos);
        }
        Ok(windows)
    }
}

/// A mean with its standard error over windows; no error from a single window.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Mean {
    /// The mean over all tokens.
    pub value: f64,
    /// Its standard error.
    pub error: Option<f64>,
}

impl Mean {
    /// Of values that come in windows of `per_window`, all equally long.
    fn of(values: &[f64], per_window: usize) -> Self {
        let means: Vec<f64> = values
            .chunks_exact(per_window)
            .map(|window| window.iter().sum::<f64>() / per_window as f64)
            .collect();
        let n = means.len() as f64;
        let value = means.iter().sum::<f64>() / n;
        let variance = means.iter().map(|mean| (mean - value).powi(2)).sum::<f64>() / (n - 1.0);
        Self {
            value,
            error: (means.len() > 1).then(|| (variance / n).sqrt()),
        }
    }
}

/// Perplexity of one model.
#[derive(Clone, Debug, Serialize)]
pub struct Perplexity {
    /// Protocol id.
    pub protocol: String,
    /// Windows scored.
    pub windows: usize,
    /// Tokens scored.
    pub tokens: usize,
    /// `exp(nll)`.
    pub perplexity: f64,
    /// Standard error of the perplexity.
    pub perplexity_error: Option<f64>,
    /// Mean negative log likelihood, nats per token.
    pub nll: f64,
    /// Its standard error.
    pub nll_error: Option<f64>,
}

impl Perplexity {
    fn of(protocol: &Protocol, windows: usize, nll: Mean, tokens: usize) -> Self {
        let perplexity = nll.value.exp();
        Self {
            protocol: protocol.id.clone(),
            windows,
            tokens,
            perplexity,
            perplexity_error: nll.error.map(|error| error * perplexity),
            nll: nll.value,
            nll_error: nll.error,
        }
    }
}

/// How a model differs from a base model, token by token.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Protocol id.
    pub protocol: String,
    /// Windows scored.
    pub windows: usize,
    /// Tokens scored.
    pub tokens: usize,
    /// Mean of `Σ p_base (ln p_base − ln p_model)`, nats per token.
    pub kl_mean: f64,
    /// Its standard error.
    pub kl_error: Option<f64>,
    /// Percentiles of the KL divergence of single tokens, and the maximum.
    pub kl_percentiles: Percentiles,
    /// Share of tokens where both models have the same most likely token.
    pub top1: f64,
    /// Its standard error.
    pub top1_error: Option<f64>,
    /// `ln(perplexity of the model / perplexity of the base)`, paired.
    pub ln_ppl_ratio: f64,
    /// Its standard error, paired.
    pub ln_ppl_ratio_error: Option<f64>,
    /// Root mean square change of the probability of the true token.
    pub rms_delta_p: f64,
    /// The base.
    pub base: Perplexity,
    /// The model.
    pub model: Perplexity,
}

/// Percentiles by nearest rank.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Percentiles {
    /// Median.
    pub p50: f64,
    /// 90%.
    pub p90: f64,
    /// 95%.
    pub p95: f64,
    /// 99%.
    pub p99: f64,
    /// 99.9%.
    pub p99_9: f64,
    /// Largest.
    pub max: f64,
}

impl Percentiles {
    fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| {
            sorted[((share * sorted.len() as f64).ceil() as usize).clamp(1, sorted.len()) - 1]
        };
        Self {
            p50: at(0.5),
            p90: at(0.9),
            p95: at(0.95),
            p99: at(0.99),
            p99_9: at(0.999),
            max: at(1.0),
        }
    }
}

/// Perplexity on windows of a protocol. `progress(done, total)` counts windows.
///
/// # Errors
/// Ids outside the vocabulary, or activations that are not finite.
///
/// # Panics
/// If `windows` is empty.
pub fn perplexity(
    decoder: &Decoder<'_>,
    protocol: &Protocol,
    windows: &[Vec<u32>],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Perplexity, RuntimeError> {
    let isa = decoder.cpu().isa;
    let rows = score(&[decoder], protocol, windows, progress, |logits, target| {
        log_sum_exp(isa, logits[0]) - f64::from(logits[0][target])
    })?;
    Ok(Perplexity::of(
        protocol,
        windows.len(),
        Mean::of(&rows, rows.len() / windows.len()),
        rows.len(),
    ))
}

/// Compares a model with a base on the same windows, in lock step. `progress(done, total)` counts windows.
///
/// # Errors
/// Different vocabularies, ids outside them, or activations that are not finite.
///
/// # Panics
/// If `windows` is empty.
pub fn compare(
    base: &Decoder<'_>,
    model: &Decoder<'_>,
    protocol: &Protocol,
    windows: &[Vec<u32>],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Comparison, RuntimeError> {
    let (left, right) = (base.config().vocab_size, model.config().vocab_size);
    if left != right {
        return Err(RuntimeError::VocabularyMismatch { left, right });
    }
    let isa = base.cpu().isa;
    let rows = score(
        &[base, model],
        protocol,
        windows,
        progress,
        |logits, target| Pair::of(isa, logits[0], logits[1], target),
    )?;
    let per_window = rows.len() / windows.len();
    let column = |pick: fn(&Pair) -> f64| rows.iter().map(pick).collect::<Vec<f64>>();
    let mean = |pick| Mean::of(&column(pick), per_window);
    let kl = mean(|row| row.kl);
    let top1 = mean(|row| f64::from(u8::from(row.same_top)));
    let ratio = mean(|row| row.model_nll - row.base_nll);
    let delta_p2 = mean(|row| ((-row.model_nll).exp() - (-row.base_nll).exp()).powi(2));
    let perplexity = |pick| Perplexity::of(protocol, windows.len(), mean(pick), rows.len());
    Ok(Comparison {
        protocol: protocol.id.clone(),
        windows: windows.len(),
        tokens: rows.len(),
        kl_mean: kl.value,
        kl_error: kl.error,
        kl_percentiles: Percentiles::of(&column(|row| row.kl)),
        top1: top1.value,
        top1_error: top1.error,
        ln_ppl_ratio: ratio.value,
        ln_ppl_ratio_error: ratio.error,
        rms_delta_p: delta_p2.value.sqrt(),
        base: perplexity(|row| row.base_nll),
        model: perplexity(|row| row.model_nll),
    })
}

/// One token under two models.
struct Pair {
    base_nll: f64,
    model_nll: f64,
    kl: f64,
    same_top: bool,
}

impl Pair {
    fn of(isa: Isa, base: &[f32], model: &[f32], target: usize) -> Self {
        let (base_sum, model_sum) = (log_sum_exp(isa, base), log_sum_exp(isa, model));
        Self {
            base_nll: base_sum - f64::from(base[target]),
            model_nll: model_sum - f64::from(model[target]),
            kl: divergence(isa, (base, base_sum), (model, model_sum)),
            same_top: argmax(isa, base) == argmax(isa, model),
        }
    }
}

/// Runs all models over all windows and maps the logits in front of every scored token to a value.
fn score<T: Send>(
    decoders: &[&Decoder<'_>],
    protocol: &Protocol,
    windows: &[Vec<u32>],
    progress: &mut dyn FnMut(usize, usize),
    row: impl Fn(&[&[f32]], usize) -> T + Sync,
) -> Result<Vec<T>, RuntimeError> {
    assert!(!windows.is_empty(), "no windows to score");
    let vocab = decoders[0].config().vocab_size;
    let mut out = Vec::new();
    let mut buffers: Vec<Buffer> = decoders.iter().map(|_| Buffer::default()).collect();
    let per_batch = (BATCH_TOKENS / protocol.window).max(1);
    for (batch, chunk) in windows.chunks(per_batch).enumerate() {
        progress(batch * per_batch, windows.len());
        let sequences: Vec<&[u32]> = chunk.iter().map(Vec::as_slice).collect();
        // The logits in front of a token score it.
        let wanted = vec![protocol.first_scored - 1..protocol.window - 1; chunk.len()];
        let hidden = decoders
            .iter()
            .map(|decoder| decoder.forward_for(&sequences, None, &wanted))
            .collect::<Result<Vec<_>, _>>()?;
        let targets: Vec<u32> = chunk
            .iter()
            .flat_map(|window| &window[protocol.first_scored..])
            .copied()
            .collect();
        let at_once = (LOGITS / vocab).max(1);
        for (part, targets) in targets.chunks(at_once).enumerate() {
            let logits: Vec<&[f32]> = decoders
                .iter()
                .zip(&hidden)
                .zip(&mut buffers)
                .map(|((decoder, hidden), buffer)| {
                    let width = decoder.config().hidden_size;
                    let hidden = &hidden[part * at_once * width..][..targets.len() * width];
                    decoder.logits_in(hidden, buffer)
                })
                .collect();
            let pool = &decoders[0].cpu().pool;
            out.extend(pool.map(targets.len(), |i| {
                let logits: Vec<&[f32]> = logits
                    .iter()
                    .map(|logits| &logits[i * vocab..(i + 1) * vocab])
                    .collect();
                row(&logits, targets[i] as usize)
            }));
        }
    }
    progress(windows.len(), windows.len());
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocols_cut_and_score_as_they_say() {
        let tokens: Vec<u32> = (0..23).collect();
        let gptq = Protocol::parse("gptq-8").expect("known");
        let windows = gptq.windows(&tokens, None, Some(99)).expect("long enough");
        assert_eq!(windows, [(0..8).collect::<Vec<u32>>(), (8..16).collect()]);
        let llamacpp = Protocol::parse("llamacpp-8").expect("known");
        assert_eq!(
            llamacpp
                .windows(&tokens, Some(1), Some(99))
                .expect("long enough")[0][..2],
            [99, 1]
        );
        // 8 − 1 − 8/2 tokens of a window count.
        assert_eq!((llamacpp.first_scored..llamacpp.window).len(), 3);
        assert!(gptq.windows(&tokens, Some(3), None).is_err());
        assert!(gptq.windows(&tokens[..7], None, None).is_err());
        for bad in ["gptq", "gptq-1", "wikitext-512", "gptq-x", "llamacpp-2"] {
            assert!(Protocol::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn mean_and_error_of_a_case_done_by_hand() {
        let mean = Mean::of(&[1.0, 3.0, 5.0, 7.0], 2);
        // Window means 2 and 6: mean 4, variance 8, error sqrt(8 / 2).
        assert_eq!(
            mean,
            Mean {
                value: 4.0,
                error: Some(2.0)
            }
        );
        assert_eq!(Mean::of(&[1.0, 2.0], 2).error, None);
    }

    #[test]
    fn pair_of_a_case_done_by_hand() {
        let (a, b) = ([0.0f32, 3.0f32.ln()], [0.0f32, 0.0]);
        let pair = Pair::of(Isa::detect(), &a, &b, 0);
        // p = (1/4, 3/4), q = (1/2, 1/2).
        let kl = 0.25 * (0.5f64).ln() + 0.75 * (1.5f64).ln();
        assert!((pair.kl - kl).abs() <= 1e-7, "{}", pair.kl);
        assert!(
            (pair.base_nll - 4f64.ln()).abs() <= 1e-7 && (pair.model_nll - 2f64.ln()).abs() <= 1e-7
        );
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let values: Vec<f64> = (1..=1000).rev().map(f64::from).collect();
        let p = Percentiles::of(&values);
        assert_eq!(
            (p.p50, p.p90, p.p99, p.p99_9, p.max),
            (500.0, 900.0, 990.0, 999.0, 1000.0)
        );
    }
}
