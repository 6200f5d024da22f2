//! The rows of a forward pass: which belong to which sequence, where they stand, and which results are wanted.

use crate::Cpu;
use crate::rope::{Angles, Rope};
use std::ops::Range;

/// The rows of a batch that belong to one sequence, and the positions before them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub(crate) first: usize,
    pub(crate) len: usize,
    pub(crate) past: usize,
}

/// The rows of a batch with their rotary angles, the same for every block.
pub(crate) struct Batch {
    rows: Vec<Rows>,
    angles: Angles,
    /// The rows whose result is wanted, where these are not all.
    wanted: Option<Wanted>,
}

/// Some rows of a batch. Those of one sequence follow each other.
pub(crate) struct Wanted {
    /// Which of the batch's rows.
    from: Vec<Range<usize>>,
    /// The same as rows of a batch of their own.
    rows: Vec<Rows>,
    angles: Angles,
}

impl Batch {
    pub(crate) fn new(cpu: &Cpu, rope: &Rope, rows: Vec<Rows>) -> Self {
        Self {
            angles: rope.angles(&cpu.pool, &positions(&rows)),
            rows,
            wanted: None,
        }
    }

    /// The batch for a block of which only the result of some tokens is wanted, a range for each sequence.
    ///
    /// # Panics
    /// If a sequence has not these tokens.
    pub(crate) fn wanting(self, cpu: &Cpu, rope: &Rope, tokens: &[Range<usize>]) -> Self {
        let (mut from, mut rows, mut first) = (Vec::new(), Vec::new(), 0);
        for (all, tokens) in self.rows.iter().zip(tokens) {
            assert!(
                tokens.start <= tokens.end && tokens.end <= all.len,
                "tokens {tokens:?} of {}",
                all.len
            );
            from.push(all.first + tokens.start..all.first + tokens.end);
            rows.push(Rows {
                first,
                len: tokens.len(),
                past: all.past + tokens.start,
            });
            first += tokens.len();
        }
        if first == self.rows.iter().map(|rows| rows.len).sum::<usize>() {
            return self;
        }
        let wanted = Some(Wanted {
            angles: rope.angles(&cpu.pool, &positions(&rows)),
            from,
            rows,
        });
        Self { wanted, ..self }
    }

    pub(crate) fn rows(&self) -> &[Rows] {
        &self.rows
    }

    pub(crate) fn angles(&self) -> &Angles {
        &self.angles
    }

    pub(crate) fn wanted(&self) -> Option<&Wanted> {
        self.wanted.as_ref()
    }

    /// The row of the batch that a block's result number `row` belongs to.
    pub(crate) fn row(&self, row: usize) -> usize {
        match &self.wanted {
            None => row,
            Some(wanted) => {
                let mut rows = wanted.from.iter().cloned().flatten();
                rows.nth(row).expect("a row that is wanted")
            }
        }
    }
}

impl Wanted {
    pub(crate) fn rows(&self) -> &[Rows] {
        &self.rows
    }

    pub(crate) fn angles(&self) -> &Angles {
        &self.angles
    }

    /// These rows of `x`, which has `width` columns.
    pub(crate) fn of(&self, x: &[f32], width: usize) -> Vec<f32> {
        let rows = self.from.iter();
        let parts: Vec<_> = rows
            .map(|rows| &x[rows.start * width..rows.end * width])
            .collect();
        parts.concat()
    }
}

/// The positions of some rows.
fn positions(rows: &[Rows]) -> Vec<usize> {
    rows.iter()
        .flat_map(|rows| rows.past..rows.past + rows.len)
        .collect()
}

/// The rows of consecutive windows that all start at position 0.
pub(crate) fn windows(tokens: usize, window_tokens: usize) -> Vec<Rows> {
    (0..tokens)
        .step_by(window_tokens)
        .map(|first| Rows {
            first,
            len: window_tokens.min(tokens - first),
            past: 0,
        })
        .collect()
}
