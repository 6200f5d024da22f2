//! Operands rounded, and copied into the order in which a kernel reads them.

use std::marker::PhantomData;
use std::ops::Range;

use super::{COLS, Kernel, STEP};
use crate::kernels::ahead::LINE;
use crate::kernels::gemm::columns::{self, ROWS as LINES};
use crate::kernels::isa::{Isa, Vectorized};
use crate::kernels::pages;
use crate::kernels::pool::Pool;

/// Steps of a line that are arranged at once, and the most words of them.
const STEPS: usize = 16;
const MOST_WORDS: usize = STEPS * STEP;

/// Words from the beginning of a cache line on: a vector of 16 of them, or a tile's row, is then read from one line and not
/// from parts of two.
pub(super) struct Words {
    words: Vec<u32>,
    used: Range<usize>,
}

impl Words {
    pub(super) fn zeros(len: usize) -> Self {
        let words: Vec<u32> = pages::zeros(len + LINE / size_of::<u32>());
        let start = match words.as_ptr().align_offset(LINE) {
            // Where it cannot be told, only speed is lost.
            usize::MAX => 0,
            start => start,
        };
        Self {
            words,
            used: start..start + len,
        }
    }

    pub(super) fn all(&self) -> &[u32] {
        &self.words[self.used.clone()]
    }

    pub(super) fn all_mut(&mut self) -> &mut [u32] {
        &mut self.words[self.used.clone()]
    }
}

/// Packs a left operand, rows of `depth` terms: `[panel][step]`.
pub(super) fn left<K: Kernel>(isa: Isa, pool: &Pool, x: &[f32], depth: usize) -> Words {
    let panel = depth.div_ceil(STEP) * K::ROWS * K::WORDS;
    let rows = x.len() / depth;
    let mut words = Words::zeros(rows.div_ceil(K::ROWS) * panel);
    pool.parts(words.all_mut(), panel, |number, panel| {
        let first = number * K::ROWS;
        let x = &x[first * depth..rows.min(first + K::ROWS) * depth];
        K::pack_left(isa, x, depth, panel);
    });
    words
}

/// Packs as many steps of a right operand from `first` on, its columns rows of `depth` terms here, as `packed` has room for:
/// `[panel][group][step][word][WIDTH]`, zeros beyond the last column.
pub(super) fn right<K: Kernel>(
    isa: Isa,
    b: &[f32],
    depth: usize,
    first: usize,
    packed: &mut [u32],
) {
    let columns = (b.len() / depth).next_multiple_of(COLS);
    let groups = packed.chunks_exact_mut(packed.len() / columns * K::WIDTH);
    let lines = b.chunks(K::WIDTH * depth).chain(std::iter::repeat(&[][..]));
    for (group, b) in groups.zip(lines) {
        transposed::<K>(isa, b, depth, first, K::WIDTH, group);
    }
}

/// Packs up to `width` lines of `depth` terms, from step `first` on, as `[step][word][width]`, zeros where there are none.
pub(super) fn transposed<K: Kernel>(
    isa: Isa,
    x: &[f32],
    depth: usize,
    first: usize,
    width: usize,
    panel: &mut [u32],
) {
    let mut lines = [[0; MOST_WORDS]; LINES];
    let parts = panel.chunks_mut(STEPS * K::WORDS * width);
    for (part, panel) in parts.enumerate() {
        let terms = (first + part * STEPS) * STEP..;
        let words = panel.len() / width;
        let mut rows = x.chunks_exact(depth).map(|row| &row[terms.clone()]);
        for group in (0..width).step_by(LINES) {
            for line in &mut lines {
                let line = &mut line[..words];
                match rows.next() {
                    Some(row) => arrange::<K>(isa, row, line),
                    None => line.fill(0),
                }
            }
            let lines = lines.each_ref().map(|line| &line[..words]);
            let end = panel.len() - (width - group - LINES);
            columns::single(isa, lines, &mut panel[group..end], width);
        }
    }
}

/// Rounds the first terms of `x` to as many whole steps as `words` has room for, zeros beyond the last term.
pub(super) fn arrange<K: Kernel>(isa: Isa, x: &[f32], words: &mut [u32]) {
    let kernel = PhantomData::<K>;
    isa.run(Arrange { x, words, kernel });
}

struct Arrange<'a, K> {
    x: &'a [f32],
    words: &'a mut [u32],
    kernel: PhantomData<K>,
}

impl<K: Kernel> Vectorized for Arrange<'_, K> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let steps = self.words.chunks_exact_mut(K::WORDS);
        for (x, words) in self.x.chunks(STEP).zip(steps) {
            K::arrange_part(x, words);
        }
    }
}
