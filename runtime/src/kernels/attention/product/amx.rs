//! The product of pairs by the tiles of AMX-BF16.
//!
//! A tile of the left factor is 16 rows × 16 words as they stand, one of the right factor 16 words × 16 columns.

use std::arch::asm;

use super::{PART, Product};
use crate::kernels::tile_config::TileConfig;

/// Rows, and columns, of a tile.
const TILE: usize = 16;

/// Tiles whose rows are those of the product: of sums for two tiles of columns, and of the left factor.
const OF_ROWS: [usize; 4] = [0, 1, LEFT_REST, 2];

/// Tiles behind the last whole part: of the left factor, and two of the right one.
const LEFT_REST: usize = 5;
const RIGHT_REST: [usize; 2] = [6, 7];

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
            for tile in OF_ROWS {
                config.rows[tile] = count as u8;
            }
            if rest > 0 {
                config.row_bytes[LEFT_REST] = 4 * rest as u16;
                for tile in RIGHT_REST {
                    config.rows[tile] = rest as u8;
                }
            }
            // SAFETY: as the caller says; the instruction reads these 64 bytes.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) }
            shapes.0 = Some([count, rest]);
        }
        for column in (0..product.columns).step_by(2 * TILE) {
            // Where only one tile of columns is left, it is computed twice.
            let second = (column + TILE).min(product.columns - TILE);
            let places = [column, second].map(|column| b.as_ptr().wrapping_add(column));
            let c = product.c.as_mut_ptr().wrapping_add(row * stride);
            // SAFETY: as the caller says. Rows, words and columns of the configured tiles are inside the slices, as checked
            // above.
            unsafe {
                asm!(
                    "test {replace:e}, {replace:e}",
                    "jz 2f",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "jmp 3f",
                    "2:",
                    "tileloadd tmm0, [{c0} + {stride}]",
                    "tileloadd tmm1, [{c1} + {stride}]",
                    "3:",
                    "test {parts}, {parts}",
                    "jz 5f",
                    "4:",
                    "tileloadd tmm2, [{a} + {a_stride}]",
                    "tileloadd tmm3, [{b0} + {stride}]",
                    "tdpbf16ps tmm0, tmm2, tmm3",
                    "tileloadd tmm4, [{b1} + {stride}]",
                    "tdpbf16ps tmm1, tmm2, tmm4",
                    "add {a}, 64",
                    "add {b0}, {b_part}",
                    "add {b1}, {b_part}",
                    "dec {parts}",
                    "jnz 4b",
                    "5:",
                    "test {rest:e}, {rest:e}",
                    "jz 6f",
                    "tileloadd tmm5, [{a} + {a_stride}]",
                    "tileloadd tmm6, [{b0} + {stride}]",
                    "tdpbf16ps tmm0, tmm5, tmm6",
                    "tileloadd tmm7, [{b1} + {stride}]",
                    "tdpbf16ps tmm1, tmm5, tmm7",
                    "6:",
                    "tilestored [{c0} + {stride}], tmm0",
                    "tilestored [{c1} + {stride}], tmm1",
                    replace = in(reg) u32::from(product.replace),
                    parts = inout(reg) parts => _,
                    rest = in(reg) rest as u32,
                    a = inout(reg) a.words.as_ptr().wrapping_add(row * a.stride) => _,
                    a_stride = in(reg) 4 * a.stride,
                    b0 = inout(reg) places[0] => _,
                    b1 = inout(reg) places[1] => _,
                    b_part = in(reg) 4 * PART * stride,
                    c0 = in(reg) c.wrapping_add(column),
                    c1 = in(reg) c.wrapping_add(second),
                    stride = in(reg) 4 * stride,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    }
}
