//! The definition of the product, in portable Rust. It serves every group size; the vector kernels of the other files
//! serve multiples of 32 columns.

use qbin_format::TILE_ROWS;

use super::Product;
use super::panel::Panel;
use crate::kernels::activations::Activations;
use crate::kernels::isa::Vectorized;

impl Vectorized for Product<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        for at in self.panels.clone() {
            let panel = Panel::of(self.w, at);
            for token in 0..self.x.tokens() {
                let mut y = [0.0; TILE_ROWS];
                for group in 0..self.x.groups() {
                    let weight_group = self.w.scheme.group_of(group * self.x.group());
                    let s_w = panel.scales(weight_group);
                    let z = panel.zero_points(weight_group);
                    let sum_qa = group_sums(&panel, self.x, token, group);
                    let (s_a, sum_a) = (self.x.scales(token)[group], self.x.sums(token)[group]);
                    for row in 0..TILE_ROWS {
                        let centred = (sum_qa[row] - z[row] * sum_a) as f32;
                        y[row] = (s_w[row] * s_a).mul_add(centred, y[row]);
                    }
                }
                self.out.write(token, at, &y);
            }
        }
    }
}

/// `Σ code · activation` over one group of columns, per row.
#[inline(always)]
fn group_sums(panel: &Panel, x: &Activations, token: usize, group: usize) -> [i32; TILE_ROWS] {
    let cols = group * x.group()..((group + 1) * x.group()).min(x.cols());
    let mut sums = [0; TILE_ROWS];
    for quad in cols.start / 4..cols.end.div_ceil(4) {
        let codes = panel.quad(quad);
        // A quad may hold columns of two groups.
        let a: [i32; 4] = std::array::from_fn(|lane| {
            let col = 4 * quad + lane;
            if cols.contains(&col) {
                i32::from(x.codes(token)[col])
            } else {
                0
            }
        });
        for row in 0..TILE_ROWS {
            for lane in 0..4 {
                sums[row] += i32::from(codes[row][lane]) * a[lane];
            }
        }
    }
    sums
}
