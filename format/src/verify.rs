//! Checking every byte of an artifact.

use sha2::{Digest, Sha256};

use crate::artifact::{Artifact, Stored};
use crate::digest::{combine, hex};
use crate::pack::TILE_ROWS;
use crate::sparse::panel_is_exact;
use crate::{FormatError, QuantizedView, Sparsity};

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
        let rows = 0..view.rows.next_multiple_of(TILE_ROWS);
        for row in rows.clone() {
            self.check_groups(name, view, row)?;
        }
        self.check_sparse(name, view)?;
        let last_group = view.scheme.groups(view.cols) - 1;
        let mut wrong = Ok(());
        view.for_each_row(rows, |row, codes| {
            let (first, expected) = match row < view.rows {
                true => (view.cols, view.zero_point(row, last_group)),
                false => (0, view.scheme.mid()),
            };
            let fill = &codes[first..];
            let at = fill.iter().position(|&code| code != expected);
            if let (Ok(()), Some(at)) = (&wrong, at) {
                let part = format!("{name}.codes, row {row}");
                wrong = Err(self.padding(&part, first + at, expected.into(), fill[at].into()));
            }
        });
        wrong
    }

    /// The masks and codes of a sparse encoding, and the zeros behind a bitmask's.
    fn check_sparse(&self, name: &str, view: &QuantizedView<'_>) -> Result<(), FormatError> {
        let panels = view.rows.div_ceil(TILE_ROWS);
        if let Some(panel) = (0..panels).find(|&panel| !panel_is_exact(view, panel)) {
            return Err(FormatError::Sparse {
                path: self.path.clone(),
                tensor: name.to_owned(),
                panel,
            });
        }
        if let Sparsity::Bitmask { .. } = view.sparsity {
            let end = view.panel_offset(panels);
            if let Some(at) = view.codes[end..].iter().position(|&byte| byte != 0) {
                let got = view.codes[end + at];
                return Err(self.padding(&format!("{name}.codes"), end + at, 0, got.into()));
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
