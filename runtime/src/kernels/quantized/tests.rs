//! Every instruction set against the definition, and the definition against real arithmetic.

use half::f16;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use qbin_format::{PackedMatrix, QuantizedMatrix, Scheme};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Product, amx, matmul};
use crate::kernels::columns::made_in_room;
use crate::kernels::{Activations, Columns, Isa, Pool};

/// A random matrix with codes and zero points of the whole range, and some scales that are zero or subnormal.
fn weights(scheme: Scheme, rows: usize, cols: usize, rng: &mut ChaCha8Rng) -> QuantizedMatrix {
    let max = u8::MAX >> (8 - scheme.bits);
    let groups = rows * scheme.groups(cols);
    let mut extremes = |len: usize| -> Vec<u8> {
        let code = |_| match rng.random_range(0..4) {
            0 => 0,
            1 => max,
            _ => rng.random_range(0..=max),
        };
        (0..len).map(code).collect()
    };
    let codes = extremes(rows * cols);
    let zero_points = if scheme.symmetric {
        Vec::new()
    } else {
        extremes(groups)
    };
    let scale = |_| match rng.random_range(0..8) {
        0 => f16::from_bits(rng.random_range(0..40)),
        _ => f16::from_f32(rng.random_range(0.001..0.1)),
    };
    let scales = (0..groups).map(scale).collect();
    QuantizedMatrix {
        scheme,
        rows,
        cols,
        codes,
        scales,
        zero_points,
    }
}

/// Random activations, some groups of extremes only.
fn inputs(tokens: usize, cols: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    let mut x: Vec<f32> = (0..tokens * cols)
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    for x in x.chunks_mut(97).step_by(3) {
        x.iter_mut().for_each(|x| *x = x.signum());
    }
    x
}

fn product(isa: Isa, packed: &PackedMatrix, x: &[f32]) -> Vec<f32> {
    let w = packed.view();
    let activations = Activations::quantize(isa, x, w.cols, w.scheme);
    let mut out = vec![f32::NAN; activations.tokens() * w.rows];
    matmul(
        isa,
        &w,
        0..w.rows,
        &activations,
        &mut Columns::whole(&mut out, w.rows),
    );
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn schemes() -> impl Strategy<Value = Scheme> {
    let groups = [4, 6, 20, 32, 64, 96, 128, 256, 1000].map(Some);
    let groups = prop::sample::select([&groups[..], &[None]].concat());
    let bits = prop::sample::select(vec![4, 8]);
    (bits, groups, any::<bool>()).prop_map(|(bits, group_size, symmetric)| Scheme {
        bits,
        group_size,
        symmetric,
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 200,
        rng_seed: RngSeed::Fixed(0x71_62_69_6e),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_level_gives_the_bits_of_the_definition(
        scheme in schemes(), rows in 1..150_usize, cols in 1..420_usize, tokens in 1..=40_usize, seed: u64,
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let packed = PackedMatrix::pack(&weights(scheme, rows, cols, &mut rng));
        let x = inputs(tokens, cols, &mut rng);
        let levels = Isa::available();
        let expected = product(levels[0], &packed, &x);
        for isa in levels {
            prop_assert_eq!(bits(&product(isa, &packed, &x)), bits(&expected), "{}", isa.level());
        }
    }

    #[test]
    fn many_tokens_are_as_many_single_ones(
        scheme in schemes(), rows in 1..100_usize, cols in 1..300_usize, tokens in 2..=20_usize, seed: u64,
    ) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let packed = PackedMatrix::pack(&weights(scheme, rows, cols, &mut rng));
        let x = inputs(tokens, cols, &mut rng);
        for isa in Isa::available() {
            let single: Vec<f32> = x.chunks(cols).flat_map(|x| product(isa, &packed, x)).collect();
            prop_assert_eq!(bits(&product(isa, &packed, &x)), bits(&single), "{}", isa.level());
        }
    }
}

/// The AMX product with tiles in software, on the vector instructions of `isa`, with a room of its own for more than a few tokens.
fn tiled(isa: Isa, packed: &PackedMatrix, x: &[f32]) -> Vec<f32> {
    let w = packed.view();
    let x = Activations::quantize_in_tiles(isa, x, w.cols, w.scheme);
    let tokens = x.tokens();
    made_in_room(tokens, w.rows, |columns| {
        let product = Product {
            w: &w,
            x: &x,
            panels: 0..w.rows.div_ceil(16),
            out: super::Panels::of_columns(columns, 0..w.rows),
        };
        let tiles = x.tiles().expect("made so");
        amx::run(isa, amx::tests::Software::new(), tiles, product);
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 60,
        rng_seed: RngSeed::Fixed(0x71_62_69_6e),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn tiles_and_rooms_give_the_bits_of_the_definition(
        bits_ in prop::sample::select(vec![4, 8]),
        group_size in prop::sample::select(vec![Some(32), Some(64), Some(128), Some(256), None]),
        symmetric: bool, rows in 1..150_usize, cols in 1..1400_usize, tokens in 1..=75_usize, seed: u64,
    ) {
        let scheme = Scheme { bits: bits_, group_size, symmetric };
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let packed = PackedMatrix::pack(&weights(scheme, rows, cols, &mut rng));
        let x = inputs(tokens, cols, &mut rng);
        let expected = product(Isa::detect(), &packed, &x);
        for isa in Isa::available() {
            let w = packed.view();
            let rounded = Activations::quantize(isa, &x, cols, scheme);
            let roomy = made_in_room(tokens, rows, |out| matmul(isa, &w, 0..rows, &rounded, out));
            prop_assert_eq!(bits(&roomy), bits(&expected), "{} in a room", isa.level());
            prop_assert_eq!(bits(&tiled(isa, &packed, &x)), bits(&expected), "{}", isa.level());
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn the_check_before_amx_passes_at_every_level() {
    let levels = Isa::available();
    assert!(levels.iter().all(|&isa| super::agrees(isa)));
}

/// Wide enough for several passes over the columns and several blocks of tokens, the last of which is smaller; the last group of
/// columns is short.
#[test]
fn large_products_are_cut_without_a_trace() {
    for (bits_, group_size, symmetric) in
        [(4, Some(128), false), (8, None, true), (4, Some(96), true)]
    {
        let scheme = Scheme {
            bits: bits_,
            group_size,
            symmetric,
        };
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let packed = PackedMatrix::pack(&weights(scheme, 83, 4100, &mut rng));
        let x = inputs(270, 4100, &mut rng);
        let levels = Isa::available();
        let expected = product(levels[0], &packed, &x);
        if group_size != Some(96) {
            // Tiles serve it.
            assert_eq!(bits(&tiled(levels[0], &packed, &x)), bits(&expected));
        }
        for isa in levels {
            assert_eq!(
                bits(&product(isa, &packed, &x)),
                bits(&expected),
                "{}",
                isa.level()
            );
        }
    }
}

/// Panels enough for several streams, more in each than results are kept, and some left over: as this CPU reads them, and as
/// others do.
#[test]
fn few_tokens_of_many_panels_give_the_bits_of_the_definition() {
    for bits_ in [4, 8] {
        let scheme = Scheme {
            bits: bits_,
            group_size: Some(64),
            symmetric: false,
        };
        let mut rng = ChaCha8Rng::seed_from_u64(8);
        let packed = PackedMatrix::pack(&weights(scheme, 1137, 192, &mut rng));
        for tokens in 1..=4 {
            let x = inputs(tokens, 192, &mut rng);
            let levels = Isa::available();
            let expected = product(levels[0], &packed, &x);
            for isa in levels {
                let level = isa.level();
                assert_eq!(bits(&product(isa, &packed, &x)), bits(&expected), "{level}");
                #[cfg(target_arch = "x86_64")]
                for out in read_everyhow(isa, &packed, &x) {
                    assert_eq!(bits(&out), bits(&expected), "{level}");
                }
            }
        }
    }
}

/// Products as they are read on Intel's CPUs and on others, with each kind of vectors that the level has.
#[cfg(target_arch = "x86_64")]
fn read_everyhow(isa: Isa, packed: &PackedMatrix, x: &[f32]) -> Vec<Vec<f32>> {
    use super::avx2::{Bytes, Halves, Nibbles, Vnni};
    use super::avx512::Avx512;
    use super::vectors::Vectors;
    use super::{Panels, few};
    use qbin_format::{QuantizedView, TILE_ROWS};

    fn read<V: Vectors>(v: V, w: &QuantizedView, x: &Activations) -> [Vec<f32>; 2] {
        [few::run_on::<V, true>, few::run_on::<V, false>].map(|run| {
            let mut out = vec![f32::NAN; x.tokens() * w.rows];
            let mut columns = Columns::whole(&mut out, w.rows);
            let product = Product {
                w,
                x,
                panels: 0..w.rows.div_ceil(TILE_ROWS),
                out: Panels::of_columns(&mut columns, 0..w.rows),
            };
            run(v, product);
            out
        })
    }
    let w = packed.view();
    let x = Activations::quantize(isa, x, w.cols, w.scheme);
    let mut all = Vec::new();
    all.extend(Avx512::of(isa).map(|v| read(v, &w, &x)));
    all.extend(Halves::<Vnni>::of(isa).map(|v| read(v, &w, &x)));
    match w.scheme.bits {
        4 => all.extend(Halves::<Nibbles>::of(isa).map(|v| read(v, &w, &x))),
        _ => all.extend(Halves::<Bytes>::of(isa).map(|v| read(v, &w, &x))),
    }
    all.into_iter().flatten().collect()
}

/// The definition against f64 arithmetic on the same codes. Per group, at most three roundings separate the two: the
/// product of the scales, the FMA, and the sum so far of all groups before.
#[test]
fn definition_follows_real_arithmetic() {
    for group_size in [Some(4), Some(6), Some(32), Some(128), None] {
        for (bits, symmetric) in [(4, true), (4, false), (8, true), (8, false)] {
            let scheme = Scheme {
                bits,
                group_size,
                symmetric,
            };
            let mut rng = ChaCha8Rng::seed_from_u64(3);
            let (rows, cols, tokens) = (21, 300, 3);
            let matrix = weights(scheme, rows, cols, &mut rng);
            let w = matrix.dequantize();
            let x = inputs(tokens, cols, &mut rng);
            let a = Activations::quantize(Isa::available()[0], &x, cols, scheme);
            let y = product(Isa::available()[0], &PackedMatrix::pack(&matrix), &x);
            for token in 0..tokens {
                for row in 0..rows {
                    let value = |col: usize| {
                        f64::from(a.codes(token)[col]) * f64::from(a.scales(token)[col / a.group()])
                    };
                    let terms = (0..cols).map(|col| f64::from(w[row * cols + col]) * value(col));
                    let (exact, magnitude) = terms.fold((0.0, 0.0), |(sum, abs), term| {
                        (sum + term, abs + term.abs())
                    });
                    // `dequantize` itself rounds each weight once more.
                    let tol = (a.groups() + 3) as f64 * f64::from(f32::EPSILON) * magnitude;
                    let got = f64::from(y[token * rows + row]);
                    assert!(
                        (got - exact).abs() <= tol,
                        "{scheme:?} [{token}, {row}]: {got} is not {exact}"
                    );
                }
            }
        }
    }
}

#[test]
fn panels_may_be_written_by_several_threads() {
    let scheme = Scheme {
        bits: 4,
        group_size: Some(32),
        symmetric: false,
    };
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let packed = PackedMatrix::pack(&weights(scheme, 1100, 70, &mut rng));
    let (w, x) = (packed.view(), inputs(9, 70, &mut rng));
    let isa = Isa::detect();
    let activations = Activations::quantize(isa, &x, 70, scheme);
    let mut out = vec![f32::NAN; 9 * 1100];
    let ranges = [0..48, 48..1088, 1088..1100];
    Pool::new(3).columns(&mut out, 1100, &ranges, |part, mut out| {
        matmul(isa, &w, ranges[part].clone(), &activations, &mut out);
    });
    assert_eq!(bits(&out), bits(&product(isa, &packed, &x)));
}

#[test]
fn a_token_that_is_not_finite_spoils_itself_only() {
    let scheme = Scheme {
        bits: 8,
        group_size: Some(32),
        symmetric: true,
    };
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let packed = PackedMatrix::pack(&weights(scheme, 40, 64, &mut rng));
    let mut x = inputs(8, 64, &mut rng);
    let clean = product(Isa::detect(), &packed, &x);
    x[2 * 64 + 50] = f32::INFINITY;
    x[5 * 64] = f32::NAN;
    for isa in Isa::available() {
        let y = product(isa, &packed, &x);
        for (token, (y, clean)) in y.chunks(40).zip(clean.chunks(40)).enumerate() {
            match token {
                2 | 5 => assert!(
                    y.iter().all(|y| y.is_nan()),
                    "{}: token {token}",
                    isa.level()
                ),
                _ => assert_eq!(bits(y), bits(clean)),
            }
        }
    }
}
