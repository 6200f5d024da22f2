//! Element types of stored tensors.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Element type of a stored tensor, under the name that safetensors gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
#[allow(missing_docs, reason = "each name says its type and width")]
pub enum Dtype {
    Bool,
    U8,
    I8,
    I16,
    U16,
    F16,
    Bf16,
    I32,
    U32,
    F32,
    F64,
    I64,
    U64,
}

impl Dtype {
    /// Every type this crate reads.
    pub const ALL: [Self; 13] = [
        Self::Bool,
        Self::U8,
        Self::I8,
        Self::I16,
        Self::U16,
        Self::F16,
        Self::Bf16,
        Self::I32,
        Self::U32,
        Self::F32,
        Self::F64,
        Self::I64,
        Self::U64,
    ];

    /// The type with this safetensors name, such as `BF16`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// The safetensors name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::I16 => "I16",
            Self::U16 => "U16",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::I32 => "I32",
            Self::U32 => "U32",
            Self::F32 => "F32",
            Self::F64 => "F64",
            Self::I64 => "I64",
            Self::U64 => "U64",
        }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::Bool | Self::U8 | Self::I8 => 1,
            Self::I16 | Self::U16 | Self::F16 | Self::Bf16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::F64 | Self::I64 | Self::U64 => 8,
        }
    }

    /// Whether weights of this type can be read as f32: `F32`, `F16` and `BF16`.
    pub fn is_float_weight(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// Bytes of a tensor of this shape, or `None` where that overflows.
    pub(crate) fn bytes_of(self, shape: &[usize]) -> Option<usize> {
        // Elements before bytes, as the `safetensors` crate has it: `[2^63, 0]` is empty, and not too large.
        let elements = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
        elements.and_then(|elements| elements.checked_mul(self.size()))
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_for_serde_and_headers() {
        for dtype in Dtype::ALL {
            let json = serde_json::to_string(&dtype).expect("plain");
            assert_eq!(json, format!("\"{}\"", dtype.name()));
            assert_eq!(Dtype::from_name(dtype.name()), Some(dtype));
        }
        assert_eq!(Dtype::from_name("bf16"), None);
    }

    #[test]
    fn size_overflow_is_seen() {
        assert_eq!(Dtype::F32.bytes_of(&[3, 5]), Some(60));
        assert_eq!(Dtype::F32.bytes_of(&[]), Some(4));
        assert_eq!(Dtype::F32.bytes_of(&[usize::MAX / 2]), None);
        assert_eq!(Dtype::F32.bytes_of(&[usize::MAX / 2, 0]), Some(0));
    }
}
