//! Small checkpoints, whole or damaged: tensors as bytes, and files that are written by hand.
//!
//! Nothing here uses our own writer: what is read in a test was not made by what is tested.

use serde_json::{Map, Value, json};
use std::fs;
use std::path::Path;

/// A tensor as it stands in a file.
#[derive(Clone, Debug)]
pub struct RawTensor {
    /// Its name.
    pub name: String,
    /// Its type as safetensors writes it.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// A Hugging Face folder in memory; the tokenizer is left out.
#[derive(Clone, Debug)]
pub struct RawCheckpoint {
    /// `config.json`.
    pub config: Value,
    /// The tensors in the order of their bytes.
    pub tensors: Vec<RawTensor>,
}

/// Vocabulary of [`RawCheckpoint::random`]: the tiny model's tokenizer and three rows that it never uses.
pub const VOCAB: usize = 4099;
/// Hidden size of [`RawCheckpoint::random`].
pub const HIDDEN: usize = 48;
/// MLP width of [`RawCheckpoint::random`].
pub const INNER: usize = 88;

impl RawCheckpoint {
    /// A Llama of two blocks with an untied head and seeded random BF16 weights. Its sizes are no multiple of
    /// a group, of 16 rows or of 64 columns.
    pub fn random(seed: u64) -> Self {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": INNER,
            "vocab_size": VOCAB, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": false, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
        });
        let mut checkpoint = Self {
            config,
            tensors: Vec::new(),
        };
        let mut random = Random(seed);
        let mut push = |name: &str, shape: &[usize]| {
            checkpoint
                .tensors
                .push(RawTensor::random(name, shape, &mut random))
        };
        push("model.embed_tokens.weight", &[VOCAB, HIDDEN]);
        for block in 0..2 {
            let mut push = |name: &str, shape: &[usize]| {
                push(&format!("model.layers.{block}.{name}.weight"), shape)
            };
            push("input_layernorm", &[HIDDEN]);
            push("self_attn.q_proj", &[HIDDEN, HIDDEN]);
            push("self_attn.k_proj", &[HIDDEN / 2, HIDDEN]);
            push("self_attn.v_proj", &[HIDDEN / 2, HIDDEN]);
            push("self_attn.o_proj", &[HIDDEN, HIDDEN]);
            push("post_attention_layernorm", &[HIDDEN]);
            push("mlp.gate_proj", &[INNER, HIDDEN]);
            push("mlp.up_proj", &[INNER, HIDDEN]);
            push("mlp.down_proj", &[HIDDEN, INNER]);
        }
        push("model.norm.weight", &[HIDDEN]);
        push("lm_head.weight", &[VOCAB, HIDDEN]);
        checkpoint
    }

    /// The tensor of this name.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    pub fn tensor(&mut self, name: &str) -> &mut RawTensor {
        self.tensors
            .iter_mut()
            .find(|tensor| tensor.name == name)
            .unwrap_or_else(|| panic!("no `{name}`"))
    }

    /// Writes `config.json` and `model.safetensors` into a folder, which is made.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write(&self, folder: &Path) {
        self.write_config(folder);
        fs::write(folder.join("model.safetensors"), file(&self.tensors)).expect("write weights");
    }

    /// Writes `config.json`, three shards and their index.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write_sharded(&self, folder: &Path) {
        self.write_config(folder);
        let mut weight_map = Map::new();
        // By turns, so that a block is spread over all shards.
        for shard in 0..3 {
            let name = format!("model-{:05}-of-00003.safetensors", shard + 1);
            let tensors: Vec<RawTensor> = self
                .tensors
                .iter()
                .skip(shard)
                .step_by(3)
                .cloned()
                .collect();
            fs::write(folder.join(&name), file(&tensors)).expect("write a shard");
            weight_map.extend(tensors.into_iter().map(|tensor| (tensor.name, json!(name))));
        }
        let index = json!({"metadata": {}, "weight_map": weight_map});
        fs::write(
            folder.join("model.safetensors.index.json"),
            index.to_string(),
        )
        .expect("write the index");
    }

    fn write_config(&self, folder: &Path) {
        fs::create_dir_all(folder).expect("make a folder");
        fs::write(folder.join("config.json"), self.config.to_string()).expect("write the config");
    }
}

impl RawTensor {
    /// Uniform BF16 weights of deviation about `1/√columns`; a vector is a norm and stays near 1.
    fn random(name: &str, shape: &[usize], random: &mut Random) -> Self {
        let width = (3.0 / shape[shape.len() - 1] as f32).sqrt();
        let mut value = || match shape.len() {
            1 => 1.0 + 0.25 * random.next(),
            _ => width * random.next(),
        };
        let count = shape.iter().product();
        let bytes = (0..count).flat_map(|_| bf16(value())).collect();
        Self {
            name: name.into(),
            dtype: "BF16".into(),
            shape: shape.into(),
            bytes,
        }
    }

    /// Writes a BF16 value over element `at`.
    pub fn set_bf16(&mut self, at: usize, value: f32) {
        self.bytes[2 * at..2 * at + 2].copy_from_slice(&bf16(value));
    }
}

/// A safetensors file of these tensors, which follow each other without gaps.
pub fn file(tensors: &[RawTensor]) -> Vec<u8> {
    let mut end = 0;
    let entries = tensors.iter().map(|tensor| {
        let start = end;
        end += tensor.bytes.len();
        format!(
            "{}:{}",
            json!(tensor.name),
            json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]})
        )
    });
    let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    with_header(
        &header,
        &tensors
            .iter()
            .flat_map(|tensor| tensor.bytes.clone())
            .collect::<Vec<_>>(),
    )
}

/// A safetensors file with this header, whatever it says, and this data.
pub fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [
        &(header.len() as u64).to_le_bytes(),
        header.as_bytes(),
        data,
    ]
    .concat()
}

/// Header and data of a safetensors file.
///
/// # Panics
/// If it is none.
pub fn split(file: &[u8]) -> (Value, &[u8]) {
    let (length, rest) = file.split_first_chunk::<8>().expect("a length field");
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    (serde_json::from_slice(header).expect("a JSON header"), data)
}

fn bf16(value: f32) -> [u8; 2] {
    ((value.to_bits() >> 16) as u16).to_le_bytes()
}

/// SplitMix64: the same numbers on every machine and in every version.
struct Random(u64);

impl Random {
    /// Uniform in −1 to 1.
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let checkpoint = RawCheckpoint::random(1);
        let bytes = file(&checkpoint.tensors);
        let (header, data) = split(&bytes);
        assert_eq!(
            header.as_object().expect("an object").len(),
            checkpoint.tensors.len()
        );
        assert_eq!(
            data.len(),
            checkpoint
                .tensors
                .iter()
                .map(|tensor| tensor.bytes.len())
                .sum::<usize>()
        );
        assert_eq!(header["lm_head.weight"]["shape"], json!([VOCAB, HIDDEN]));
        assert_eq!(header["lm_head.weight"]["data_offsets"][1], data.len());
    }

    #[test]
    fn random_weights_are_spread_and_seeded() {
        let mut random = Random(3);
        let values: Vec<f32> = (0..10_000).map(|_| random.next()).collect();
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let square = values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32;
        assert!(
            mean.abs() < 0.03 && (square - 1.0 / 3.0).abs() < 0.02,
            "{mean} {square}"
        );
        assert!(values.iter().all(|value| (-1.0..1.0).contains(value)));
        let first = |seed| RawCheckpoint::random(seed).tensors[0].bytes.clone();
        assert!(first(1) == first(1) && first(1) != first(2));
    }
}
