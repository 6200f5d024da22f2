//! The header of a safetensors file: strict reading, and writing.
//!
//! The `safetensors` crate is the oracle of our tests, but not the reader: its errors carry neither the
//! tensor's name nor the numbers, and it accepts a repeated name. The rules are the same, and
//! stricter where noted: every tensor's bytes lie inside the file, follow each other without gap or
//! overlap, cover the whole of the data, and are as many as shape and type say.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

use crate::unique_map::unique_map;
use crate::{Dtype, Foreign, FormatError};

/// Longest header that is read; the same bound as in the `safetensors` crate.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A checked header.
#[derive(Debug)]
pub(crate) struct Header {
    /// `__metadata__`.
    pub(crate) metadata: BTreeMap<String, String>,
    /// The tensors in the order of their bytes.
    pub(crate) tensors: Vec<HeaderTensor>,
    /// Where in the file the data starts.
    pub(crate) data_start: usize,
}

/// One tensor of a checked header.
#[derive(Debug)]
pub(crate) struct HeaderTensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// The tensor's bytes in the file, inside it.
    pub(crate) range: Range<usize>,
}

/// Reads and checks the header of the file whose contents are `file`.
///
/// # Errors
/// Whatever is wrong with the header; nothing is allocated beyond a small multiple of the header's length.
pub(crate) fn parse(path: &Path, file: &[u8]) -> Result<Header, FormatError> {
    let json = header_json(path, file)?;
    let data_start = 8 + json.len();
    let raw: RawHeader =
        serde_json::from_slice(json).map_err(|source| FormatError::HeaderJson {
            path: path.to_owned(),
            source,
        })?;
    let data_bytes = file.len() - data_start;
    let mut tensors = Vec::with_capacity(raw.tensors.len());
    for (name, tensor) in raw.tensors {
        tensors.push(check_tensor(path, name, tensor, data_bytes)?);
    }
    check_names(path, &tensors)?;
    tensors.sort_by_key(|tensor| (tensor.range.start, tensor.range.end));
    check_cover(path, &tensors, data_bytes)?;
    for tensor in &mut tensors {
        tensor.range.start += data_start;
        tensor.range.end += data_start;
    }
    Ok(Header {
        metadata: raw.metadata,
        tensors,
        data_start,
    })
}

/// The header's JSON text, after checking the length field against the file.
fn header_json<'a>(path: &Path, file: &'a [u8]) -> Result<&'a [u8], FormatError> {
    if let Some(foreign) = Foreign::detect(path, file) {
        return Err(FormatError::Foreign {
            path: path.to_owned(),
            foreign,
        });
    }
    let Some((&length, rest)) = file.split_first_chunk::<8>() else {
        return Err(FormatError::TooShort {
            path: path.to_owned(),
            got: file.len(),
        });
    };
    let got = u64::from_le_bytes(length);
    if got > rest.len() as u64 {
        return Err(FormatError::HeaderBeyondFile {
            path: path.to_owned(),
            got,
            available: rest.len(),
        });
    }
    if got > MAX_HEADER_BYTES {
        return Err(FormatError::HeaderTooLong {
            path: path.to_owned(),
            got,
            limit: MAX_HEADER_BYTES,
        });
    }
    Ok(&rest[..got as usize])
}

fn check_tensor(
    path: &Path,
    name: String,
    raw: RawTensor,
    data_bytes: usize,
) -> Result<HeaderTensor, FormatError> {
    let path = path.to_owned();
    let Some(dtype) = Dtype::from_name(&raw.dtype) else {
        return Err(FormatError::UnknownDtype {
            path,
            tensor: name,
            got: raw.dtype,
        });
    };
    let dims: Result<Vec<usize>, _> = raw.shape.iter().map(|&d| usize::try_from(d)).collect();
    let sized = dims
        .ok()
        .and_then(|shape| Some((dtype.bytes_of(&shape)?, shape)));
    let Some((expected, shape)) = sized else {
        return Err(FormatError::ShapeOverflow {
            path,
            tensor: name,
            dtype,
            shape: raw.shape,
        });
    };
    let (start, end) = raw.data_offsets;
    if start > end || end > data_bytes as u64 {
        return Err(FormatError::OffsetsOutOfRange {
            path,
            tensor: name,
            start,
            end,
            available: data_bytes,
        });
    }
    let range = start as usize..end as usize;
    if range.len() != expected {
        return Err(FormatError::SizeMismatch {
            path,
            tensor: name,
            dtype,
            shape,
            expected,
            got: range.len(),
        });
    }
    Ok(HeaderTensor {
        name,
        dtype,
        shape,
        range,
    })
}

fn check_names(path: &Path, tensors: &[HeaderTensor]) -> Result<(), FormatError> {
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(pair) => Err(FormatError::DuplicateTensor {
            path: path.to_owned(),
            tensor: pair[0].to_owned(),
        }),
    }
}

/// Checks that the tensors, sorted by offset, cover `0..data_bytes` exactly.
fn check_cover(
    path: &Path,
    tensors: &[HeaderTensor],
    data_bytes: usize,
) -> Result<(), FormatError> {
    let mut expected = 0;
    let mut before = "";
    for tensor in tensors {
        let got = tensor.range.start;
        if got < expected {
            return Err(FormatError::Overlap {
                path: path.to_owned(),
                tensor: tensor.name.clone(),
                before: before.to_owned(),
                expected,
                got,
            });
        }
        if got > expected {
            return Err(FormatError::Gap {
                path: path.to_owned(),
                tensor: tensor.name.clone(),
                expected,
                got,
            });
        }
        expected = tensor.range.end;
        before = &tensor.name;
    }
    if expected == data_bytes {
        return Ok(());
    }
    Err(FormatError::TrailingBytes {
        path: path.to_owned(),
        expected,
        got: data_bytes,
    })
}

/// The JSON object as it stands in the file. Tensors are kept as a list, so that a repeated name is seen.
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawTensor)>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

#[derive(serde::Deserialize)]
#[serde(transparent)]
struct Metadata(#[serde(deserialize_with = "unique_map")] BTreeMap<String, String>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RawHeaderVisitor)
    }
}

struct RawHeaderVisitor;

impl<'de> Visitor<'de> for RawHeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object that maps tensor names to type, shape and offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<RawHeader, A::Error> {
        let mut metadata = None;
        let mut tensors = Vec::new();
        while let Some(name) = access.next_key::<String>()? {
            let in_entry = |error| A::Error::custom(format_args!("`{name}`: {error}"));
            if name != "__metadata__" {
                let tensor = access.next_value().map_err(in_entry)?;
                tensors.push((name, tensor));
            } else {
                let Metadata(map) = access.next_value().map_err(in_entry)?;
                if metadata.replace(map).is_some() {
                    return Err(A::Error::custom("`__metadata__` stands there twice"));
                }
            }
        }
        Ok(RawHeader {
            metadata: metadata.unwrap_or_default(),
            tensors,
        })
    }
}

/// One tensor to be written: `bytes` bytes from `start` of the data.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) start: u64,
    pub(crate) bytes: u64,
}

/// The header's JSON text: metadata first, then the tensors in the order given.
pub(crate) fn to_json(metadata: &BTreeMap<String, String>, parts: &[Part]) -> String {
    let mut entries = Vec::with_capacity(parts.len() + 1);
    if !metadata.is_empty() {
        let metadata = serde_json::to_string(metadata).expect("a map of strings is plain data");
        entries.push(format!("\"__metadata__\":{metadata}"));
    }
    for part in parts {
        let name = serde_json::to_string(&part.name).expect("a string is plain data");
        let shape = serde_json::to_string(&part.shape).expect("integers are plain data");
        let (dtype, end) = (part.dtype, part.start + part.bytes);
        entries.push(format!(
            "{name}:{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{},{end}]}}",
            part.start
        ));
    }
    format!("{{{}}}", entries.join(","))
}

/// Length field, text, and spaces up to `header_bytes` in all.
///
/// # Panics
/// If the text does not fit.
pub(crate) fn to_bytes(json: &str, header_bytes: u64) -> Vec<u8> {
    let needed = 8 + json.len() as u64;
    assert!(
        needed <= header_bytes,
        "header of {needed} bytes, {header_bytes} reserved"
    );
    let mut bytes = (header_bytes - 8).to_le_bytes().to_vec();
    bytes.extend(json.as_bytes());
    bytes.resize(header_bytes as usize, b' ');
    bytes
}
