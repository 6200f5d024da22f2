//! Dense checkpoints: one safetensors file, or several that an index makes one.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::header::{self, Header};
use crate::layout::MANIFEST_KEY;
use crate::mmap::Mapping;
use crate::{Foreign, FormatError, TensorView, index};

/// Files beside the weights that belong to a model; a checkpoint reads those that are there.
pub const SIDE_FILES: [&str; 6] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// Largest side file or index that is read.
const MAX_SIDE_FILE_BYTES: u64 = 64 << 20;

/// A checkpoint: mapped shards seen as one, and the files beside them.
#[derive(Debug)]
pub struct Checkpoint {
    shards: Vec<Shard>,
    /// Name → shard and position in its header.
    tensors: BTreeMap<String, (usize, usize)>,
    /// Side files by name, with their paths.
    files: BTreeMap<&'static str, (PathBuf, Vec<u8>)>,
    index: Option<PathBuf>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    mapping: Mapping,
    header: Header,
}

impl Checkpoint {
    pub(crate) fn copy_to_huge_pages(&mut self) -> Result<(), FormatError> {
        for shard in &mut self.shards {
            let copy = shard.mapping.in_huge_pages();
            shard.mapping = copy.map_err(FormatError::io("copy into memory", &shard.path))?;
        }
        Ok(())
    }

    /// Opens a `.safetensors` file, an index (`*.json`), or a folder.
    ///
    /// In a folder `model.safetensors.index.json` comes first, then `model.safetensors`, then the single
    /// `*.safetensors` file. All headers are checked in full; no weight is read.
    ///
    /// # Errors
    /// If a file is missing, is no safetensors file or is an artifact, or contradicts itself, the index or another shard.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let path = &resolve(path)?;
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            return Self::open_index(path);
        }
        let (mapping, header) = map_file(path)?;
        if header.metadata.contains_key(MANIFEST_KEY) {
            return Err(FormatError::IsArtifact {
                path: path.to_owned(),
            });
        }
        Self::from_file(path, mapping, header)
    }

    /// A checkpoint of one file that is mapped already.
    pub(crate) fn from_file(
        path: &Path,
        mapping: Mapping,
        header: Header,
    ) -> Result<Self, FormatError> {
        let shard = Shard {
            path: path.to_owned(),
            mapping,
            header,
        };
        Self::from_shards(path, vec![shard], None)
    }

    fn open_index(path: &Path) -> Result<Self, FormatError> {
        let weight_map = index::parse(path, &read_small(path)?)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut shards: Vec<Shard> = Vec::new();
        let mut opened = BTreeMap::new();
        for (tensor, file_name) in &weight_map {
            if opened.contains_key(file_name.as_str()) {
                continue;
            }
            let path = folder.join(file_name);
            if !path.exists() {
                let tensor = tensor.clone();
                return Err(FormatError::MissingShard { path, tensor });
            }
            let (mapping, header) = map_file(&path)?;
            opened.insert(file_name.as_str(), shards.len());
            shards.push(Shard {
                path,
                mapping,
                header,
            });
        }
        let expected = weight_map
            .iter()
            .map(|(tensor, file_name)| (tensor.as_str(), opened[file_name.as_str()]))
            .collect();
        check_against_index(&shards, &expected)?;
        Self::from_shards(path, shards, Some(path.to_owned()))
    }

    fn from_shards(
        beside: &Path,
        shards: Vec<Shard>,
        index: Option<PathBuf>,
    ) -> Result<Self, FormatError> {
        let mut tensors = BTreeMap::new();
        for (shard_at, shard) in shards.iter().enumerate() {
            for (tensor_at, tensor) in shard.header.tensors.iter().enumerate() {
                tensors.insert(tensor.name.clone(), (shard_at, tensor_at));
            }
        }
        Ok(Self {
            shards,
            tensors,
            files: read_side_files(beside.parent().unwrap_or(Path::new("")))?,
            index,
        })
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let &(shard, at) = self.tensors.get(name)?;
        let shard = &self.shards[shard];
        let tensor = &shard.header.tensors[at];
        Some(TensorView {
            name: &tensor.name,
            dtype: tensor.dtype,
            shape: &tensor.shape,
            bytes: &shard.mapping.bytes()[tensor.range.clone()],
        })
    }

    /// A file that stood beside the weights when they were opened; see [`SIDE_FILES`].
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        self.files.get(name).map(|(_, bytes)| bytes.as_slice())
    }

    /// Says that the pages of this tensor are not needed for now; its contents stay readable.
    pub fn release(&self, name: &str) {
        if let Some(&(shard, at)) = self.tensors.get(name) {
            let shard = &self.shards[shard];
            shard
                .mapping
                .release(shard.header.tensors[at].range.clone());
        }
    }

    /// Bytes of all tensors together.
    pub fn total_bytes(&self) -> u64 {
        let shards = self.shards.iter();
        shards
            .map(|shard| (shard.mapping.bytes().len() - shard.header.data_start) as u64)
            .sum()
    }

    /// Every file this checkpoint was read from: shards, index, side files.
    pub fn input_paths(&self) -> impl Iterator<Item = &Path> {
        let shards = self.shards.iter().map(|shard| shard.path.as_path());
        let files = self.files.values().map(|(path, _)| path.as_path());
        shards.chain(self.index.as_deref()).chain(files)
    }
}

/// Opens, maps and checks one safetensors file.
pub(crate) fn map_file(path: &Path) -> Result<(Mapping, Header), FormatError> {
    let file = File::open(path).map_err(FormatError::io("open", path))?;
    let mapping = Mapping::new(&file).map_err(FormatError::io("map", path))?;
    let header = header::parse(path, mapping.bytes())?;
    Ok((mapping, header))
}

/// The file to open for `path`: itself, or the one that a folder stands for.
pub(crate) fn resolve(path: &Path) -> Result<PathBuf, FormatError> {
    let metadata = fs::metadata(path).map_err(FormatError::io("open", path))?;
    if !metadata.is_dir() {
        return Ok(path.to_owned());
    }
    for name in ["model.safetensors.index.json", "model.safetensors"] {
        let candidate = path.join(name);
        if candidate.exists() {
            return Ok(candidate);
        }
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path).map_err(FormatError::io("list", path))? {
        files.push(entry.map_err(FormatError::io("list", path))?.path());
    }
    files.sort();
    single_safetensors(path, &files)
}

fn single_safetensors(folder: &Path, files: &[PathBuf]) -> Result<PathBuf, FormatError> {
    let is_safetensors = |file: &&PathBuf| file.extension().is_some_and(|e| e == "safetensors");
    let found: Vec<&PathBuf> = files.iter().filter(is_safetensors).collect();
    match found[..] {
        [file] => Ok(file.clone()),
        [] => Err(no_safetensors(folder, files)),
        _ => Err(FormatError::AmbiguousFolder {
            path: folder.to_owned(),
            found: found
                .iter()
                .filter_map(|file| Some(file.file_name()?.to_string_lossy().into_owned()))
                .collect(),
        }),
    }
}

/// A folder without safetensors often holds the same model in another format.
fn no_safetensors(folder: &Path, files: &[PathBuf]) -> FormatError {
    let foreign = |file: &PathBuf| Some((file.clone(), Foreign::by_name(file)?));
    match files.iter().find_map(foreign) {
        Some((path, foreign)) => FormatError::Foreign { path, foreign },
        None => FormatError::NoCheckpoint {
            path: folder.to_owned(),
        },
    }
}

/// Checks that the shards hold exactly the tensors that the index gives to each.
fn check_against_index(
    shards: &[Shard],
    expected: &BTreeMap<&str, usize>,
) -> Result<(), FormatError> {
    let mut found: BTreeMap<&str, usize> = BTreeMap::new();
    for (at, shard) in shards.iter().enumerate() {
        for tensor in &shard.header.tensors {
            if let Some(first) = found.insert(&tensor.name, at) {
                return Err(FormatError::InTwoShards {
                    tensor: tensor.name.clone(),
                    first: shards[first].path.clone(),
                    second: shard.path.clone(),
                });
            }
        }
    }
    for (&tensor, &at) in &found {
        if !expected.contains_key(tensor) {
            return Err(FormatError::NotInIndex {
                path: shards[at].path.clone(),
                tensor: tensor.to_owned(),
            });
        }
    }
    for (&tensor, &at) in expected {
        if found.get(tensor) != Some(&at) {
            return Err(FormatError::MissingInShard {
                path: shards[at].path.clone(),
                tensor: tensor.to_owned(),
            });
        }
    }
    Ok(())
}

fn read_side_files(
    folder: &Path,
) -> Result<BTreeMap<&'static str, (PathBuf, Vec<u8>)>, FormatError> {
    let mut files = BTreeMap::new();
    for name in SIDE_FILES {
        let path = folder.join(name);
        if path.exists() {
            let bytes = read_small(&path)?;
            files.insert(name, (path, bytes));
        }
    }
    Ok(files)
}

/// Reads a file that is parsed as text, and therefore must not be huge.
fn read_small(path: &Path) -> Result<Vec<u8>, FormatError> {
    let metadata = fs::metadata(path).map_err(FormatError::io("open", path))?;
    if metadata.len() > MAX_SIDE_FILE_BYTES {
        return Err(FormatError::SideFileTooLarge {
            path: path.to_owned(),
            got: metadata.len(),
            limit: MAX_SIDE_FILE_BYTES,
        });
    }
    fs::read(path).map_err(FormatError::io("read", path))
}
