//! Reading a packed matrix.

use std::ops::Range;

use half::f16;

use crate::pack::{TILE_COLS, TILE_ROWS, tile_bytes, unpack_row};
use crate::sparse::{Encoding, block_bytes, blocks_of, expand_panel};
use crate::{QuantizedMatrix, Scheme};

/// Which codes of a matrix are stored; the others are their groups' zero points.
#[derive(Clone, Copy, Debug)]
pub enum Sparsity<'a> {
    /// All: `codes` is `[panels, tiles, 512]` with 4 bits and `[panels, tiles, 1024]` with 8.
    Dense,
    /// Those that the masks name; `codes` is `[bytes]`. Behind its last panel stand as many zero bytes as a dense
    /// tile has, so that a kernel that brings its position below them before every tile reads inside it, whatever
    /// the masks say: opening checks the offsets, but not that the masks fit them.
    Bitmask {
        /// u64 little endian, `[panels, tiles, 16]`: bit `4·row + column` of a quad's mask.
        masks: &'a [u8],
        /// u64 little endian, `[panels + 1]`: where in `codes` each panel starts and the last ends.
        offsets: &'a [u8],
    },
    /// Two of each four columns, and which: `codes` is `[panels, ⌈tiles/2⌉, 704]` with 4 bits and `[panels, ⌈tiles/2⌉, 1216]`
    /// with 8.
    TwoOfFour,
}

impl<'a> Sparsity<'a> {
    pub(crate) fn new(encoding: Encoding, masks: &'a [u8], offsets: &'a [u8]) -> Self {
        match encoding {
            Encoding::Dense => Self::Dense,
            Encoding::Bitmask => Self::Bitmask { masks, offsets },
            Encoding::TwoOfFour => Self::TwoOfFour,
        }
    }

    /// Name of the case.
    pub fn encoding(&self) -> Encoding {
        match self {
            Self::Dense => Encoding::Dense,
            Self::Bitmask { .. } => Encoding::Bitmask,
            Self::TwoOfFour => Encoding::TwoOfFour,
        }
    }
}

/// A quantized matrix `W[rows, cols]` in the artifact's layout, `w = scale · (code − zero_point)`.
///
/// With `panels = ⌈rows/16⌉`, `tiles = ⌈cols/64⌉` and `groups = scheme.groups(cols)`; the reader checked
/// the lengths.
#[derive(Clone, Copy, Debug)]
pub struct QuantizedView<'a> {
    /// How to read the codes.
    pub scheme: Scheme,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// The stored codes; their shape stands at each case of [`Sparsity`].
    pub codes: &'a [u8],
    /// Which codes these are.
    pub sparsity: Sparsity<'a>,
    /// f16 little endian, `[panels, groups, 16]`.
    pub scales: &'a [u8],
    /// `[panels, groups, 16]`, or empty where the scheme is symmetric.
    pub zero_points: &'a [u8],
}

impl QuantizedView<'_> {
    /// Dequantizes whole rows into `out`, `[rows.len(), cols]` row major; the same values as
    /// [`QuantizedMatrix::dequantize`].
    ///
    /// # Panics
    /// If the rows are not in the matrix, or `out` has another length.
    #[track_caller]
    pub fn read_f32(&self, rows: Range<usize>, out: &mut [f32]) {
        assert!(
            rows.start <= rows.end && rows.end <= self.rows,
            "rows {rows:?} of {}",
            self.rows
        );
        assert_eq!(
            out.len(),
            rows.len() * self.cols,
            "rows {rows:?} of {} columns",
            self.cols
        );
        let width = self.scheme.group_size.unwrap_or(self.cols);
        let mut rows_out = out.chunks_exact_mut(self.cols);
        self.for_each_row(rows, |row, codes| {
            let out = rows_out.next().expect("as many as rows");
            let codes = codes[..self.cols].chunks(width);
            for (group, (codes, out)) in codes.zip(out.chunks_mut(width)).enumerate() {
                let scale = self.scale(row, group).to_f32();
                let zero_point = i32::from(self.zero_point(row, group));
                for (&code, out) in codes.iter().zip(out) {
                    *out = scale * (i32::from(code) - zero_point) as f32;
                }
            }
        });
    }

    /// The matrix in plain row-major form.
    pub fn unpack(&self) -> QuantizedMatrix {
        let groups = self.scheme.groups(self.cols);
        let mut matrix = QuantizedMatrix {
            scheme: self.scheme,
            rows: self.rows,
            cols: self.cols,
            codes: Vec::with_capacity(self.rows * self.cols),
            scales: Vec::with_capacity(self.rows * groups),
            zero_points: Vec::new(),
        };
        self.for_each_row(0..self.rows, |row, codes| {
            matrix.codes.extend(&codes[..self.cols]);
            matrix
                .scales
                .extend((0..groups).map(|group| self.scale(row, group)));
            if !self.scheme.symmetric {
                let zero_points = (0..groups).map(|group| self.zero_point(row, group));
                matrix.zero_points.extend(zero_points);
            }
        });
        matrix
    }

    /// Calls `each` with the codes of every one of these rows, padding columns included. The rows may be padding
    /// rows of the last panel.
    pub(crate) fn for_each_row(&self, rows: Range<usize>, mut each: impl FnMut(usize, &[u8])) {
        let mut codes = vec![[0; TILE_COLS]; self.cols.div_ceil(TILE_COLS)];
        let mut scratch = Vec::new();
        let mut start = rows.start;
        while start < rows.end {
            let panel = start / TILE_ROWS;
            let end = rows.end.min((panel + 1) * TILE_ROWS);
            let tiles = self.dense_panel(panel, &mut scratch);
            for row in start..end {
                let tiles = tiles.chunks_exact(tile_bytes(self.scheme.bits));
                for (codes, tile) in codes.iter_mut().zip(tiles) {
                    unpack_row(self.scheme.bits, tile, row % TILE_ROWS, codes);
                }
                each(row, codes.as_flattened());
            }
            start = end;
        }
    }

    /// The dense tiles of a panel: its own bytes, or what they expand to, in `scratch`.
    pub(crate) fn dense_panel<'s>(&'s self, panel: usize, scratch: &'s mut Vec<u8>) -> &'s [u8] {
        let len = self.cols.div_ceil(TILE_COLS) * tile_bytes(self.scheme.bits);
        if let Sparsity::Dense = self.sparsity {
            return &self.codes[panel * len..(panel + 1) * len];
        }
        scratch.resize(len, 0);
        self.expand_panel(panel, scratch);
        scratch
    }

    /// Expands a panel of a sparse matrix into dense tiles, `[tiles, 512]` with 4 bits and `[tiles, 1024]` with 8. A
    /// damaged matrix gives some codes.
    ///
    /// # Panics
    /// If the matrix is dense, has no such panel, or `out` has another length.
    #[track_caller]
    pub fn expand_panel(&self, panel: usize, out: &mut [u8]) {
        let len = self.cols.div_ceil(TILE_COLS) * tile_bytes(self.scheme.bits);
        assert_eq!(out.len(), len, "dense tiles of panel {panel}");
        expand_panel(self, panel, out);
    }

    /// Where in `codes` the panel's stored codes start; of the number of panels, where the last one's end.
    ///
    /// # Panics
    /// If the panel is beyond that.
    pub fn panel_offset(&self, panel: usize) -> usize {
        let (bits, tiles) = (self.scheme.bits, self.cols.div_ceil(TILE_COLS));
        match self.sparsity {
            Sparsity::Dense => panel * tiles * tile_bytes(bits),
            Sparsity::TwoOfFour => panel * blocks_of(tiles) * block_bytes(bits),
            Sparsity::Bitmask { offsets, .. } => {
                let (offsets, _) = offsets.as_chunks();
                // A 32-bit machine cannot have mapped what does not fit.
                usize::try_from(u64::from_le_bytes(offsets[panel])).unwrap_or(usize::MAX)
            }
        }
    }

    /// Position of a scale or zero point, counted in elements.
    pub(crate) fn group_at(&self, row: usize, group: usize) -> usize {
        let groups = self.scheme.groups(self.cols);
        (row / TILE_ROWS * groups + group) * TILE_ROWS + row % TILE_ROWS
    }

    pub(crate) fn scale(&self, row: usize, group: usize) -> f16 {
        let at = 2 * self.group_at(row, group);
        f16::from_le_bytes([self.scales[at], self.scales[at + 1]])
    }

    pub(crate) fn zero_point(&self, row: usize, group: usize) -> u8 {
        if self.scheme.symmetric {
            self.scheme.mid()
        } else {
            self.zero_points[self.group_at(row, group)]
        }
    }
}
