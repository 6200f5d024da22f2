//! The product of pairs by the tiles of AMX-BF16.
//!
//! A tile of the left factor is 16 rows × 16 words as they stand, one of the right factor 16 words × 16 columns.

use std::arch::asm;

use super::{PART, Product};
use crate::kernels::tile_config::TileConfig;

/// Rows, and columns, of a tile.
const TILE: usize = 16;

/// Tiles of sums, of both factors, and of both factors behind the last whole part.
const SUMS: usize = 0;
const WHOLE: [usize; 2] = [1, 2];
const REST: [usize; 2] = [3, 4];

/// The shapes that the tiles of this thread have, which are set only when they change: rows, and words behind the last whole
/// part.
#[derive(Default)]
pub(in super::super) struct Shapes(Option<[usize; 2]>);

impl Drop for Shapes {
    fn drop(&mut self) {
        if self.0.is_some() {
            // SAFETY: who set them had the tiles. They are given back so that a switch of threads need not save them.
            unsafe { asm!("tilerelease", options(nostack, nomem)) }
        }
    }
}

/// # Panics
/// If a factor is too short.
///
/// # Safety
/// Detection found AMX, and the operating system granted its tiles.
pub(super) unsafe fn product(product: Product, shapes: &mut Shapes) {
    let Product { a, b, stride, .. } = product;
    let rows = product.c.len() / stride;
    let (parts, rest) = (a.depth / PART, a.depth % PART);
    assert!(
        (rows == 0 || (rows - 1) * a.stride + a.depth <= a.words.len())
            && (a.depth == 0 || (a.depth - 1) * stride + product.columns <= b.len())
            && product.columns <= stride,
        "factors of {rows} rows and {} columns",
        product.columns
    );
    for row in (0..rows).step_by(TILE) {
        let count = TILE.min(rows - row);
        if shapes.0 != Some([count, rest]) {
            let mut config = TileConfig::WHOLE;
            config.rows[SUMS] = count as u8;
            for [left, right] in [WHOLE, REST] {
                config.rows[left] = count as u8;
                config.rows[right] = PART as u8;
            }
            if rest > 0 {
                config.row_bytes[REST[0]] = 4 * rest as u16;
                config.rows[REST[1]] = rest as u8;
            }
            // SAFETY: as the caller says; the instruction reads these 64 bytes.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) }
            shapes.0 = Some([count, rest]);
        }
        for column in (0..product.columns).step_by(TILE) {
            // SAFETY: as the caller says. Rows, words and columns of the configured tiles are inside the slices, as checked
            // above.
            unsafe {
                asm!(
                    "test {replace:e}, {replace:e}",
                    "jz 2f",
                    "tilezero tmm0",
                    "jmp 3f",
                    "2:",
                    "tileloadd tmm0, [{c} + {stride}]",
                    "3:",
                    "test {parts}, {parts}",
                    "jz 5f",
                    "4:",
                    "tileloadd tmm1, [{a} + {a_stride}]",
                    "tileloadd tmm2, [{b} + {stride}]",
                    "tdpbf16ps tmm0, tmm1, tmm2",
                    "add {a}, 64",
                    "add {b}, {b_part}",
                    "dec {parts}",
                    "jnz 4b",
                    "5:",
                    "test {rest:e}, {rest:e}",
                    "jz 6f",
                    "tileloadd tmm3, [{a} + {a_stride}]",
                    "tileloadd tmm4, [{b} + {stride}]",
                    "tdpbf16ps tmm0, tmm3, tmm4",
                    "6:",
                    "tilestored [{c} + {stride}], tmm0",
                    replace = in(reg) u32::from(product.replace),
                    parts = inout(reg) parts => _,
                    rest = in(reg) rest as u32,
                    a = inout(reg) a.words.as_ptr().wrapping_add(row * a.stride) => _,
                    a_stride = in(reg) 4 * a.stride,
                    b = inout(reg) b.as_ptr().wrapping_add(column) => _,
                    b_part = in(reg) 4 * PART * stride,
                    c = in(reg) product.c.as_mut_ptr().wrapping_add(row * stride + column),
                    stride = in(reg) 4 * stride,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _,
                    options(nostack),
                );
            }
        }
    }
}
