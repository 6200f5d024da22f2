//! Every way to multiply against the definition, bit for bit.

use proptest::prelude::*;

use super::tiles::tests::Software;
use super::*;
use crate::kernels::gemm::tests::values;

/// [`values`] with exponents spread over `spread` powers of two from `1` down, and a zero here and there.
fn spread(len: usize, seed: u64, spread: i32) -> Vec<f32> {
    let exponents = values(len, seed + 1);
    let scaled = values(len, seed).into_iter().zip(exponents);
    scaled
        .map(|(value, e)| value * ((e - 0.5) * spread as f32).round().exp2())
        .collect()
}

#[test]
fn rounding_is_that_of_bf16_but_for_what_is_tiny() {
    let smallest = f32::from_bits((127 - 56) << 23);
    let halves = (0..=u16::MAX).flat_map(|half| {
        let bits = u32::from(half) << 16;
        [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| f32::from_bits(bits | low))
    });
    for x in halves {
        let mut got = [f32::NAN];
        let rounded = Rounded::new(Isa::available()[0], &Pool::new(1), &[x], 1);
        product_rounded(Isa::available()[0], &mut got, &rounded, &[1.0]);
        let expected = match x.abs() < smallest {
            true => 0.0,
            false => half::bf16::from_f32(x).to_f32(),
        };
        assert!(
            got[0] == expected || got[0].is_nan() && expected.is_nan(),
            "{x:e}: {} {expected}",
            got[0]
        );
    }
}

fn round(x: f32) -> f32 {
    match x.abs() < f32::exp2(-56.0) {
        true => 0.0,
        false => half::bf16::from_f32(x).to_f32(),
    }
}

/// The definition, for two lines of rounded terms.
fn sum(a: &[f32], b: &[f32]) -> f32 {
    let steps = a.chunks(STEP).zip(b.chunks(STEP));
    steps.fold(0.0, |sum, (a, b)| {
        let chain = |first: usize| {
            let terms = a.iter().zip(b).skip(first).step_by(2);
            terms.fold(0f32, |chain, (a, b)| a.mul_add(*b, chain))
        };
        sum + (chain(0) + chain(1))
    })
}

/// Products `x·wᵀ` in every form of every level, and on tiles in software.
fn products(x: &[f32], w: &[f32], depth: usize) -> Vec<(String, Vec<f32>)> {
    let pool = Pool::new(2);
    let (rows, cols) = (x.len() / depth, w.len() / depth);
    let mut all = Vec::new();
    for isa in Isa::available() {
        let mut forms = vec![Form::of(isa), Form::Values];
        #[cfg(target_arch = "x86_64")]
        if isa.has_bf16() {
            forms.push(Form::Pairs);
        }
        for form in forms {
            let mut out = vec![f32::NAN; rows * cols];
            product_rounded(
                isa,
                &mut out,
                &Rounded::in_form(form, isa, &pool, x, depth),
                w,
            );
            all.push((format!("{form:?} {}", isa.level()), out));
        }
        let a = Rounded {
            rows,
            cols: depth,
            form: Form::Values,
            words: pack::left::<Software>(isa, &pool, x, depth),
        };
        let mut out = vec![f32::NAN; rows * cols];
        multiply(isa, &mut Software, &mut out, &a, w);
        all.push((format!("software {}", isa.level()), out));
    }
    all
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Around the borders of tiles (8, 16, 32), steps (32), parts (512) and packed columns (128 and 256).
const SHAPES: [(usize, usize, usize); 13] = [
    (1, 1, 1),
    (1, 64, 200),
    (8, 32, 32),
    (9, 31, 31),
    (7, 33, 33),
    (17, 255, 64),
    (16, 47, 16),
    (33, 66, 49),
    (32, 512, 40),
    (3, 513, 260),
    (20, 700, 5),
    (2, 1100, 545),
    (65, 100, 1),
];

#[test]
fn products_have_the_bits_of_the_definition() {
    for (rows, depth, cols) in SHAPES {
        // Close to each other; far apart; and so small that products reach what the instructions would flush.
        for (range, scale) in [(3, 1.0), (40, 1.0), (20, f32::exp2(-45.0))] {
            let scaled = |len, seed| -> Vec<f32> {
                spread(len, seed, range).iter().map(|x| x * scale).collect()
            };
            let (x, w) = (scaled(rows * depth, 11), scaled(cols * depth, 12));
            let [a, b] = [&x, &w].map(|x| x.iter().map(|&x| round(x)).collect::<Vec<_>>());
            let lines = a
                .chunks(depth)
                .flat_map(|a| b.chunks(depth).map(move |b| (a, b)));
            let expected: Vec<f32> = lines.map(|(a, b)| sum(a, b)).collect();
            for (name, got) in products(&x, &w, depth) {
                assert_eq!(
                    bits(&got),
                    bits(&expected),
                    "{name}, {rows} x {depth} x {cols}"
                );
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    // One of them in each row of x but the first.
    let (depth, cols) = (70, 35);
    let odd = [0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
    let mut x = values(odd.len() * depth, 1);
    for (row, odd) in odd.into_iter().enumerate().skip(1) {
        x[row * depth + 37] = odd;
    }
    let w = vec![0.5; cols * depth];
    for (name, got) in products(&x, &w, depth) {
        let rows: Vec<&[f32]> = got.chunks(cols).collect();
        assert!(rows[0].iter().all(|y| y.is_finite()), "{name}");
        assert!(rows[1].iter().all(|&y| y == f32::INFINITY), "{name}");
        assert!(rows[2].iter().all(|&y| y == f32::NEG_INFINITY), "{name}");
        assert!(rows[3].iter().all(|y| y.is_nan()), "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn neighbours_do_not_matter(rows in 1usize..70, depth in 1usize..600, cols in 1usize..70, seed in 0u64..1000) {
        let (x, w) = (spread(rows * depth, seed, 12), spread(cols * depth, seed + 7, 12));
        let (row, col) = (seed as usize % rows, seed as usize % cols);
        let [a, b] = [(&x, row), (&w, col)]
            .map(|(x, line)| x[line * depth..][..depth].iter().map(|&x| round(x)).collect::<Vec<_>>());
        let expected = sum(&a, &b);
        for (name, got) in products(&x, &w, depth) {
            prop_assert_eq!(got[row * cols + col].to_bits(), expected.to_bits(), "{}", name);
        }
    }
}
