//! Every level against the portable product of the same matrix in dense tiles.

use half::f16;
use proptest::prelude::*;
use qbin_format::{Encoding, PackedMatrix, QuantizedMatrix, QuantizedView, Scheme, Sparsity};

use super::{dense_panel_bytes, expand};
use crate::kernels::Pool;
use crate::kernels::quantized::matmul;
use crate::kernels::{Activations, Isa};

/// SplitMix64.
struct Seeded(u64);

impl Seeded {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Which weights are not zero.
#[derive(Clone, Copy, Debug)]
enum Pattern {
    /// Each with this chance in 256.
    Random(u64),
    TwoOfFour,
    /// One in the whole matrix.
    One,
    /// A row of zeros and a dense one, in turn.
    Rows,
}

fn sparse_matrix(
    scheme: Scheme,
    rows: usize,
    cols: usize,
    pattern: Pattern,
    seed: u64,
) -> QuantizedMatrix {
    let mut seeded = Seeded(seed);
    let mut code = || (seeded.next() >> (64 - scheme.bits)) as u8;
    let groups = scheme.groups(cols);
    let zero_points: Vec<u8> = match scheme.symmetric {
        true => Vec::new(),
        false => (0..rows * groups).map(|_| code()).collect(),
    };
    let mut codes: Vec<u8> = (0..rows * cols).map(|_| code()).collect();
    let one = seeded.next() as usize % (rows * cols);
    let pairs = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]];
    let mut pair = pairs[0];
    for (at, code) in codes.iter_mut().enumerate() {
        let (row, col) = (at / cols, at % cols);
        if col % 4 == 0 {
            pair = pairs[seeded.next() as usize % 6];
        }
        let keep = match pattern {
            Pattern::Random(chance) => seeded.next() % 256 < chance,
            Pattern::TwoOfFour => pair.contains(&(col % 4)),
            Pattern::One => at == one,
            Pattern::Rows => row % 2 == 1,
        };
        if !keep {
            let group = row * groups + scheme.group_of(col);
            *code = zero_points.get(group).copied().unwrap_or(scheme.mid());
        }
    }
    let scale = |_| f16::from_f32((seeded.next() % 1000) as f32 / 997.0);
    QuantizedMatrix {
        scheme,
        rows,
        cols,
        codes,
        scales: (0..rows * groups).map(scale).collect(),
        zero_points,
    }
}

fn activations(tokens: usize, cols: usize, seed: u64) -> Vec<f32> {
    let mut seeded = Seeded(seed);
    let value = |_| (seeded.next() as i64) as f32 / 1e18;
    (0..tokens * cols).map(value).collect()
}

/// The bits of `W·x`, `[tokens, rows]`, of the rows in two parts.
fn product(isa: Isa, w: &QuantizedView, x: &[f32]) -> Vec<u32> {
    let x = Activations::quantize(isa, x, w.cols, w.scheme);
    let mut y = vec![f32::NAN; x.tokens() * w.rows];
    let cut = w.rows.div_ceil(16) / 3 * 16;
    let ranges = [0..cut, cut..w.rows];
    Pool::new(1).columns(&mut y, w.rows, &ranges, |part, mut out| {
        matmul(isa, w, ranges[part].clone(), &x, &mut out);
    });
    y.iter().map(|y| y.to_bits()).collect()
}

fn check(m: &QuantizedMatrix, encoding: Encoding, tokens: usize, seed: u64) {
    let Some(packed) = PackedMatrix::pack_as(m, encoding) else {
        return;
    };
    let (w, dense) = (packed.view(), PackedMatrix::pack(m));
    let x = activations(tokens, m.cols, seed);
    let expected = product(Isa::available()[0], &dense.view(), &x);
    let bytes = dense_panel_bytes(&w);
    for isa in Isa::available() {
        let level = isa.level();
        for (panel, expected) in dense.view().codes.chunks_exact(bytes).enumerate() {
            let mut tiles = vec![0xff; bytes];
            expand(isa, &w, panel, &mut tiles);
            assert!(tiles == expected, "{level}: {encoding:?}, panel {panel}");
        }
        assert_eq!(product(isa, &w, &x), expected, "{level}: {encoding:?}");
    }
}

fn schemes() -> impl Strategy<Value = Scheme> {
    let groups = prop_oneof![
        Just(None),
        prop::sample::select(vec![4, 6, 20, 32, 48, 64, 96, 128, 256, 5000]).prop_map(Some),
    ];
    (prop::sample::select(vec![4, 8]), groups, any::<bool>()).prop_map(
        |(bits, group_size, symmetric)| Scheme {
            bits,
            group_size,
            symmetric,
        },
    )
}

fn patterns() -> impl Strategy<Value = Pattern> {
    prop_oneof![
        (0u64..=256).prop_map(Pattern::Random),
        Just(Pattern::TwoOfFour),
        Just(Pattern::One),
        Just(Pattern::Rows),
    ]
}

/// More panels than are expanded at a time.
#[test]
fn wide_panels_are_expanded_in_parts() {
    let scheme = Scheme {
        bits: 8,
        group_size: Some(64),
        symmetric: false,
    };
    let m = sparse_matrix(scheme, 150, 5000, Pattern::TwoOfFour, 7);
    for tokens in [1, 7] {
        check(&m, Encoding::Bitmask, tokens, 1);
        check(&m, Encoding::TwoOfFour, tokens, 2);
    }
}

proptest! {
    #[test]
    fn every_level_gives_the_bits_of_the_dense_product(
        scheme in schemes(), rows in 1usize..120, cols in 1usize..400,
        pattern in patterns(), tokens in 1usize..=10, seed: u64
    ) {
        let m = sparse_matrix(scheme, rows, cols, pattern, seed);
        for encoding in [Encoding::Bitmask, Encoding::TwoOfFour] {
            check(&m, encoding, tokens, seed);
        }
    }

    /// Opening an artifact does not read masks: whatever they say, a kernel stays inside the codes.
    #[test]
    fn damaged_masks_and_codes_give_numbers(
        scheme in schemes(), rows in 1usize..60, cols in 1usize..300, tokens in 1usize..=5, ones: bool, seed: u64
    ) {
        let m = sparse_matrix(scheme, rows, cols, Pattern::TwoOfFour, seed);
        let x = activations(tokens, cols, seed);
        for encoding in [Encoding::Bitmask, Encoding::TwoOfFour] {
            let packed = PackedMatrix::pack_as(&m, encoding).expect("two of four");
            let mut w = packed.view();
            let mut seeded = Seeded(seed);
            let fill = |_: &u8| if ones { 0xff } else { seeded.next() as u8 };
            let damaged: Vec<u8>;
            match &mut w.sparsity {
                Sparsity::Bitmask { masks, .. } => {
                    damaged = masks.iter().map(fill).collect();
                    *masks = &damaged;
                }
                _ => {
                    damaged = w.codes.iter().map(fill).collect();
                    w.codes = &damaged;
                }
            }
            let levels = Isa::available();
            let products: Vec<_> = levels.into_iter().map(|isa| product(isa, &w, &x)).collect();
            for product in &products {
                prop_assert_eq!(product.len(), tokens * rows);
                // Any bits are some two of four, the same for all.
                prop_assert!(encoding == Encoding::Bitmask || *product == products[0]);
            }
        }
    }
}
