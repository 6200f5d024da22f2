//! Where everything in an artifact stands, known before any work.

use std::collections::BTreeSet;

use crate::header::{self, Part};
use crate::pack::{PackedSize, TILE_ROWS, tile_bytes};
use crate::sparse::{MASK_BYTES, block_bytes, blocks_of};
use crate::{Dtype, Encoding, FormatError, Scheme};

/// The data starts on a multiple of this.
pub(crate) const DATA_ALIGN: u64 = 4096;
/// Every tensor starts on a multiple of this.
pub(crate) const TENSOR_ALIGN: u64 = 64;
/// Metadata key of the manifest.
pub(crate) const MANIFEST_KEY: &str = "qbin";
/// Metadata key of the manifest's digest.
pub(crate) const MANIFEST_DIGEST_KEY: &str = "qbin.sha256";

/// One thing that an artifact will hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Planned {
    /// A quantized matrix. Its plan is the dense encoding; one that turns out sparse enough takes less.
    Quantized {
        /// Name of the tensor.
        name: String,
        /// How it will be stored.
        scheme: Scheme,
        /// Output features.
        rows: usize,
        /// Input features.
        cols: usize,
    },
    /// A tensor kept as it is.
    Dense {
        /// Name of the tensor.
        name: String,
        /// Its type.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A file, such as `tokenizer.json`.
    File {
        /// Its name.
        name: String,
        /// Its length.
        bytes: usize,
    },
}

impl Planned {
    /// Name of the tensor or file.
    pub fn name(&self) -> &str {
        match self {
            Self::Quantized { name, .. } | Self::Dense { name, .. } | Self::File { name, .. } => {
                name
            }
        }
    }

    /// The stored tensors it becomes: name, type, shape.
    pub(crate) fn parts(&self, stored: StoredCodes) -> Result<Vec<StoredPart>, FormatError> {
        match self {
            &Self::Quantized {
                ref name,
                scheme,
                rows,
                cols,
            } => {
                let size = PackedSize::new(name, scheme, rows, cols)?;
                Ok(quantized_parts(name, size, scheme, stored))
            }
            Self::Dense { name, dtype, shape } => Ok(vec![(name.clone(), *dtype, shape.clone())]),
            Self::File { name, bytes } => Ok(vec![(file_part(name), Dtype::U8, vec![*bytes])]),
        }
    }
}

/// A stored tensor: name, type, shape.
pub(crate) type StoredPart = (String, Dtype, Vec<usize>);

/// How the codes of a quantized matrix are stored.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoredCodes {
    pub(crate) encoding: Encoding,
    /// Length of the codes, where sizes do not say it: for a bitmask.
    pub(crate) bytes: usize,
}

impl StoredCodes {
    pub(crate) const DENSE: Self = Self {
        encoding: Encoding::Dense,
        bytes: 0,
    };
}

/// A quantized tensor's stored parts, in their order in the file and in its digest.
fn quantized_parts(
    name: &str,
    size: PackedSize,
    scheme: Scheme,
    stored: StoredCodes,
) -> Vec<StoredPart> {
    let StoredCodes { encoding, bytes } = stored;
    let tiles = |bytes| vec![size.panels, size.tiles, bytes];
    let per_group = vec![size.panels, size.groups, TILE_ROWS];
    let codes = match encoding {
        Encoding::Dense => tiles(tile_bytes(scheme.bits)),
        Encoding::Bitmask => vec![bytes],
        Encoding::TwoOfFour => vec![size.panels, blocks_of(size.tiles), block_bytes(scheme.bits)],
    };
    let mut parts = vec![("codes", Dtype::U8, codes)];
    if encoding == Encoding::Bitmask {
        parts.push(("masks", Dtype::U8, tiles(MASK_BYTES)));
        parts.push(("offsets", Dtype::U64, vec![size.panels + 1]));
    }
    parts.push(("scales", Dtype::F16, per_group.clone()));
    if !scheme.symmetric {
        parts.push(("zero_points", Dtype::U8, per_group));
    }
    let named = parts.into_iter();
    named
        .map(|(part, dtype, shape)| (format!("{name}.{part}"), dtype, shape))
        .collect()
}

/// Name of the tensor that carries a file.
pub(crate) fn file_part(name: &str) -> String {
    format!("qbin.file/{name}")
}

/// Name of the `n`-th tensor of zeros between two others.
pub(crate) fn pad_part(n: usize) -> String {
    format!("qbin.pad.{n}")
}

/// Sizes of an artifact.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Bytes before the data: length field, header, padding.
    pub header_bytes: u64,
    /// Bytes of the whole file.
    pub total_bytes: u64,
    /// The entries in the order in which they were planned, which is their order in the file.
    pub entries: Vec<LayoutEntry>,
    /// Every stored tensor, the zeros between them included, in order.
    pub(crate) parts: Vec<Part>,
}

/// Size and place of one planned entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayoutEntry {
    /// Name of the tensor or file.
    pub name: String,
    /// Bytes of its stored parts, without the zeros up to the next multiple of 64.
    pub bytes: u64,
    /// Its stored parts in `Layout::parts`.
    pub(crate) parts: Vec<usize>,
}

/// Lays out an artifact without writing anything, with every quantized matrix dense: the most that it can need.
///
/// `manifest_bytes` is an upper bound of the manifest's JSON text, see [`crate::Manifest::planned_bytes`];
/// the header is given twice as much, because every quote in it is escaped.
///
/// # Errors
/// If a name is reserved or used twice, or a scheme or size cannot be stored.
pub fn artifact_layout(planned: &[Planned], manifest_bytes: usize) -> Result<Layout, FormatError> {
    let stored = vec![StoredCodes::DENSE; planned.len()];
    lay_out(planned, &stored, manifest_bytes)
}

/// Lays out an artifact whose quantized matrices are stored like this.
pub(crate) fn lay_out(
    planned: &[Planned],
    stored: &[StoredCodes],
    manifest_bytes: usize,
) -> Result<Layout, FormatError> {
    let mut builder = Builder::default();
    for (entry, &stored) in planned.iter().zip(stored) {
        builder.add(entry, stored)?;
    }
    let json = header::to_json(&Default::default(), &builder.parts);
    // 256 bytes: the length field, both metadata keys, the manifest's digest.
    let header_bytes =
        (2 * manifest_bytes as u64 + json.len() as u64 + 256).next_multiple_of(DATA_ALIGN);
    Ok(Layout {
        header_bytes,
        total_bytes: header_bytes + builder.end,
        entries: builder.entries,
        parts: builder.parts,
    })
}

#[derive(Default)]
struct Builder {
    end: u64,
    pads: usize,
    parts: Vec<Part>,
    entries: Vec<LayoutEntry>,
    names: BTreeSet<String>,
}

impl Builder {
    fn add(&mut self, planned: &Planned, stored: StoredCodes) -> Result<(), FormatError> {
        let name = planned.name();
        let is_file = matches!(planned, Planned::File { .. });
        if !is_file && (name.starts_with("qbin.") || name == "__metadata__") {
            return Err(FormatError::ReservedName {
                name: name.to_owned(),
            });
        }
        let mut entry = LayoutEntry {
            name: name.to_owned(),
            bytes: 0,
            parts: Vec::new(),
        };
        for (part, dtype, shape) in planned.parts(stored)? {
            entry.parts.push(self.parts.len());
            entry.bytes += self.push(part, dtype, shape)?;
            self.pad();
        }
        self.entries.push(entry);
        Ok(())
    }

    /// Appends one stored tensor and returns its size.
    fn push(&mut self, name: String, dtype: Dtype, shape: Vec<usize>) -> Result<u64, FormatError> {
        // Offsets stay below i64::MAX, the largest file there can be, with room for header and padding.
        let bytes = dtype.bytes_of(&shape).map(|bytes| bytes as u64);
        let Some(bytes) = bytes.filter(|bytes| *bytes < (1 << 62) && self.end < (1 << 62)) else {
            return Err(FormatError::TooLarge { name });
        };
        if !self.names.insert(name.clone()) {
            return Err(FormatError::DuplicateName { name });
        }
        self.parts.push(Part {
            name,
            dtype,
            shape,
            start: self.end,
            bytes,
        });
        self.end += bytes;
        Ok(bytes)
    }

    /// safetensors allows no gap between tensors, so that alignment needs a tensor of zeros.
    fn pad(&mut self) {
        let bytes = self.end.next_multiple_of(TENSOR_ALIGN) - self.end;
        if bytes > 0 {
            self.parts.push(Part {
                name: pad_part(self.pads),
                dtype: Dtype::U8,
                shape: vec![bytes as usize],
                start: self.end,
                bytes,
            });
            self.pads += 1;
            self.end += bytes;
        }
    }
}
