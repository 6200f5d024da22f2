//! Activations as weights of two of four choose from them.

use super::Activations;
use crate::kernels::isa::{Isa, Vectorized};

/// Columns of a block: of each `Choices`.
const COLS: usize = 128;
/// Columns of a step.
const STEP: usize = 32;

/// For every step of a block the activations that two bits choose from: of each quad four for its first code, then four for its
/// second. They are in the order that `docs/format.md` gives these bits.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(in crate::kernels) struct Choices(pub(in crate::kernels) [[i8; 2 * STEP]; COLS / STEP]);

impl Activations {
    /// `[tokens, blocks]`, with 0 right of the last tile; the first to ask makes them.
    pub(in crate::kernels) fn choices(&self, isa: Isa) -> &[Choices] {
        self.choices.get_or_init(|| isa.run(Choose(self)))
    }
}

struct Choose<'a>(&'a Activations);

impl Vectorized for Choose<'_> {
    type Output = Vec<Choices>;

    #[inline(always)]
    fn run(self) -> Vec<Choices> {
        let Self(x) = self;
        let blocks = x.cols().div_ceil(COLS);
        let mut choices = vec![Choices([[0; 2 * STEP]; COLS / STEP]); x.tokens() * blocks];
        for (token, choices) in choices.chunks_exact_mut(blocks).enumerate() {
            let (quads, _) = x.codes(token).as_chunks::<4>();
            let choices = choices.iter_mut().flat_map(|Choices(steps)| steps);
            let choices = choices.flat_map(|step| step.as_chunks_mut::<8>().0);
            for (&[a, b, c, d], choices) in quads.iter().zip(choices) {
                *choices = [a, b, a, c, c, b, d, d];
            }
        }
        choices
    }
}
