//! The small steps between products, in portable Rust compiled for each instruction set.

use super::Columns;
use super::ahead::AHEAD;
use super::isa::{Isa, Vectorized};
use crate::math;

/// Root-mean-square norm of one row: `x / sqrt(mean(x²) + eps) · weight`.
pub(crate) fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    isa.run(RmsNorm {
        x,
        weight,
        eps,
        out,
    });
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Vectorized for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let mean = math::sum(self.x, |x| x * x) / self.x.len() as f32;
        let scale = 1.0 / (mean + self.eps).sqrt();
        for ((out, x), weight) in self.out.iter_mut().zip(self.x).zip(self.weight) {
            *out = x * scale * weight;
        }
    }
}

/// The same on every head of `heads` in place; heads are as wide as `weight`.
pub(crate) fn rms_norm_heads(isa: Isa, heads: &mut [f32], weight: &[f32], eps: f32) {
    isa.run(RmsNormHeads { heads, weight, eps });
}

struct RmsNormHeads<'a> {
    heads: &'a mut [f32],
    weight: &'a [f32],
    eps: f32,
}

impl Vectorized for RmsNormHeads<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for head in self.heads.chunks_exact_mut(self.weight.len()) {
            let mean = math::sum(head, |x| x * x) / head.len() as f32;
            let scale = 1.0 / (mean + self.eps).sqrt();
            for (x, weight) in head.iter_mut().zip(self.weight) {
                *x = *x * scale * weight;
            }
        }
    }
}

/// `x += y`.
pub(crate) fn add(isa: Isa, x: &mut [f32], y: &[f32]) {
    isa.run(Add { x, y });
}

struct Add<'a> {
    x: &'a mut [f32],
    y: &'a [f32],
}

impl Vectorized for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.x.iter_mut().zip(self.y).for_each(|(x, y)| *x += y);
    }
}

/// `x += y`, where the rows of `x` lie together.
///
/// # Panics
/// If they have different shapes, or `x` is in bands.
pub(crate) fn add_columns(isa: Isa, x: &mut Columns<'_>, y: &mut Columns<'_>) {
    assert_eq!([x.rows(), x.width()], [y.rows(), y.width()]);
    isa.run(AddColumns { x, y });
}

struct AddColumns<'c, 'x, 'y> {
    x: &'c mut Columns<'x>,
    y: &'c mut Columns<'y>,
}

impl Vectorized for AddColumns<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { x, y } = self;
        for row in 0..x.rows() {
            // Rows are far apart, so that the core does not see the next ones coming.
            x.fetch(row + AHEAD);
            let mut x = x.row(row);
            for y in y.pieces(row) {
                let now;
                (now, x) = x.split_at_mut(y.len());
                Add { x: now, y }.run();
            }
        }
    }
}

/// `x *= factor`.
pub(crate) fn scale(isa: Isa, x: &mut [f32], factor: f32) {
    isa.run(Scale { x, factor });
}

struct Scale<'a> {
    x: &'a mut [f32],
    factor: f32,
}

impl Vectorized for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.x.iter_mut().for_each(|x| *x *= self.factor);
    }
}

/// `out = silu(gate) · up` for one row.
///
/// # Panics
/// If they are not as wide as each other.
pub(crate) fn silu_times(
    isa: Isa,
    gate: &mut Columns<'_>,
    up: &mut Columns<'_>,
    row: usize,
    out: &mut [f32],
) {
    assert_eq!([gate.width(), up.width()], [out.len(); 2]);
    isa.run(SiluTimes { gate, up, row, out });
}

struct SiluTimes<'c, 'a, 'b> {
    gate: &'c mut Columns<'a>,
    up: &'c mut Columns<'b>,
    row: usize,
    out: &'c mut [f32],
}

impl Vectorized for SiluTimes<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let mut out = self.out;
        for (gate, up) in self.gate.pieces(self.row).zip(self.up.pieces(self.row)) {
            let now;
            (now, out) = out.split_at_mut(gate.len());
            for ((out, gate), up) in now.iter_mut().zip(gate).zip(up) {
                *out = *gate / (1.0 + math::exp(-*gate)) * *up;
            }
        }
    }
}

/// Turns every head of `heads`: channel `i` with channel `i + half` by the angle of `sin[i]`, `cos[i]`.
pub(crate) fn turn(isa: Isa, heads: &mut [f32], sin: &[f32], cos: &[f32]) {
    isa.run(Turn { heads, sin, cos });
}

struct Turn<'a> {
    heads: &'a mut [f32],
    sin: &'a [f32],
    cos: &'a [f32],
}

impl Vectorized for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let half = self.sin.len();
        for head in self.heads.chunks_exact_mut(2 * half) {
            let (low, high) = head.split_at_mut(half);
            let angles = self.sin.iter().zip(self.cos);
            for ((a, b), (sin, cos)) in low.iter_mut().zip(high).zip(angles) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}
