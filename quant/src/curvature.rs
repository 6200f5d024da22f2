//! The Hessian as reports and the refinement read it.

use qbin_runtime::kernels::Isa;
use qbin_runtime::kernels::gemm::View;
use qbin_runtime::kernels::gram::Slab;
use zerocopy::{FromBytes, IntoBytes};

/// Rows of a weight that share a column's rounding step.
const SLAB_ROWS: usize = 2048;

/// The damped Hessian, `[n, n]`, columns as in the file, zeros for dead columns.
#[derive(Clone, Debug)]
pub(crate) struct Curvature {
    pub(crate) n: usize,
    /// Two f32 in the memory of each f64: that of the exact Hessian, of which half is given back.
    pairs: Vec<f64>,
}

impl Curvature {
    /// The same matrix in f32, in the same memory.
    pub(crate) fn new(n: usize, mut hessian: Vec<f64>) -> Self {
        assert_eq!(hessian.len(), n * n, "the hessian is not [n, n]");
        let pairs = (n * n).div_ceil(2);
        for pair in 0..pairs {
            // Neither was written over yet: what was written ends before the first.
            let mut both = [0; size_of::<f64>()];
            for (i, bytes) in both.chunks_mut(size_of::<f32>()).enumerate() {
                let value = hessian.get(2 * pair + i).copied().unwrap_or(0.0) as f32;
                bytes.copy_from_slice(&value.to_ne_bytes());
            }
            hessian[pair] = f64::from_ne_bytes(both);
        }
        hessian.truncate(pairs);
        hessian.shrink_to_fit();
        Self { n, pairs: hessian }
    }

    pub(crate) fn values(&self) -> &[f32] {
        let values = <[f32]>::ref_from_bytes(self.pairs.as_bytes());
        &values.expect("two for each f64")[..self.n * self.n]
    }

    /// `W·H·Wᵀ` summed over the rows of `weight` (`[rows, n]`), and `‖W‖²` of the live columns. Beside the
    /// diagonal weights are rounded to int8, column by column, which is seen in the fourth digit.
    pub(crate) fn signal(&self, weight: &[f32]) -> (f64, f64) {
        let isa = Isa::detect();
        let (mut signal, mut norm) = (0.0, 0.0);
        for weight in weight.chunks(SLAB_ROWS * self.n) {
            let slab = Slab::new(isa, weight, self.n);
            signal += slab.quadratic(isa, self.values());
            let columns = slab.square_sums().iter().enumerate();
            let live = columns.filter(|&(col, _)| self.live(col));
            norm += live.map(|(_, square)| square).sum::<f64>();
        }
        (signal, norm)
    }

    pub(crate) fn view(&self) -> View<'_, f32> {
        View::row_major(self.values(), self.n, self.n)
    }

    /// Whether the column ever saw a non-zero input.
    pub(crate) fn live(&self, col: usize) -> bool {
        self.values()[col * self.n + col] > 0.0
    }
}
