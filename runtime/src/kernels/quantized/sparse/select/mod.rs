//! Two of four for a few tokens: the codes stay as they are stored, and the activations that meet them are selected.
//!
//! A vector of codes has the two that are stored of a row in each of two quads, for 16 rows. Two bits say which of its
//! quad's activations a code meets; a shift brings them to the code's place, a shuffle of bytes brings the activation, and nothing
//! is multiplied by zero:
//!
//! `Σ (code − zero point) · a = Σ code · a − zero point · Σ a`, over stored codes and selected activations alone.
//!
//! A panel is one stream of bytes, read in the order of the file as the dense kernel does it ([`few`](super::super::few)): software
//! prefetches help only where the products of several tokens hide the next loads.

mod avx2;
mod avx512;

use qbin_format::TILE_ROWS;

use super::avx512::Vbmi2;
use super::two_of_four::{BYTES_4, BYTES_8, WHICH, blocks};
use super::{STEP, VECTOR, Zeros};
use crate::kernels::activations::Choices;
use crate::kernels::isa::{Isa, Vectorized};
use crate::kernels::quantized::Product;
use crate::kernels::quantized::avx2::{Bytes, Halves, Nibbles, Vnni};
use crate::kernels::quantized::reads::Reads;
use crate::kernels::quantized::vectors::Vectors;

/// Most tokens of these kernels: with AVX-512 their sums stay in registers.
pub(super) const TOKENS: usize = 6;

/// How far ahead the file is fetched, in bytes, where [`Vectors::LATE`] says so.
const AHEAD: usize = 2048;

/// Pairs of quads of a step; each has a vector of codes.
const PAIRS: usize = STEP / 8;

/// Where the choices of a row's four codes begin among the sixteen of two quads.
const FIRST: i32 = i32::from_le_bytes([0, 4, 8, 12]);

/// What selecting needs of an instruction set. A value is the proof that its instructions may be executed; methods but
/// [`Self::run`] are `#[inline(always)]`.
trait Select: Copy {
    /// Vectors for what is not selecting.
    type Vectors: Vectors;
    /// What says which columns of a block are stored.
    type Columns: Copy;
    /// A token's sums of a group: of products, and of the activations in them.
    type Sums: Copy;

    /// Runs work compiled for these instructions.
    fn run<W: Vectorized>(self, work: W) -> W::Output;
    fn vectors(self) -> Self::Vectors;
    /// Of the three vectors that a block begins with.
    fn columns(self, vectors: [<Self::Vectors as Vectors>::Codes; 3]) -> Self::Columns;
    /// Sums of nothing.
    fn none(self) -> Self::Sums;
    /// Adds step `AT` of a block.
    fn step<const BITS: u8, const BYTES: usize, const T: usize, const AT: usize>(
        self,
        sums: [Self::Sums; T],
        columns: Self::Columns,
        block: &[u8; BYTES],
        choices: [&[i8; VECTOR]; T],
    ) -> [Self::Sums; T];
    /// `Σ (code − zero point) · a` of each row.
    fn centred<const BITS: u8>(
        self,
        sums: Self::Sums,
        zero_points: &[u8; TILE_ROWS],
    ) -> <Self::Vectors as Vectors>::Int;
}

/// The product for at most [`TOKENS`] tokens, if this level can select.
pub(super) fn run(isa: Isa, product: &mut Product) -> bool {
    if let Some(v) = Vbmi2::of(isa) {
        selected(v, isa, product);
    } else if let Some(v) = Halves::<Vnni>::of(isa) {
        selected(v, isa, product);
    } else if product.w.scheme.bits == 4
        && let Some(v) = Halves::<Nibbles>::of(isa)
    {
        selected(v, isa, product);
    } else if product.w.scheme.bits == 8
        && let Some(v) = Halves::<Bytes>::of(isa)
    {
        selected(v, isa, product);
    } else {
        return false;
    }
    true
}

fn selected<S: Select>(v: S, isa: Isa, product: &mut Product) {
    let choices = product.x.choices(isa);
    match product.w.scheme.bits {
        8 => of_bits::<S, 8, BYTES_8>(v, product, choices),
        _ => of_bits::<S, 4, BYTES_4>(v, product, choices),
    }
}

fn of_bits<S: Select, const BITS: u8, const BYTES: usize>(
    v: S,
    product: &mut Product,
    choices: &[Choices],
) {
    match product.x.tokens() {
        0 => {}
        1 => v.run(Work::<S, BITS, BYTES, 1>(v, product, choices)),
        2 => v.run(Work::<S, BITS, BYTES, 2>(v, product, choices)),
        3 => v.run(Work::<S, BITS, BYTES, 3>(v, product, choices)),
        4 => v.run(Work::<S, BITS, BYTES, 4>(v, product, choices)),
        _ => v.run(Work::<S, BITS, BYTES, TOKENS>(v, product, choices)),
    }
}

/// The product for `T` tokens; where there are fewer, the last one is computed again.
struct Work<'p, 'a, 'o, S, const BITS: u8, const BYTES: usize, const T: usize>(
    S,
    &'p mut Product<'a, 'o>,
    &'p [Choices],
);

impl<S: Select, const BITS: u8, const BYTES: usize, const T: usize> Vectorized
    for Work<'_, '_, '_, S, BITS, BYTES, T>
{
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self(v, product, choices) = self;
        for at in product.panels.clone() {
            panel::<S, BITS, BYTES, T>(v, product, choices, at);
        }
    }
}

#[inline(always)]
fn panel<S: Select, const BITS: u8, const BYTES: usize, const T: usize>(
    v: S,
    product: &mut Product,
    choices: &[Choices],
    panel: usize,
) {
    let Product { w, x, .. } = *product;
    let blocks = blocks::<BYTES>(w, panel);
    let mut choices = [choices; T];
    let mut scales = [x.scales(0); T];
    for t in 0..T {
        let token = t.min(x.tokens() - 1);
        choices[t] = &choices[t][token * blocks.len()..][..blocks.len()];
        scales[t] = x.scales(token);
    }
    let zeros = Zeros::new(w, panel);
    let weight_groups = w.scheme.groups(w.cols);
    let (scales_of_weights, _) = w.scales.as_chunks::<{ 2 * TILE_ROWS }>();
    let scales_of_weights = &scales_of_weights[panel * weight_groups..][..weight_groups];
    let vectors = v.vectors();
    let mut y = [vectors.zero(); T];
    let mut sums = [v.none(); T];
    let (steps, per_group) = (w.cols.div_ceil(STEP), x.group() / STEP);
    let (mut group, mut steps_left) = (0, per_group.min(steps));
    'groups: for (at, block) in blocks.iter().enumerate() {
        let mut of_block = [&choices[0][at].0; T];
        for t in 1..T {
            of_block[t] = &choices[t][at].0;
        }
        let columns = v.columns(columns_of::<_, BITS, BYTES, T>(vectors, block));
        // Constants make a step fast, so that each is code of its own.
        macro_rules! step {
            ($step:literal) => {
                let mut of_step = [&of_block[0][$step]; T];
                for t in 1..T {
                    of_step[t] = &of_block[t][$step];
                }
                sums = v.step::<BITS, BYTES, T, $step>(sums, columns, block, of_step);
                steps_left -= 1;
                if steps_left == 0 {
                    let weight_group = w.scheme.group_of(group * x.group());
                    let zero_points = zeros.of_group(weight_group);
                    let s_w = vectors.scales(&scales_of_weights[weight_group]);
                    for t in 0..T {
                        let centred = v.centred::<BITS>(sums[t], zero_points);
                        y[t] = vectors.add(y[t], s_w, scales[t][group], centred);
                    }
                    sums = [v.none(); T];
                    group += 1;
                    steps_left = per_group.min(steps.saturating_sub(group * per_group));
                    if steps_left == 0 {
                        break 'groups;
                    }
                }
            };
        }
        step!(0);
        step!(1);
        step!(2);
        step!(3);
    }
    for (token, y) in y.into_iter().enumerate().take(x.tokens()) {
        product.out.write(token, panel, &vectors.rows(y));
    }
}

/// Fetches what follows a vector of the file some way ahead, where `T` tokens' products make it late.
#[inline(always)]
fn fetch<V: Vectors, const BITS: u8, const T: usize>(v: V, vector: &[u8; VECTOR]) {
    if Reads::of::<V>(2 * T * 8 / BITS as usize).ahead > 0 {
        v.prefetch_near(vector.as_ptr().wrapping_add(AHEAD));
    }
}

/// The three vectors of a block that say which columns are stored.
#[inline(always)]
fn columns_of<V: Vectors, const BITS: u8, const BYTES: usize, const T: usize>(
    v: V,
    block: &[u8; BYTES],
) -> [V::Codes; 3] {
    let (vectors, _) = block.as_chunks();
    let mut columns = [v.codes(&vectors[0]); 3];
    for (columns, vector) in columns.iter_mut().zip(vectors) {
        fetch::<_, BITS, T>(v, vector);
        *columns = v.codes(vector);
    }
    columns
}

/// The codes of a pair of quads of a block; with 4 bits, those of odd pairs as [`Vectors::high_in_place`] gives them.
#[inline(always)]
fn codes_of<V: Vectors, const BITS: u8, const BYTES: usize, const T: usize>(
    v: V,
    block: &[u8; BYTES],
    pair: usize,
) -> V::Codes {
    let (codes, _) = block[WHICH..].as_chunks();
    let codes = &codes[pair * usize::from(BITS) / 8];
    if BITS == 8 || pair.is_multiple_of(2) {
        fetch::<_, BITS, T>(v, codes);
    }
    match (BITS, pair % 2) {
        (8, _) => v.codes(codes),
        (_, 0) => v.low(codes),
        (_, _) => v.high_in_place(codes),
    }
}
