//! How many zeros, and in which pattern.

use crate::PruneError;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// How many weights become zero.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sparsity {
    /// This share of a matrix, anywhere.
    Share(f64),
    /// `zeros` in every `of` consecutive columns of a row.
    Pattern {
        /// Zeros in each run.
        zeros: usize,
        /// Length of a run.
        of: usize,
    },
}

impl Sparsity {
    /// How many of `len` weights become zero: a share of them rounded to the nearest number; of a run, the
    /// pattern's zeros, and of a run that the end of the row cuts short its part of them, rounded down.
    pub fn zeros_in(self, len: usize) -> usize {
        match self {
            Self::Share(share) => (share * len as f64).round() as usize,
            Self::Pattern { zeros, of } => zeros * len.min(of) / of,
        }
    }

    /// The length of the pattern's runs.
    pub fn run(self) -> Option<usize> {
        match self {
            Self::Share(_) => None,
            Self::Pattern { of, .. } => Some(of),
        }
    }
}

impl FromStr for Sparsity {
    type Err = PruneError;

    fn from_str(text: &str) -> Result<Self, PruneError> {
        let wrong = || PruneError::Sparsity { got: text.into() };
        let parsed = match text.split_once(':') {
            Some((zeros, of)) => Self::Pattern {
                zeros: zeros.parse().map_err(|_| wrong())?,
                of: of.parse().map_err(|_| wrong())?,
            },
            None => Self::Share(text.parse().map_err(|_| wrong())?),
        };
        let fits = match parsed {
            Self::Share(share) => (0.0..1.0).contains(&share),
            Self::Pattern { zeros, of } => 0 < zeros && zeros < of,
        };
        if fits { Ok(parsed) } else { Err(wrong()) }
    }
}

impl fmt::Display for Sparsity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Share(share) => write!(f, "{share}"),
            Self::Pattern { zeros, of } => write!(f, "{zeros}:{of}"),
        }
    }
}

impl Serialize for Sparsity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Share(share) => serializer.serialize_f64(*share),
            Self::Pattern { .. } => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for Sparsity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(f64),
            Text(String),
        }
        let text = match Written::deserialize(deserializer)? {
            Written::Number(number) => number.to_string(),
            Written::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_read_and_written() {
        for text in ["0.5", "2:4", "0", "7:8"] {
            assert_eq!(text.parse::<Sparsity>().expect("valid").to_string(), text);
        }
        for bad in ["1", "-0.1", "4:4", "0:4", "half", "2:", "nan"] {
            assert!(bad.parse::<Sparsity>().is_err(), "{bad}");
        }
    }
}
