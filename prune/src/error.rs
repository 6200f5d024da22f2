//! What can be wrong with what is asked of this crate.

use crate::Sparsity;

/// An input this crate refuses.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PruneError {
    /// A sparsity that is neither a share nor `N:M`.
    #[error(
        "sparsity is `{got}`, expected a share of zeros from 0 up to, but not including, 1, such as `0.5`, or `N:M` with 0 < N < M, such as `2:4`"
    )]
    Sparsity {
        /// What was given.
        got: String,
    },
    /// Runs of a pattern that do not fit into the groups of a grid.
    #[error(
        "tensor `{tensor}`: sparsity `{sparsity}` in groups of `{group_size}` columns, expected groups of whole runs"
    )]
    RunsAndGroups {
        /// Name in the checkpoint.
        tensor: String,
        /// The pattern.
        sparsity: Sparsity,
        /// Columns that share a scale.
        group_size: usize,
    },
}
