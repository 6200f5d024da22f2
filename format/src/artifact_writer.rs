//! Writing an artifact, tensor by tensor, in whatever order they are finished.

use std::collections::BTreeMap;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::digest::{combine, hex};
use crate::header;
use crate::layout::{
    DATA_ALIGN, Layout, MANIFEST_DIGEST_KEY, MANIFEST_KEY, StoredCodes, TENSOR_ALIGN, lay_out,
};
use crate::mmap::Mapping;
use crate::output::Output;
use crate::pack::{PackedMatrix, TILE_COLS, TILE_ROWS, check_matrix, tile_bytes};
use crate::sparse::{Census, Encoder};
use crate::{
    Artifact, Dtype, Encoding, FORMAT_VERSION, Fate, FileEntry, FormatError, LayoutEntry, Manifest,
    Planned, QuantizedMatrix, QuantizedView, Scheme, Sparsity, sha256_hex,
};

/// Codes packed at a time, in weights.
const PACK_CHUNK: usize = 1 << 20;

/// Writes an artifact into `<path>.partial`, which [`ArtifactWriter::finish`] gives its name.
///
/// Each entry has its place from the start, so that the bytes do not depend on the order of writing. A quantized
/// matrix is written densely; when its last row is there and a sparse encoding is smaller, it is encoded in its
/// place, and [`ArtifactWriter::finish`] closes the gaps. A writer that is dropped removes its file.
#[derive(Debug)]
pub struct ArtifactWriter {
    output: Output,
    layout: Layout,
    planned: Vec<Planned>,
    /// Positions in `planned`, files and tensors apart: a tensor may be named like a file.
    tensors: BTreeMap<String, usize>,
    files: BTreeMap<String, usize>,
    progress: Vec<Vec<PartProgress>>,
    /// Of each entry, what its quantized matrix has shown so far.
    census: Vec<Census>,
    /// Of each entry, how its codes are stored.
    stored: Vec<StoredCodes>,
}

/// How far one stored part is written.
#[derive(Clone, Debug)]
struct PartProgress {
    /// Its place, from the start of the data.
    start: u64,
    done: u64,
    hasher: Sha256,
}

impl PartProgress {
    fn at(start: u64) -> Self {
        Self {
            start,
            done: 0,
            hasher: Sha256::new(),
        }
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Length of the file.
    pub bytes: u64,
    /// SHA-256 of the file, as `sha256sum` prints it.
    pub sha256: String,
    /// What each planned entry takes, in their order.
    pub entries: Vec<LayoutEntry>,
}

impl ArtifactWriter {
    /// Creates the temporary file and reserves its whole space.
    ///
    /// `manifest_bytes` is an upper bound of the manifest's text, see [`Manifest::planned_bytes`]. It
    /// decides where the data starts and must not depend on anything but the inputs. A manifest that
    /// turns out longer costs one move of the data.
    ///
    /// # Errors
    /// If the plan cannot be laid out, the file cannot be created, another run is writing it, or the space
    /// is not there.
    pub fn create(
        path: &Path,
        planned: Vec<Planned>,
        manifest_bytes: usize,
    ) -> Result<Self, FormatError> {
        let stored = vec![StoredCodes::DENSE; planned.len()];
        let layout = lay_out(&planned, &stored, manifest_bytes)?;
        let output = Output::create(path, layout.total_bytes)?;
        let (mut tensors, mut files) = (BTreeMap::new(), BTreeMap::new());
        for (at, entry) in planned.iter().enumerate() {
            let map = match entry {
                Planned::File { .. } => &mut files,
                _ => &mut tensors,
            };
            map.insert(entry.name().to_owned(), at);
        }
        let entries = layout.entries.iter().map(|entry| {
            let parts = entry.parts.iter();
            let parts = parts.map(|&part| PartProgress::at(layout.parts[part].start));
            parts.collect()
        });
        Ok(Self {
            progress: entries.collect(),
            census: vec![Census::none(); planned.len()],
            stored,
            output,
            layout,
            planned,
            tensors,
            files,
        })
    }

    /// Packs and writes a whole matrix.
    ///
    /// # Errors
    /// If a scale is not finite, or writing fails.
    ///
    /// # Panics
    /// If the matrix is not the planned one, contradicts itself, or was written before.
    #[track_caller]
    pub fn write_quantized(
        &mut self,
        name: &str,
        matrix: &QuantizedMatrix,
    ) -> Result<(), FormatError> {
        self.write_quantized_rows(name, 0, matrix)
    }

    /// Packs and writes some rows of a matrix; the pieces of one matrix come in order.
    ///
    /// `first_row` is a multiple of 16 and the end of the previous piece, and only the last piece may have
    /// a number of rows that is no multiple of 16. `part` has the matrix's scheme and columns.
    ///
    /// # Errors
    /// If a scale is not finite, or writing fails.
    ///
    /// # Panics
    /// If the piece does not fit the plan or what is written already, or contradicts itself.
    #[track_caller]
    pub fn write_quantized_rows(
        &mut self,
        name: &str,
        first_row: usize,
        part: &QuantizedMatrix,
    ) -> Result<(), FormatError> {
        let at = *self
            .tensors
            .get(name)
            .unwrap_or_else(|| panic!("tensor `{name}` is not planned"));
        let Planned::Quantized {
            scheme, rows, cols, ..
        } = self.planned[at]
        else {
            panic!("tensor `{name}` is planned as dense");
        };
        check_matrix(part);
        assert_eq!(
            (part.scheme, part.cols),
            (scheme, cols),
            "tensor `{name}`: scheme, columns"
        );
        let end = first_row + part.rows;
        let whole = end.is_multiple_of(TILE_ROWS) || end == rows;
        assert!(
            first_row.is_multiple_of(TILE_ROWS) && end <= rows && whole,
            "tensor `{name}`: rows {first_row}..{end} of {rows}"
        );
        assert_eq!(
            self.stored[at].encoding,
            Encoding::Dense,
            "tensor `{name}` written twice"
        );
        let row_scales = 2 * scheme.groups(cols) as u64;
        let written = self.progress[at][1].done / row_scales;
        assert_eq!(
            written, first_row as u64,
            "tensor `{name}`: rows come in order"
        );
        check_scales(name, first_row, part)?;

        let panels = part.rows.div_ceil(TILE_ROWS);
        let step = (PACK_CHUNK / (TILE_ROWS * cols)).max(1);
        for start in (0..panels).step_by(step) {
            let packed = PackedMatrix::pack_panels(part, start..panels.min(start + step));
            let view = packed.view();
            for panel in 0..view.rows.div_ceil(TILE_ROWS) {
                self.census[at].add(Census::of_panel(&view, panel));
            }
            let pieces = [view.codes, view.scales, view.zero_points];
            for (piece, bytes) in pieces.into_iter().enumerate().take(self.progress[at].len()) {
                self.append(at, piece, bytes)?;
            }
        }
        if end == rows {
            let encoding = self.census[at].smallest(scheme.bits);
            if encoding != Encoding::Dense {
                self.encode(at, scheme, cols, encoding)?;
            }
        }
        Ok(())
    }

    /// Encodes a matrix that was written densely, in the place of its dense codes: each panel takes at most as many bytes
    /// as its tiles, and masks and offsets find room behind them because the encoding is smaller.
    fn encode(
        &mut self,
        at: usize,
        scheme: Scheme,
        cols: usize,
        encoding: Encoding,
    ) -> Result<(), FormatError> {
        let dense = self.progress[at].clone();
        let tiles = cols.div_ceil(TILE_COLS) * tile_bytes(scheme.bits);
        let panels = dense[0].done as usize / tiles;
        let zero_points = match scheme.symmetric {
            true => 0,
            false => scheme.groups(cols) * TILE_ROWS,
        };
        let (mut tiles, mut zero_points) = (vec![0; tiles], vec![0; zero_points]);
        let mut encoder = Encoder::new(encoding);
        self.progress[at][0] = PartProgress::at(dense[0].start);
        for panel in 0..panels {
            let read = |part: &PartProgress, buffer: &mut [u8]| {
                let start = part.start + (panel * buffer.len()) as u64;
                self.output
                    .read_at(self.layout.header_bytes + start, buffer)
            };
            read(&dense[0], &mut tiles)?;
            if let Some(part) = dense.get(2) {
                read(part, &mut zero_points)?;
            }
            let view = QuantizedView {
                scheme,
                rows: TILE_ROWS,
                cols,
                codes: &tiles,
                sparsity: Sparsity::Dense,
                scales: &[],
                zero_points: &zero_points,
            };
            let codes = encoder.panel(&view, 0);
            let codes = codes.expect("the census saw that it can be stored so");
            self.append(at, 0, &codes)?;
        }
        self.append(at, 0, &vec![0; encoder.tail(scheme.bits)])?;
        self.stored[at] = StoredCodes {
            encoding,
            bytes: self.progress[at][0].done as usize,
        };
        let more = [encoder.masks.as_slice(), &encoder.offset_bytes()];
        for (n, bytes) in more
            .into_iter()
            .filter(|bytes| !bytes.is_empty())
            .enumerate()
        {
            let before = &self.progress[at][n];
            let start = (before.start + before.done).next_multiple_of(TENSOR_ALIGN);
            assert!(
                start + bytes.len() as u64 <= dense[1].start,
                "the smaller encoding finds room"
            );
            self.progress[at].insert(n + 1, PartProgress::at(start));
            self.append(at, n + 1, bytes)?;
        }
        Ok(())
    }

    /// Writes a tensor as it is.
    ///
    /// # Errors
    /// If writing fails.
    ///
    /// # Panics
    /// If the tensor is not the planned one, or was written before.
    #[track_caller]
    pub fn write_dense(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<(), FormatError> {
        let at = *self
            .tensors
            .get(name)
            .unwrap_or_else(|| panic!("tensor `{name}` is not planned"));
        let given = Planned::Dense {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
        };
        assert_eq!(given, self.planned[at], "tensor `{name}`");
        self.write_whole(at, bytes)
    }

    /// Writes a file that travels inside the artifact.
    ///
    /// # Errors
    /// If writing fails.
    ///
    /// # Panics
    /// If the file is not planned with this length, or was written before.
    #[track_caller]
    pub fn write_file(&mut self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        let at = *self
            .files
            .get(name)
            .unwrap_or_else(|| panic!("file `{name}` is not planned"));
        self.write_whole(at, bytes)
    }

    #[track_caller]
    fn write_whole(&mut self, at: usize, bytes: &[u8]) -> Result<(), FormatError> {
        let entry = &self.layout.entries[at];
        assert_eq!(bytes.len() as u64, entry.bytes, "bytes of `{}`", entry.name);
        assert_eq!(
            self.progress[at][0].done, 0,
            "`{}` written twice",
            entry.name
        );
        // In pieces, so that a tensor from a map is not hashed through and then read again.
        for chunk in bytes.chunks(1 << 20) {
            self.append(at, 0, chunk)?;
        }
        Ok(())
    }

    fn append(&mut self, entry: usize, piece: usize, bytes: &[u8]) -> Result<(), FormatError> {
        let progress = &mut self.progress[entry][piece];
        let at = self.layout.header_bytes + progress.start + progress.done;
        self.output.write_at(at, bytes)?;
        progress.hasher.update(bytes);
        progress.done += bytes.len() as u64;
        Ok(())
    }

    /// Completes the manifest with digests, writes the header, reads everything back, and only then gives the
    /// file its name.
    ///
    /// The writer fills in `format_version`, `files`, and `sha256` of every stored tensor.
    ///
    /// # Errors
    /// If writing fails, or what was read back is not a valid artifact with this manifest.
    ///
    /// # Panics
    /// If something planned was not written, or a stored tensor is not in the manifest.
    #[track_caller]
    pub fn finish(mut self, mut manifest: Manifest) -> Result<Written, FormatError> {
        manifest.format_version = FORMAT_VERSION;
        self.close_gaps()?;
        self.fill_in(&mut manifest);
        self.write_header(&manifest.to_text())?;
        self.output.sync()?;
        let written = self.check()?;
        self.output.commit()?;
        Ok(written)
    }

    /// Lays the file out for what the matrices take, and moves every part to its place, which is never behind
    /// the one that it had.
    fn close_gaps(&mut self) -> Result<(), FormatError> {
        if self.stored.iter().all(|s| s.encoding == Encoding::Dense) {
            return Ok(());
        }
        let header_bytes = self.layout.header_bytes;
        let mut layout = lay_out(&self.planned, &self.stored, 0)?;
        layout.total_bytes = layout.total_bytes - layout.header_bytes + header_bytes;
        layout.header_bytes = header_bytes;
        let mut end = 0;
        for (entry, progress) in layout.entries.iter().zip(&mut self.progress) {
            for (&part, progress) in entry.parts.iter().zip(progress) {
                let part = &layout.parts[part];
                // The zeros between two parts.
                let zeros = [0; TENSOR_ALIGN as usize];
                let zeros = &zeros[..(part.start - end) as usize];
                if progress.start != part.start {
                    let (from, to) = (header_bytes + progress.start, header_bytes + part.start);
                    self.output.move_down(from, to, progress.done)?;
                }
                self.output.write_at(header_bytes + end, zeros)?;
                progress.start = part.start;
                end = part.start + part.bytes;
            }
        }
        let zeros = vec![0; (layout.total_bytes - header_bytes - end) as usize];
        self.output.write_at(header_bytes + end, &zeros)?;
        self.output.set_len(layout.total_bytes)?;
        self.layout = layout;
        Ok(())
    }

    #[track_caller]
    fn fill_in(&self, manifest: &mut Manifest) {
        for (name, &at) in &self.tensors {
            let entry = manifest.tensors.get_mut(name);
            let entry = entry.unwrap_or_else(|| panic!("`{name}` is not in the manifest"));
            entry.sha256 = self.digest(at);
            let stored = self.stored[at].encoding;
            if let Fate::Quantized { encoding, bits, .. } = &mut entry.fate {
                *encoding = stored.name(*bits);
            }
            let features = &mut manifest.required_features;
            if let Some(feature) = stored.feature()
                && !features.iter().any(|given| given == feature)
            {
                features.push(feature.to_owned());
            }
        }
        manifest.required_features.sort();
        manifest.files.clear();
        for (name, &at) in &self.files {
            let entry = FileEntry {
                bytes: self.layout.entries[at].bytes,
                sha256: self.digest(at),
            };
            manifest.files.insert(name.clone(), entry);
        }
    }

    #[track_caller]
    fn digest(&self, at: usize) -> String {
        let entry = &self.layout.entries[at];
        let mut digests = Vec::new();
        for (&part, progress) in entry.parts.iter().zip(&self.progress[at]) {
            let part = &self.layout.parts[part];
            assert_eq!(
                progress.done, part.bytes,
                "`{}` was not written in full",
                part.name
            );
            digests.push(progress.hasher.clone().finalize().into());
        }
        combine(&digests)
    }

    fn write_header(&mut self, manifest: &str) -> Result<(), FormatError> {
        let metadata = BTreeMap::from([
            (MANIFEST_KEY.to_owned(), manifest.to_owned()),
            (
                MANIFEST_DIGEST_KEY.to_owned(),
                sha256_hex(manifest.as_bytes()),
            ),
        ]);
        let json = header::to_json(&metadata, &self.layout.parts);
        let needed = (8 + json.len() as u64).next_multiple_of(DATA_ALIGN);
        if let Some(more) = needed.checked_sub(self.layout.header_bytes)
            && more > 0
        {
            let data = self.layout.total_bytes - self.layout.header_bytes;
            self.output.shift(self.layout.header_bytes, data, more)?;
            self.layout.header_bytes += more;
            self.layout.total_bytes += more;
        }
        let bytes = header::to_bytes(&json, self.layout.header_bytes);
        self.output.write_at(0, &bytes)
    }

    /// Reads the file back from the disk and verifies it.
    fn check(&self) -> Result<Written, FormatError> {
        let path = self.output.temporary();
        let mapping = Mapping::new(self.output.file()).map_err(FormatError::io("map", path))?;
        let header = header::parse(path, mapping.bytes())?;
        let artifact = Artifact::from_file(path, mapping, header)?;
        artifact.verify(&mut |_| ())?;
        Ok(Written {
            bytes: artifact.file_bytes(),
            sha256: hex(&artifact.file_digest()),
            entries: self.layout.entries.clone(),
        })
    }
}

fn check_scales(name: &str, first_row: usize, part: &QuantizedMatrix) -> Result<(), FormatError> {
    let groups = part.scheme.groups(part.cols);
    match part.scales.iter().position(|scale| !scale.is_finite()) {
        None => Ok(()),
        Some(at) => Err(FormatError::ScaleNotFinite {
            tensor: name.to_owned(),
            row: first_row + at / groups,
            group: at % groups,
            got: part.scales[at].to_f32(),
        }),
    }
}
