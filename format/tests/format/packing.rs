//! The tile layout, against a second packer written from `docs/format.md`.

use crate::common::random_matrix;
use half::f16;
use proptest::prelude::*;
use qbin_format::{PackedMatrix, QuantizedMatrix, Scheme};

/// Codes, scales and zero points of the documented layout, one element at a time.
fn slow_pack(m: &QuantizedMatrix) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
    let (panels, tiles) = (m.rows.div_ceil(16), m.cols.div_ceil(64));
    let group_size = m.scheme.group_size.unwrap_or(m.cols);
    let groups = m.cols.div_ceil(group_size);
    let mid = 1 << (m.scheme.bits - 1);
    let zero_point = |n: usize, g: usize| match n < m.rows && !m.scheme.symmetric {
        true => m.zero_points[n * groups + g],
        false => mid,
    };
    let tile_bytes = if m.scheme.bits == 4 { 512 } else { 1024 };
    let mut codes = vec![0u8; panels * tiles * tile_bytes];
    for n in 0..panels * 16 {
        for k in 0..tiles * 64 {
            let code = match (n < m.rows, k < m.cols) {
                (true, true) => m.codes[n * m.cols + k],
                (true, false) => zero_point(n, groups - 1),
                (false, _) => mid,
            };
            let (p, r, t, c) = (n / 16, n % 16, k / 64, k % 64);
            let tile = (p * tiles + t) * tile_bytes;
            if m.scheme.bits == 8 {
                codes[tile + 64 * (c / 4) + 4 * r + c % 4] = code;
            } else if (c / 4) % 2 == 0 {
                codes[tile + 64 * (c / 8) + 4 * r + c % 4] |= code;
            } else {
                codes[tile + 64 * (c / 8) + 4 * r + c % 4] |= code << 4;
            }
        }
    }
    let (mut scales, mut zero_points) = (Vec::new(), Vec::new());
    for p in 0..panels {
        for g in 0..groups {
            for n in 16 * p..16 * p + 16 {
                let scale = if n < m.rows {
                    m.scales[n * groups + g]
                } else {
                    f16::ZERO
                };
                scales.extend(scale.to_bits().to_le_bytes());
                if !m.scheme.symmetric {
                    zero_points.push(zero_point(n, g));
                }
            }
        }
    }
    (codes, scales, zero_points)
}

pub(crate) fn schemes() -> impl Strategy<Value = Scheme> {
    let groups = prop_oneof![
        Just(None),
        Just(Some(32)),
        Just(Some(64)),
        Just(Some(128)),
        (1usize..200).prop_map(Some)
    ];
    (prop_oneof![Just(4u8), Just(8)], groups, any::<bool>()).prop_map(
        |(bits, group_size, symmetric)| crate::common::scheme(bits, group_size, symmetric),
    )
}

proptest! {
    #[test]
    fn packing_is_what_the_document_says(
        scheme in schemes(), rows in 1usize..50, cols in 1usize..300, seed: u64
    ) {
        let matrix = random_matrix(scheme, rows, cols, seed);
        let packed = PackedMatrix::pack(&matrix);
        let view = packed.view();
        let (codes, scales, zero_points) = slow_pack(&matrix);
        prop_assert_eq!(view.codes, codes);
        prop_assert_eq!(view.scales, scales);
        prop_assert_eq!(view.zero_points, zero_points);
        prop_assert_eq!(view.unpack(), matrix);
    }

    #[test]
    fn rows_are_dequantized_as_in_the_plain_form(
        scheme in schemes(), rows in 1usize..40, cols in 1usize..200, seed: u64, cut in 0.0f64..1.0
    ) {
        let matrix = random_matrix(scheme, rows, cols, seed);
        let packed = PackedMatrix::pack(&matrix);
        let first = (cut * rows as f64) as usize;
        let mut out = vec![f32::NAN; (rows - first) * cols];
        packed.view().read_f32(first..rows, &mut out);
        let expected = matrix.dequantize();
        prop_assert_eq!(&out, &expected[first * cols..]);
    }
}

#[test]
#[should_panic(expected = "a code is above 15")]
fn a_code_of_too_many_bits_is_refused() {
    let mut matrix = random_matrix(crate::common::scheme(4, None, true), 1, 4, 0);
    matrix.codes[3] = 16;
    PackedMatrix::pack(&matrix);
}
