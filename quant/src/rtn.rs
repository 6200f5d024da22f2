//! Round-to-nearest: every weight to its closest level, one group at a time.

use half::f16;
use qbin_format::QuantizedMatrix;
use rayon::prelude::*;

use crate::error::QuantError;
use crate::grid::{Grid, GroupParams};
use crate::scan::position;

/// Rows that one task works on.
const PANEL_ROWS: usize = 16;

/// Quantizes `weight` (`[rows, cols]`) to the nearest values of `grid`.
///
/// `importance` (`[cols]`, ≥ 0, for example the diagonal of the Hessian) weighs the scale search.
/// `clip` (`[rows, groups]`, infinity for "no limit") bounds the magnitude of the weights of a group before
/// anything else is done with them.
///
/// # Errors
/// [`QuantError::Bits`], [`QuantError::GroupSize`], [`QuantError::NonFiniteWeight`].
///
/// # Panics
/// If a slice does not have the length its shape says.
pub fn rtn(
    weight: &[f32],
    rows: usize,
    cols: usize,
    grid: &Grid,
    importance: Option<&[f32]>,
    clip: Option<&[f32]>,
) -> Result<QuantizedMatrix, QuantError> {
    check_weight(weight, rows, cols)?;
    grid.check(cols)?;
    let groups = grid.scheme().groups(cols);
    assert!(
        importance.is_none_or(|h| h.len() == cols),
        "importance is not [cols]"
    );
    assert!(
        clip.is_none_or(|c| c.len() == rows * groups),
        "clip is not [rows, groups]"
    );

    let mut out = Parts::new(rows, cols, grid);
    out.par_panels(PANEL_ROWS)
        .enumerate()
        .for_each(|(panel, mut out)| {
            let mut group_weights = Vec::new();
            for row in 0..out.scales.len() / groups {
                let at = panel * PANEL_ROWS + row;
                for group in 0..groups {
                    let columns = grid.columns(group, cols);
                    let limit = clip.map_or(f32::INFINITY, |clip| clip[at * groups + group]);
                    group_weights.clear();
                    group_weights.extend(
                        weight[at * cols..][columns.clone()]
                            .iter()
                            .map(|w| w.clamp(-limit, limit)),
                    );
                    let params =
                        grid.params(&group_weights, importance.map(|h| &h[columns.clone()]));
                    out.set(row * groups + group, params);
                    let rounder = grid.rounder(params);
                    let codes = &mut out.codes[row * cols..][columns];
                    for (code, &w) in codes.iter_mut().zip(&group_weights) {
                        *code = rounder.code(rounder.steps(w));
                    }
                }
            }
        });
    Ok(out.finish())
}

/// Refuses shapes that disagree (our mistake) and weights that are not finite (the file's).
pub(crate) fn check_weight(weight: &[f32], rows: usize, cols: usize) -> Result<(), QuantError> {
    assert_eq!(weight.len(), rows * cols, "weight is not [rows, cols]");
    match position(weight, |w| !w.is_finite()) {
        Some(at) => Err(QuantError::NonFiniteWeight {
            row: at / cols,
            col: at % cols,
            value: weight[at],
        }),
        None => Ok(()),
    }
}

/// A quantized matrix while its rows are being written.
pub(crate) struct Parts {
    matrix: QuantizedMatrix,
    groups: usize,
}

/// Some consecutive rows of it.
pub(crate) struct Panel<'a> {
    /// `[panel rows, cols]`.
    pub(crate) codes: &'a mut [u8],
    /// `[panel rows, groups]`.
    pub(crate) scales: &'a mut [f16],
    zero_points: &'a mut [u8],
}

impl Parts {
    pub(crate) fn new(rows: usize, cols: usize, grid: &Grid) -> Self {
        let scheme = grid.scheme();
        let groups = scheme.groups(cols);
        Self {
            matrix: QuantizedMatrix {
                scheme,
                rows,
                cols,
                codes: vec![0; rows * cols],
                scales: vec![f16::ZERO; rows * groups],
                zero_points: vec![0; rows * groups],
            },
            groups,
        }
    }

    /// The matrix in panels of `rows` rows, the last one possibly shorter.
    pub(crate) fn par_panels(
        &mut self,
        rows: usize,
    ) -> impl IndexedParallelIterator<Item = Panel<'_>> {
        let matrix = &mut self.matrix;
        (
            matrix.codes.par_chunks_mut(rows * matrix.cols),
            matrix.scales.par_chunks_mut(rows * self.groups),
            matrix.zero_points.par_chunks_mut(rows * self.groups),
        )
            .into_par_iter()
            .map(|(codes, scales, zero_points)| Panel {
                codes,
                scales,
                zero_points,
            })
    }

    pub(crate) fn finish(mut self) -> QuantizedMatrix {
        if self.matrix.scheme.symmetric {
            self.matrix.zero_points = Vec::new();
        }
        self.matrix
    }
}

impl Panel<'_> {
    /// Stores the parameters of the group at `row · groups + group`.
    pub(crate) fn set(&mut self, at: usize, params: GroupParams) {
        self.scales[at] = f16::from_f32(params.scale);
        self.zero_points[at] = params.zero_point;
    }

    /// The parameters stored there.
    pub(crate) fn params(&self, at: usize) -> GroupParams {
        GroupParams {
            scale: self.scales[at].to_f32(),
            zero_point: self.zero_points[at],
        }
    }
}

/// 0 for what is held at zero and 1 for the rest, `[columns, rows]`, for some columns of `zeros[rows, n]`.
pub(crate) fn kept(zeros: Option<&[bool]>, n: usize, rows: usize, columns: &[usize]) -> Vec<f32> {
    let mut kept = vec![1f32; columns.len() * rows];
    for (row, zeros) in zeros.unwrap_or_default().chunks(n).enumerate() {
        for (at, &col) in columns.iter().enumerate() {
            if zeros[col] {
                kept[at * rows + row] = 0.0;
            }
        }
    }
    kept
}
