//! The walk over decoder blocks in which weights are rewritten: it knows order and data, no algorithm.
//!
//! The residual stream of all calibration windows is carried from block to block. In every block, for
//! each sublayer and each side of it, a pass may watch the inputs of the linears there and then rewrite
//! them; what follows, inside the block and after it, sees the rewritten weights. So a linear's inputs
//! are those of the compressed model ("true-sequential"), and each weight is read once. A pass that
//! wants the inputs of the original model leaves the block's weights as they are and only reports
//! its results.

use crate::decoder::{Parts, finite};
use crate::spec::{EMBEDDING, LinearKind, weight_name};
use crate::times::{Stage, Times};
use crate::{Block, Cpu, Path, RuntimeError, Side, Sublayer};
use qbin_format::QuantizedMatrix;
use qbin_format::TensorReport;
use std::collections::BTreeMap;

/// Tokens run at once; bounds the memory of a block's inner activations.
const BATCH_TOKENS: usize = 2048;
/// Embedding rows read before their pages are given back.
const EMBED_TOKENS: usize = 4096;

/// One side of one sublayer of one block: a set of linears that read the same input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Site {
    /// The block.
    pub block: usize,
    /// Which half of it.
    pub sublayer: Sublayer,
    /// Which linears of that half.
    pub side: Side,
}

impl Site {
    /// The linears of this site.
    pub fn linears(self) -> &'static [LinearKind] {
        LinearKind::at(self.sublayer, self.side)
    }
}

/// The residual stream in front of a block, `[windows · window_tokens, hidden]`.
pub struct Stream {
    /// Values, row major.
    pub x: Vec<f32>,
    /// Width of a row.
    pub hidden: usize,
    /// Tokens of a window.
    pub window_tokens: usize,
}

impl Stream {
    /// Whole windows, `BATCH_TOKENS` tokens at a time (at least one window).
    fn batch_len(&self) -> usize {
        (BATCH_TOKENS / self.window_tokens).max(1) * self.window_tokens * self.hidden
    }

    /// Rows of evenly spaced whole windows, at most `tokens` tokens (at least one window).
    pub fn sample(&self, tokens: usize) -> Vec<f32> {
        let window = self.window_tokens * self.hidden;
        let windows = self.x.len() / window;
        let take = (tokens / self.window_tokens).clamp(1, windows);
        (0..take)
            .flat_map(|i| {
                self.x[i * windows / take * window..][..window]
                    .iter()
                    .copied()
            })
            .collect()
    }
}

/// What a pass made of a tensor.
pub enum NewTensor {
    /// A linear's weight on a grid.
    Quantized(QuantizedMatrix),
    /// A tensor of the same shape in f32.
    Dense(Vec<f32>),
}

/// New tensors of one block by name, with what there is to say about each; what is not here stays as stored.
pub type Rewritten = BTreeMap<String, (NewTensor, TensorReport)>;

/// An error of a pass.
pub type PassError = Box<dyn std::error::Error + Send + Sync>;

/// An algorithm that rewrites the weights of a block; one that needs no statistics writes only `rewrite`.
pub trait BlockPass {
    /// Whether [`BlockPass::prepare`] wants both sides of this sublayer observed first, with the weights as they are.
    fn prepares(&self, _block: usize, _sublayer: Sublayer) -> bool {
        false
    }

    /// Whether the inputs of this site are to be observed before [`BlockPass::rewrite`].
    fn wants(&self, _site: Site) -> bool {
        false
    }

    /// Inputs of a site's linears, `[tokens, in_features]`; called once for each batch.
    ///
    /// # Errors
    /// Inputs the method cannot use.
    fn observe(&mut self, _site: Site, _x: &[f32]) -> Result<(), PassError> {
        Ok(())
    }

    /// Changes a sublayer as a whole, before its sides are rewritten; only called where `prepares` says so.
    ///
    /// # Errors
    /// The method failed.
    fn prepare(
        &mut self,
        _block: &mut Block<'_>,
        _sublayer: Sublayer,
        _stream: &Stream,
        _out: &mut Rewritten,
    ) -> Result<(), PassError> {
        Ok(())
    }

    /// Rewrites the linears of a site.
    ///
    /// # Errors
    /// The method failed.
    fn rewrite(
        &mut self,
        block: &mut Block<'_>,
        site: Site,
        out: &mut Rewritten,
    ) -> Result<(), PassError>;
}

/// How far the walk is, in units of estimated work.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Work done.
    pub done: u64,
    /// Work in all.
    pub total: u64,
    /// The block at work.
    pub block: usize,
}

/// Runs `passes` over every block. `ids` is `[windows, window_tokens]`, row major; it may be empty when
/// no pass observes anything. `sink` takes each block's new tensors as soon as they are final. Returns how long the
/// stages took that the walk knows.
///
/// # Errors
/// Whatever the model, a pass or the sink reports.
///
/// # Panics
/// If a pass wants to observe and there are no windows.
pub fn walk(
    parts: &Parts<'_>,
    ids: &[u32],
    window_tokens: usize,
    passes: &mut [&mut dyn BlockPass],
    sink: &mut dyn FnMut(usize, Rewritten) -> Result<(), PassError>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Times, RuntimeError> {
    let mut walker = Walker {
        parts,
        cpu: parts.cpu.with_path(Path::Bf16),
        times: Times::default(),
        stream: embed(parts, ids, window_tokens)?,
        done: 0,
        total: 0,
        block: 0,
        progress,
    };
    let block_work: u64 = Sublayer::ALL
        .iter()
        .map(|sublayer| walker.sublayer_work(*sublayer, passes))
        .sum();
    walker.total = block_work * parts.config.num_blocks as u64;
    for index in 0..parts.config.num_blocks {
        walker.block = index;
        let mut block = parts.block(index)?;
        let mut out = Rewritten::new();
        for sublayer in Sublayer::ALL {
            walker.sublayer(&mut block, sublayer, passes, &mut out)?;
        }
        finite(&walker.stream.x, index, walker.stream.hidden, |row| row)?;
        let written = walker.times.of(Stage::Write, || sink(index, out));
        written.map_err(RuntimeError::Pass)?;
        for kind in LinearKind::ALL {
            parts.model.release(&weight_name(index, kind));
        }
    }
    Ok(walker.times)
}

fn embed(parts: &Parts<'_>, ids: &[u32], window_tokens: usize) -> Result<Stream, RuntimeError> {
    let hidden = parts.config.hidden_size;
    let mut x = Vec::with_capacity(ids.len() * hidden);
    for ids in ids.chunks(EMBED_TOKENS) {
        x.extend_from_slice(&parts.embed(ids)?);
        parts.model.release(EMBEDDING);
    }
    Ok(Stream {
        x,
        hidden,
        window_tokens,
    })
}

struct Walker<'a, 'p> {
    parts: &'a Parts<'a>,
    /// What the calibration windows run on. Passes compare outputs that differ little, on the path they were given.
    cpu: Cpu,
    times: Times,
    stream: Stream,
    done: u64,
    total: u64,
    block: usize,
    progress: &'p mut dyn FnMut(Progress),
}

impl Walker<'_, '_> {
    fn sublayer(
        &mut self,
        block: &mut Block<'_>,
        sublayer: Sublayer,
        passes: &mut [&mut dyn BlockPass],
        out: &mut Rewritten,
    ) -> Result<(), RuntimeError> {
        for pass in passes.iter_mut() {
            if pass.prepares(block.index, sublayer) {
                self.observe(block, sublayer, &Side::ALL, *pass)?;
                let stream = &self.stream;
                let prepare = || pass.prepare(block, sublayer, stream, out);
                let prepared = self.times.of(Stage::Rewrite, prepare);
                prepared.map_err(RuntimeError::Pass)?;
            }
        }
        for side in Side::ALL {
            let site = Site {
                block: block.index,
                sublayer,
                side,
            };
            for pass in passes.iter_mut() {
                if pass.wants(site) {
                    self.observe(block, sublayer, &[side], *pass)?;
                }
                let rewrite = || pass.rewrite(block, site, out);
                let rewritten = self.times.of(Stage::Rewrite, rewrite);
                rewritten.map_err(RuntimeError::Pass)?;
                self.tick(rewrite_work(self.parts, site));
            }
        }
        self.advance(block, sublayer);
        Ok(())
    }

    /// Shows a pass the inputs of the given sides, batch by batch.
    fn observe(
        &mut self,
        block: &Block<'_>,
        sublayer: Sublayer,
        sides: &[Side],
        pass: &mut dyn BlockPass,
    ) -> Result<(), RuntimeError> {
        assert!(
            !self.stream.x.is_empty(),
            "a pass wants to observe inputs, but there are no calibration windows"
        );
        let (len, window_tokens) = (self.stream.batch_len(), self.stream.window_tokens);
        for start in (0..self.stream.x.len()).step_by(len) {
            let batch = &self.stream.x[start..(start + len).min(self.stream.x.len())];
            let tokens = batch.len() / self.stream.hidden;
            let normed = self
                .times
                .of(Stage::Forward, || block.normed(sublayer, batch));
            for &side in sides {
                let site = Site {
                    block: block.index,
                    sublayer,
                    side,
                };
                let mixed = || block.mixed(&self.cpu, sublayer, &normed, window_tokens);
                let inputs = match side {
                    Side::Inner => &normed,
                    Side::Outer => &self.times.of(Stage::Forward, mixed),
                };
                let observe = || pass.observe(site, inputs);
                let observed = self.times.of(Stage::Statistics, observe);
                observed.map_err(RuntimeError::Pass)?;
                self.tick_tokens(site, tokens);
            }
        }
        Ok(())
    }

    /// Carries the stream over the sublayer.
    fn advance(&mut self, block: &Block<'_>, sublayer: Sublayer) {
        let (len, window_tokens) = (self.stream.batch_len(), self.stream.window_tokens);
        for start in (0..self.stream.x.len()).step_by(len) {
            let end = (start + len).min(self.stream.x.len());
            let batch = &mut self.stream.x[start..end];
            self.times.of(Stage::Forward, || {
                let normed = block.normed(sublayer, batch);
                let mixed = block.mixed(&self.cpu, sublayer, &normed, window_tokens);
                block.add_outer(&self.cpu, sublayer, &mixed, batch);
            });
            let tokens = (end - start) / self.stream.hidden;
            for side in Side::ALL {
                self.tick_tokens(
                    Site {
                        block: block.index,
                        sublayer,
                        side,
                    },
                    tokens,
                );
            }
        }
    }

    fn tick_tokens(&mut self, site: Site, tokens: usize) {
        self.tick(site_work(self.parts, site, tokens));
    }

    fn tick(&mut self, work: u64) {
        self.done += work;
        (self.progress)(Progress {
            done: self.done,
            total: self.total.max(self.done),
            block: self.block,
        });
    }

    /// Estimated work of one sublayer; the same for every block.
    fn sublayer_work(&self, sublayer: Sublayer, passes: &[&mut dyn BlockPass]) -> u64 {
        let tokens = self.stream.x.len() / self.stream.hidden;
        let mut work = 0;
        for side in Side::ALL {
            let site = Site {
                block: 0,
                sublayer,
                side,
            };
            let forward = site_work(self.parts, site, tokens);
            work += forward;
            for pass in passes {
                let seen = u64::from(pass.prepares(0, sublayer)) + u64::from(pass.wants(site));
                work += seen * forward + rewrite_work(self.parts, site);
            }
        }
        work
    }
}

/// Multiply-adds of observing or running a site: its linears, and about as much again for statistics.
fn site_work(parts: &Parts<'_>, site: Site, tokens: usize) -> u64 {
    let weights: usize = site
        .linears()
        .iter()
        .map(|kind| kind.shape(&parts.config).iter().product::<usize>())
        .sum();
    weights as u64 * tokens as u64
}

/// Multiply-adds of rewriting a site: quadratic in the inputs for every output, as error feedback is.
fn rewrite_work(parts: &Parts<'_>, site: Site) -> u64 {
    site.linears()
        .iter()
        .map(|kind| kind.shape(&parts.config))
        .map(|[rows, cols]| (rows * cols) as u64 * cols as u64)
        .sum()
}
