//! Checking every byte of an artifact.

use sha2::{Digest, Sha256};

use crate::artifact::{Artifact, Stored};
use crate::digest::{combine, hex};
use crate::pack::TILE_ROWS;
use crate::{FormatError, QuantizedView};

impl Artifact {
    /// Reads the whole file: digests of all tensors and files, finite scales, codes and zero points that
    /// use no more than their bits, and padding with the values that the format gives it.
    ///
    /// `progress` is called with the number of bytes just checked.
    ///
    /// # Errors
    /// What does not agree, with its name, expected and got.
    pub fn verify(&self, progress: &mut dyn FnMut(u64)) -> Result<(), FormatError> {
        for (name, stored) in &self.tensors {
            let ranges = stored.ranges();
            let digests: Vec<[u8; 32]> = ranges
                .iter()
                .map(|range| Sha256::digest(self.bytes(range)).into())
                .collect();
            let expected = &self.manifest().tensors[name].sha256;
            self.compare(name, expected, combine(&digests))?;
            if let (Stored::Quantized { .. }, Some(view)) = (stored, self.quantized(name)) {
                self.check_quantized(name, &view)?;
            }
            self.release(name);
            progress(ranges.iter().map(|range| range.len() as u64).sum());
        }
        for (name, range) in &self.files {
            let expected = &self.manifest().files[name].sha256;
            self.compare(name, expected, hex(&Sha256::digest(self.bytes(range))))?;
            progress(range.len() as u64);
        }
        for pad in &self.pads {
            let bytes = self.bytes(&pad.range);
            if let Some(at) = bytes.iter().position(|&byte| byte != 0) {
                return Err(self.padding(&pad.name, at, 0, bytes[at].into()));
            }
        }
        Ok(())
    }

    fn compare(&self, part: &str, expected: &str, got: String) -> Result<(), FormatError> {
        if got == expected {
            return Ok(());
        }
        Err(FormatError::Digest {
            path: self.path.clone(),
            part: part.to_owned(),
            expected: expected.to_owned(),
            got,
        })
    }

    fn padding(&self, part: &str, at: usize, expected: u16, got: u16) -> FormatError {
        FormatError::Padding {
            path: self.path.clone(),
            part: part.to_owned(),
            at,
            expected,
            got,
        }
    }

    /// What a digest cannot say: that the writer kept the rules. A kernel relies on them, because it
    /// computes with the padding as with everything else.
    fn check_quantized(&self, name: &str, view: &QuantizedView<'_>) -> Result<(), FormatError> {
        let mut codes = view.code_buffer();
        let padded_cols = codes.as_flattened().len();
        for row in 0..view.rows.next_multiple_of(TILE_ROWS) {
            self.check_groups(name, view, row)?;
            let mid = view.scheme.mid();
            let last_group = view.scheme.groups(view.cols) - 1;
            let (first, expected) = match row < view.rows {
                true => (view.cols, view.zero_point(row, last_group)),
                false => (0, mid),
            };
            if first == padded_cols {
                continue;
            }
            view.read_codes(row, &mut codes);
            let fill = &codes.as_flattened()[first..];
            if let Some(at) = fill.iter().position(|&code| code != expected) {
                let part = format!("{name}.codes, row {row}");
                return Err(self.padding(&part, first + at, expected.into(), fill[at].into()));
            }
        }
        Ok(())
    }

    /// The scales and zero points of one row, which may be a padding row.
    fn check_groups(
        &self,
        name: &str,
        view: &QuantizedView<'_>,
        row: usize,
    ) -> Result<(), FormatError> {
        let max = u8::MAX >> (8 - view.scheme.bits);
        for group in 0..view.scheme.groups(view.cols) {
            let (scale, zero_point) = (view.scale(row, group), view.zero_point(row, group));
            if !scale.is_finite() {
                let source = FormatError::ScaleNotFinite {
                    tensor: name.to_owned(),
                    row,
                    group,
                    got: scale.to_f32(),
                };
                return Err(FormatError::InvalidArtifact {
                    path: self.path.clone(),
                    source: Box::new(source),
                });
            }
            let (expected_scale, expected_zero_point) = match row < view.rows {
                true => (scale.to_bits(), zero_point.min(max)),
                false => (0, view.scheme.mid()),
            };
            let at = view.group_at(row, group);
            if zero_point != expected_zero_point {
                let part = format!("{name}.zero_points");
                return Err(self.padding(&part, at, expected_zero_point.into(), zero_point.into()));
            }
            if scale.to_bits() != expected_scale {
                let part = format!("{name}.scales");
                return Err(self.padding(&part, at, expected_scale, scale.to_bits()));
            }
        }
        Ok(())
    }
}
