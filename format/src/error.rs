//! What can be wrong with a model file, or go wrong while one is written.

use std::io;
use std::path::{Path, PathBuf};

use crate::{Dtype, Foreign, Scheme};

/// Why a model file cannot be read or written.
///
/// The text names the file and the tensor, both sides of what does not agree, and the rule last;
/// [`FormatError::hint`] says what to do, where that is not the rule itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each message says what its fields hold")]
pub enum FormatError {
    #[error("cannot {action} `{}`", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },

    // Which file to read.
    #[error("`{}` is {foreign}, a safetensors file is needed", path.display())]
    Foreign { path: PathBuf, foreign: Foreign },
    #[error("`{}` is an artifact already, a checkpoint is needed", path.display())]
    IsArtifact { path: PathBuf },
    #[error("folder `{}` holds no safetensors file", path.display())]
    NoCheckpoint { path: PathBuf },
    #[error("folder `{}` holds {} safetensors files and no index: {}", path.display(), found.len(), found.join(", "))]
    AmbiguousFolder { path: PathBuf, found: Vec<String> },
    #[error("`{}` has {got} bytes, at most {limit} are read of a file beside the weights", path.display())]
    SideFileTooLarge { path: PathBuf, got: u64, limit: u64 },

    // Headers.
    #[error("`{}` has {got} bytes, a safetensors file has at least 8 and a header", path.display())]
    TooShort { path: PathBuf, got: usize },
    #[error("`{}`: the header length is {got}, but the file ends {available} bytes after the length field", path.display())]
    HeaderBeyondFile {
        path: PathBuf,
        got: u64,
        available: usize,
    },
    #[error("`{}`: the header length is {got}, at most {limit} is allowed", path.display())]
    HeaderTooLong { path: PathBuf, got: u64, limit: u64 },
    #[error("`{}`: the header is not a safetensors header", path.display())]
    HeaderJson {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("`{}`: tensor `{tensor}` stands in the header twice, every name may be used once", path.display())]
    DuplicateTensor { path: PathBuf, tensor: String },
    #[error("`{}`: tensor `{tensor}` has the unknown type `{got}`, expected one of {}", path.display(), dtype_names())]
    UnknownDtype {
        path: PathBuf,
        tensor: String,
        got: String,
    },
    #[error("`{}`: tensor `{tensor}` of shape {shape:?} and type {dtype} is larger than any file", path.display())]
    ShapeOverflow {
        path: PathBuf,
        tensor: String,
        dtype: Dtype,
        shape: Vec<u64>,
    },
    #[error("`{}`: tensor `{tensor}` lies at bytes {start}..{end} of the data, but there are {available} bytes of data", path.display())]
    OffsetsOutOfRange {
        path: PathBuf,
        tensor: String,
        start: u64,
        end: u64,
        available: usize,
    },
    #[error("`{}`: tensor `{tensor}` of shape {shape:?} and type {dtype} has {expected} bytes, its offsets span {got}", path.display())]
    SizeMismatch {
        path: PathBuf,
        tensor: String,
        dtype: Dtype,
        shape: Vec<usize>,
        expected: usize,
        got: usize,
    },
    #[error("`{}`: tensor `{tensor}` starts at byte {got} of the data, inside tensor `{before}` which ends at {expected}; tensors may not overlap", path.display())]
    Overlap {
        path: PathBuf,
        tensor: String,
        before: String,
        expected: usize,
        got: usize,
    },
    #[error("`{}`: tensor `{tensor}` starts at byte {got} of the data, expected {expected}; tensors follow each other without a gap", path.display())]
    Gap {
        path: PathBuf,
        tensor: String,
        expected: usize,
        got: usize,
    },
    #[error("`{}`: the tensors end at byte {expected} of the data, but there are {got} bytes of data", path.display())]
    TrailingBytes {
        path: PathBuf,
        expected: usize,
        got: usize,
    },

    // Sharded checkpoints.
    #[error("`{}` is not an index of a sharded checkpoint", path.display())]
    IndexJson {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("`{}`: tensor `{tensor}` is said to be in `{shard}`, a shard must be a plain file name in the index's own folder", path.display())]
    ShardOutsideFolder {
        path: PathBuf,
        tensor: String,
        shard: String,
    },
    #[error("shard `{}` is missing, the index says that it holds tensor `{tensor}`", path.display())]
    MissingShard { path: PathBuf, tensor: String },
    #[error("tensor `{tensor}` is not in `{}`, where the index says it is", path.display())]
    MissingInShard { path: PathBuf, tensor: String },
    #[error("tensor `{tensor}` is in `{}` and in `{}`, every tensor may be stored once", first.display(), second.display())]
    InTwoShards {
        tensor: String,
        first: PathBuf,
        second: PathBuf,
    },
    #[error("tensor `{tensor}` is in `{}`, but the index does not list it", path.display())]
    NotInIndex { path: PathBuf, tensor: String },

    // Artifacts.
    #[error("`{}` is a safetensors file without a `qbin` manifest, not an artifact", path.display())]
    NotAnArtifact { path: PathBuf },
    #[error("`{}`: the manifest's digest is `{got}`, expected `{expected}`", path.display())]
    ManifestDigest {
        path: PathBuf,
        expected: String,
        got: String,
    },
    #[error("`{}`: the manifest cannot be read", path.display())]
    ManifestJson {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("`{}` has format version {got}, this program reads {expected}", path.display())]
    FormatVersion {
        path: PathBuf,
        expected: u32,
        got: u32,
    },
    #[error("`{}` requires the feature `{feature}`, which this program does not know", path.display())]
    UnknownFeature { path: PathBuf, feature: String },
    #[error("`{}`: tensor `{tensor}` has the encoding `{got}`, expected one of {expected} for its bits", path.display())]
    Encoding {
        path: PathBuf,
        tensor: String,
        expected: String,
        got: String,
    },
    #[error("`{}`: the offset of panel {panel} in `{tensor}.offsets` is {got}, expected {expected}; panels follow each other inside the codes", path.display())]
    Offsets {
        path: PathBuf,
        tensor: String,
        panel: usize,
        expected: String,
        got: u64,
    },
    #[error("`{}`: the masks and codes of panel {panel} in `{tensor}` do not fit: its encoding would be another", path.display())]
    Sparse {
        path: PathBuf,
        tensor: String,
        panel: usize,
    },
    #[error("`{}`: `{part}` should be {expected}, got {got}", path.display())]
    StoredPart {
        path: PathBuf,
        part: String,
        expected: String,
        got: String,
    },
    #[error("`{}`: `{part}` is stored, but the manifest does not list it", path.display())]
    NotInManifest { path: PathBuf, part: String },
    #[error("`{}`: `{part}` starts at byte {got} of the file, no multiple of {expected}", path.display())]
    Misaligned {
        path: PathBuf,
        part: String,
        expected: usize,
        got: usize,
    },
    #[error("`{}` is not a valid artifact", path.display())]
    InvalidArtifact {
        path: PathBuf,
        source: Box<FormatError>,
    },
    #[error("`{}`: tensor `{tensor}` is an alias of `{of}`, which must be a stored tensor of the same shape", path.display())]
    Alias {
        path: PathBuf,
        tensor: String,
        of: String,
    },
    #[error("`{}`: the digest of `{part}` is `{got}`, expected `{expected}`", path.display())]
    Digest {
        path: PathBuf,
        part: String,
        expected: String,
        got: String,
    },
    #[error("`{}`: `{part}` has the value {got:#x} at element {at}, expected {expected:#x}; unused places have fixed values", path.display())]
    Padding {
        path: PathBuf,
        part: String,
        at: usize,
        expected: u16,
        got: u16,
    },

    // Tensors and writing.
    #[error(
        "tensor `{tensor}` [{rows}, {cols}]: {scheme:?} cannot be stored; bits are 4 or 8, the group size is at least 1, and no side is empty"
    )]
    Scheme {
        tensor: String,
        scheme: Scheme,
        rows: usize,
        cols: usize,
    },
    #[error(
        "tensor `{tensor}`: a stored scale of group {group} in row {row} is {got}, scales must be finite"
    )]
    ScaleNotFinite {
        tensor: String,
        row: usize,
        group: usize,
        got: f32,
    },
    #[error(
        "`{name}` cannot be stored, names that start with `qbin.` and `__metadata__` are reserved"
    )]
    ReservedName { name: String },
    #[error("`{name}` would be stored twice, every name may be used once")]
    DuplicateName { name: String },
    #[error("`{name}` makes the file larger than any file can be")]
    TooLarge { name: String },
    #[error("output `{}` is the same file as the input `{}`", out.display(), input.display())]
    OutputIsInput { out: PathBuf, input: PathBuf },
    #[error("output `{}` is a folder, a file name is needed", path.display())]
    OutputIsFolder { path: PathBuf },
    #[error("another run is writing `{}`", path.display())]
    OutputBusy { path: PathBuf },
    #[error("`{}` needs {needed} bytes, its file system has {free} free", path.display())]
    NoSpace {
        path: PathBuf,
        needed: u64,
        free: u64,
    },
}

fn dtype_names() -> String {
    Dtype::ALL.map(Dtype::name).join(", ")
}

impl FormatError {
    /// What to do about it, as one sentence without a full stop.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Foreign { foreign, .. } => foreign.way_out(),
            Self::NoCheckpoint { .. } => {
                "give a .safetensors file, a *.safetensors.index.json or a Hugging Face model folder"
            }
            Self::IsArtifact { .. } => "give the checkpoint that the artifact was made from",
            Self::AmbiguousFolder { .. } => "give the file itself instead of the folder",
            Self::TooShort { .. }
            | Self::HeaderBeyondFile { .. }
            | Self::OffsetsOutOfRange { .. }
            | Self::TrailingBytes { .. }
            | Self::ManifestDigest { .. }
            | Self::Padding { .. }
            | Self::Offsets { .. }
            | Self::Sparse { .. }
            | Self::Digest { .. } => {
                "the file is cut or damaged: copy or download it again, or quantize again from the checkpoint"
            }
            Self::MissingShard { .. } => {
                "the download may be incomplete: fetch every shard that the index names"
            }
            Self::InTwoShards { .. } | Self::NotInIndex { .. } | Self::MissingInShard { .. } => {
                "index and shards do not belong together: download the model into an empty folder"
            }
            Self::FormatVersion { .. } | Self::UnknownFeature { .. } => {
                "use a newer release of this program, or quantize again with this one"
            }
            Self::ScaleNotFinite { .. } => {
                "the weights are too large for f16 scales, or not finite: keep this tensor as it is"
            }
            Self::OutputIsInput { .. } => "choose another output path",
            Self::OutputBusy { .. } => "wait for it to end, or choose another output path",
            Self::NoSpace { .. } => "free some space, or choose an output path on another disk",
            _ => return None,
        };
        Some(hint.to_owned())
    }

    /// An IO error of `action` on `path`, to be given to `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}
