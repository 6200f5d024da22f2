//! `qbin synth`: a checkpoint of seeded random weights, to try shapes and sizes without a real model.

use crate::args::{ShapeArg, SynthArgs};
use crate::commands::Show;
use crate::error::CliError;
use crate::progress::Progress;
use crate::render;
use qbin_format::{Dtype, SafetensorsWriter};
use qbin_runtime::ModelConfig;
use qbin_runtime::spec::{self, Role, TensorSpec};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde_json::json;
use std::process::ExitCode;

/// Weights made at once.
const CHUNK: usize = 1 << 20;

#[derive(Serialize)]
struct Synthesized {
    parameters: u64,
    bytes: u64,
}

pub(crate) fn run(args: &SynthArgs, show: Show) -> Result<ExitCode, CliError> {
    let (hidden, blocks, heads, kv_heads, inner, vocab) = match args.shape {
        ShapeArg::Tiny => (64, 2, 4, 2, 160, 256),
        ShapeArg::HalfB => (1024, 24, 16, 4, 4864, 32_000),
        ShapeArg::OneB => (2048, 16, 32, 8, 8192, 128_256),
    };
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "num_hidden_layers": args.blocks.unwrap_or(blocks), "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": inner, "vocab_size": vocab, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    });
    let text = serde_json::to_string_pretty(&config).expect("plain data");
    let config = ModelConfig::from_json(text.as_bytes())?;
    let write_error = |path: &std::path::Path| {
        let path = path.to_path_buf();
        |source| CliError::Write { path, source }
    };
    std::fs::create_dir_all(&args.output).map_err(write_error(&args.output))?;
    let config_path = args.output.join("config.json");
    std::fs::write(&config_path, text).map_err(write_error(&config_path))?;

    let specs = spec::tensors(&config);
    let parameters: u64 = specs
        .iter()
        .map(|spec| spec.shape.iter().product::<usize>() as u64)
        .sum();
    let entries = specs
        .iter()
        .map(|spec| (spec.name.clone(), Dtype::Bf16, spec.shape.clone()))
        .collect();
    let mut writer = SafetensorsWriter::create(
        &args.output.join("model.safetensors"),
        entries,
        Default::default(),
    )?;
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let mut progress = Progress::new("synthesizing", show.quiet);
    let mut done = 0;
    for spec in &specs {
        let mut left: usize = spec.shape.iter().product();
        while left > 0 {
            let count = left.min(CHUNK);
            writer.write(&spec.name, &weights(&mut rng, spec, count))?;
            left -= count;
            done += count as u64;
            progress.set(done, parameters, &spec.name);
        }
    }
    writer.finish()?;
    progress.finish();
    show.print(
        &Synthesized {
            parameters,
            bytes: 2 * parameters,
        },
        |s| format!("{} parameters, {}\n", s.parameters, render::bytes(s.bytes)),
    )?;
    Ok(ExitCode::SUCCESS)
}

/// BF16 weights: norms 1, everything else about normal with deviation 1/√columns, so that activations
/// keep their size from block to block.
fn weights(rng: &mut ChaCha8Rng, spec: &TensorSpec, count: usize) -> Vec<u8> {
    let one = |value: f32| ((value.to_bits() >> 16) as u16).to_le_bytes();
    if matches!(spec.role, Role::Norm { .. }) {
        return (0..count).flat_map(|_| one(1.0)).collect();
    }
    let deviation = 1.0 / (*spec.shape.last().expect("weights have a shape") as f32).sqrt();
    let weight = |bits: u64| {
        // The sum of four uniform numbers: near enough to normal for a shape test, and cheap.
        let sum: f32 = (0..4)
            .map(|i| ((bits >> (16 * i)) & 0xffff) as f32 / 65_535.0 - 0.5)
            .sum();
        one(sum * 3f32.sqrt() * deviation)
    };
    (0..count).flat_map(|_| weight(rng.next_u64())).collect()
}
