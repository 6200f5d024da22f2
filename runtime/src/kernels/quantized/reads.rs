//! What helps a core to read weights as fast as memory answers.

use super::vectors::Vectors;

/// How a core is helped to read the weights. It changes no result.
#[derive(Clone, Copy)]
pub(super) struct Reads {
    /// Panels side by side, as far from each other as can be: 1, 2 or 4.
    pub(super) streams: usize,
    /// How many bytes before they are due codes are fetched; 0 is not.
    pub(super) ahead: usize,
    /// The same once more, nearer; 0 is not. Such a line was asked for before, and still one token was read for a twentieth faster
    /// on the Xeon where it was tried. Why is not known.
    pub(super) again: usize,
    /// How many groups before they are due scales and zero points are fetched; 0 is not. They are slow streams of their own.
    pub(super) groups: usize,
}

impl Reads {
    /// The core's own prefetching is best left alone.
    pub(super) const ALONE: Self = Self {
        streams: 1,
        ahead: 0,
        again: 0,
        groups: 0,
    };
    /// One stream, fetched ahead.
    pub(super) const AHEAD: Self = Self {
        ahead: 2048,
        ..Self::ALONE
    };
    /// Four streams.
    pub(super) const SIDE_BY_SIDE: Self = Self {
        streams: 4,
        ahead: 512,
        ..Self::ALONE
    };
    /// What is best on Intel's CPUs with any instructions: their own prefetching begins too late, and again at each page.
    pub(super) const INTEL: Self = Self {
        streams: 2,
        ahead: 3328,
        again: 3072,
        groups: 32,
    };

    /// What is best on other CPUs where each vector of codes has so many products.
    pub(super) const fn of<V: Vectors>(products: usize) -> Self {
        V::READS[(products > V::READS_BUSY) as usize]
    }
}
