//! AWQ's searches and folds over one sublayer.

use crate::pass::{N_GRID, QuantPass};
use crate::recipe::Method;
use crate::{QuantError, awq};
use qbin_format::TensorReport;
use qbin_runtime::spec::{LinearKind, bias_name, block_tensor};
use qbin_runtime::walk::{NewTensor, PassError, Rewritten, Site, Stream};
use qbin_runtime::{Block, Matrix, Side, Sublayer};
use rayon::prelude::*;

/// Tokens on which a scale's effect on the output of a whole sublayer is measured.
const SEARCH_TOKENS: usize = 8192;
/// Rounding errors of a fold in units of ε of the largest output: sums of thousands of terms, each off by an ε.
const FOLD_EPSILONS: f32 = 512.0;

impl QuantPass<'_> {
    /// All readers of the norm must take up the scale; a linear that stays as stored cannot.
    pub(super) fn folds_norm(&self, block: usize, sublayer: Sublayer) -> bool {
        let readers = LinearKind::at(sublayer, Side::Inner);
        self.recipe.method == Method::Awq
            && readers.iter().all(|&kind| self.grid(block, kind).is_some())
    }

    pub(super) fn folds_producer(&self, block: usize, sublayer: Sublayer) -> bool {
        let reader = LinearKind::at(sublayer, Side::Outer)[0];
        self.recipe.method == Method::Awq
            && [reader, producer(sublayer)]
                .iter()
                .all(|&kind| self.grid(block, kind).is_some())
    }

    /// Moves the best scales of a sublayer's inputs into what makes them.
    pub(super) fn fold(
        &mut self,
        block: &mut Block<'_>,
        sublayer: Sublayer,
        stream: &Stream,
        out: &mut Rewritten,
    ) -> Result<(), PassError> {
        let index = block.index;
        let sample = block.normed(sublayer, &stream.sample(SEARCH_TOKENS));
        let target = block.output(sublayer, &sample, stream.window_tokens);
        if self.folds_norm(index, sublayer) {
            let site = Site {
                block: index,
                sublayer,
                side: Side::Inner,
            };
            let scales =
                self.search_inner(block, sublayer, &sample, &target, stream.window_tokens)?;
            for &kind in site.linears() {
                awq::scale_columns(block.linear_mut(kind).own()?, &scales);
            }
            awq::divide_vector(&mut block.norms[sublayer as usize], &scales, 0.0);
            self.moments
                .get_mut(&site)
                .expect("observed")
                .scaled(&scales);
            let name = block_tensor(index, sublayer.norm_name());
            out.insert(
                name,
                (
                    NewTensor::Dense(block.norms[sublayer as usize].clone()),
                    TensorReport::default(),
                ),
            );
        }
        if self.folds_producer(index, sublayer) {
            self.fold_producer(block, sublayer, out)?;
        }
        // Before anything is rounded, the folds must have changed nothing.
        let normed = block.normed(sublayer, &stream.sample(SEARCH_TOKENS));
        let folded = block.output(sublayer, &normed, stream.window_tokens);
        identical(index, sublayer, &target, &folded)?;
        Ok(())
    }

    /// The channel scales under which the sublayer's output on `sample` changes least.
    fn search_inner(
        &self,
        block: &mut Block<'_>,
        sublayer: Sublayer,
        sample: &[f32],
        target: &[f32],
        window_tokens: usize,
    ) -> Result<Vec<f32>, PassError> {
        let site = Site {
            block: block.index,
            sublayer,
            side: Side::Inner,
        };
        let mut original = Vec::new();
        for &kind in site.linears() {
            original.push(block.linear_mut(kind).own()?.clone());
        }
        let mut best: Option<(f64, Vec<f32>)> = None;
        for scales in awq::scale_candidates(&self.moments[&site].abs_mean(), N_GRID) {
            for (&kind, weight) in site.linears().iter().zip(&original) {
                let grid = *self
                    .grid(site.block, kind)
                    .expect("all readers are on a grid");
                let linear = block.linear_mut(kind);
                linear.weight = Matrix::Owned(awq::rounded(
                    weight,
                    linear.rows,
                    linear.cols,
                    &scales,
                    &grid,
                )?);
            }
            let output = block.output(sublayer, sample, window_tokens);
            let loss = squared_distance(target, &output);
            if best.as_ref().is_none_or(|(least, _)| loss < *least) {
                best = Some((loss, scales));
            }
        }
        for (&kind, weight) in site.linears().iter().zip(original) {
            block.linear_mut(kind).weight = Matrix::Owned(weight);
        }
        Ok(best.expect("the identity is a candidate").1)
    }

    /// Scales the outer linear's columns and divides the rows of what makes its input.
    fn fold_producer(
        &mut self,
        block: &mut Block<'_>,
        sublayer: Sublayer,
        out: &mut Rewritten,
    ) -> Result<(), PassError> {
        let site = Site {
            block: block.index,
            sublayer,
            side: Side::Outer,
        };
        let (reader, producer) = (site.linears()[0], producer(sublayer));
        let grid = *self
            .grid(site.block, reader)
            .expect("the reader is on a grid");
        let moments = self.moments.get_mut(&site).expect("observed");
        let (heads, kv_heads) = (self.config.num_heads, self.config.num_kv_heads);
        let mut means = moments.abs_mean();
        if sublayer == Sublayer::Attention {
            means = awq::gqa_mean(&means, heads, kv_heads);
        }
        let metric = moments.metric();
        let linear = block.linear_mut(reader);
        let (rows, cols) = (linear.rows, linear.cols);
        let weight = linear.own()?;
        let mut best: Option<(f64, Vec<f32>)> = None;
        for scales in awq::scale_candidates(&means, N_GRID) {
            let loss = awq::quadratic_loss(weight, rows, cols, &metric, &scales, &grid)?;
            if best.as_ref().is_none_or(|(least, _)| loss < *least) {
                best = Some((loss, scales));
            }
        }
        let (_, scales) = best.expect("the identity is a candidate");
        awq::scale_columns(weight, &scales);
        moments.scaled(&scales);
        let rows_of = match sublayer {
            Sublayer::Attention => awq::gqa_producer_scales(&scales, heads, kv_heads),
            Sublayer::Mlp => scales,
        };
        let linear = block.linear_mut(producer);
        awq::divide_rows(linear.own()?, &rows_of);
        if let Some(bias) = &mut linear.bias {
            awq::divide_vector(bias, &rows_of, 0.0);
            out.insert(
                bias_name(site.block, producer),
                (NewTensor::Dense(bias.clone()), TensorReport::default()),
            );
        }
        Ok(())
    }
}

/// The linear whose output channels are the outer linear's input channels.
pub(super) fn producer(sublayer: Sublayer) -> LinearKind {
    match sublayer {
        Sublayer::Attention => LinearKind::V,
        Sublayer::Mlp => LinearKind::Up,
    }
}

fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    // Fixed chunks, summed in order: the same for every number of threads.
    let part = |(a, b): (&[f32], &[f32])| {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(a - b).powi(2))
            .sum::<f64>()
    };
    let parts: Vec<f64> = a
        .par_chunks(4096)
        .zip(b.par_chunks(4096))
        .map(part)
        .collect();
    parts.iter().sum()
}

/// A fold multiplies and divides by the same factor, so outputs differ by rounding only: a few ε for each
/// of the two products, relative to the largest output.
fn identical(
    block: usize,
    sublayer: Sublayer,
    before: &[f32],
    after: &[f32],
) -> Result<(), QuantError> {
    let largest = before.iter().fold(0f32, |m, v| m.max(v.abs()));
    let difference = before
        .iter()
        .zip(after)
        .fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    let tolerance = FOLD_EPSILONS * f32::EPSILON * largest;
    // Phrased so that NaN fails.
    if difference <= tolerance {
        Ok(())
    } else {
        Err(QuantError::FoldNotIdentity {
            block,
            sublayer: format!("{sublayer:?}"),
            difference,
            tolerance,
        })
    }
}
