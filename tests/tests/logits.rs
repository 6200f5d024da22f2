//! Logits of the reference path against `transformers`, for every family and for a real model.

use qbin_format::Model;
use qbin_runtime::{Decoder, Parts};
use qbin_tests::close::assert_max_rel;
use qbin_tests::run::{Lab, copy_folder};
use qbin_tests::{golden, numbers, reference_cpu, root};
use std::path::Path;

/// Largest difference allowed, relative to the largest logit.
const TOLERANCE: f64 = 1e-4;
/// Families with every difference there is: biases, tied heads, sliding windows, norms on q and k.
const RANDOM_MODELS: [&str; 9] = [
    "llama2",
    "llama3",
    "llama3-old-keys",
    "mistral",
    "mistral-window",
    "qwen2",
    "qwen2-tied-old-keys",
    "qwen3",
    "qwen3-tied",
];

fn with_decoder<T>(folder: &Path, work: impl FnOnce(&Decoder<'_>) -> T) -> T {
    let model = Model::open(folder).expect("a model of the repository");
    let parts = Parts::new(&model, &reference_cpu()).expect("a config that is supported");
    work(&Decoder::new(&parts).expect("finite weights"))
}

fn check(name: &str) {
    let golden = golden(&format!("logits/{name}.json"));
    let tokens: Vec<u32> = numbers(&golden["tokens"])
        .into_iter()
        .map(|id| id as u32)
        .collect();
    let positions: Vec<usize> = numbers(&golden["positions"])
        .into_iter()
        .map(|at| at as usize)
        .collect();
    let expected: Vec<f32> = numbers(&golden["logits"])
        .into_iter()
        .map(|logit| logit as f32)
        .collect();
    let folder = root().join(golden["model"].as_str().expect("the model's folder"));
    with_decoder(&folder, |decoder| {
        let width = decoder.config().hidden_size;
        let at = |hidden: &[f32]| -> Vec<f32> {
            positions
                .iter()
                .flat_map(|&p| hidden[p * width..(p + 1) * width].to_vec())
                .collect()
        };
        let whole = decoder
            .forward(&[&tokens], None)
            .expect("ids of the vocabulary");
        assert_max_rel(&decoder.logits(&at(&whole)), &expected, TOLERANCE, name);
        // The same in three steps through the cache.
        let mut cache = [decoder.cache(tokens.len())];
        let (first, rest) = tokens.split_at(tokens.len() / 2);
        let (second, last) = rest.split_at(1);
        let mut cached = Vec::new();
        for part in [first, second, last] {
            cached.extend(
                decoder
                    .forward(&[part], Some(&mut cache))
                    .expect("ids of the vocabulary"),
            );
        }
        assert_max_rel(
            &decoder.logits(&at(&cached)),
            &expected,
            TOLERANCE,
            &format!("{name}, cached"),
        );
    });
}

#[test]
fn every_family_agrees() {
    RANDOM_MODELS.iter().for_each(|name| check(name));
}

#[test]
fn a_trained_model_agrees() {
    check("tiny-1m");
}

#[test]
fn sequences_of_a_batch_do_not_see_each_other() {
    with_decoder(
        &root().join("tests/golden/models/mistral-window"),
        |decoder| {
            let (a, b): (Vec<u32>, Vec<u32>) = ((1..20).collect(), (30..37).collect());
            let both = decoder
                .forward(&[&a, &b], None)
                .expect("ids of the vocabulary");
            let alone = [&a, &b]
                .map(|ids| {
                    decoder
                        .forward(&[ids.as_slice()], None)
                        .expect("ids of the vocabulary")
                })
                .concat();
            assert_max_rel(&both, &alone, TOLERANCE, "batch");
        },
    );
}

#[test]
fn a_truncated_cache_goes_on_as_if_nothing_had_followed() {
    with_decoder(&root().join("tests/golden/models/qwen3"), |decoder| {
        let tokens: Vec<u32> = (5..25).collect();
        let mut cache = [decoder.cache(0)];
        decoder
            .forward(&[&tokens[..10]], Some(&mut cache))
            .expect("ids of the vocabulary");
        decoder
            .forward(&[&[90, 91, 92]], Some(&mut cache))
            .expect("ids of the vocabulary");
        cache[0].truncate(10);
        let rest = decoder
            .forward(&[&tokens[10..]], Some(&mut cache))
            .expect("ids of the vocabulary");
        let whole = decoder
            .forward(&[&tokens], None)
            .expect("ids of the vocabulary");
        assert_max_rel(
            &rest,
            &whole[whole.len() - rest.len()..],
            TOLERANCE,
            "after truncation",
        );
    });
}

/// Root mean square change allowed, relative to the logits': these models amplify a change of their weights some
/// fifty times, so eight bits are felt; a scale folded into the wrong place, a forgotten bias or a swapped head
/// makes other logits altogether (a ratio near 1).
const INT8_TOLERANCE: f64 = 0.1;

fn relative_rms(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (difference / b.iter().map(|&b| square(b)).sum::<f64>()).sqrt()
}

#[test]
fn every_family_survives_eight_bits() {
    let lab = Lab::new(env!("CARGO_BIN_EXE_qbin-under-test"));
    let ids: Vec<i32> = (0..16 * 64).map(|at| at * 7919 % 96).collect();
    lab.write_npy("ids.npy", 64, &ids);
    let tokens: Vec<u32> = (0..40).map(|at| at * 37 % 96).collect();
    for name in RANDOM_MODELS {
        let folder = root().join("tests/golden/models").join(name);
        let logits = |path: &Path| {
            with_decoder(path, |decoder| {
                let hidden = decoder
                    .forward(&[&tokens], None)
                    .expect("ids of the vocabulary");
                decoder.logits(&hidden)
            })
        };
        let original = logits(&folder);
        copy_folder(&folder, &lab.path(name));
        for method in ["rtn", "gptq", "awq"] {
            lab.succeed(&format!(
                "quantize --method {method} --bits 8 --group-size 32 --head int8 --calib ids.npy \
                 --calib-windows 16 --calib-tokens 64 {name} {name}-{method}.qbin"
            ));
            let quantized = logits(&lab.path(&format!("{name}-{method}.qbin")));
            let change = relative_rms(&quantized, &original);
            assert!(change <= INT8_TOLERANCE, "{name}, {method}: {change}");
        }
    }
}
