//! What a model is read from, whether it is quantized or not.

use std::ops::Range;
use std::path::Path;

use crate::checkpoint::{map_file, resolve};
use crate::layout::MANIFEST_KEY;
use crate::{Artifact, Checkpoint, Fate, FormatError, QuantizedView, Sparsity, TensorView};

/// A checkpoint or an artifact.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one of it")]
pub enum Model {
    /// A dense checkpoint.
    Checkpoint(Checkpoint),
    /// A `.qbin` file.
    Artifact(Artifact),
}

/// One weight, dense or quantized.
#[derive(Clone, Copy, Debug)]
pub enum Weight<'a> {
    /// A tensor as it was in the checkpoint.
    Dense(TensorView<'a>),
    /// A packed matrix.
    Quantized(QuantizedView<'a>),
}

impl Model {
    /// Opens whatever is at `path`: see [`Checkpoint::open`] and [`Artifact::open`]. An artifact is recognised
    /// by its manifest, not by its name.
    ///
    /// # Errors
    /// If it can be opened as neither.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let path = &resolve(path)?;
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            return Checkpoint::open(path).map(Self::Checkpoint);
        }
        let (mapping, header) = map_file(path)?;
        if header.metadata.contains_key(MANIFEST_KEY) {
            Artifact::from_file(path, mapping, header).map(Self::Artifact)
        } else {
            Checkpoint::from_file(path, mapping, header).map(Self::Checkpoint)
        }
    }

    /// The same with all bytes copied into memory of this process, in huge pages where the system gives them. Weights
    /// are then read faster, because each page needs a translation; but opening takes as long as copying, and
    /// processes no longer share the pages.
    ///
    /// # Errors
    /// If the memory is not there.
    pub fn in_huge_pages(mut self) -> Result<Self, FormatError> {
        match &mut self {
            Self::Checkpoint(checkpoint) => checkpoint.copy_to_huge_pages(),
            Self::Artifact(artifact) => artifact.copy_to_huge_pages(),
        }?;
        Ok(self)
    }

    /// The weight of this name; in an artifact an alias gives the tensor that it stands for.
    pub fn weight(&self, name: &str) -> Option<Weight<'_>> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.tensor(name).map(Weight::Dense),
            Self::Artifact(artifact) => {
                let name = stored_name(artifact, name);
                let quantized = artifact.quantized(name).map(Weight::Quantized);
                quantized.or_else(|| artifact.tensor(name).map(Weight::Dense))
            }
        }
    }

    /// A file that belongs to the model; see [`crate::SIDE_FILES`].
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.file(name),
            Self::Artifact(artifact) => artifact.file(name),
        }
    }

    /// Says that the pages of this weight are not needed for now; its contents stay readable.
    pub fn release(&self, name: &str) {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.release(name),
            Self::Artifact(artifact) => artifact.release(stored_name(artifact, name)),
        }
    }

    /// Names of all weights that [`Model::weight`] knows, sorted.
    pub fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match self {
            Self::Checkpoint(checkpoint) => Box::new(checkpoint.names()),
            Self::Artifact(artifact) => {
                let entries = artifact.manifest().tensors.iter();
                let there = entries.filter(|(_, e)| !matches!(e.fate, Fate::Dropped { .. }));
                Box::new(there.map(|(name, _)| name.as_str()))
            }
        }
    }

    /// Every file it was read from.
    pub fn input_paths(&self) -> Box<dyn Iterator<Item = &Path> + '_> {
        match self {
            Self::Checkpoint(checkpoint) => Box::new(checkpoint.input_paths()),
            Self::Artifact(artifact) => Box::new(std::iter::once(artifact.path())),
        }
    }
}

/// The name under which the artifact stores a tensor. Aliases of aliases were refused on opening.
fn stored_name<'a>(artifact: &'a Artifact, name: &'a str) -> &'a str {
    match artifact
        .manifest()
        .tensors
        .get(name)
        .map(|entry| &entry.fate)
    {
        Some(Fate::Alias { of, .. }) => of,
        _ => name,
    }
}

impl Weight<'_> {
    /// Its shape as in the checkpoint.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::Dense(tensor) => tensor.shape.to_vec(),
            Self::Quantized(matrix) => vec![matrix.rows, matrix.cols],
        }
    }

    /// Everything a kernel reads of it, padding, scales and zero points included, in parts.
    pub fn stored(&self) -> Vec<&[u8]> {
        match self {
            Self::Dense(tensor) => vec![tensor.bytes],
            Self::Quantized(matrix) => {
                let sparsity = match matrix.sparsity {
                    Sparsity::Dense | Sparsity::TwoOfFour => [[].as_slice(); 2],
                    Sparsity::Bitmask { masks, offsets } => [masks, offsets],
                };
                let [masks, offsets] = sparsity;
                vec![
                    matrix.codes,
                    masks,
                    offsets,
                    matrix.scales,
                    matrix.zero_points,
                ]
            }
        }
    }

    /// How many bytes that is.
    pub fn stored_bytes(&self) -> usize {
        self.stored().iter().map(|part| part.len()).sum()
    }

    /// Reads whole rows, that is slices of the first dimension, as f32: `[rows.len(), …]` row major.
    ///
    /// # Panics
    /// If the rows are not there, `out` has another length, or a dense tensor's type is none that
    /// [`TensorView::read_f32`] converts.
    #[track_caller]
    pub fn read_rows_f32(&self, rows: Range<usize>, out: &mut [f32]) {
        match self {
            Self::Quantized(matrix) => matrix.read_f32(rows, out),
            Self::Dense(tensor) => {
                let row: usize = tensor.shape.iter().skip(1).product();
                assert!(rows.start <= rows.end, "rows {rows:?}");
                assert_eq!(
                    out.len(),
                    rows.len() * row,
                    "tensor `{}`: rows {rows:?}",
                    tensor.name
                );
                tensor.read_f32(rows.start * row, out);
            }
        }
    }
}
