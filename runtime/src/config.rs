//! What a Hugging Face `config.json` says about the shape of a decoder.
//!
//! Differences between families are data in [`ModelConfig`]; nothing else in the crate asks for the
//! architecture's name. Every key must be read or be on a list of keys that cannot change the forward
//! pass: an unknown one stops the run, because it may be the one that changes it.

use crate::RuntimeError;
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// A supported decoder family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 1, 2 and 3.
    Llama,
    /// Mistral.
    Mistral,
    /// Qwen2 and Qwen2.5.
    Qwen2,
    /// Qwen3, dense.
    Qwen3,
}

impl Architecture {
    const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// The class name that `architectures` holds.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }
}

/// Change of the rotary frequencies for long contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Frequencies as they are.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high` are kept.
        high_freq_factor: f64,
        /// Context length the model was first trained with.
        original_max_positions: f64,
    },
}

/// The shape of a decoder and the constants of its forward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Family, for messages and reports.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder blocks.
    pub num_blocks: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest context the model was configured for.
    pub max_positions: usize,
    /// Epsilon of RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Long-context change of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on o.
    pub o_bias: bool,
    /// Biases on gate, up and down.
    pub mlp_bias: bool,
    /// RMSNorm on every head of q and k, before the rotation.
    pub qk_norm: bool,
    /// Per block: how many last positions a token attends to, itself included; `None` is all.
    pub sliding_window: Vec<Option<usize>>,
    /// Beginning-of-sequence id.
    pub bos_token_id: Option<u32>,
}

/// Keys that every family may carry and that cannot change the logits of a forward pass.
const NO_EFFECT: &[&str] = &[
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bad_words_ids",
    "chunk_size_feed_forward",
    "do_sample",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_llama_config",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "max_length",
    "min_length",
    "mlp_dropout",
    "num_beams",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "repetition_penalty",
    "return_dict",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
    "use_return_dict",
];

/// The keys of one JSON object, remembering which were read.
struct Keys<'a> {
    map: &'a Map<String, Value>,
    prefix: &'static str,
    read: RefCell<BTreeSet<&'a str>>,
}

impl<'a> Keys<'a> {
    fn new(map: &'a Map<String, Value>, prefix: &'static str) -> Self {
        Self {
            map,
            prefix,
            read: RefCell::default(),
        }
    }

    /// The value of `key`; JSON null counts as absent, as in transformers.
    fn get(&self, key: &str) -> Option<&'a Value> {
        let (key, value) = self.map.get_key_value(key)?;
        self.read.borrow_mut().insert(key);
        (!value.is_null()).then_some(value)
    }

    fn wrong(&self, key: &str, got: &Value, expected: &str) -> RuntimeError {
        RuntimeError::ConfigValue {
            key: format!("{}{key}", self.prefix),
            got: got.to_string(),
            expected: expected.into(),
        }
    }

    fn size(&self, key: &str) -> Result<Option<usize>, RuntimeError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        // Above 2^31 a product of two sizes could overflow; no model comes near.
        match value.as_u64() {
            Some(size) if (1..1 << 31).contains(&size) => Ok(Some(size as usize)),
            _ => Err(self.wrong(key, value, "an integer from 1 to 2147483647")),
        }
    }

    fn need_size(&self, key: &str) -> Result<usize, RuntimeError> {
        self.size(key)?
            .ok_or_else(|| self.wrong(key, &Value::Null, "an integer: the key is missing"))
    }

    fn positive(&self, key: &str) -> Result<Option<f64>, RuntimeError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(number) if number > 0.0 && number.is_finite() => Ok(Some(number)),
            _ => Err(self.wrong(key, value, "a positive number")),
        }
    }

    /// A positive number of at most 1.
    fn small(&self, key: &str) -> Result<Option<f64>, RuntimeError> {
        match (self.positive(key)?, self.get(key)) {
            (Some(number), Some(value)) if number > 1.0 => {
                Err(self.wrong(key, value, "a positive number of at most 1"))
            }
            (number, _) => Ok(number),
        }
    }

    fn need_positive(&self, key: &str) -> Result<f64, RuntimeError> {
        self.positive(key)?
            .ok_or_else(|| self.wrong(key, &Value::Null, "a number: the key is missing"))
    }

    fn flag(&self, key: &str) -> Result<bool, RuntimeError> {
        let Some(value) = self.get(key) else {
            return Ok(false);
        };
        value
            .as_bool()
            .ok_or_else(|| self.wrong(key, value, "true or false"))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, RuntimeError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_str()
            .map(Some)
            .ok_or_else(|| self.wrong(key, value, "a string"))
    }

    fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>, RuntimeError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_object()
            .map(Some)
            .ok_or_else(|| self.wrong(key, value, "an object"))
    }

    fn refuse_unread(
        &self,
        no_effect: &[&str],
        architecture: Architecture,
    ) -> Result<(), RuntimeError> {
        let read = self.read.borrow();
        match self.map.iter().find(|(key, value)| {
            !value.is_null() && !read.contains(key.as_str()) && !no_effect.contains(&key.as_str())
        }) {
            None => Ok(()),
            Some((key, value)) => Err(RuntimeError::UnknownConfigKey {
                key: format!("{}{key}", self.prefix),
                value: value.to_string(),
                architecture: architecture.name(),
            }),
        }
    }
}

impl ModelConfig {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// Not JSON, an architecture or key that is not known, or a value out of range.
    pub fn from_json(text: &[u8]) -> Result<Self, RuntimeError> {
        let value: Value = serde_json::from_slice(text).map_err(RuntimeError::ConfigSyntax)?;
        let Value::Object(map) = &value else {
            return Err(RuntimeError::ConfigValue {
                key: "(top level)".into(),
                got: value.to_string(),
                expected: "an object".into(),
            });
        };
        let keys = Keys::new(map, "");
        let architecture = architecture(&keys)?;
        let config = read(&keys, architecture)?;
        keys.refuse_unread(NO_EFFECT, architecture)?;
        Ok(config)
    }

    /// Checks that `need` positions are within the model's context; beyond it, figures mean nothing.
    ///
    /// # Errors
    /// [`RuntimeError::ContextTooLong`].
    pub fn check_context(&self, need: usize) -> Result<(), RuntimeError> {
        let max_positions = self.max_positions;
        if need > max_positions {
            return Err(RuntimeError::ContextTooLong {
                need,
                max_positions,
            });
        }
        Ok(())
    }

    /// Width of q: `num_heads · head_dim`.
    pub fn q_dim(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Width of k and of v: `num_kv_heads · head_dim`.
    pub fn kv_dim(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }
}

fn architecture(keys: &Keys<'_>) -> Result<Architecture, RuntimeError> {
    let model_type = keys.text("model_type")?;
    let class = keys
        .get("architectures")
        .and_then(|list| list.get(0))
        .and_then(Value::as_str);
    let from_type = match model_type {
        Some("llama") => Some("LlamaForCausalLM"),
        Some("mistral") => Some("MistralForCausalLM"),
        Some("qwen2") => Some("Qwen2ForCausalLM"),
        Some("qwen3") => Some("Qwen3ForCausalLM"),
        _ => None,
    };
    let name = class.or(from_type);
    Architecture::ALL
        .into_iter()
        .find(|known| name == Some(known.name()))
        .ok_or_else(|| RuntimeError::UnknownArchitecture {
            got: class.or(model_type).unwrap_or("(none given)").into(),
            supported: Architecture::ALL
                .map(|known| format!("`{}`", known.name()))
                .join(", "),
        })
}

fn read(keys: &Keys<'_>, architecture: Architecture) -> Result<ModelConfig, RuntimeError> {
    if let Some(value) = keys.get("quantization_config") {
        return Err(keys.wrong(
            "quantization_config",
            value,
            "an unquantized checkpoint: start from the original weights",
        ));
    }
    match keys.text("hidden_act")? {
        None | Some("silu" | "swish") => {}
        Some(_) => return Err(keys.wrong("hidden_act", &keys.map["hidden_act"], "`silu`")),
    }
    // Switches that some checkpoints carry, off.
    for key in ["use_mrope", "rope_interleaved"] {
        if keys.flag(key)? {
            return Err(keys.wrong(key, &true.into(), "false"));
        }
    }
    let hidden_size = keys.need_size("hidden_size")?;
    let num_blocks = keys.need_size("num_hidden_layers")?;
    // Tensors are listed per block before any is looked for.
    if num_blocks > 10_000 {
        return Err(keys.wrong("num_hidden_layers", &num_blocks.into(), "at most 10000"));
    }
    let num_heads = keys.need_size("num_attention_heads")?;
    let num_kv_heads = match keys.size("num_key_value_heads")? {
        Some(heads) => heads,
        // The defaults of the config classes in transformers.
        None => match architecture {
            Architecture::Llama => num_heads,
            Architecture::Mistral => 8,
            Architecture::Qwen2 | Architecture::Qwen3 => 32,
        },
    };
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(keys.wrong(
            "num_key_value_heads",
            &num_kv_heads.into(),
            &format!("a divisor of `num_attention_heads` = {num_heads}"),
        ));
    }
    let head_dim = match keys.size("head_dim")? {
        Some(dim) => dim,
        None if architecture == Architecture::Qwen3 => 128,
        None => hidden_size / num_heads,
    };
    if head_dim == 0 || !head_dim.is_multiple_of(2) {
        return Err(keys.wrong(
            "head_dim",
            &head_dim.into(),
            "an even number: rotary positions turn pairs of channels",
        ));
    }
    let attention_bias = keys.flag("attention_bias")?;
    let qwen2 = architecture == Architecture::Qwen2;
    let (rope_theta, rope_scaling) = rope(keys, architecture)?;
    Ok(ModelConfig {
        architecture,
        hidden_size,
        intermediate_size: keys.need_size("intermediate_size")?,
        num_blocks,
        num_heads,
        num_kv_heads,
        head_dim,
        vocab_size: keys.need_size("vocab_size")?,
        max_positions: keys.size("max_position_embeddings")?.unwrap_or(2048),
        rms_norm_eps: keys.small("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        rope_theta,
        rope_scaling,
        tie_word_embeddings: keys.flag("tie_word_embeddings")?,
        // Qwen2 always has biases on q, k and v and never on o; the key is absent there.
        qkv_bias: qwen2 || attention_bias,
        o_bias: !qwen2 && attention_bias,
        mlp_bias: keys.flag("mlp_bias")?,
        qk_norm: architecture == Architecture::Qwen3,
        sliding_window: sliding_windows(keys, architecture, num_blocks)?,
        bos_token_id: keys
            .get("bos_token_id")
            .and_then(Value::as_u64)
            .and_then(|id| u32::try_from(id).ok()),
    })
}

/// Base and scaling of the rotary frequencies, in the older style (`rope_theta`, `rope_scaling`) or the
/// newer one (`rope_parameters`).
fn rope(keys: &Keys<'_>, architecture: Architecture) -> Result<(f64, RopeScaling), RuntimeError> {
    let top_theta = keys.positive("rope_theta")?;
    let old = keys.object("rope_scaling")?;
    let new = keys.object("rope_parameters")?;
    let Some(map) = new.or(old) else {
        return Ok((top_theta.unwrap_or(10_000.0), RopeScaling::None));
    };
    let keys = Keys::new(
        map,
        if new.is_some() {
            "rope_parameters."
        } else {
            "rope_scaling."
        },
    );
    let theta = keys
        .positive("rope_theta")?
        .or(top_theta)
        .unwrap_or(10_000.0);
    if let Some(value) = keys
        .get("partial_rotary_factor")
        .filter(|value| value.as_f64() != Some(1.0))
    {
        return Err(keys.wrong("partial_rotary_factor", value, "1"));
    }
    // `type` is the oldest spelling; both may stand there.
    let old_kind = keys.text("type")?;
    let kind = keys.text("rope_type")?.or(old_kind);
    let scaling = match kind {
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear {
            factor: keys.need_positive("factor")?,
        },
        Some("llama3") => RopeScaling::Llama3 {
            factor: keys.need_positive("factor")?,
            low_freq_factor: keys.need_positive("low_freq_factor")?,
            high_freq_factor: keys.need_positive("high_freq_factor")?,
            original_max_positions: keys.need_positive("original_max_position_embeddings")?,
        },
        Some(other) => {
            return Err(keys.wrong(
                "rope_type",
                &other.into(),
                "`default`, `linear` or `llama3`",
            ));
        }
    };
    keys.refuse_unread(&[], architecture)?;
    Ok((theta, scaling))
}

/// The attention window of every block.
fn sliding_windows(
    keys: &Keys<'_>,
    architecture: Architecture,
    num_blocks: usize,
) -> Result<Vec<Option<usize>>, RuntimeError> {
    let window = keys.size("sliding_window")?;
    let first = keys.get("max_window_layers");
    let used = match architecture {
        Architecture::Mistral => true,
        // Their `sliding_window` stands in the file even where it is switched off.
        Architecture::Qwen2 | Architecture::Qwen3 => keys.flag("use_sliding_window")?,
        Architecture::Llama => {
            return match window {
                None => Ok(vec![None; num_blocks]),
                Some(window) => Err(keys.wrong(
                    "sliding_window",
                    &window.into(),
                    "null: this architecture has none",
                )),
            };
        }
    };
    let window = window.filter(|_| used);
    let Some(types) = keys.get("layer_types") else {
        let first = first
            .and_then(Value::as_u64)
            .filter(|_| architecture != Architecture::Mistral)
            .unwrap_or(0) as usize;
        return Ok((0..num_blocks)
            .map(|block| window.filter(|_| block >= first))
            .collect());
    };
    let list = types.as_array().filter(|list| list.len() == num_blocks);
    let list = list.ok_or_else(|| {
        keys.wrong(
            "layer_types",
            types,
            &format!("a list of {num_blocks} strings, one a block"),
        )
    })?;
    list.iter()
        .map(|kind| match kind.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") if window.is_some() => Ok(window),
            _ => Err(keys.wrong(
                "layer_types",
                kind,
                "`full_attention`, or `sliding_attention` with a `sliding_window`",
            )),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = r#"{"model_type":"llama","hidden_size":64,"intermediate_size":96,"num_hidden_layers":2,
        "num_attention_heads":4,"num_key_value_heads":2,"vocab_size":100}"#;

    fn with(extra: &str) -> Result<ModelConfig, RuntimeError> {
        let extra: Map<String, Value> = serde_json::from_str(extra).expect("the test's own JSON");
        let mut base: Map<String, Value> = serde_json::from_str(BASE).expect("the test's own JSON");
        base.extend(extra);
        ModelConfig::from_json(Value::Object(base).to_string().as_bytes())
    }

    fn message(extra: &str) -> String {
        with(extra).expect_err("must be refused").to_string()
    }

    #[test]
    fn defaults_are_those_of_the_config_classes() {
        let llama = with("{}").expect("valid");
        assert_eq!(
            (llama.head_dim, llama.num_kv_heads, llama.rope_theta),
            (16, 2, 10_000.0)
        );
        assert!(!llama.tie_word_embeddings && !llama.qkv_bias && !llama.qk_norm);
        let qwen = with(r#"{"model_type":"qwen3","num_key_value_heads":4}"#).expect("valid");
        assert!(qwen.qk_norm && qwen.head_dim == 128);
        let qwen = with(r#"{"model_type":"qwen2"}"#).expect("valid");
        assert!(qwen.qkv_bias && !qwen.o_bias);
    }

    #[test]
    fn both_spellings_of_rope_scaling_agree() {
        let inner = r#""rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":64"#;
        let old = with(&format!(
            r#"{{"rope_theta":500000.0,"rope_scaling":{{{inner}}}}}"#
        ))
        .expect("valid");
        let new = with(&format!(
            r#"{{"rope_parameters":{{"rope_theta":500000.0,{inner}}}}}"#
        ))
        .expect("valid");
        assert_eq!(old, new);
        assert!(matches!(
            old.rope_scaling,
            RopeScaling::Llama3 { factor: 8.0, .. }
        ));
    }

    #[test]
    fn sliding_window_only_where_it_is_used() {
        let off = with(r#"{"model_type":"qwen2","sliding_window":8,"use_sliding_window":false,"max_window_layers":1}"#).expect("valid");
        assert_eq!(off.sliding_window, [None, None]);
        let on = with(r#"{"model_type":"qwen2","sliding_window":8,"use_sliding_window":true,"max_window_layers":1}"#).expect("valid");
        assert_eq!(on.sliding_window, [None, Some(8)]);
        let mistral = with(r#"{"model_type":"mistral","sliding_window":8}"#).expect("valid");
        assert_eq!(mistral.sliding_window, [Some(8), Some(8)]);
    }

    #[test]
    fn what_might_change_the_model_is_refused() {
        assert!(message(r#"{"attn_logit_softcapping":50.0}"#).contains("attn_logit_softcapping"));
        assert!(message(r#"{"architectures":["MambaForCausalLM"]}"#).contains("MambaForCausalLM"));
        assert!(message(r#"{"rope_scaling":{"rope_type":"yarn","factor":4.0}}"#).contains("yarn"));
        assert!(
            message(r#"{"rope_scaling":{"rope_type":"linear","factor":4.0,"beta":1}}"#)
                .contains("rope_scaling.beta")
        );
        assert!(message(r#"{"hidden_act":"gelu"}"#).contains("gelu"));
        assert!(message(r#"{"num_key_value_heads":3}"#).contains("num_key_value_heads"));
        assert!(with(r#"{"attn_logit_softcapping":null}"#).is_ok());
        assert!(message(r#"{"use_mrope":true}"#).contains("use_mrope"));
        assert!(
            with(r#"{"use_mrope":false,"rope_interleaved":false,"is_llama_config":true}"#).is_ok()
        );
        assert!(message(r#"{"rms_norm_eps":1e300}"#).contains("rms_norm_eps"));
        assert!(message(r#"{"hidden_size":0}"#).contains("hidden_size"));
        assert!(message(r#"{"vocab_size":null}"#).contains("vocab_size"));
        assert!(message(r#"{"quantization_config":{"bits":4}}"#).contains("unquantized"));
    }
}
