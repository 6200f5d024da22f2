//! What holds for every pruned matrix: counts, zeros that stay, losses that fall, and the edges.

use proptest::prelude::*;
use qbin_prune::{Pruned, Sparsity, magnitude, refit, sparsegpt, swap, wanda};
use qbin_quant::{
    ActOrder, Factor, GptqParams, Granularity, Grid, Metric, Moments, ScaleSearch, Survivors,
};

/// A small generator (SplitMix64), so that a case is its seed on every platform.
struct Random(u64);

impl Random {
    /// Uniform in [-1, 1).
    fn unit(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    fn units(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.unit()).collect()
    }
}

/// A layer with correlated inputs of unequal size.
struct Layer {
    cols: usize,
    weight: Vec<f32>,
    moments: Moments,
}

impl Layer {
    /// `dead` inputs are always zero.
    fn new(rows: usize, cols: usize, seed: u64, dead: &[usize]) -> Self {
        let mut random = Random(seed);
        let weight = random.units(rows * cols);
        let size: Vec<f32> = (0..cols).map(|_| (1.5 * random.unit()).exp()).collect();
        let mut x = Vec::new();
        for _ in 0..2 * cols {
            let shared = random.unit();
            x.extend(
                size.iter()
                    .map(|size| size * (shared + 0.5 * random.unit())),
            );
        }
        for (at, x) in x.iter_mut().enumerate() {
            if dead.contains(&(at % cols)) {
                *x = 0.0;
            }
        }
        let mut moments = Moments::new(cols);
        moments.add(&x).expect("finite inputs");
        Self {
            cols,
            weight,
            moments,
        }
    }

    /// A factor whose blocks keep runs of `together` columns whole.
    fn factor(&self, together: usize, act_order: ActOrder) -> Factor {
        let params = GptqParams {
            act_order,
            ..GptqParams::new(grid(Granularity::Group(together.min(self.cols))))
        };
        Factor::new(self.moments.clone(), &params).expect("valid parameters")
    }

    fn metric(&self) -> Metric {
        self.moments.clone().metric()
    }

    /// By every method, plain and refined.
    fn pruned(&self, sparsity: Sparsity) -> Vec<(&'static str, Pruned)> {
        let kept = |zeros: Vec<bool>| Pruned {
            weight: self
                .weight
                .iter()
                .zip(&zeros)
                .map(|(&w, &zero)| if zero { 0.0 } else { w })
                .collect(),
            zeros,
        };
        let mut all = vec![
            (
                "magnitude",
                kept(magnitude(&self.weight, self.cols, sparsity)),
            ),
            (
                "wanda",
                kept(wanda(
                    &self.weight,
                    &self.moments.clone().square_mean(),
                    sparsity,
                )),
            ),
        ];
        for (name, act_order) in [
            ("sparsegpt", ActOrder::None),
            ("by diagonal", ActOrder::Group),
        ] {
            let factor = self.factor(sparsity.run().unwrap_or(1), act_order);
            let mut pruned = sparsegpt(&self.weight, &factor, sparsity);
            all.push((name, pruned.clone()));
            swap(
                &self.weight,
                &mut pruned,
                sparsity,
                &self.metric(),
                factor.damping(),
            );
            self.refit(&mut pruned, factor.damping(), 4);
            all.push(("refined", pruned));
        }
        all
    }

    fn refit(&self, pruned: &mut Pruned, damping: f64, steps: usize) {
        let (zeros, metric) = (&pruned.zeros, self.metric());
        refit(
            &self.weight,
            &mut pruned.weight,
            zeros,
            &metric,
            damping,
            steps,
        );
    }
}

fn grid(granularity: Granularity) -> Grid {
    Grid {
        bits: 4,
        symmetric: false,
        granularity,
        search: ScaleSearch::Weighted,
    }
}

fn count(zeros: &[bool]) -> usize {
    zeros.iter().filter(|zero| **zero).count()
}

/// `Σ δ·(M + damping·I)·δᵀ` in f64, straight from its definition.
fn loss(layer: &Layer, pruned: &Pruned, damping: f64) -> f64 {
    let (metric, n) = (layer.metric(), layer.cols);
    let rows = layer.weight.chunks(n).zip(pruned.weight.chunks(n));
    rows.map(|(weight, pruned)| {
        let delta: Vec<f64> = weight
            .iter()
            .zip(pruned)
            .map(|(w, p)| f64::from(*w) - f64::from(*p))
            .collect();
        let bent = |i: usize| -> f64 {
            let row = &metric.values()[i * n..][..n];
            row.iter()
                .zip(&delta)
                .map(|(&m, d)| f64::from(m) * d)
                .sum::<f64>()
                + damping * delta[i]
        };
        (0..n).map(|i| delta[i] * bent(i)).sum::<f64>()
    })
    .sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_pattern_holds_in_every_run(zeros in 1usize..8, of in 2usize..9, cols in 9usize..40, seed: u64) {
        prop_assume!(zeros < of);
        // Also where the end of the row cuts a run short.
        let layer = Layer::new(5, cols, seed, &[]);
        let sparsity = Sparsity::Pattern { zeros, of };
        for (method, pruned) in layer.pruned(sparsity) {
            for (mask, values) in pruned.zeros.chunks(cols).zip(pruned.weight.chunks(cols)) {
                for (mask, values) in mask.chunks(of).zip(values.chunks(of)) {
                    prop_assert_eq!(count(mask), zeros * mask.len() / of, "{}", method);
                    prop_assert!(mask.iter().zip(values).all(|(&zero, &w)| zero == (w == 0.0)), "{}", method);
                }
            }
        }
    }

    #[test]
    fn a_share_is_exact(share in 0.0f64..1.0, rows in 1usize..70, cols in 1usize..300, seed: u64) {
        let layer = Layer::new(rows, cols, seed, &[]);
        for (method, pruned) in layer.pruned(Sparsity::Share(share)) {
            let expected = match method {
                "wanda" => rows * (share * cols as f64).round() as usize,
                _ => (share * (rows * cols) as f64).round() as usize,
            };
            prop_assert_eq!(count(&pruned.zeros), expected, "{}", method);
            let zeros = pruned.weight.iter().map(|w| *w == 0.0).collect::<Vec<_>>();
            prop_assert!(zeros == pruned.zeros, "{}", method);
        }
    }

    #[test]
    fn exchanges_and_least_squares_lower_the_loss(pattern: bool, seed: u64) {
        let layer = Layer::new(9, 48, seed, &[]);
        let sparsity = if pattern { Sparsity::Pattern { zeros: 2, of: 4 } } else { Sparsity::Share(0.6) };
        let factor = layer.factor(4, ActOrder::None);
        let damping = factor.damping();
        let mut pruned = sparsegpt(&layer.weight, &factor, sparsity);
        let mut last = loss(&layer, &pruned, damping);
        for _ in 0..3 {
            let swaps = swap(&layer.weight, &mut pruned, sparsity, &layer.metric(), damping);
            let swapped = loss(&layer, &pruned, damping);
            prop_assert!(if swaps > 0 { swapped < last } else { swapped <= last }, "{} {}", swapped, last);
            layer.refit(&mut pruned, damping, 3);
            last = loss(&layer, &pruned, damping);
            // Rounding in f32 may cost a few of its units where nothing is left to gain.
            prop_assert!(last <= swapped * (1.0 + 1e-5), "{} {}", last, swapped);
        }
    }
}

#[test]
fn least_squares_leave_no_slope_among_the_survivors() {
    let layer = Layer::new(7, 40, 3, &[5]);
    let factor = layer.factor(1, ActOrder::None);
    let mut pruned = sparsegpt(&layer.weight, &factor, Sparsity::Share(0.5));
    layer.refit(&mut pruned, factor.damping(), 60);
    let (metric, n) = (layer.metric(), layer.cols);
    let mut sides = 0;
    for row in 0..7 {
        let delta: Vec<f64> = (0..n)
            .map(|i| f64::from(layer.weight[row * n + i]) - f64::from(pruned.weight[row * n + i]))
            .collect();
        for col in (0..n).filter(|col| !pruned.zeros[row * n + col]) {
            let m = &metric.values()[col * n..][..n];
            let terms = m.iter().zip(&delta).map(|(&m, d)| f64::from(m) * d);
            let slope: f64 = terms.clone().sum::<f64>() + factor.damping() * delta[col];
            let size: f64 = terms.map(f64::abs).sum::<f64>() + factor.damping() * delta[col].abs();
            // f32 sums of n terms, once more for the steps.
            assert!(
                slope.abs() <= 4.0 * n as f64 * f64::from(f32::EPSILON) * size.max(1.0),
                "{row} {col}: {slope} of {size}"
            );
            sides += 1;
        }
    }
    assert_eq!(sides, 7 * 40 / 2);
}

#[test]
fn zero_rows_dense_rows_and_lone_survivors() {
    let (rows, cols) = (4, 32);
    for seed in 0..8 {
        let mut layer = Layer::new(rows, cols, seed, &[]);
        layer.weight[..cols].fill(0.0);
        // Row 1 is so large that nothing of it goes; of row 2 nothing else than one weight counts.
        layer.weight[cols..2 * cols]
            .iter_mut()
            .for_each(|w| *w = 1e4_f32.copysign(*w));
        layer.weight[2 * cols..3 * cols].fill(0.0);
        layer.weight[2 * cols + 7] = 3.0;
        for (method, pruned) in layer.pruned(Sparsity::Share(0.5)) {
            assert!(pruned.weight.iter().all(|w| w.is_finite()), "{method}");
            assert!(
                pruned.weight[..cols].iter().all(|&w| w == 0.0),
                "{method}: a row of zeros stays one"
            );
            if method != "wanda" {
                // Wanda takes its share of every row.
                assert_eq!(
                    count(&pruned.zeros[cols..2 * cols]),
                    0,
                    "{method}: the large row stays dense"
                );
            }
            let survivor = pruned.weight[2 * cols + 7];
            assert!((survivor - 3.0).abs() <= 1e-4, "{method}: {survivor}");
        }
    }
}

#[test]
fn weights_of_dead_inputs_go_first_and_otherwise_stay() {
    let dead = [0, 9, 10, 31];
    let layer = Layer::new(6, 32, 5, &dead);
    for (method, pruned) in layer.pruned(Sparsity::Share(0.25)) {
        if method == "magnitude" {
            continue;
        }
        for row in pruned.zeros.chunks(32) {
            assert!(dead.iter().all(|&col| row[col]), "{method}");
        }
    }
    // Fewer zeros than dead weights: those that stay are as they were.
    for (method, pruned) in layer.pruned(Sparsity::Share(0.1)) {
        for (at, (&w, &zero)) in pruned.weight.iter().zip(&pruned.zeros).enumerate() {
            let expected = if zero { 0.0 } else { layer.weight[at] };
            if method != "magnitude" && dead.contains(&(at % 32)) {
                assert_eq!(w, expected, "{method}");
            }
        }
    }
}

#[test]
fn without_any_input_magnitude_decides() {
    let all: Vec<usize> = (0..12).collect();
    let layer = Layer::new(3, 12, 1, &all);
    let factor = layer.factor(1, ActOrder::None);
    let pruned = sparsegpt(&layer.weight, &factor, Sparsity::Share(0.5));
    assert_eq!(
        pruned.zeros,
        magnitude(&layer.weight, 12, Sparsity::Share(0.5))
    );
}

#[test]
fn on_a_grid_zeros_have_the_code_of_zero() {
    let layer = Layer::new(40, 96, 8, &[3, 50]);
    let metric = layer.metric();
    for granularity in [Granularity::Group(32), Granularity::Channel] {
        let params = GptqParams::new(grid(granularity));
        let factor = Factor::new(layer.moments.clone(), &params).expect("valid parameters");
        for sparsity in [Sparsity::Share(0.5), Sparsity::Pattern { zeros: 2, of: 4 }] {
            let pruned = sparsegpt(&layer.weight, &factor, sparsity);
            let survivors = Survivors {
                zeros: &pruned.zeros,
                start: &pruned.weight,
                metric: &metric,
            };
            let done = factor
                .quantize_survivors(&layer.weight, 40, &params.grid, Some(&survivors))
                .expect("valid inputs");
            let q = &done.quantized;
            let groups = q.scheme.groups(96);
            for (at, &zero) in pruned.zeros.iter().enumerate() {
                let zero_point = q.zero_points[at / 96 * groups + q.scheme.group_of(at % 96)];
                assert!(
                    !zero || q.codes[at] == zero_point,
                    "{granularity:?} {sparsity} {at}"
                );
            }
            let error = metric.relative_error(&layer.weight, &q.dequantize());
            assert_eq!(done.report.relative_error, error);
            assert!(error < 0.5, "{error}");
        }
    }
}
