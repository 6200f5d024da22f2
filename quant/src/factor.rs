//! The Hessian prepared for error feedback: order of the columns, damping, Cholesky factor, cut into blocks.
//!
//! With the Hessian in sweep order `H = R·Rᵀ`, `R` upper triangular, and `R = (I + U)·diag(r)`, the best
//! target of column `j`, given the errors `e` of the columns before it, is `w_j + Σ_{k<j} e_k·U[k, j]`, and
//! the loss of the whole row is `Σ_j r_j²·(target_j − q_j)²`. `R` comes from one Cholesky factorization of
//! the matrix with rows and columns reversed; no inverse of `H` is formed, unlike in the paper.

use std::ops::Range;

use qbin_runtime::kernels::Isa;
use qbin_runtime::kernels::gemm::{Left, View};
use rayon::prelude::*;

use crate::curvature::Curvature;
use crate::error::QuantError;
use crate::gptq::{ActOrder, GptqParams};
use crate::grid::{Granularity, Grid};
use crate::hessian::{Moments, mirror};
use crate::linalg::{NonPositivePivot, Products, cholesky_in_place};

/// The most that the ladder multiplies the damping by.
const LADDER: [f64; 7] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0];
/// First rung above "no damping".
const FIRST_RUNG: f64 = 0.01;

/// A factored Hessian, usable for every matrix that reads the same inputs on the same grid.
///
/// Holds a little more than `1.5·n²` in f32.
#[derive(Clone, Debug)]
pub struct Factor {
    n: usize,
    granularity: Granularity,
    /// Column of the weight at each place of the sweep.
    pub(crate) order: Vec<usize>,
    pub(crate) blocks: Vec<Block>,
    /// `r` of each place of the sweep: the root of its conditional variance.
    pub(crate) root: Vec<f32>,
    /// Whether the column at that place of the sweep never saw a non-zero input.
    pub(crate) dead: Vec<bool>,
    /// What was added to the diagonal of live columns.
    pub(crate) damp: f64,
    pub(crate) damp_fraction: f64,
    pub(crate) fallback: Option<String>,
    /// The Hessian itself, for the signal of reports and the refinement.
    pub(crate) curvature: Curvature,
    /// How often the refinement goes over a matrix.
    pub(crate) refine_sweeps: usize,
}

/// A run of whole groups, swept together.
#[derive(Clone, Debug)]
pub(crate) struct Block {
    /// Places in the sweep.
    pub(crate) places: Range<usize>,
    /// Group number, and its places in the sweep.
    pub(crate) groups: Vec<(usize, Range<usize>)>,
    /// `U[..start, block]` transposed, `[width, start]`: feedback from everything before the block.
    pub(crate) before: Left<f32>,
    /// The inverse of `I + U[block, block]`, `[width, width]`, row major: feedback on current weights.
    pub(crate) inverse: Vec<f32>,
}

impl Factor {
    /// Factors the Hessian of `moments`, which is consumed (its buffer is worked in).
    ///
    /// Damping starts at `params.damp_fraction` of the mean diagonal of the live columns and is doubled,
    /// up to 64 times the start, while the matrix is not positive definite; after that only the diagonal
    /// is used. What happened is in [`crate::GptqReport`].
    ///
    /// # Errors
    /// [`QuantError::Bits`], [`QuantError::GroupSize`], [`QuantError::DampFraction`],
    /// [`QuantError::UpdateBlock`].
    pub fn new(moments: Moments, params: &GptqParams) -> Result<Self, QuantError> {
        let n = moments.n();
        params.check(n)?;
        let mut h = moments.finish().values;
        let of_file: Vec<f64> = (0..n).map(|i| h[i * n + i]).collect();
        let plan = Plan::new(
            &params.grid,
            params.act_order,
            params.update_block,
            &of_file,
        );

        let reversed: Vec<usize> = plan.order.iter().rev().copied().collect();
        permute(&mut h, &reversed);
        let mut diagonal: Vec<f64> = reversed.iter().map(|&col| of_file[col]).collect();
        let dead: Vec<bool> = diagonal.iter().rev().map(|&d| d == 0.0).collect();
        let live = diagonal.iter().filter(|&&d| d > 0.0).count();
        let mean = diagonal.iter().sum::<f64>() / live.max(1) as f64;
        // No evidence: the column is cut loose and rounds to its nearest value.
        diagonal
            .iter_mut()
            .filter(|d| **d == 0.0)
            .for_each(|d| *d = 1.0);

        let (damp_fraction, fallback) =
            climb(&mut h, n, &diagonal, mean, &dead, params.damp_fraction);
        let damp = damp_fraction.unwrap_or(0.0) * mean;
        let root = (0..n).map(|place| at(&h, n, place, place) as f32).collect();
        let blocks = cut(&h, n, plan.groups);
        let refine_sweeps = match damp_fraction {
            Some(_) => {
                restore(&mut h, n);
                permute(&mut h, &inverse(&reversed));
                params.refine_sweeps
            }
            // What is left of the matrix is its diagonal, and nothing can be refined against that.
            None => {
                h.fill(0.0);
                0
            }
        };
        for (i, &d) in of_file.iter().enumerate() {
            let damp = if d > 0.0 { damp as f32 } else { 0.0 };
            h[i * n + i] = f64::from(d as f32 + damp);
        }
        Ok(Self {
            n,
            granularity: params.grid.granularity,
            blocks,
            order: plan.order,
            root,
            dead,
            damp,
            damp_fraction: damp_fraction.unwrap_or(0.0),
            fallback,
            curvature: Curvature::new(n, h),
            refine_sweeps,
        })
    }

    /// Input features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns whose input was zero for every token.
    pub fn dead_columns(&self) -> usize {
        self.dead.iter().filter(|&&dead| dead).count()
    }

    /// Whether there is any evidence at all.
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.iter().all(|&dead| dead)
    }

    /// Whether the blocks suit `grid`.
    pub(crate) fn fits(&self, grid: &Grid) -> bool {
        self.granularity == grid.granularity
    }
}

/// The order of the sweep.
struct Plan {
    order: Vec<usize>,
    /// The groups of each block, with their places.
    groups: Vec<Vec<(usize, Range<usize>)>>,
}

impl Plan {
    /// Columns by falling diagonal inside each group, groups by their largest diagonal, so that a group
    /// stays contiguous in the file and the sweep still meets important columns first. Ties keep the
    /// order of the file.
    fn new(grid: &Grid, act_order: ActOrder, update_block: usize, diagonal: &[f64]) -> Self {
        let n = diagonal.len();
        let falling = |a: &usize, b: &usize| diagonal[*b].total_cmp(&diagonal[*a]);
        let mut groups: Vec<(usize, Vec<usize>)> = (0..grid.scheme().groups(n))
            .map(|group| (group, grid.columns(group, n).collect()))
            .collect();
        if act_order == ActOrder::Group {
            groups
                .iter_mut()
                .for_each(|(_, columns)| columns.sort_by(falling));
            groups.sort_by(|(_, a), (_, b)| falling(&a[0], &b[0]));
        }
        let mut plan = Self {
            order: Vec::with_capacity(n),
            groups: vec![Vec::new()],
        };
        for (group, columns) in groups {
            let start = plan.order.len();
            let block = plan.groups.last_mut().expect("never empty");
            if block
                .first()
                .is_some_and(|(_, first)| start - first.start >= update_block)
            {
                plan.groups.push(Vec::new());
            }
            let block = plan.groups.last_mut().expect("never empty");
            block.push((group, start..start + columns.len()));
            plan.order.extend(columns);
        }
        plan
    }
}

/// The permutation that undoes this one.
fn inverse(source: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; source.len()];
    for (i, &from) in source.iter().enumerate() {
        inverse[from] = i;
    }
    inverse
}

/// Reorders rows and columns in place: position `i` receives `source[i]`.
fn permute(h: &mut [f64], source: &[usize]) {
    let n = source.len();
    let mut placed = vec![false; n];
    let mut first_row = vec![0f64; n];
    for start in 0..n {
        if placed[start] {
            continue;
        }
        // Follow the cycle: each row moves to the place that the one before it left.
        first_row.copy_from_slice(&h[start * n..][..n]);
        let mut row = start;
        loop {
            placed[row] = true;
            let from = source[row];
            if from == start {
                h[row * n..][..n].copy_from_slice(&first_row);
                break;
            }
            h.copy_within(from * n..(from + 1) * n, row * n);
            row = from;
        }
    }
    h.par_chunks_mut(n).for_each_init(
        || vec![0f64; n],
        |old, row| {
            old.copy_from_slice(row);
            for (value, &from) in row.iter_mut().zip(source) {
                *value = old[from];
            }
        },
    );
}

/// Factors with rising damping; leaves the factor in the lower triangle and tells the fraction used, none if
/// only the diagonal could be factored.
fn climb(
    h: &mut [f64],
    n: usize,
    diagonal: &[f64],
    mean: f64,
    dead: &[bool],
    start: f64,
) -> (Option<f64>, Option<String>) {
    let first = if start > 0.0 { start } else { FIRST_RUNG };
    let undamped = (start == 0.0).then_some(0.0).into_iter();
    let rungs = undamped.chain(LADDER.map(|step| step * first));
    // What fails with the fast products is tried with the exact ones before the matrix is changed any further.
    let attempts = rungs.flat_map(|fraction| {
        [Products::Single, Products::Double].map(|products| (fraction, products))
    });
    let mut tried: Option<(f64, NonPositivePivot)> = None;
    let mut dirty = false;
    for (fraction, products) in attempts {
        if dirty {
            // The upper triangle still holds the matrix.
            restore(h, n);
        }
        for (i, &d) in diagonal.iter().enumerate() {
            let damp = if dead[n - 1 - i] {
                0.0
            } else {
                fraction * mean
            };
            h[i * n + i] = d + damp;
        }
        dirty = true;
        match cholesky_in_place(h, n, products) {
            Ok(()) => {
                let fallback = tried.map(|(last, pivot)| {
                    format!(
                        "damping raised to {fraction:?}: at {last:?} pivot {} was {:e}",
                        pivot.index, pivot.value
                    )
                });
                return (Some(fraction), fallback);
            }
            Err(_) if products == Products::Single => {}
            Err(pivot) => tried = Some((fraction, pivot)),
        }
    }
    h.fill(0.0);
    for (i, &d) in diagonal.iter().enumerate() {
        h[i * n + i] = d.sqrt();
    }
    let reason = tried.map(|(last, pivot)| {
        format!(
            "diagonal of the hessian only: at damping {last:?} pivot {} was {:e}",
            pivot.index, pivot.value
        )
    });
    (None, reason)
}

/// Copies the strict upper triangle (column major: row < column) back onto the lower.
fn restore(h: &mut [f64], n: usize) {
    mirror(h, n, |_| ());
}

/// `R[a, b]`, `a ≤ b`, out of the Cholesky factor of the reversed matrix.
fn at(lower: &[f64], n: usize, a: usize, b: usize) -> f64 {
    lower[(n - 1 - b) * n + (n - 1 - a)]
}

/// Takes `U` out of the factor, block by block.
fn cut(lower: &[f64], n: usize, groups: Vec<Vec<(usize, Range<usize>)>>) -> Vec<Block> {
    let isa = Isa::detect();
    let block = |groups: Vec<(usize, Range<usize>)>| {
        let places = groups[0].1.start..groups[groups.len() - 1].1.end;
        let (start, width) = (places.start, places.len());
        let mut before = vec![0f32; start * width];
        let mut inside = vec![0f64; width * width];
        for (j, place) in places.clone().enumerate() {
            let root = at(lower, n, place, place);
            for k in 0..start {
                before[j * start + k] = (at(lower, n, k, place) / root) as f32;
            }
            for k in 0..=j {
                inside[j * width + k] = at(lower, n, start + k, place) / root;
            }
        }
        let inverse = invert_unit_upper(&inside, width);
        let before = View::row_major(&before, width, start);
        Block {
            places,
            groups,
            before: Left::new(isa, before),
            inverse: inverse.into_iter().map(|value| value as f32).collect(),
        }
    };
    groups.into_par_iter().map(block).collect()
}

/// The inverse of a unit upper triangular matrix given column major, row major.
fn invert_unit_upper(upper: &[f64], width: usize) -> Vec<f64> {
    let mut inverse = vec![0f64; width * width];
    for (i, row) in inverse.chunks_mut(width).enumerate() {
        // Row i of the inverse: x·upper = e_i, from the left.
        row[i] = 1.0;
        for j in i + 1..width {
            let column = &upper[j * width..][..j];
            row[j] = -column[i..]
                .iter()
                .zip(&row[i..j])
                .map(|(u, x)| u * x)
                .sum::<f64>();
        }
    }
    inverse
}
