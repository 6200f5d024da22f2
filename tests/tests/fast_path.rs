//! The same bits on every machine and for every batch, and a fast path close to the reference path.

use qbin_format::Model;
use qbin_runtime::eval::{self, Protocol};
use qbin_runtime::generate::{Request, generate};
use qbin_runtime::kernels::Isa;
use qbin_runtime::{Cpu, Decoder, Parts, Path, Sampling};
use qbin_tests::root;
use qbin_tests::run::{Lab, copy_folder};

/// The families of the golden logits: biases, tied heads, grouped queries, sliding windows, norms on q and k.
const FAMILIES: [&str; 9] = [
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

fn with_decoder<T>(model: &Model, cpu: &Cpu, work: impl FnOnce(&Decoder<'_>) -> T) -> T {
    let parts = Parts::new(model, cpu).expect("a config that is supported");
    work(&Decoder::new(&parts).expect("finite weights"))
}

/// Every level of this machine with 1, 2 and 3 threads; the first is the definition.
fn cpus(path: Path) -> Vec<Cpu> {
    let levels = Isa::available().into_iter();
    levels
        .flat_map(|isa| (1..=3).map(move |threads| Cpu::new(path, isa, threads)))
        .collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    assert!(values.iter().all(|value| value.is_finite()));
    values.iter().map(|value| value.to_bits()).collect()
}

/// Logits of `tokens`, through a cache in steps of the given lengths.
fn in_steps(decoder: &Decoder<'_>, tokens: &[u32], steps: &[usize]) -> Vec<u32> {
    let mut cache = [decoder.cache(0)];
    let (mut rest, mut logits) = (tokens, Vec::new());
    for &step in steps {
        let (now, later) = rest.split_at(step);
        let hidden = decoder
            .forward(&[now], Some(&mut cache))
            .expect("known ids");
        logits.extend(decoder.logits(&hidden));
        rest = later;
    }
    assert!(rest.is_empty());
    bits(&logits)
}

/// The last logits of every sequence of a batch that runs from position 0.
fn in_a_batch(decoder: &Decoder<'_>, sequences: &[&[u32]]) -> Vec<Vec<u32>> {
    let hidden = decoder.forward(sequences, None).expect("known ids");
    let logits = decoder.logits(&hidden);
    let vocab = decoder.config().vocab_size;
    let mut end = 0;
    sequences
        .iter()
        .map(|tokens| {
            end += tokens.len();
            bits(&logits[(end - tokens.len()) * vocab..end * vocab])
        })
        .collect()
}

/// The stream of some tokens alone is that of the whole, and leaves the same behind in the caches.
fn check_wanted(decoder: &Decoder<'_>, sequences: &[&[u32]], what: &str) {
    let hidden = decoder.config().hidden_size;
    let wanted: Vec<_> = sequences
        .iter()
        .enumerate()
        .map(|(at, tokens)| tokens.len() / 2..tokens.len() - at)
        .collect();
    let mut caches: Vec<_> = sequences.iter().map(|_| decoder.cache(0)).collect();
    let mut other = caches.clone();
    for step in 0..2 {
        let whole = decoder
            .forward(sequences, Some(&mut caches))
            .expect("known ids");
        let some = decoder
            .forward_for(sequences, Some(&mut other), &wanted)
            .expect("known ids");
        let (mut expected, mut first) = (Vec::new(), 0);
        for (tokens, wanted) in sequences.iter().zip(&wanted) {
            let rows = (first + wanted.start) * hidden..(first + wanted.end) * hidden;
            expected.extend(bits(&whole[rows]));
            first += tokens.len();
        }
        assert!(
            bits(&some) == expected,
            "{what}: wanted tokens, step {step}"
        );
    }
}

#[test]
fn every_family_has_the_same_logits_everywhere() {
    let lab = Lab::new(env!("CARGO_BIN_EXE_qbin-under-test"));
    let tokens: Vec<u32> = (0..41).map(|at| at * 37 % 96).collect();
    let other: Vec<u32> = (0..23).map(|at| at * 31 % 96).collect();
    // Four bits asymmetric in small groups, eight bits symmetric with one scale per row, and a dense head beside them.
    let recipes = [
        "--bits 4 --group-size 32 --head int8",
        "--bits 8 --group-size channel",
    ];
    for name in FAMILIES {
        copy_folder(
            &root().join("tests/golden/models").join(name),
            &lab.path(name),
        );
        for recipe in recipes {
            lab.succeed(&format!(
                "quantize --method rtn {recipe} {name} {name}.qbin"
            ));
            let model = Model::open(&lab.path(&format!("{name}.qbin"))).expect("an artifact");
            let mut expected: Option<Vec<u32>> = None;
            for cpu in cpus(Path::Fast) {
                let what = format!(
                    "{name}, {recipe}, {}, {}",
                    cpu.isa.level(),
                    cpu.pool.threads()
                );
                with_decoder(&model, &cpu, |decoder| {
                    let whole = in_steps(decoder, &tokens, &[41]);
                    let expected = expected.get_or_insert_with(|| whole.clone());
                    assert!(whole == *expected, "{what}");
                    for steps in [&[1; 41][..], &[2, 7, 1, 31]] {
                        assert!(
                            in_steps(decoder, &tokens, steps) == *expected,
                            "{what}: {steps:?}"
                        );
                    }
                    let batch = in_a_batch(decoder, &[&other, &tokens, &other[..5]]);
                    assert!(batch[1] == *expected, "{what}: in a batch");
                    check_wanted(decoder, &[&other, &tokens, &other[..5]], &what);
                });
            }
        }
    }
}

#[test]
fn a_dense_checkpoint_has_the_same_logits_everywhere_on_every_path() {
    let model = Model::open(&root().join("tests/golden/models/qwen2")).expect("a checkpoint");
    let tokens: Vec<u32> = (0..41).map(|at| at * 37 % 96).collect();
    for path in [Path::Reference, Path::Bf16, Path::Fast] {
        let mut expected: Option<Vec<u32>> = None;
        for cpu in cpus(path) {
            with_decoder(&model, &cpu, |decoder| {
                let whole = in_steps(decoder, &tokens, &[41]);
                assert!(whole == *expected.get_or_insert_with(|| whole.clone()));
                assert!(whole == in_steps(decoder, &tokens, &[1; 41]));
            });
        }
    }
}

#[test]
fn generated_tokens_are_the_same_everywhere() {
    let lab = Lab::new(env!("CARGO_BIN_EXE_qbin-under-test"));
    lab.succeed("quantize --method rtn --head int8 tiny tiny.qbin");
    let model = Model::open(&lab.path("tiny.qbin")).expect("an artifact");
    let requests: Vec<Request> = [(3, 0.0), (11, 0.8), (1, 1.2)]
        .into_iter()
        .map(|(len, temperature)| Request {
            prompt: (0..len).map(|at| 100 + 17 * at).collect(),
            sampling: Sampling {
                temperature,
                top_k: 50,
                top_p: 0.9,
                seed: 5,
                ..Sampling::default()
            },
        })
        .collect();
    let continued = |cpu: &Cpu| {
        with_decoder(&model, cpu, |decoder| {
            generate(decoder, &requests, 30, &[], |_, _| true).expect("known ids")
        })
    };
    let cpus = cpus(Path::Fast);
    let expected = continued(&cpus[0]);
    assert!(expected.iter().all(|tokens| tokens.len() == 30));
    for cpu in &cpus[1..] {
        assert_eq!(continued(cpu), expected, "{}", cpu.isa.level());
    }
}

/// Rounding activations to int8 changes each by an even error of deviation `step/√12`, a step being the 127th part
/// of the largest of a group, which is about three deviations of its values. All linears add independent errors; the
/// logits, whose spread on this model is about 3, move by that share, and the likelihood by half the square.
#[test]
fn perplexity_is_that_of_the_reference_path() {
    let lab = Lab::new(env!("CARGO_BIN_EXE_qbin-under-test"));
    lab.succeed("quantize --method rtn tiny tiny.qbin");
    let model = Model::open(&lab.path("tiny.qbin")).expect("an artifact");
    let text: Vec<u32> = (0..2048).map(|at| at * at % 4001).collect();
    let protocol = Protocol::parse("gptq-128").expect("a protocol");
    let windows = protocol.windows(&text, None, None).expect("long enough");
    let nll = |path| {
        let cpu = Cpu::new(path, Isa::detect(), 2);
        with_decoder(&model, &cpu, |decoder| {
            let result = eval::perplexity(decoder, &protocol, &windows, &mut |_, _| ());
            let blocks = decoder.config().num_blocks;
            (result.expect("known ids").nll, blocks)
        })
    };
    let ((reference, blocks), (fast, _)) = (nll(Path::Reference), nll(Path::Fast));
    let linear = (3.0f64 / 127.0).powi(2) / 12.0;
    let tolerance = 0.5 * 3f64.powi(2) * linear * (7 * blocks) as f64;
    assert!((fast - reference).abs() <= tolerance, "{fast} {reference}");
    assert!(fast != reference, "both took the same path");
}

#[test]
fn commands_say_what_ran() {
    let lab = Lab::new(env!("CARGO_BIN_EXE_qbin-under-test"));
    lab.succeed("quantize --method rtn tiny tiny.qbin");
    lab.write("text.txt", "the first time ".repeat(200));
    let ran = lab.json("run tiny.qbin --prompt the --max-tokens 3 --isa scalar --threads 2");
    let copied = lab.json("run tiny.qbin --prompt the --max-tokens 3 --huge-pages");
    assert_eq!(copied["text"], ran["text"], "a copy is the same model");
    assert_eq!(
        (&ran["path"], &ran["isa"], &ran["threads"]),
        (&"fast".into(), &"scalar".into(), &2.into())
    );
    let eval = "--data text.txt --protocol gptq-64 --threads 1";
    for (path, args) in [("reference", ""), ("fast", "--path fast")] {
        let measured = lab.json(&format!("eval perplexity tiny.qbin {eval} {args}"));
        assert_eq!(measured["path"], path);
        let compared = lab.json(&format!("eval compare tiny.qbin tiny.qbin {eval} {args}"));
        assert_eq!(compared["path"], path);
        let kl = compared["kl_mean"].as_f64().expect("a number");
        assert!(if path == "fast" { kl > 0.0 } else { kl == 0.0 }, "{kl}");
    }
    let refused = lab.run("run tiny.qbin --prompt the --isa sse9");
    assert_eq!(refused.status, Some(2));
    assert!(
        refused.stderr.contains("unknown instruction set `sse9`"),
        "{}",
        refused.stderr
    );
    let refused = lab.run("run tiny.qbin --prompt the --path quick");
    assert_eq!(refused.status, Some(2));
    assert!(
        refused.stderr.contains("unknown path `quick`"),
        "{}",
        refused.stderr
    );
}
