//! What a product reads: a matrix that is packed on the way, or one that was packed before.

use std::ops::Range;

use rayon::prelude::*;

use super::View;
use super::pack::pack;
use super::tile::{COLS, Element, ROWS};
use crate::kernels::isa::Isa;
use crate::kernels::pages;

/// An operand of [`product`](super::product) in the eyes of one side of it: `lines`, the rows of the left one or the columns of
/// the right one, of `terms` each.
pub trait Operand<T, const W: usize>: Copy {
    #[doc(hidden)]
    fn lines(&self) -> usize;

    #[doc(hidden)]
    fn terms(&self) -> usize;

    /// Whether panels are copied into the scratch memory that the caller brings.
    #[doc(hidden)]
    const COPIED: bool;

    /// Copies `W` lines from `first` on, zeros beyond the last, where they are [`Self::COPIED`].
    #[doc(hidden)]
    fn copy(&self, isa: Isa, first: usize, terms: Range<usize>, scratch: &mut [T]);

    /// Those lines, `[term][W]`: what [`Self::copy`] left in `scratch`, or the operand's own.
    #[doc(hidden)]
    fn panel<'a>(&'a self, first: usize, terms: Range<usize>, scratch: &'a [T]) -> &'a [[T; W]];
}

macro_rules! viewed {
    ($width:ident, $lines:ident, $terms:ident, $lengthwise:expr) => {
        impl<T: Element> Operand<T, $width> for View<'_, T> {
            fn lines(&self) -> usize {
                self.$lines()
            }

            fn terms(&self) -> usize {
                self.$terms()
            }

            const COPIED: bool = true;

            fn copy(&self, isa: Isa, first: usize, terms: Range<usize>, scratch: &mut [T]) {
                pack::<T, $width>(isa, $lengthwise(*self), first, terms, scratch);
            }

            fn panel<'a>(
                &'a self,
                _: usize,
                _: Range<usize>,
                scratch: &'a [T],
            ) -> &'a [[T; $width]] {
                scratch.as_chunks().0
            }
        }
    };
}

viewed!(ROWS, rows, cols, std::convert::identity);
viewed!(COLS, cols, rows, View::transpose);

/// A matrix in the order in which tiles read it: `[panel][term][W]`, zeros beyond its last line. Worth its copy where it
/// takes part in many products.
#[derive(Clone, Debug)]
pub struct Packed<T, const W: usize> {
    lines: usize,
    terms: usize,
    values: Vec<T>,
}

/// A left operand, its rows packed.
pub type Left<T> = Packed<T, ROWS>;
/// A right operand, its columns packed.
pub type Right<T> = Packed<T, COLS>;

impl<T: Element, const W: usize> Packed<T, W> {
    /// Zeros.
    pub fn zeros(lines: usize, terms: usize) -> Self {
        Self {
            lines,
            terms,
            values: pages::zeros(lines.next_multiple_of(W) * terms),
        }
    }

    /// Packs `source[lines, terms]`.
    pub fn new(isa: Isa, source: View<'_, T>) -> Self {
        let mut packed = Self::zeros(source.rows(), source.cols());
        let terms = 0..packed.terms;
        if !terms.is_empty() {
            let panels = packed.values.par_chunks_exact_mut(W * terms.len());
            panels.enumerate().for_each(|(panel, out)| {
                pack::<T, W>(isa, source, panel * W, terms.clone(), out);
            });
        }
        packed
    }

    /// Overwrites the terms from `first` on with `values[count, lines]`.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn set(&mut self, first: usize, values: &[T]) {
        let lines = self.lines;
        for (panel, own) in self.span_mut(first, values.len()).enumerate() {
            let from = panel * W;
            for (own, values) in own.iter_mut().zip(values.chunks_exact(lines)) {
                let values = &values[from..lines.min(from + W)];
                own[..values.len()].copy_from_slice(values);
            }
        }
    }

    /// Copies the terms from `first` on to `values[count, lines]`.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn get(&self, first: usize, values: &mut [T]) {
        let lines = self.lines;
        let count = values.len() / lines;
        let all = self.all();
        for from in (0..lines).step_by(W) {
            let own = all.panel(from, first..first + count, &[]);
            for (own, values) in own.iter().zip(values.chunks_exact_mut(lines)) {
                let values = &mut values[from..lines.min(from + W)];
                values.copy_from_slice(&own[..values.len()]);
            }
        }
    }

    /// As an operand.
    pub fn all(&self) -> Terms<'_, T, W> {
        Terms {
            values: self.values.as_chunks().0,
            stride: self.terms,
            lines: self.lines,
            terms: self.terms,
        }
    }

    /// The first `terms` terms as an operand.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn head(&self, terms: usize) -> Terms<'_, T, W> {
        assert!(terms <= self.terms, "{terms} of {} terms", self.terms);
        Terms {
            terms,
            ..self.all()
        }
    }

    /// Some lines as an operand.
    ///
    /// # Panics
    /// If there are fewer, or if the first does not begin a panel.
    pub fn lines(&self, lines: Range<usize>) -> Terms<'_, T, W> {
        assert!(
            lines.start.is_multiple_of(W) && lines.end <= self.lines,
            "lines {lines:?} of {} in panels of {W}",
            self.lines
        );
        Terms {
            values: &self.values.as_chunks().0[lines.start / W * self.terms..],
            lines: lines.len(),
            ..self.all()
        }
    }

    /// The terms from `first` on of every panel, as many as `len` values have.
    fn span_mut(&mut self, first: usize, len: usize) -> impl Iterator<Item = &mut [[T; W]]> {
        let count = len / self.lines.max(1);
        assert!(
            count * self.lines == len && first + count <= self.terms,
            "values are not [terms, {}]",
            self.lines
        );
        let panels = self
            .values
            .as_chunks_mut()
            .0
            .chunks_exact_mut(self.terms.max(1));
        panels.map(move |panel| &mut panel[first..first + count])
    }
}

/// Some lines, or the first terms, of a packed matrix.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a, T, const W: usize> {
    /// From the first panel on.
    values: &'a [[T; W]],
    /// Terms from panel to panel.
    stride: usize,
    lines: usize,
    terms: usize,
}

impl<T: Element, const W: usize> Operand<T, W> for Terms<'_, T, W> {
    fn lines(&self) -> usize {
        self.lines
    }

    fn terms(&self) -> usize {
        self.terms
    }

    const COPIED: bool = false;

    fn copy(&self, _: Isa, _: usize, _: Range<usize>, _: &mut [T]) {}

    fn panel<'a>(&'a self, first: usize, terms: Range<usize>, _: &'a [T]) -> &'a [[T; W]] {
        &self.values[first / W * self.stride..][terms]
    }
}
