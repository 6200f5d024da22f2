//! Dense products and moments at every instruction set of this machine, on one thread: `cargo bench -p qbin-runtime
//! --bench gemm`. An element is one multiply-add, so `Gelem/s` is half of GFLOP/s.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use qbin_runtime::kernels::gemm::{Element, Rounded, Store, View, product, product_rounded};
use qbin_runtime::kernels::gram::{self, Slab};
use qbin_runtime::kernels::{Isa, Pool};

/// Rows, depth and columns: a slab of tokens through a panel of weights, a square, and the feedback of a sweep.
const SHAPES: [(usize, usize, usize); 4] = [
    (512, 2048, 2048),
    (1024, 2048, 128),
    (1024, 1024, 1024),
    (128, 4096, 128),
];
/// Tokens and features of a slab.
const SLABS: [(usize, usize); 2] = [(2048, 1024), (2048, 4096)];

fn values<T: From<f32>>(len: usize) -> Vec<T> {
    (0..len)
        .map(|i| T::from((i * 7919 % 1013) as f32 - 506.0))
        .collect()
}

fn products<T: Element + From<f32>>(c: &mut Criterion, name: &str) {
    let mut group = c.benchmark_group(name);
    group.sample_size(10);
    for (rows, depth, cols) in SHAPES {
        let (x, w): (Vec<T>, Vec<T>) = (values(rows * depth), values(depth * cols));
        let mut out = vec![T::default(); rows * cols];
        group.throughput(Throughput::Elements((rows * depth * cols) as u64));
        for isa in Isa::available() {
            let (x, w) = (
                View::row_major(&x, rows, depth),
                View::row_major(&w, cols, depth),
            );
            group.bench_function(format!("{rows}x{depth}x{cols}/{}", isa.level()), |b| {
                b.iter(|| {
                    product(
                        isa,
                        &mut out,
                        cols,
                        Store::Replace,
                        black_box(x),
                        w.transpose(),
                    )
                });
            });
        }
    }
}

fn rounded(c: &mut Criterion) {
    let mut group = c.benchmark_group("bf16");
    group.sample_size(10);
    let pool = Pool::new(1);
    for (rows, depth, cols) in SHAPES {
        let (x, w): (Vec<f32>, Vec<f32>) = (values(rows * depth), values(depth * cols));
        // Where a forward pass has it, at the beginning of a cache line.
        let mut room = vec![0.0; rows * cols + 16];
        let start = room.as_ptr().align_offset(64);
        let out = &mut room[start..start + rows * cols];
        group.throughput(Throughput::Elements((rows * depth * cols) as u64));
        for isa in Isa::available() {
            let x = Rounded::new(isa, &pool, &x, depth);
            group.bench_function(format!("{rows}x{depth}x{cols}/{}", isa.level()), |b| {
                b.iter(|| product_rounded(isa, out, black_box(&x), &w));
            });
        }
    }
}

fn moments(c: &mut Criterion) {
    let mut group = c.benchmark_group("moments");
    group.sample_size(10);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .expect("one thread");
    for (tokens, features) in SLABS {
        let x: Vec<f32> = values(tokens * features);
        let mut second = vec![0f64; features * features];
        group.throughput(Throughput::Elements(
            (tokens * features * features / 2) as u64,
        ));
        for isa in Isa::available() {
            group.bench_function(format!("{tokens}x{features}/{}", isa.level()), |b| {
                b.iter(|| {
                    pool.install(|| {
                        let slab = Slab::new(isa, black_box(&x), features);
                        gram::add(isa, &[slab], &mut second);
                    });
                });
            });
        }
    }
}

fn all(c: &mut Criterion) {
    products::<f32>(c, "f32");
    products::<f64>(c, "f64");
    rounded(c);
    moments(c);
}

criterion_group!(benches, all);
criterion_main!(benches);
