//! Model files: safetensors checkpoints and the `.qbin` artifact.
//!
//! [`Model::open`] reads either kind by memory map; every header is checked in full before a view
//! into it is handed out. [`ArtifactWriter`] writes an artifact tensor by tensor, in any order, into
//! a temporary file that takes its final name only after it was read back and verified. The byte
//! layout is described in `docs/format.md`; this crate is the only one that knows it.
//!
//! The crate knows nothing of models' arithmetic, algorithms or threads.

mod artifact;
mod artifact_writer;
mod checkpoint;
mod digest;
mod dtype;
mod error;
mod foreign;
mod header;
mod index;
mod layout;
mod manifest;
mod mmap;
mod model;
mod output;
mod pack;
mod quantized;
mod quantized_view;
mod safetensors_writer;
mod sparse;
mod tensor;
mod unique_map;
mod verify;

pub use artifact::Artifact;
pub use artifact_writer::{ArtifactWriter, Written};
pub use checkpoint::{Checkpoint, SIDE_FILES};
pub use digest::{SourceHasher, sha256_hex};
pub use dtype::Dtype;
pub use error::FormatError;
pub use foreign::Foreign;
pub use layout::{Layout, LayoutEntry, Planned, artifact_layout};
pub use manifest::{
    CalibrationInfo, FORMAT_VERSION, Fate, FileEntry, Manifest, SourceInfo, TensorEntry,
    TensorReport,
};
pub use model::{Model, Weight};
pub use output::check_output;
pub use pack::{PackedMatrix, TILE_COLS, TILE_ROWS};
pub use quantized::{QuantizedMatrix, Scheme};
pub use quantized_view::{QuantizedView, Sparsity};
pub use safetensors_writer::SafetensorsWriter;
pub use sparse::Encoding;
pub use tensor::{TensorView, float_bytes};
