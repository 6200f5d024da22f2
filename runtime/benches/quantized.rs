//! Products of packed weights per instruction set and number of tokens, with weights in the L2 cache and in memory.
//!
//! The throughput printed in bytes is that of the packed weights (codes, scales, zero points). Next to it stand a
//! read of as many bytes, which bounds few tokens, and operations per second (one multiplication and one addition
//! per code and token), which bound many.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use qbin_format::{PackedMatrix, QuantizedMatrix, Scheme};
use qbin_runtime::kernels::{Activations, Columns, Isa, matmul};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Shapes `[rows, cols]` whose codes are in the L2 cache, and in memory beyond all caches.
const SHAPES: [(&str, usize, usize); 2] = [("l2", 512, 1024), ("memory", 32768, 4096)];

fn weights(bits: u8, rows: usize, cols: usize) -> PackedMatrix {
    let scheme = Scheme {
        bits,
        group_size: Some(128),
        symmetric: true,
    };
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let max = u8::MAX >> (8 - bits);
    PackedMatrix::pack(&QuantizedMatrix {
        scheme,
        rows,
        cols,
        codes: (0..rows * cols)
            .map(|_| rng.random_range(0..=max))
            .collect(),
        scales: vec![f16::from_f32(0.01); rows * scheme.groups(cols)],
        zero_points: Vec::new(),
    })
}

fn inputs(tokens: usize, cols: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    (0..tokens * cols)
        .map(|_| rng.random_range(-1.0..1.0))
        .collect()
}

/// The limit of few tokens.
fn read(criterion: &mut Criterion) {
    for (place, rows, cols) in SHAPES {
        let bytes = vec![1_u64; rows * cols / 16];
        let mut group = criterion.benchmark_group("read");
        group.throughput(Throughput::Bytes(8 * bytes.len() as u64));
        group.bench_function(place, |bencher| {
            bencher.iter(|| {
                black_box(&bytes)
                    .iter()
                    .fold(0_u64, |sum, word| sum.wrapping_add(*word))
            });
        });
    }
}

/// Few tokens, bound by reading the weights.
fn decode(criterion: &mut Criterion) {
    for (place, rows, cols) in SHAPES {
        for bits in [4, 8] {
            let packed = weights(bits, rows, cols);
            let w = packed.view();
            let mut group = criterion.benchmark_group(format!("decode/int{bits}/{place}"));
            group.throughput(Throughput::Bytes((w.codes.len() + w.scales.len()) as u64));
            for isa in Isa::available() {
                for tokens in [1, 2, 4] {
                    let x = Activations::quantize(isa, &inputs(tokens, cols), cols, w.scheme);
                    let mut out = vec![0.0; tokens * rows];
                    group.bench_function(format!("{}/{tokens}", isa.level()), |bencher| {
                        bencher.iter(|| {
                            matmul(isa, &w, 0..rows, &x, &mut Columns::whole(&mut out, rows))
                        });
                    });
                }
            }
        }
    }
}

/// Many tokens, bound by multiplying.
fn prefill(criterion: &mut Criterion) {
    for (rows, cols) in [(2048, 2048), (8192, 2048), (2048, 8192)] {
        for bits in [4, 8] {
            let packed = weights(bits, rows, cols);
            let w = packed.view();
            let mut group = criterion.benchmark_group(format!("prefill/int{bits}/{rows}x{cols}"));
            for isa in Isa::available() {
                for tokens in [8, 32, 512] {
                    let x = Activations::quantize(isa, &inputs(tokens, cols), cols, w.scheme);
                    // As many rows at a time as in a forward pass.
                    let chunk = if tokens * cols > 1 << 20 { 256 } else { 128 };
                    let mut room = vec![0.0; Columns::room(tokens, chunk) + 16];
                    let start = room.as_ptr().align_offset(64);
                    let room = &mut room[start..][..Columns::room(tokens, chunk)];
                    group.throughput(Throughput::Elements(2 * (tokens * rows * cols) as u64));
                    group.bench_function(format!("{}/{tokens}", isa.level()), |bencher| {
                        bencher.iter(|| {
                            for first in (0..rows).step_by(chunk) {
                                let mut out = Columns::in_room(room, tokens, chunk);
                                matmul(isa, &w, first..first + chunk, &x, &mut out);
                            }
                        });
                    });
                }
            }
        }
    }
}

/// int8 codes of 512 tokens.
fn quantize(criterion: &mut Criterion) {
    let cols = 2048;
    let x = inputs(512, cols);
    let scheme = Scheme {
        bits: 4,
        group_size: Some(128),
        symmetric: true,
    };
    let mut group = criterion.benchmark_group("activations");
    group.throughput(Throughput::Elements(x.len() as u64));
    for isa in Isa::available() {
        group.bench_function(isa.level().name(), |bencher| {
            bencher.iter(|| Activations::quantize(isa, black_box(&x), cols, scheme));
        });
    }
}

criterion_group!(benches, read, decode, prefill, quantize);
criterion_main!(benches);
