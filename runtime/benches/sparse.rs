//! Products of sparse weights against dense ones, one token, with weights in the L2 cache and in memory beyond all caches.
//!
//! The throughput counts weights, so that encodings can be compared: dense INT4 takes 4.125 bits of each, a bitmask of
//! half of them 3.14, two of four 2.875 (INT8: 8.125, 5.14, 4.875).

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use qbin_format::{Encoding, PackedMatrix, QuantizedMatrix, Scheme};
use qbin_runtime::kernels::{Activations, Columns, Isa, matmul};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Rows of weights in the L2 cache (at most 0.5 MB), and in memory (at least 96 MB).
const ROWS: [(&str, usize); 2] = [("l2", 256), ("memory", 131072)];
const COLS: usize = 2048;

/// Two of each four columns are not zero, at random places.
fn weights(bits: u8, rows: usize) -> QuantizedMatrix {
    let scheme = Scheme {
        bits,
        group_size: Some(128),
        symmetric: true,
    };
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut codes = vec![scheme.mid(); rows * COLS];
    for four in codes.as_chunks_mut::<4>().0 {
        let first = rng.random_range(0..4);
        let second = (first + rng.random_range(1..4)) % 4;
        for at in [first, second] {
            four[at] = rng.random_range(0..scheme.mid());
        }
    }
    QuantizedMatrix {
        scheme,
        rows,
        cols: COLS,
        codes,
        scales: vec![f16::from_f32(0.01); rows * scheme.groups(COLS)],
        zero_points: Vec::new(),
    }
}

fn decode(criterion: &mut Criterion) {
    let x: Vec<f32> = (0..COLS).map(|i| (i as f32).sin()).collect();
    for ((place, rows), bits) in ROWS
        .into_iter()
        .flat_map(|rows| [4, 8].map(|bits| (rows, bits)))
    {
        let matrix = weights(bits, rows);
        let packed = Encoding::ALL
            .map(|encoding| PackedMatrix::pack_as(&matrix, encoding).expect("two of four"));
        let mut group = criterion.benchmark_group(format!("sparse/int{bits}/{place}"));
        group.throughput(Throughput::Elements((rows * COLS) as u64));
        for isa in Isa::available() {
            for packed in &packed {
                let w = packed.view();
                let x = Activations::quantize(isa, &x, COLS, w.scheme);
                let mut out = vec![0.0; rows];
                let name = format!("{}/{:?}", isa.level(), w.sparsity.encoding());
                group.bench_function(name, |bencher| {
                    bencher
                        .iter(|| matmul(isa, &w, 0..rows, &x, &mut Columns::whole(&mut out, rows)));
                });
            }
        }
    }
}

criterion_group!(benches, decode);
criterion_main!(benches);
