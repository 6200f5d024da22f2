//! Writing a plain safetensors file as a stream.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::header::{self, Part};
use crate::output::Output;
use crate::{Dtype, FormatError};

/// Writes a safetensors file tensor after tensor; the file gets its name in [`SafetensorsWriter::finish`].
#[derive(Debug)]
pub struct SafetensorsWriter {
    output: Output,
    data_start: u64,
    parts: Vec<Part>,
    /// The tensor being written, and how many of its bytes are.
    current: usize,
    done: u64,
}

impl SafetensorsWriter {
    /// Creates the temporary file, reserves its space and writes its header.
    ///
    /// `entries` are name, type and shape of every tensor, in the order in which they will be written.
    ///
    /// # Errors
    /// If a name is used twice, a shape is too large, or the file cannot be created.
    pub fn create(
        path: &Path,
        entries: Vec<(String, Dtype, Vec<usize>)>,
        metadata: BTreeMap<String, String>,
    ) -> Result<Self, FormatError> {
        let parts = lay_out(entries)?;
        let json = header::to_json(&metadata, &parts);
        let data_start = (8 + json.len() as u64).next_multiple_of(64);
        let end = parts.last().map_or(0, |part| part.start + part.bytes);
        let output = Output::create(path, data_start + end)?;
        output.write_at(0, &header::to_bytes(&json, data_start))?;
        Ok(Self {
            output,
            data_start,
            parts,
            current: 0,
            done: 0,
        })
    }

    /// Appends bytes to a tensor: the current one, or the next once the current one is full.
    ///
    /// # Errors
    /// If writing fails.
    ///
    /// # Panics
    /// If the tensor is out of turn, or gets more bytes than it has.
    #[track_caller]
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        self.skip_full(name);
        let part = self.parts.get(self.current);
        let part = part.unwrap_or_else(|| panic!("tensor `{name}` after the last one"));
        assert_eq!(part.name, name, "tensors come in order");
        assert!(
            self.done + bytes.len() as u64 <= part.bytes,
            "tensor `{name}` overfull"
        );
        self.output
            .write_at(self.data_start + part.start + self.done, bytes)?;
        self.done += bytes.len() as u64;
        Ok(())
    }

    /// Goes on past tensors that are full, up to the one named.
    fn skip_full(&mut self, name: &str) {
        while let Some(part) = self.parts.get(self.current)
            && part.name != name
            && self.done == part.bytes
        {
            self.current += 1;
            self.done = 0;
        }
    }

    /// Brings the file to the disk and gives it its name.
    ///
    /// # Errors
    /// If that fails; there is no file then.
    ///
    /// # Panics
    /// If a tensor was not written in full.
    #[track_caller]
    pub fn finish(mut self) -> Result<(), FormatError> {
        self.skip_full("");
        let missing = self
            .parts
            .get(self.current)
            .filter(|part| self.done < part.bytes);
        assert!(missing.is_none(), "not written in full: {missing:?}");
        self.output.sync()?;
        self.output.commit()
    }
}

fn lay_out(entries: Vec<(String, Dtype, Vec<usize>)>) -> Result<Vec<Part>, FormatError> {
    let mut names = BTreeSet::new();
    let mut parts = Vec::with_capacity(entries.len());
    let mut start = 0u64;
    for (name, dtype, shape) in entries {
        if name == "__metadata__" {
            return Err(FormatError::ReservedName { name });
        }
        if !names.insert(name.clone()) {
            return Err(FormatError::DuplicateName { name });
        }
        let bytes = dtype.bytes_of(&shape).map(|bytes| bytes as u64);
        let Some(bytes) = bytes.filter(|bytes| *bytes < (1 << 62) && start < (1 << 62)) else {
            return Err(FormatError::TooLarge { name });
        };
        parts.push(Part {
            name,
            dtype,
            shape,
            start,
            bytes,
        });
        start += bytes;
    }
    Ok(parts)
}
