//! The manifest of an artifact: what is in it, where it came from and how it was made.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::unique_map::unique_map;
use crate::{Dtype, Encoding, FormatError, Scheme};

/// Version of the artifact's format that this crate writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// Manifest bytes set aside per tensor for its digest and report, and once for the whole.
const ALLOWANCE_PER_TENSOR: usize = 512;
const ALLOWANCE_IN_ALL: usize = 4096;

/// What is in an artifact, where it came from and how it was made.
///
/// Nothing in it depends on time, paths or threads, so that the same inputs give the same bytes.
/// Unknown fields are ignored on reading; what a reader must not ignore stands in `required_features`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format; the writer sets it to [`FORMAT_VERSION`].
    pub format_version: u32,
    /// Features without which the artifact cannot be read; an unknown one is refused. The writer adds those of the
    /// encodings that it chose.
    #[serde(default)]
    pub required_features: Vec<String>,
    /// Features that a reader may ignore.
    #[serde(default)]
    pub optional_features: Vec<String>,
    /// Version of the program that wrote the artifact.
    pub tool_version: String,
    /// The model's `config.json`.
    pub config: Value,
    /// What was done to the weights, with every option.
    pub recipe: Value,
    /// Seed of everything random.
    pub seed: u64,
    /// The checkpoint it was made from.
    pub source: SourceInfo,
    /// The calibration text, where one was used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<CalibrationInfo>,
    /// Every tensor of the checkpoint, with its fate.
    #[serde(deserialize_with = "unique_map")]
    pub tensors: BTreeMap<String, TensorEntry>,
    /// Files carried inside; the writer fills this in.
    #[serde(default, deserialize_with = "unique_map")]
    pub files: BTreeMap<String, FileEntry>,
}

/// The checkpoint an artifact was made from; see [`crate::SourceHasher`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceInfo {
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes of all tensors together.
    pub bytes: u64,
    /// Digest of all tensors, the same for a sharded and a single-file checkpoint.
    pub sha256: String,
}

/// The calibration text an artifact was made with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CalibrationInfo {
    /// Where it came from: `builtin`, `self`, or a description of the files.
    pub source: String,
    /// Number of windows.
    pub windows: usize,
    /// Tokens in one window.
    pub window_tokens: usize,
    /// Tokens in all.
    pub tokens: u64,
    /// Digest of the token ids.
    pub sha256: String,
}

/// One tensor of the checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// What became of it.
    pub fate: Fate,
    /// Its shape in the checkpoint.
    pub shape: Vec<usize>,
    /// SHA-256 of the stored bytes, filled in by the writer; empty for what is not stored.
    ///
    /// For a quantized tensor it is the SHA-256 of the SHA-256s (32 bytes each) of its stored parts:
    /// codes, scales, zero points if any.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sha256: String,
    /// What is to be known about its quality.
    #[serde(default, skip_serializing_if = "TensorReport::is_empty")]
    pub report: TensorReport,
}

/// What became of a tensor of the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Fate {
    /// Stored as codes, scales and zero points.
    Quantized {
        /// Name of the byte layout, see [`Encoding::name`]; the writer sets it to the one that it chose.
        encoding: String,
        /// Width of the stored code.
        bits: u8,
        /// Columns that share a scale; `None` is the whole row.
        group_size: Option<usize>,
        /// Whether the zero point is `2^(bits-1)` and not stored.
        symmetric: bool,
        /// Type of the stored scales, `F16`.
        scale_dtype: Dtype,
        /// Name of the method that found the codes.
        method: String,
    },
    /// Stored as it was, byte for byte.
    Kept {
        /// Its type.
        dtype: Dtype,
        /// Why it was not quantized.
        reason: String,
    },
    /// The same weights as another tensor, which is stored.
    Alias {
        /// The stored tensor.
        of: String,
        /// Why they are the same.
        reason: String,
    },
    /// Not stored.
    Dropped {
        /// Why it is not needed.
        reason: String,
    },
}

impl Fate {
    /// The fate of a tensor quantized with this scheme.
    pub fn quantized(scheme: Scheme, method: impl Into<String>) -> Self {
        Self::Quantized {
            encoding: Encoding::Dense.name(scheme.bits),
            bits: scheme.bits,
            group_size: scheme.group_size,
            symmetric: scheme.symmetric,
            scale_dtype: Dtype::F16,
            method: method.into(),
        }
    }

    /// The scheme of a quantized tensor.
    pub fn scheme(&self) -> Option<Scheme> {
        match *self {
            Self::Quantized {
                bits,
                group_size,
                symmetric,
                ..
            } => Some(Scheme {
                bits,
                group_size,
                symmetric,
            }),
            _ => None,
        }
    }
}

/// What is to be known about the quality of one tensor; what is absent was not measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TensorReport {
    /// `‖(W − Ŵ)X‖² / ‖WX‖²` over the calibration tokens, or over the weights alone where a note says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relative_error: Option<f64>,
    /// What was not done as asked.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fallbacks: Vec<String>,
    /// What else is worth knowing.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Share of weights that lay beyond the grid when they were rounded, 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clipped: Option<f64>,
    /// Part of the mean of the Hessian's diagonal that was added to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damp: Option<f64>,
}

impl TensorReport {
    /// Whether there is nothing to report.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A file carried inside an artifact.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its length.
    pub bytes: u64,
    /// Its SHA-256.
    pub sha256: String,
}

impl Manifest {
    /// Bytes to set aside for this manifest before any tensor was made: its present text, and an allowance
    /// for the digests and reports that are still missing.
    pub fn planned_bytes(&self) -> usize {
        self.to_text().len() + self.tensors.len() * ALLOWANCE_PER_TENSOR + ALLOWANCE_IN_ALL
    }

    /// The manifest as it is stored: JSON with sorted keys and no white space.
    pub(crate) fn to_text(&self) -> String {
        let mut value = serde_json::to_value(self).expect("a manifest is plain data");
        // The config keeps its file's key order otherwise, and that is no property of the model.
        value.sort_all_objects();
        value.to_string()
    }

    /// Reads a stored manifest. Version and features come first: what follows may have changed its shape.
    pub(crate) fn parse(path: &Path, text: &str) -> Result<Self, FormatError> {
        #[derive(Deserialize)]
        struct Preface {
            format_version: u32,
            #[serde(default)]
            required_features: Vec<String>,
        }
        let json = |source| FormatError::ManifestJson {
            path: path.to_owned(),
            source,
        };
        let preface: Preface = serde_json::from_str(text).map_err(json)?;
        if preface.format_version != FORMAT_VERSION {
            return Err(FormatError::FormatVersion {
                path: path.to_owned(),
                expected: FORMAT_VERSION,
                got: preface.format_version,
            });
        }
        let known = |name: &str| Encoding::ALL.iter().any(|e| e.feature() == Some(name));
        if let Some(feature) = preface.required_features.into_iter().find(|f| !known(f)) {
            return Err(FormatError::UnknownFeature {
                path: path.to_owned(),
                feature,
            });
        }
        serde_json::from_str(text).map_err(json)
    }
}
