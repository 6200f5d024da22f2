//! The sparse encodings, against a second packer written from `docs/format.md`.

use std::path::Path;

use proptest::prelude::*;
use qbin_format::{
    Artifact, ArtifactWriter, Encoding, Fate, Manifest, PackedMatrix, Planned, QuantizedMatrix,
    QuantizedView, Sparsity,
};

use crate::common::{Seeded, entry, random_matrix, scheme};
use crate::packing::schemes;

/// Zero point of the group that column `k` of row `n` is in; right of the matrix that of the last group.
fn zero_point(m: &QuantizedMatrix, n: usize, k: usize) -> u8 {
    if m.scheme.symmetric || n >= m.rows {
        return 1 << (m.scheme.bits - 1);
    }
    let groups = m.scheme.groups(m.cols);
    m.zero_points[n * groups + m.scheme.group_of(k.min(m.cols - 1))]
}

/// Makes every weight zero that `keep` does not want, and every other one not zero.
fn zero_all_but(m: &mut QuantizedMatrix, mut keep: impl FnMut(usize, usize) -> bool) {
    for n in 0..m.rows {
        for k in 0..m.cols {
            let zero = zero_point(m, n, k);
            let code = &mut m.codes[n * m.cols + k];
            match keep(n, k) {
                true if *code == zero => *code ^= 1,
                true => {}
                false => *code = zero,
            }
        }
    }
}

/// Which weights are not zero.
#[derive(Clone, Copy, Debug)]
enum Pattern {
    /// Each with this chance in 256.
    Random(u64),
    /// Two of each four columns.
    TwoOfFour,
    /// One in the whole matrix.
    One,
    /// A row of zeros and a dense one, in turn.
    Rows,
}

fn sparse_matrix(
    scheme: qbin_format::Scheme,
    rows: usize,
    cols: usize,
    pattern: Pattern,
    seed: u64,
) -> QuantizedMatrix {
    let mut m = random_matrix(scheme, rows, cols, seed);
    let mut seeded = Seeded::new(seed);
    let one = (
        seeded.below(rows as u64) as usize,
        seeded.below(cols as u64) as usize,
    );
    let pairs = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]];
    let mut pair = [0, 0];
    zero_all_but(&mut m, |n, k| match pattern {
        Pattern::Random(chance) => seeded.below(256) < chance,
        Pattern::One => (n, k) == one,
        Pattern::Rows => n % 2 == 1,
        Pattern::TwoOfFour => {
            if k % 4 == 0 {
                pair = pairs[seeded.below(6) as usize];
            }
            pair.contains(&(k % 4))
        }
    });
    m
}

/// The code at a row and column of a matrix, and whether it is not zero; all padding is zero.
fn code(m: &QuantizedMatrix, n: usize, k: usize) -> (u8, bool) {
    let zero = zero_point(m, n, k);
    let code = match n < m.rows && k < m.cols {
        true => m.codes[n * m.cols + k],
        false => zero,
    };
    (code, code != zero)
}

/// Codes, masks and offsets of the documented encodings, one weight at a time; `None` if they cannot hold it.
fn slow_encode(m: &QuantizedMatrix, encoding: Encoding) -> Option<(Vec<u8>, Vec<u8>, Vec<u64>)> {
    match encoding {
        Encoding::TwoOfFour => slow_two_of_four(m),
        _ => Some(slow_bitmask(m)),
    }
}

fn slow_bitmask(m: &QuantizedMatrix) -> (Vec<u8>, Vec<u8>, Vec<u64>) {
    let (panels, tiles) = (m.rows.div_ceil(16), m.cols.div_ceil(64));
    let (mut codes, mut masks, mut offsets) = (Vec::new(), Vec::new(), vec![0]);
    for p in 0..panels {
        let mut streams = [Vec::new(), Vec::new()];
        for quad in 0..tiles * 16 {
            let stream = &mut streams[if m.scheme.bits == 4 { quad % 2 } else { 0 }];
            let mut mask = 0u64;
            for i in 0..64 {
                let (code, kept) = code(m, 16 * p + i / 4, 4 * quad + i % 4);
                mask |= u64::from(kept) << i;
                stream.extend(kept.then_some(code));
            }
            masks.extend(mask.to_le_bytes());
        }
        let [low, high] = streams;
        let nth = |codes: &[u8], i: usize| codes.get(i).copied().unwrap_or(0);
        let panel = (0..low.len().max(high.len())).map(|i| nth(&low, i) | nth(&high, i) << 4);
        codes.extend(panel);
        offsets.push(codes.len() as u64);
    }
    codes.resize(codes.len() + 128 * usize::from(m.scheme.bits), 0);
    (codes, masks, offsets)
}

/// The two columns of four that are stored, and their codes.
fn two_of(m: &QuantizedMatrix, n: usize, quad: usize) -> Option<[(usize, u8); 2]> {
    let columns = || 0..4;
    let kept = |&k: &usize| code(m, n, 4 * quad + k).1;
    let mut two: Vec<usize> = columns().filter(kept).collect();
    let missing = 2usize.checked_sub(two.len())?;
    two.extend(columns().filter(|k| !kept(k)).take(missing));
    two.sort();
    Some([two[0], two[1]].map(|k| (k, code(m, n, 4 * quad + k).0)))
}

/// A block as one string of bits, written as the document says.
fn slow_two_of_four(m: &QuantizedMatrix) -> Option<(Vec<u8>, Vec<u8>, Vec<u64>)> {
    let (panels, tiles) = (m.rows.div_ceil(16), m.cols.div_ceil(64));
    let block_bytes = if m.scheme.bits == 4 { 704 } else { 1216 };
    let mut stored = Vec::new();
    for (p, block) in (0..panels).flat_map(|p| (0..tiles.div_ceil(2)).map(move |block| (p, block)))
    {
        let mut bits = vec![false; 8 * block_bytes];
        let mut put = |first: usize, value: u8, len: usize| {
            for i in 0..len {
                bits[first + i] = value >> i & 1 == 1;
            }
        };
        for (quad, row) in (0..32).flat_map(|quad| (0..16).map(move |row| (quad, row))) {
            if 2 * block + quad / 16 >= tiles {
                continue;
            }
            let [(first, a), (second, b)] = two_of(m, 16 * p + row, 32 * block + quad)?;
            let three = [
                (0, 2),
                (1, 2),
                (0, 1),
                (9, 9),
                (0, 3),
                (1, 3),
                (9, 9),
                (2, 3),
            ];
            let three = three.iter().position(|&two| two == (first, second));
            let three = three.expect("columns in order") as u8;
            for i in 0..3 {
                let twelve = 6 * (row % 2) + 3 * (quad % 2) + i;
                let (vector, bit) = match quad / 2 {
                    15 => (twelve / 4, 60 + twelve % 4),
                    two_quads => (two_quads / 5, 12 * (two_quads % 5) + twelve),
                };
                put(512 * vector + 64 * (row / 2) + bit, three >> i & 1, 1);
            }
            let codes = 3 * 512 + 32 * row + 16 * (quad % 2);
            match m.scheme.bits {
                8 => {
                    put(codes + 512 * (quad / 2), a, 8);
                    put(codes + 512 * (quad / 2) + 8, b, 8);
                }
                _ => {
                    let nibble = codes + 512 * (quad / 4) + 4 * (quad % 4 / 2);
                    put(nibble, a, 4);
                    put(nibble + 8, b, 4);
                }
            }
        }
        let byte = |bits: &[bool]| (0..8).map(|i| u8::from(bits[i]) << i).sum::<u8>();
        stored.extend(bits.chunks(8).map(byte));
    }
    Some((stored, Vec::new(), Vec::new()))
}

fn check_encoding(m: &QuantizedMatrix, encoding: Encoding, view: &QuantizedView<'_>) {
    let (codes, masks, offsets) = slow_encode(m, encoding).expect("it fits");
    assert_eq!(view.codes, codes);
    match view.sparsity {
        Sparsity::Bitmask {
            masks: got,
            offsets: places,
        } => {
            assert_eq!(got, masks);
            let (places, _) = places.as_chunks();
            assert!(places.iter().map(|b| u64::from_le_bytes(*b)).eq(offsets));
        }
        Sparsity::TwoOfFour => {}
        Sparsity::Dense => panic!("encoded densely"),
    }
    assert_eq!(view.unpack(), *m);
}

fn patterns() -> impl Strategy<Value = Pattern> {
    prop_oneof![
        (0u64..=256).prop_map(Pattern::Random),
        Just(Pattern::TwoOfFour),
        Just(Pattern::One),
        Just(Pattern::Rows),
    ]
}

proptest! {
    #[test]
    fn encodings_are_what_the_document_says(
        scheme in schemes(), rows in 1usize..50, cols in 1usize..300, pattern in patterns(), seed: u64
    ) {
        let m = sparse_matrix(scheme, rows, cols, pattern, seed);
        for encoding in [Encoding::Bitmask, Encoding::TwoOfFour] {
            let packed = PackedMatrix::pack_as(&m, encoding);
            prop_assert_eq!(packed.is_some(), slow_encode(&m, encoding).is_some());
            if let Some(packed) = packed {
                prop_assert_eq!(packed.view().sparsity.encoding(), encoding);
                check_encoding(&m, encoding, &packed.view());
                let mut row = vec![f32::NAN; cols];
                packed.view().read_f32(rows - 1..rows, &mut row);
                prop_assert_eq!(&row, &m.dequantize()[(rows - 1) * cols..]);
            }
        }
    }

    /// What the writer stores is what `pack_smallest` makes, and it is never larger than another encoding by more than
    /// the eighth that a sparse one must save.
    #[test]
    fn the_writer_takes_the_smallest(
        scheme in schemes(), rows in 1usize..50, cols in 1usize..300, pattern in patterns(), seed: u64, cut in 0usize..4
    ) {
        let folder = tempfile::tempdir().expect("temp folder");
        let path = folder.path().join("m.qbin");
        let m = sparse_matrix(scheme, rows, cols, pattern, seed);
        let first = (16 * cut).min(rows / 16 * 16);
        write(&path, &[("w", &m)], first);
        let artifact = Artifact::open(&path).expect("open");
        let view = artifact.quantized("w").expect("quantized");
        prop_assert_eq!(view.unpack(), m.clone());
        let packed = PackedMatrix::pack_smallest(&m);
        prop_assert_eq!(view.sparsity.encoding(), packed.view().sparsity.encoding());
        prop_assert_eq!(view.codes, packed.view().codes);
        let dense = size(&PackedMatrix::pack(&m).view());
        for encoding in [Encoding::Bitmask, Encoding::TwoOfFour] {
            if let Some(other) = PackedMatrix::pack_as(&m, encoding) {
                let other = size(&other.view());
                prop_assert!(size(&view) <= other || (size(&view) == dense && other > dense - dense / 8));
            }
        }
    }
}

/// Bytes of codes, masks and offsets.
fn size(view: &QuantizedView<'_>) -> usize {
    let more = match view.sparsity {
        Sparsity::Dense | Sparsity::TwoOfFour => 0,
        Sparsity::Bitmask { masks, offsets } => masks.len() + offsets.len(),
    };
    view.codes.len() + more
}

/// Writes an artifact of these matrices, each in two pieces where `first_rows` is not 0, the last one first.
pub(crate) fn write(path: &Path, matrices: &[(&str, &QuantizedMatrix)], first_rows: usize) {
    let planned = matrices.iter().map(|(name, m)| Planned::Quantized {
        name: (*name).to_owned(),
        scheme: m.scheme,
        rows: m.rows,
        cols: m.cols,
    });
    let mut manifest = Manifest::default();
    for (name, m) in matrices {
        let fate = Fate::quantized(m.scheme, "rtn");
        let entry = entry(fate, &[m.rows, m.cols]);
        manifest.tensors.insert((*name).to_owned(), entry);
    }
    let mut writer =
        ArtifactWriter::create(path, planned.collect(), manifest.planned_bytes()).expect("create");
    for (name, m) in matrices.iter().rev() {
        for rows in [0..first_rows, first_rows..m.rows] {
            if !rows.is_empty() {
                let part = crate::artifact::rows_of(m, rows.clone());
                let written = writer.write_quantized_rows(name, rows.start, &part);
                written.expect("write");
            }
        }
    }
    let entries = writer.finish(manifest).expect("finish").entries;
    assert_eq!(entries.len(), matrices.len());
}

/// Stored bits per weight of a large matrix, scales included.
fn bits_per_weight(bits: u8, group: Option<usize>, pattern: Pattern) -> (Encoding, f64) {
    let m = sparse_matrix(scheme(bits, group, true), 512, 2048, pattern, 5);
    let packed = PackedMatrix::pack_smallest(&m);
    let view = packed.view();
    let bytes = size(&view) + view.scales.len();
    let bits = 8.0 * bytes as f64 / (m.rows * m.cols) as f64;
    (view.sparsity.encoding(), bits)
}

#[test]
fn half_of_the_weights_take_three_quarters_of_the_bytes() {
    // (bits, pattern, encoding, bits per weight, rounded up)
    let half = Pattern::Random(128);
    let cases = [
        (4, half, Encoding::Bitmask, 3.145),
        (8, half, Encoding::Bitmask, 5.14),
        (4, Pattern::TwoOfFour, Encoding::TwoOfFour, 2.88),
        (8, Pattern::TwoOfFour, Encoding::TwoOfFour, 4.88),
        (4, Pattern::Random(256), Encoding::Dense, 4.13),
    ];
    for (bits, pattern, encoding, expected) in cases {
        let (got, size) = bits_per_weight(bits, Some(128), pattern);
        assert_eq!(got, encoding);
        let range = expected - 0.01..=expected;
        assert!(
            range.contains(&size),
            "{size} bits per weight, expected {range:?}"
        );
    }
}

#[test]
fn an_artifact_of_several_encodings_closes_its_gaps() {
    let folder = tempfile::tempdir().expect("temp folder");
    let path = folder.path().join("m.qbin");
    let matrices = [
        sparse_matrix(scheme(4, Some(32), false), 40, 300, Pattern::Random(100), 1),
        sparse_matrix(scheme(8, None, true), 33, 256, Pattern::Random(256), 2),
        sparse_matrix(scheme(8, Some(64), true), 64, 256, Pattern::TwoOfFour, 3),
        sparse_matrix(scheme(4, Some(64), true), 64, 200, Pattern::One, 4),
    ];
    let named: Vec<(&str, &QuantizedMatrix)> =
        ["a", "b", "c", "d"].into_iter().zip(&matrices).collect();
    write(&path, &named, 16);
    let artifact = Artifact::open(&path).expect("open");
    artifact.verify(&mut |_| ()).expect("verify");
    let encodings = named.iter().map(|(name, m)| {
        let view = artifact.quantized(name).expect("quantized");
        assert_eq!(view.unpack(), **m);
        assert_eq!(view.codes.as_ptr().align_offset(64), 0);
        view.sparsity.encoding()
    });
    let expected = [
        Encoding::Bitmask,
        Encoding::Dense,
        Encoding::TwoOfFour,
        Encoding::Bitmask,
    ];
    assert!(encodings.eq(expected));
    let manifest = artifact.manifest();
    assert_eq!(
        manifest.required_features,
        ["sparse.2of4", "sparse.bitmask"]
    );
    let fate = &manifest.tensors["c"].fate;
    assert!(matches!(fate, Fate::Quantized { encoding, .. } if encoding == "int8.t16x64.2of4"));

    // The order of writing makes no difference, nor do the pieces.
    let again = folder.path().join("again.qbin");
    write(&again, &named, 0);
    let read = |path| std::fs::read(path).expect("read");
    assert!(read(&path) == read(&again));
}
