//! Stages of GPTQ on one block of the 1B shape, on one thread, without forward passes: `cargo bench -p qbin-quant`.
//!
//! INT4 in groups of 128 with zero points; 65536 tokens, of which 8192 are measured and multiplied. Sites by name limit
//! it to those: `cargo bench -p qbin-quant -- down`.
#![allow(clippy::print_stdout)] // The table is what it is run for.

use std::hint::black_box;
use std::time::Instant;

use qbin_quant::{Factor, GptqParams, Granularity, Grid, Moments, ScaleSearch};

/// Tokens of a batch of a walk.
const BATCH: usize = 2048;
/// Batches measured at once: [`Moments`] sums so many together.
const TOGETHER: usize = 4;
/// Batches of 128 windows of 512 tokens.
const BATCHES: usize = 32;
/// Measurements, of which the best counts.
const REPEAT: usize = 2;

/// Linears that share their inputs.
struct Site {
    name: &'static str,
    features: usize,
    /// Output features of each.
    rows: &'static [usize],
}

const SITES: [Site; 4] = [
    Site {
        name: "qkv",
        features: 2048,
        rows: &[2048, 512, 512],
    },
    Site {
        name: "o",
        features: 2048,
        rows: &[2048],
    },
    Site {
        name: "gate-up",
        features: 2048,
        rows: &[8192, 8192],
    },
    Site {
        name: "down",
        features: 8192,
        rows: &[2048],
    },
];

/// Seconds of each stage.
const STAGES: [&str; 5] = ["hessian", "factor", "sweep", "scale search", "refinement"];

/// Seeded, about normal.
fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let sum = |_| uniform() + uniform() + uniform() + uniform();
    (0..len).map(sum).collect()
}

fn seconds<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    let result = work();
    (result, start.elapsed().as_secs_f64())
}

/// The stages of one site: the search and the refinement are what a run with them takes longer than one without.
fn measure(site: &Site) -> [f64; STAGES.len()] {
    let n = site.features;
    let mut moments = Moments::new(n);
    let mut best = f64::INFINITY;
    for repeat in 0..REPEAT {
        // As many different tokens as a regular Hessian needs.
        let batch = |i| values(BATCH * n, (TOGETHER * repeat + i) as u64);
        let batches: [Vec<f32>; TOGETHER] = std::array::from_fn(batch);
        let (_, time) = seconds(|| {
            for x in &batches {
                moments.add(black_box(x)).expect("finite");
            }
        });
        best = best.min(time);
    }
    let hessian = best * (BATCHES / TOGETHER) as f64;
    let grid = Grid {
        bits: 4,
        symmetric: false,
        granularity: Granularity::Group(128),
        search: ScaleSearch::Weighted,
    };
    let params = GptqParams::new(grid);
    let plain = GptqParams {
        refine_sweeps: 0,
        ..params
    };
    let copy = moments.clone();
    let (factor, time) = seconds(|| Factor::new(copy, &plain));
    let mut stages = [hessian, time, 0.0, 0.0, 0.0];
    let factor = factor.expect("valid");
    let refining = Factor::new(moments, &params).expect("valid");
    let unsearched = Grid {
        search: ScaleSearch::None,
        ..grid
    };
    for (linear, &rows) in site.rows.iter().enumerate() {
        let weight = values(rows * n, 100 + linear as u64);
        let run = |factor: &Factor, grid| {
            let (done, time) = seconds(|| factor.quantize(black_box(&weight), rows, grid));
            black_box(done.expect("finite"));
            time
        };
        let (sweep, searched) = (run(&factor, &unsearched), run(&factor, &grid));
        stages[2] += sweep;
        stages[3] += searched - sweep;
        stages[4] += run(&refining, &grid) - searched;
    }
    stages
}

fn print(name: &str, stages: &[f64]) {
    let all: f64 = stages.iter().sum();
    let cells: String = stages.iter().map(|time| format!("{time:>14.2}")).collect();
    println!("{name:<8}{cells}{all:>14.2}");
}

fn main() {
    let asked: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .collect();
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build()
        .expect("one thread");
    let names: String = STAGES.iter().map(|name| format!("{name:>14}")).collect();
    println!("{:<8}{names}{:>14}", "seconds", "all");
    let mut total = [0f64; STAGES.len()];
    for site in SITES {
        if !asked.is_empty() && !asked.iter().any(|asked| asked == site.name) {
            continue;
        }
        let stages = pool.install(|| measure(&site));
        print(site.name, &stages);
        for (total, time) in total.iter_mut().zip(stages) {
            *total += time;
        }
    }
    print("block", &total);
}
