//! Reading an artifact.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::checkpoint::map_file;
use crate::header::{Header, HeaderTensor};
use crate::layout::{
    DATA_ALIGN, MANIFEST_DIGEST_KEY, MANIFEST_KEY, StoredCodes, TENSOR_ALIGN, file_part, pad_part,
};
use crate::mmap::Mapping;
use crate::sparse::check_offsets;
use crate::{
    Dtype, Encoding, Fate, FormatError, Manifest, Planned, QuantizedView, Scheme, Sparsity,
    TensorEntry, TensorView, sha256_hex,
};

/// A mapped `.qbin` file whose header, manifest, sizes and offsets are checked.
///
/// The digests are not checked on opening; [`Artifact::verify`] does that.
#[derive(Debug)]
pub struct Artifact {
    pub(crate) path: PathBuf,
    pub(crate) mapping: Mapping,
    manifest: Manifest,
    /// `manifest.config` as text, for an artifact that does not carry the file itself.
    config: Vec<u8>,
    pub(crate) tensors: BTreeMap<String, Stored>,
    pub(crate) files: BTreeMap<String, Range<usize>>,
    /// The zeros between tensors.
    pub(crate) pads: Vec<HeaderTensor>,
}

/// Where a stored tensor's bytes are.
#[derive(Debug)]
pub(crate) enum Stored {
    Dense {
        dtype: Dtype,
        bytes: Range<usize>,
    },
    Quantized {
        scheme: Scheme,
        encoding: Encoding,
        /// Codes; masks and offsets of a bitmask; scales; zero points of an asymmetric scheme.
        parts: Vec<Range<usize>>,
    },
}

impl Stored {
    /// The byte ranges of all parts.
    pub(crate) fn ranges(&self) -> &[Range<usize>] {
        match self {
            Self::Dense { bytes, .. } => std::slice::from_ref(bytes),
            Self::Quantized { parts, .. } => parts,
        }
    }
}

impl Artifact {
    /// Opens an artifact; no weight is read.
    ///
    /// # Errors
    /// If the file is no artifact, is damaged, or needs a newer program.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let (mapping, header) = map_file(path)?;
        Self::from_file(path, mapping, header)
    }

    /// An artifact whose file is mapped already.
    pub(crate) fn from_file(
        path: &Path,
        mapping: Mapping,
        header: Header,
    ) -> Result<Self, FormatError> {
        let manifest = read_manifest(path, &header)?;
        check_alignment(path, &header)?;
        let mut parts = Parts::new(path, &manifest.required_features, header.tensors);
        let mut tensors = BTreeMap::new();
        for (name, entry) in &manifest.tensors {
            if let Some(stored) = parts.take_tensor(name, entry)? {
                tensors.insert(name.clone(), stored);
            }
        }
        let mut files = BTreeMap::new();
        for (name, entry) in &manifest.files {
            let bytes = usize::try_from(entry.bytes).unwrap_or(usize::MAX);
            let range = parts.take(&file_part(name), Dtype::U8, &[bytes])?;
            files.insert(name.clone(), range);
        }
        check_aliases(path, &manifest)?;
        let pads = parts.pads()?;
        let artifact = Self {
            path: path.to_owned(),
            config: manifest.config.to_string().into_bytes(),
            pads,
            mapping,
            manifest,
            tensors,
            files,
        };
        artifact.check_offsets()?;
        Ok(artifact)
    }

    pub(crate) fn copy_to_huge_pages(&mut self) -> Result<(), FormatError> {
        let copy = self.mapping.in_huge_pages();
        self.mapping = copy.map_err(FormatError::io("copy into memory", &self.path))?;
        Ok(())
    }

    /// Panels of bitmasks must lie inside their codes: kernels find them by these offsets.
    fn check_offsets(&self) -> Result<(), FormatError> {
        for name in self.tensors.keys() {
            let Some(view) = self.quantized(name) else {
                continue;
            };
            if let Err(wrong) = check_offsets(&view) {
                return Err(FormatError::Offsets {
                    path: self.path.clone(),
                    tensor: name.clone(),
                    panel: wrong.panel,
                    expected: wrong.expected,
                    got: wrong.got,
                });
            }
        }
        Ok(())
    }

    /// What is in the artifact and how it was made.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The kept tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, stored) = self.tensors.get_key_value(name)?;
        let &Stored::Dense { dtype, ref bytes } = stored else {
            return None;
        };
        Some(TensorView {
            name,
            dtype,
            shape: &self.manifest.tensors[name].shape,
            bytes: self.bytes(bytes),
        })
    }

    /// The quantized matrix of this name.
    pub fn quantized(&self, name: &str) -> Option<QuantizedView<'_>> {
        let Some(Stored::Quantized {
            scheme,
            encoding,
            parts,
        }) = self.tensors.get(name)
        else {
            return None;
        };
        let (scheme, encoding) = (*scheme, *encoding);
        let shape = &self.manifest.tensors[name].shape;
        let mut parts = parts.iter().map(|range| self.bytes(range));
        let mut part_if = |there: bool| match there {
            true => parts.next().expect("opening found every part"),
            false => &[],
        };
        let codes = part_if(true);
        let bitmask = encoding == Encoding::Bitmask;
        let (masks, offsets) = (part_if(bitmask), part_if(bitmask));
        Some(QuantizedView {
            scheme,
            rows: shape[0],
            cols: shape[1],
            codes,
            sparsity: Sparsity::new(encoding, masks, offsets),
            scales: part_if(true),
            zero_points: part_if(!scheme.symmetric),
        })
    }

    /// A file that travels inside. `config.json` is there even if it is not carried as a file: it is the
    /// manifest's `config` then.
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        match self.files.get(name) {
            Some(range) => Some(self.bytes(range)),
            None if name == "config.json" && !self.manifest.config.is_null() => Some(&self.config),
            None => None,
        }
    }

    /// Says that the pages of this tensor are not needed for now; its contents stay readable.
    pub fn release(&self, name: &str) {
        for range in self.tensors.get(name).map_or(&[][..], Stored::ranges) {
            self.mapping.release(range.clone());
        }
    }

    /// Length of the file.
    pub fn file_bytes(&self) -> u64 {
        self.mapping.bytes().len() as u64
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn bytes(&self, range: &Range<usize>) -> &[u8] {
        &self.mapping.bytes()[range.clone()]
    }

    /// SHA-256 of the whole file, read in pieces whose pages are let go again.
    pub(crate) fn file_digest(&self) -> [u8; 32] {
        const PIECE: usize = 64 << 20;
        let mut hasher = Sha256::new();
        for (n, piece) in self.mapping.bytes().chunks(PIECE).enumerate() {
            hasher.update(piece);
            self.mapping.release(n * PIECE..n * PIECE + piece.len());
        }
        hasher.finalize().into()
    }
}

/// The manifest out of the metadata, with its digest checked.
fn read_manifest(path: &Path, header: &Header) -> Result<Manifest, FormatError> {
    let Some(text) = header.metadata.get(MANIFEST_KEY) else {
        return Err(FormatError::NotAnArtifact {
            path: path.to_owned(),
        });
    };
    let expected = header.metadata.get(MANIFEST_DIGEST_KEY);
    let expected = expected.map_or("", String::as_str);
    let got = sha256_hex(text.as_bytes());
    if got != expected {
        return Err(FormatError::ManifestDigest {
            path: path.to_owned(),
            expected: expected.to_owned(),
            got,
        });
    }
    Manifest::parse(path, text)
}

fn check_alignment(path: &Path, header: &Header) -> Result<(), FormatError> {
    let data = ("the data", header.data_start, DATA_ALIGN as usize);
    let tensors = header.tensors.iter();
    let stored = tensors
        .filter(|tensor| !tensor.name.starts_with("qbin.pad."))
        .map(|tensor| {
            (
                tensor.name.as_str(),
                tensor.range.start,
                TENSOR_ALIGN as usize,
            )
        });
    for (part, got, expected) in std::iter::once(data).chain(stored) {
        if !got.is_multiple_of(expected) {
            return Err(FormatError::Misaligned {
                path: path.to_owned(),
                part: part.to_owned(),
                expected,
                got,
            });
        }
    }
    Ok(())
}

fn check_aliases(path: &Path, manifest: &Manifest) -> Result<(), FormatError> {
    for (name, entry) in &manifest.tensors {
        let Fate::Alias { of, .. } = &entry.fate else {
            continue;
        };
        let stored = manifest.tensors.get(of).is_some_and(|target| {
            matches!(target.fate, Fate::Quantized { .. } | Fate::Kept { .. })
                && target.shape == entry.shape
        });
        if !stored {
            return Err(FormatError::Alias {
                path: path.to_owned(),
                tensor: name.clone(),
                of: of.clone(),
            });
        }
    }
    Ok(())
}

/// The stored tensors that no manifest entry has claimed yet.
struct Parts<'a> {
    path: &'a Path,
    /// The manifest's required features.
    features: &'a [String],
    left: BTreeMap<String, HeaderTensor>,
}

impl<'a> Parts<'a> {
    fn new(path: &'a Path, features: &'a [String], tensors: Vec<HeaderTensor>) -> Self {
        let named = tensors
            .into_iter()
            .map(|tensor| (tensor.name.clone(), tensor));
        Self {
            path,
            features,
            left: named.collect(),
        }
    }

    /// Claims what the manifest says about one tensor; `None` for a tensor that is not stored.
    fn take_tensor(
        &mut self,
        name: &str,
        entry: &TensorEntry,
    ) -> Result<Option<Stored>, FormatError> {
        match &entry.fate {
            Fate::Alias { .. } | Fate::Dropped { .. } => Ok(None),
            &Fate::Kept { dtype, .. } => {
                let bytes = self.take(name, dtype, &entry.shape)?;
                Ok(Some(Stored::Dense { dtype, bytes }))
            }
            &Fate::Quantized {
                ref encoding,
                bits,
                group_size,
                symmetric,
                scale_dtype,
                ..
            } => {
                let scheme = Scheme {
                    bits,
                    group_size,
                    symmetric,
                };
                let encoding = self.encoding(name, encoding, bits, scale_dtype)?;
                let parts = self.take_quantized(name, scheme, encoding, &entry.shape)?;
                Ok(Some(Stored::Quantized {
                    scheme,
                    encoding,
                    parts,
                }))
            }
        }
    }

    fn encoding(
        &self,
        name: &str,
        stated: &str,
        bits: u8,
        scale_dtype: Dtype,
    ) -> Result<Encoding, FormatError> {
        let mut encodings = Encoding::ALL.into_iter();
        let Some(encoding) = encodings.find(|encoding| encoding.name(bits) == stated) else {
            let expected = Encoding::ALL.map(|encoding| format!("`{}`", encoding.name(bits)));
            return Err(FormatError::Encoding {
                path: self.path.to_owned(),
                tensor: name.to_owned(),
                expected: expected.join(", "),
                got: stated.to_owned(),
            });
        };
        if let Some(feature) = encoding.feature()
            && !self.features.iter().any(|given| given == feature)
        {
            let expected = format!("stored with `{feature}` among the required features");
            return Err(self.wrong(name, &expected, format!("{:?}", self.features)));
        }
        if scale_dtype != Dtype::F16 {
            return Err(self.wrong(name, "scaled by F16", scale_dtype.to_string()));
        }
        Ok(encoding)
    }

    fn take_quantized(
        &mut self,
        name: &str,
        scheme: Scheme,
        encoding: Encoding,
        shape: &[usize],
    ) -> Result<Vec<Range<usize>>, FormatError> {
        let &[rows, cols] = shape else {
            return Err(self.wrong(name, "a matrix of two dimensions", format!("{shape:?}")));
        };
        // A bitmask's codes are as long as they are; the offsets must fit them.
        let codes = self.left.get(&format!("{name}.codes"));
        let stored = StoredCodes {
            encoding,
            bytes: codes.map_or(0, |codes| codes.range.len()),
        };
        let planned = Planned::Quantized {
            name: name.to_owned(),
            scheme,
            rows,
            cols,
        };
        let parts = planned
            .parts(stored)
            .map_err(|source| FormatError::InvalidArtifact {
                path: self.path.to_owned(),
                source: Box::new(source),
            })?;
        parts
            .into_iter()
            .map(|(part, dtype, shape)| self.take(&part, dtype, &shape))
            .collect()
    }

    /// Claims one stored tensor, which must have this type and shape.
    fn take(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
    ) -> Result<Range<usize>, FormatError> {
        let expected = format!("{dtype} {shape:?}");
        let Some(found) = self.left.remove(name) else {
            return Err(self.wrong(name, &expected, "nothing".to_owned()));
        };
        if (found.dtype, found.shape.as_slice()) != (dtype, shape) {
            let got = format!("{} {:?}", found.dtype, found.shape);
            return Err(self.wrong(name, &expected, got));
        }
        Ok(found.range)
    }

    fn wrong(&self, part: &str, expected: &str, got: String) -> FormatError {
        FormatError::StoredPart {
            path: self.path.to_owned(),
            part: part.to_owned(),
            expected: expected.to_owned(),
            got,
        }
    }

    /// What is left must be the zeros between tensors, counted up in the order of their places.
    fn pads(self) -> Result<Vec<HeaderTensor>, FormatError> {
        let mut pads: Vec<HeaderTensor> = self.left.into_values().collect();
        pads.sort_by_key(|pad| pad.range.start);
        for (n, pad) in pads.iter().enumerate() {
            let is_pad = pad.name == pad_part(n) && pad.dtype == Dtype::U8 && pad.shape.len() == 1;
            if !is_pad || pad.range.len() as u64 >= TENSOR_ALIGN {
                return Err(FormatError::NotInManifest {
                    path: self.path.to_owned(),
                    part: pad.name.clone(),
                });
            }
        }
        Ok(pads)
    }
}
