//! What several tests of this crate need.

use std::collections::BTreeMap;
use std::path::Path;

use half::f16;
use qbin_format::{
    ArtifactWriter, Dtype, Fate, FormatError, Manifest, Planned, QuantizedMatrix,
    SafetensorsWriter, Scheme, TensorEntry, TensorReport, Written,
};

/// A small deterministic generator (SplitMix64), so that a test says its seed.
pub(crate) struct Seeded(u64);

impl Seeded {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

pub(crate) fn scheme(bits: u8, group_size: Option<usize>, symmetric: bool) -> Scheme {
    Scheme {
        bits,
        group_size,
        symmetric,
    }
}

/// A matrix with random codes, scales and zero points over their whole range.
pub(crate) fn random_matrix(
    scheme: Scheme,
    rows: usize,
    cols: usize,
    seed: u64,
) -> QuantizedMatrix {
    let mut seeded = Seeded(seed);
    let max = 1u64 << scheme.bits;
    let groups = rows * scheme.groups(cols);
    let mut code = || seeded.below(max) as u8;
    let codes = (0..rows * cols).map(|_| code()).collect();
    let zero_points = (0..groups).map(|_| code()).collect::<Vec<u8>>();
    let scale = |_| f16::from_f32(0.001 + seeded.below(1000) as f32 / 997.0);
    QuantizedMatrix {
        scheme,
        rows,
        cols,
        codes,
        scales: (0..groups).map(scale).collect(),
        zero_points: if scheme.symmetric {
            Vec::new()
        } else {
            zero_points
        },
    }
}

pub(crate) fn kept(dtype: Dtype, shape: &[usize]) -> TensorEntry {
    entry(
        Fate::Kept {
            dtype,
            reason: "norm".to_owned(),
        },
        shape,
    )
}

pub(crate) fn entry(fate: Fate, shape: &[usize]) -> TensorEntry {
    TensorEntry {
        fate,
        shape: shape.to_vec(),
        sha256: String::new(),
        report: TensorReport::default(),
    }
}

/// Everything that goes into a small artifact with one of each kind.
pub(crate) struct Small {
    pub(crate) matrices: Vec<(&'static str, QuantizedMatrix)>,
    pub(crate) dense: Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)>,
    pub(crate) files: Vec<(&'static str, Vec<u8>)>,
    pub(crate) manifest: Manifest,
}

pub(crate) fn small() -> Small {
    let matrices = vec![
        (
            "a.weight",
            random_matrix(scheme(4, Some(32), false), 31, 70, 1),
        ),
        ("b.weight", random_matrix(scheme(8, None, true), 16, 64, 2)),
    ];
    let dense = vec![
        ("norm.weight", Dtype::Bf16, vec![5], (0..10).collect()),
        ("ids", Dtype::I64, vec![2, 1], (0..16).collect()),
    ];
    let files = vec![("tokenizer.json", b"{\"a\": 1}".to_vec())];
    let mut manifest = Manifest {
        tool_version: "0.0.0".to_owned(),
        config: serde_json::json!({"model_type": "llama", "hidden_size": 64}),
        recipe: serde_json::json!({"method": "rtn"}),
        seed: 7,
        ..Manifest::default()
    };
    for (name, matrix) in &matrices {
        let fate = Fate::quantized(matrix.scheme, "rtn");
        manifest
            .tensors
            .insert((*name).to_owned(), entry(fate, &[matrix.rows, matrix.cols]));
    }
    for (name, dtype, shape, _) in &dense {
        manifest
            .tensors
            .insert((*name).to_owned(), kept(*dtype, shape));
    }
    let alias = Fate::Alias {
        of: "a.weight".to_owned(),
        reason: "tied".to_owned(),
    };
    let dropped = Fate::Dropped {
        reason: "recomputed".to_owned(),
    };
    manifest
        .tensors
        .insert("tied.weight".to_owned(), entry(alias, &[31, 70]));
    manifest
        .tensors
        .insert("inv_freq".to_owned(), entry(dropped, &[8]));
    Small {
        matrices,
        dense,
        files,
        manifest,
    }
}

/// The same with two sparse matrices: `c.weight` is stored as a bitmask and `d.weight` as two of four.
pub(crate) fn small_and_sparse() -> Small {
    let mut small = small();
    let mut c = random_matrix(scheme(4, Some(64), true), 32, 128, 3);
    let mut d = random_matrix(scheme(8, Some(32), false), 16, 192, 4);
    for (at, code) in c.codes.iter_mut().enumerate() {
        if at / 3 % 3 > 0 {
            *code = 8;
        }
    }
    for (at, code) in d.codes.iter_mut().enumerate() {
        if at / 2 % 2 == at / 64 % 2 {
            *code = d.zero_points[at / 32];
        }
    }
    for (name, matrix) in [("c.weight", c), ("d.weight", d)] {
        let fate = Fate::quantized(matrix.scheme, "sparsegpt");
        let entry = entry(fate, &[matrix.rows, matrix.cols]);
        small.manifest.tensors.insert(name.to_owned(), entry);
        small.matrices.push((name, matrix));
    }
    small
}

impl Small {
    pub(crate) fn planned(&self) -> Vec<Planned> {
        let matrices = self.matrices.iter().map(|(name, m)| Planned::Quantized {
            name: (*name).to_owned(),
            scheme: m.scheme,
            rows: m.rows,
            cols: m.cols,
        });
        let dense = self
            .dense
            .iter()
            .map(|(name, dtype, shape, _)| Planned::Dense {
                name: (*name).to_owned(),
                dtype: *dtype,
                shape: shape.clone(),
            });
        let files = self.files.iter().map(|(name, bytes)| Planned::File {
            name: (*name).to_owned(),
            bytes: bytes.len(),
        });
        matrices.chain(dense).chain(files).collect()
    }

    pub(crate) fn writer(&self, path: &Path, manifest_bytes: usize) -> ArtifactWriter {
        ArtifactWriter::create(path, self.planned(), manifest_bytes).expect("create")
    }

    /// Writes all entries in their order.
    pub(crate) fn fill(&self, writer: &mut ArtifactWriter) -> Result<(), FormatError> {
        for (name, matrix) in &self.matrices {
            writer.write_quantized(name, matrix)?;
        }
        for (name, dtype, shape, bytes) in &self.dense {
            writer.write_dense(name, *dtype, shape, bytes)?;
        }
        for (name, bytes) in &self.files {
            writer.write_file(name, bytes)?;
        }
        Ok(())
    }

    pub(crate) fn write(&self, path: &Path) -> Result<Written, FormatError> {
        let mut writer = self.writer(path, self.manifest.planned_bytes());
        self.fill(&mut writer)?;
        writer.finish(self.manifest.clone())
    }
}

/// A tensor as these tests write it: name, type, shape, bytes.
pub(crate) type Dense = (&'static str, Dtype, Vec<usize>, Vec<u8>);

pub(crate) fn write_safetensors(path: &Path, tensors: &[Dense]) {
    let entries = tensors
        .iter()
        .map(|(name, dtype, shape, _)| ((*name).to_owned(), *dtype, shape.clone()));
    let mut writer =
        SafetensorsWriter::create(path, entries.collect(), BTreeMap::new()).expect("create");
    for (name, _, _, bytes) in tensors {
        writer.write(name, bytes).expect("write");
    }
    writer.finish().expect("finish");
}

/// A safetensors file out of a header's text and some data.
pub(crate) fn raw_file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

/// The whole text of an error: the message, its sources, the hint.
pub(crate) fn text_of(error: &FormatError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text + "; " + &error.hint().unwrap_or_default()
}

/// Checks that an error's text has every one of these words.
#[track_caller]
pub(crate) fn check_words(error: &FormatError, words: &[&str]) {
    let text = text_of(error);
    for word in words {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
}

/// Names of the files in a folder, sorted.
pub(crate) fn list(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("list");
    let mut names: Vec<String> = entries
        .map(|entry| {
            entry
                .expect("entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();
    names
}
