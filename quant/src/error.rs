//! What can be wrong with the values given to this crate.

/// An input this crate refuses.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantError {
    /// A code width that no grid has.
    #[error("`bits` is `{bits}`, expected `3`, `4` or `8`")]
    Bits {
        /// The width asked for.
        bits: u8,
    },
    /// A group that is empty or wider than the row.
    #[error("`group_size` is `{group_size}`, expected `1` to `in_features` = `{cols}`")]
    GroupSize {
        /// The group size asked for.
        group_size: usize,
        /// Columns of the matrix.
        cols: usize,
    },
    /// A damping that is negative or not a number.
    #[error("`damp_fraction` is `{damp_fraction}`, expected a finite number of at least `0`")]
    DampFraction {
        /// The fraction asked for.
        damp_fraction: f64,
    },
    /// A group size that is none of those offered.
    #[error("`group_size` is `{got}`, expected `32`, `64`, `128` or `channel`")]
    UnknownGroupSize {
        /// What was given.
        got: String,
    },
    /// A pattern that is no glob.
    #[error("`{pattern}` is not a glob pattern")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What is wrong with it.
        source: globset::Error,
    },
    /// A pattern that fits no linear.
    #[error("`{pattern}` matches no linear of the model")]
    PatternMatchesNothing {
        /// The pattern.
        pattern: String,
    },
    /// A channel scale changed what the model computes, although it should cancel out.
    #[error(
        "block {block}, {sublayer}: folding channel scales changed the output by up to {difference:e}, expected at most {tolerance:e}"
    )]
    FoldNotIdentity {
        /// The decoder block.
        block: usize,
        /// Its sublayer.
        sublayer: String,
        /// The largest change.
        difference: f32,
        /// What rounding explains.
        tolerance: f32,
    },
    /// An update block without columns.
    #[error("`update_block` is `0`, expected at least `1`")]
    UpdateBlock,
    /// NaN or infinity among the weights.
    #[error("the weight in row `{row}`, column `{col}` is `{value}`, expected a finite number")]
    NonFiniteWeight {
        /// Output feature.
        row: usize,
        /// Input feature.
        col: usize,
        /// The offending weight.
        value: f32,
    },
    /// NaN, infinity, or something whose square is not safe among the calibration inputs.
    #[error(
        "input `{col}` of calibration token `{token}` is `{value}`, expected at most `1e16` in magnitude"
    )]
    NonFiniteInput {
        /// Token, counted from the first one these moments saw.
        token: u64,
        /// Input feature.
        col: usize,
        /// The offending activation.
        value: f32,
    },
    /// One of the above, with the tensor it was found in.
    #[error("tensor `{tensor}`: {error}")]
    InTensor {
        /// Name in the checkpoint.
        tensor: String,
        /// What is wrong with it.
        error: Box<QuantError>,
    },
}

impl QuantError {
    /// The same error with the name of the tensor in front.
    pub fn in_tensor(self, tensor: impl Into<String>) -> Self {
        Self::InTensor {
            tensor: tensor.into(),
            error: Box::new(self),
        }
    }

    /// What the user can do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::GroupSize { .. } => {
                Some("choose a smaller group, or one scale per channel".into())
            }
            Self::NonFiniteWeight { .. } => {
                Some("the checkpoint is damaged or was saved after a diverged run".into())
            }
            Self::NonFiniteInput { .. } => Some(
                "the model overflows on this text: check the checkpoint's weights and its config"
                    .into(),
            ),
            Self::InTensor { error, .. } => error.hint(),
            Self::PatternMatchesNothing { .. } => Some("`qbin plan` lists the names".into()),
            _ => None,
        }
    }
}
