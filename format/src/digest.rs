//! SHA-256 of files, tensors and whole checkpoints.

use std::collections::BTreeMap;
use std::fmt::Write;

use sha2::{Digest, Sha256};

use crate::{SourceInfo, TensorView};

/// SHA-256 of `bytes` as 64 lower-case hexadecimal digits.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Lower-case hexadecimal text.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes any text");
        text
    })
}

/// Digest of a tensor that is stored in several parts: of one part its own digest, of more the digest
/// of their digests, so that the parts can be written side by side, piece by piece.
pub(crate) fn combine(parts: &[[u8; 32]]) -> String {
    match parts {
        [part] => hex(part),
        parts => sha256_hex(parts.as_flattened()),
    }
}

/// Digest of a checkpoint's tensors that does not depend on how they are spread over files.
///
/// Each tensor gives `SHA-256(len(name) ‖ name ‖ len(dtype) ‖ dtype ‖ rank ‖ dims ‖ bytes)`, numbers
/// as u64 little endian; the result is the SHA-256 of these digests in the byte order of the names.
#[derive(Debug, Default)]
pub struct SourceHasher {
    tensors: BTreeMap<String, [u8; 32]>,
    bytes: u64,
}

impl SourceHasher {
    /// A hasher that saw no tensor yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in one tensor; the order of calls does not matter.
    ///
    /// # Panics
    /// If a tensor of this name was added before.
    #[track_caller]
    pub fn add(&mut self, tensor: &TensorView<'_>) {
        let mut hasher = Sha256::new();
        let dtype = tensor.dtype.name();
        for text in [tensor.name, dtype] {
            hasher.update((text.len() as u64).to_le_bytes());
            hasher.update(text);
        }
        hasher.update((tensor.shape.len() as u64).to_le_bytes());
        for &dim in tensor.shape {
            hasher.update((dim as u64).to_le_bytes());
        }
        hasher.update(tensor.bytes);
        let before = self
            .tensors
            .insert(tensor.name.to_owned(), hasher.finalize().into());
        assert!(before.is_none(), "tensor `{}` added twice", tensor.name);
        self.bytes += tensor.bytes.len() as u64;
    }

    /// Number of tensors, their bytes, and the digest of them all.
    pub fn finish(self) -> SourceInfo {
        let mut hasher = Sha256::new();
        for digest in self.tensors.values() {
            hasher.update(digest);
        }
        SourceInfo {
            tensors: self.tensors.len(),
            bytes: self.bytes,
            sha256: hex(&hasher.finalize()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    fn digest_of(tensors: &[(&str, Dtype, &[usize], &[u8])]) -> String {
        let mut hasher = SourceHasher::new();
        for &(name, dtype, shape, bytes) in tensors {
            hasher.add(&TensorView {
                name,
                dtype,
                shape,
                bytes,
            });
        }
        hasher.finish().sha256
    }

    #[test]
    fn sha256_of_a_known_text() {
        // FIPS 180-2, appendix B.1.
        assert_eq!(
            sha256_hex(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn source_digest_ignores_order_and_sees_everything_else() {
        let a: (&str, Dtype, &[usize], &[u8]) = ("a", Dtype::U8, &[2], &[1, 2]);
        let b: (&str, Dtype, &[usize], &[u8]) = ("b", Dtype::U8, &[1], &[3]);
        let base = digest_of(&[a, b]);
        assert_eq!(base, digest_of(&[b, a]));
        let variants = [
            digest_of(&[a]),
            digest_of(&[("c", a.1, a.2, a.3), b]),
            digest_of(&[("a", Dtype::I8, a.2, a.3), b]),
            digest_of(&[("a", a.1, &[1, 2], a.3), b]),
            digest_of(&[("a", a.1, a.2, &[1, 3]), b]),
        ];
        for variant in variants {
            assert_ne!(base, variant);
        }
    }
}
