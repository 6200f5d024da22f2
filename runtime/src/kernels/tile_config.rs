//! The shapes of AMX's tiles.

/// What `ldtilecfg` reads, palette 1.
#[repr(C, align(64))]
pub(super) struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes of a row, per tile.
    pub(super) row_bytes: [u16; 16],
    pub(super) rows: [u8; 16],
}

impl TileConfig {
    /// Eight tiles of 16 rows of 64 bytes.
    pub(super) const WHOLE: Self = Self {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };
}
