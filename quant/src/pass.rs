//! The quantization pass of a walk: which statistics a method needs, and what it does to a block.

mod folds;

use crate::hessian::relative_error;
use crate::recipe::{Fate, Method, QuantRecipe};
use crate::{Factor, Gptq, GptqParams, Grid, Metric, Moments, QuantError, Survivors, awq, rtn};
use folds::producer;
use qbin_format::TensorReport;
use qbin_runtime::spec::{LinearKind, bias_name, block_tensor, linears, weight_name};
use qbin_runtime::times::{Stage, Times};
use qbin_runtime::walk::{BlockPass, NewTensor, PassError, Rewritten, Site, Stream};
use qbin_runtime::{Block, Matrix, ModelConfig, Side, Sublayer};
use std::collections::BTreeMap;

/// Ratios AWQ tries.
const N_GRID: usize = 20;
/// The most AWQ clips off a group's range.
const MAX_SHRINK: f64 = 0.5;

/// The note of a report whose error is not that of outputs.
pub const WEIGHTS_ALONE: &str = "relative error of the weights alone, without inputs";

/// Zeros of a linear, and the weights GPTQ starts from; see [`Survivors`].
pub struct Held {
    /// `[rows, cols]`, true for zero.
    pub zeros: Vec<bool>,
    /// `[rows, cols]`.
    pub start: Vec<f32>,
}

/// Says which weights of a linear are held at zero while GPTQ puts the others on their grid.
pub trait Zeros {
    /// The zeros of a linear; none where nothing is held. `metric` and `factor` are those of its inputs.
    ///
    /// # Errors
    /// The choice failed.
    fn choose(
        &self,
        block: usize,
        kind: LinearKind,
        weight: &[f32],
        metric: &Metric,
        factor: &Factor,
    ) -> Result<Option<Held>, PassError>;
}

/// Holds what is zero already.
pub struct Found;

impl Zeros for Found {
    fn choose(
        &self,
        _block: usize,
        _kind: LinearKind,
        weight: &[f32],
        _metric: &Metric,
        _factor: &Factor,
    ) -> Result<Option<Held>, PassError> {
        Ok(Some(Held {
            zeros: weight.iter().map(|&w| w == 0.0).collect(),
            start: weight.to_vec(),
        }))
    }
}

/// Adds inputs of a site's linears, `[tokens, in_features]`, to the moments of all sites observed and not yet used.
///
/// # Errors
/// Inputs that are not finite.
pub fn observe(
    moments: &mut BTreeMap<Site, Moments>,
    config: &ModelConfig,
    site: Site,
    x: &[f32],
) -> Result<(), QuantError> {
    let cols = site.linears()[0].shape(config)[1];
    let moments = moments.entry(site).or_insert_with(|| Moments::new(cols));
    moments.add(x)
}

/// A quantization pass over the blocks of one model.
pub struct QuantPass<'a> {
    recipe: &'a QuantRecipe,
    config: &'a ModelConfig,
    zeros: Option<&'a dyn Zeros>,
    fates: BTreeMap<(usize, LinearKind), Fate>,
    moments: BTreeMap<Site, Moments>,
    times: Times,
}

impl<'a> QuantPass<'a> {
    /// Resolves the recipe for every linear of the model.
    ///
    /// # Errors
    /// See [`QuantRecipe::resolve`].
    pub fn new(recipe: &'a QuantRecipe, config: &'a ModelConfig) -> Result<Self, QuantError> {
        let shapes: Vec<_> = linears(config)
            .map(|(block, kind)| (weight_name(block, kind), kind.shape(config)))
            .collect();
        let fates = linears(config).zip(recipe.resolve(&shapes)?).collect();
        Ok(Self {
            recipe,
            config,
            zeros: None,
            fates,
            moments: BTreeMap::new(),
            times: Times::default(),
        })
    }

    /// The same pass, with GPTQ holding at zero what `zeros` says. The other methods keep a weight that is zero
    /// as it is without being told: zero is on every grid.
    #[must_use]
    pub fn holding(self, zeros: Option<&'a dyn Zeros>) -> Self {
        Self { zeros, ..self }
    }

    /// How long the stages of GPTQ have taken so far.
    pub fn times(&self) -> Times {
        self.times
    }

    /// What becomes of a linear.
    pub fn fate(&self, block: usize, kind: LinearKind) -> &Fate {
        &self.fates[&(block, kind)]
    }

    /// Tensors beside the linears that this pass rewrites in f32: norms and biases that take up AWQ's scales.
    pub fn folded(&self, block: usize) -> Vec<String> {
        let mut names = Vec::new();
        for sublayer in Sublayer::ALL {
            if self.folds_norm(block, sublayer) {
                names.push(block_tensor(block, sublayer.norm_name()));
            }
            let producer = producer(sublayer);
            if self.folds_producer(block, sublayer) && producer.has_bias(self.config) {
                names.push(bias_name(block, producer));
            }
        }
        names
    }

    fn grid(&self, block: usize, kind: LinearKind) -> Option<&Grid> {
        match self.fate(block, kind) {
            Fate::Quantize(grid) => Some(grid),
            Fate::Keep(_) => None,
        }
    }

    fn touches(&self, site: Site) -> bool {
        site.linears()
            .iter()
            .any(|&kind| self.grid(site.block, kind).is_some())
    }

    /// Quantizes the linears of a site by error feedback; they share one factorization for each kind of grid.
    fn rewrite_gptq(
        &mut self,
        block: &mut Block<'_>,
        site: Site,
        out: &mut Rewritten,
    ) -> Result<(), PassError> {
        let mut targets: Vec<(LinearKind, Grid)> = site
            .linears()
            .iter()
            .filter_map(|&kind| self.grid(site.block, kind).map(|grid| (kind, *grid)))
            .collect();
        let mut moments = self.moments.remove(&site);
        while let Some(&(_, first)) = targets.first() {
            let (now, later): (Vec<_>, Vec<_>) = targets
                .into_iter()
                .partition(|(_, grid)| grid.granularity == first.granularity);
            targets = later;
            let input = if targets.is_empty() {
                moments.take()
            } else {
                moments.clone()
            };
            let params = GptqParams {
                damp_fraction: self.recipe.damp,
                act_order: self.recipe.act_order,
                refine_sweeps: self.recipe.refine,
                ..GptqParams::new(first)
            };
            let mut input = input.expect("the walk observes a site before it is rewritten");
            let metric = self.zeros.map(|_| input.metric());
            let factor = self
                .times
                .of(Stage::Factor, || Factor::new(input, &params))?;
            for (kind, grid) in now {
                let linear = block.linear_mut(kind);
                let rows = linear.rows;
                let name = linear.name.clone();
                let weight = linear.own()?;
                let held = match (self.zeros, &metric) {
                    (Some(zeros), Some(metric)) => zeros
                        .choose(site.block, kind, weight, metric, &factor)?
                        .map(|held| (held, metric)),
                    _ => None,
                };
                let survivors = held.as_ref().map(|(held, metric)| Survivors {
                    zeros: &held.zeros,
                    start: &held.start,
                    metric,
                });
                let done = factor
                    .quantize_timed(weight, rows, &grid, survivors.as_ref(), &mut self.times)
                    .map_err(|error| error.in_tensor(&name))?;
                linear.weight = Matrix::Owned(done.quantized.dequantize());
                let (tensor, mut report) = gptq_tensor(done, self.recipe.damp);
                if let Some((held, _)) = &held {
                    let zeros = held.zeros.iter().filter(|zero| **zero).count();
                    let of = held.zeros.len();
                    report
                        .notes
                        .push(format!("{zeros} of {of} weights held at zero"));
                }
                put(out, name, (tensor, report));
            }
        }
        Ok(())
    }

    /// Rounds the linears of a site to nearest, within AWQ's clips where there are statistics.
    fn rewrite_nearest(
        &mut self,
        block: &mut Block<'_>,
        site: Site,
        out: &mut Rewritten,
    ) -> Result<(), PassError> {
        let mut moments = self.moments.remove(&site);
        let metric = moments.as_mut().map(Moments::metric);
        let importance = moments.map(|mut moments| {
            moments
                .square_mean()
                .iter()
                .map(|&mean| mean as f32)
                .collect::<Vec<f32>>()
        });
        for &kind in site.linears() {
            let Some(&grid) = self.grid(site.block, kind) else {
                continue;
            };
            let linear = block.linear_mut(kind);
            let (rows, cols, name) = (linear.rows, linear.cols, linear.name.clone());
            let weight = linear.own()?;
            // Attention logits are too sensitive to clip what makes them (Lin et al., section 4).
            let clips = match &metric {
                Some(metric) if !matches!(kind, LinearKind::Q | LinearKind::K) => Some(
                    awq::search_clip(weight, rows, cols, metric, &grid, N_GRID, MAX_SHRINK)
                        .map_err(|error| error.in_tensor(&name))?,
                ),
                _ => None,
            };
            let quantized = rtn(
                weight,
                rows,
                cols,
                &grid,
                importance.as_deref(),
                clips.as_deref(),
            )
            .map_err(|error| error.in_tensor(&name))?;
            let relative_error = relative_error(weight, &quantized.dequantize(), metric.as_ref());
            let notes = metric.is_none().then(|| WEIGHTS_ALONE.to_string());
            let report = TensorReport {
                relative_error: Some(relative_error),
                notes: notes.into_iter().collect(),
                ..TensorReport::default()
            };
            put(out, name, (NewTensor::Quantized(quantized), report));
        }
        Ok(())
    }
}

impl BlockPass for QuantPass<'_> {
    fn prepares(&self, block: usize, sublayer: Sublayer) -> bool {
        let sites = Side::ALL.map(|side| Site {
            block,
            sublayer,
            side,
        });
        self.recipe.method == Method::Awq && sites.into_iter().any(|site| self.touches(site))
    }

    fn wants(&self, site: Site) -> bool {
        self.recipe.method == Method::Gptq && self.touches(site)
    }

    fn observe(&mut self, site: Site, x: &[f32]) -> Result<(), PassError> {
        Ok(observe(&mut self.moments, self.config, site, x)?)
    }

    fn prepare(
        &mut self,
        block: &mut Block<'_>,
        sublayer: Sublayer,
        stream: &Stream,
        out: &mut Rewritten,
    ) -> Result<(), PassError> {
        self.fold(block, sublayer, stream, out)
    }

    fn rewrite(
        &mut self,
        block: &mut Block<'_>,
        site: Site,
        out: &mut Rewritten,
    ) -> Result<(), PassError> {
        match self.recipe.method {
            Method::Gptq => self.rewrite_gptq(block, site, out),
            Method::Rtn | Method::Awq => self.rewrite_nearest(block, site, out),
        }
    }
}

/// Replaces what an earlier pass made of the tensor, but keeps what it had to say.
fn put(out: &mut Rewritten, name: String, (tensor, mut report): (NewTensor, TensorReport)) {
    if let Some((_, earlier)) = out.remove(&name) {
        report.notes.splice(0..0, earlier.notes);
    }
    out.insert(name, (tensor, report));
}

fn gptq_tensor(done: Gptq, asked_damp: f64) -> (NewTensor, TensorReport) {
    let report = &done.report;
    let mut notes = Vec::new();
    if report.dead_columns > 0 {
        notes.push(format!("{} inputs were always zero", report.dead_columns));
    }
    let report = TensorReport {
        relative_error: Some(report.relative_error),
        damp: (report.damp_fraction != asked_damp).then_some(report.damp_fraction),
        clipped: Some(report.clipped as f64 / done.quantized.codes.len() as f64),
        fallbacks: report.fallback.iter().cloned().collect(),
        notes,
    };
    (NewTensor::Quantized(done.quantized), report)
}
