//! Products of sparse weights: masks and stored codes become dense tiles on the fly.
//!
//! What a panel expands to is [`QuantizedView::expand_panel`]'s to say, and the product is that of the dense tiles, so
//! every instruction set gives the bits of the dense kernels on the unpacked matrix. For a few tokens, AVX-512
//! expands a bitmask in registers, and AVX2 and AVX-512 select the activations that the codes of two of four meet; in every other
//! case some panels are expanded into a buffer that stays in the cache, and the dense kernels take them from there.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod cursor;
#[cfg(target_arch = "x86_64")]
mod few;
#[cfg(target_arch = "x86_64")]
mod select;
#[cfg(test)]
mod tests;
mod two_of_four;

use std::cell::RefCell;
use std::ops::Range;

use qbin_format::{QuantizedView, Sparsity, TILE_COLS, TILE_ROWS};

use super::Product;
#[cfg(target_arch = "x86_64")]
use crate::kernels::activations::FEW;
use crate::kernels::isa::Isa;

/// Columns that have one code of zero in each row, where the kernels here serve.
const STEP: usize = 32;

/// Bytes of a vector of codes.
const VECTOR: usize = 64;

/// Bytes of dense tiles that are expanded before they are multiplied: they stay in the L2 cache.
const EXPANDED: usize = 256 << 10;

/// Panels of the widest block of the dense kernels.
const BLOCK: usize = 4;

thread_local! {
    /// Dense tiles of some panels.
    static TILES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The product of sparse weights.
pub(super) fn run(isa: Isa, mut product: Product) {
    // These read activations in rows.
    #[cfg(target_arch = "x86_64")]
    const {
        assert!(few::TOKENS <= FEW && select::TOKENS <= FEW)
    };
    #[cfg(target_arch = "x86_64")]
    if one_zero_per_step(product.w) && product.x.group().is_multiple_of(STEP) {
        let tokens = product.x.tokens();
        let done = match product.w.sparsity {
            Sparsity::Bitmask { masks, .. } if tokens <= few::TOKENS => {
                few::run(isa, masks, &mut product)
            }
            Sparsity::TwoOfFour if tokens <= select::TOKENS => select::run(isa, &mut product),
            _ => false,
        };
        if done {
            return;
        }
    }
    let (w, panels) = (product.w, product.panels.clone());
    let panel_bytes = dense_panel_bytes(w);
    let chunk = (EXPANDED / panel_bytes).next_multiple_of(BLOCK).max(BLOCK);
    TILES.with_borrow_mut(|tiles| {
        for start in panels.clone().step_by(chunk) {
            let part = start..panels.end.min(start + chunk);
            tiles.resize(part.len() * panel_bytes, 0);
            for (panel, tiles) in part.clone().zip(tiles.chunks_exact_mut(panel_bytes)) {
                expand(isa, w, panel, tiles);
            }
            let expanded = Product {
                w: &dense_part(w, part.clone(), tiles),
                x: product.x,
                panels: 0..part.len(),
                out: product.out.part(part),
            };
            super::dense(isa, expanded);
        }
    });
}

/// Bytes of a panel's dense tiles.
fn dense_panel_bytes(w: &QuantizedView) -> usize {
    w.cols.div_ceil(TILE_COLS) * TILE_ROWS * TILE_COLS * usize::from(w.scheme.bits) / 8
}

/// Some panels as a matrix of their own, with these tiles.
fn dense_part<'a>(
    w: &QuantizedView<'a>,
    panels: Range<usize>,
    tiles: &'a [u8],
) -> QuantizedView<'a> {
    let parameters = w.scheme.groups(w.cols) * TILE_ROWS;
    let of = |bytes: &'a [u8], each: usize| &bytes[panels.start * each..panels.end * each];
    QuantizedView {
        rows: (panels.end * TILE_ROWS).min(w.rows) - panels.start * TILE_ROWS,
        codes: tiles,
        sparsity: Sparsity::Dense,
        scales: of(w.scales, 2 * parameters),
        zero_points: match w.scheme.symmetric {
            true => &[],
            false => of(w.zero_points, parameters),
        },
        ..*w
    }
}

/// Expands one panel into dense tiles.
fn expand(isa: Isa, w: &QuantizedView, panel: usize, tiles: &mut [u8]) {
    match w.sparsity {
        Sparsity::TwoOfFour if one_zero_per_step(w) => two_of_four::expand(isa, w, panel, tiles),
        #[cfg(target_arch = "x86_64")]
        Sparsity::Bitmask { masks, .. } if one_zero_per_step(w) => {
            if let Some(vbmi2) = avx512::Vbmi2::of(isa) {
                vbmi2.expand(w, masks, panel, tiles);
            } else if let Some(avx2) = avx2::Avx2::of(isa) {
                avx2.expand(w, masks, panel, tiles);
            } else {
                w.expand_panel(panel, tiles);
            }
        }
        _ => w.expand_panel(panel, tiles),
    }
}

/// Whether the code of zero is the same for all columns of a step, in every row.
fn one_zero_per_step(w: &QuantizedView) -> bool {
    w.scheme.symmetric || w.scheme.group_size.is_none_or(|g| g.is_multiple_of(STEP))
}

/// The codes of zero of a panel's rows.
struct Zeros<'a> {
    mid: [u8; TILE_ROWS],
    /// One for each weight group, if the scheme is asymmetric.
    stored: &'a [[u8; TILE_ROWS]],
    /// Columns of a weight group.
    width: usize,
}

impl<'a> Zeros<'a> {
    fn new(w: &QuantizedView<'a>, panel: usize) -> Self {
        let groups = w.scheme.groups(w.cols);
        let (stored, _) = w.zero_points.as_chunks();
        Self {
            mid: [w.scheme.mid(); TILE_ROWS],
            stored: match w.scheme.symmetric {
                true => &[],
                false => &stored[panel * groups..][..groups],
            },
            width: w.scheme.group_size.unwrap_or(w.cols),
        }
    }

    /// In a column, and right of the matrix in its last group.
    #[inline(always)]
    fn at(&self, col: usize) -> &[u8; TILE_ROWS] {
        self.of_group(col / self.width)
    }

    /// In a weight group, and behind the last in that.
    #[inline(always)]
    fn of_group(&self, group: usize) -> &[u8; TILE_ROWS] {
        match self.stored.last() {
            None => &self.mid,
            Some(last) => self.stored.get(group).unwrap_or(last),
        }
    }
}
