//! Which tensors a [`ModelConfig`] implies, and the accounting of every tensor of a file against them.

use crate::{ModelConfig, RuntimeError, Side, Sublayer};
use qbin_format::{Dtype, Model, Weight};
use std::collections::BTreeMap;

/// The seven linears of a decoder block, in the order of the forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinearKind {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention output.
    O,
    /// Gate of the MLP.
    Gate,
    /// Up projection of the MLP.
    Up,
    /// Down projection of the MLP.
    Down,
}

impl LinearKind {
    /// All of them, in order; `ALL[kind as usize] == kind`.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// Name of the module inside its block.
    pub fn module(self) -> &'static str {
        [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ][self as usize]
    }

    /// The linears that read the same input: one side of one sublayer.
    pub fn at(sublayer: Sublayer, side: Side) -> &'static [Self] {
        match (sublayer, side) {
            (Sublayer::Attention, Side::Inner) => &[Self::Q, Self::K, Self::V],
            (Sublayer::Attention, Side::Outer) => &[Self::O],
            (Sublayer::Mlp, Side::Inner) => &[Self::Gate, Self::Up],
            (Sublayer::Mlp, Side::Outer) => &[Self::Down],
        }
    }

    /// `[out_features, in_features]`.
    pub fn shape(self, config: &ModelConfig) -> [usize; 2] {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        match self {
            Self::Q => [config.q_dim(), hidden],
            Self::K | Self::V => [config.kv_dim(), hidden],
            Self::O => [hidden, config.q_dim()],
            Self::Gate | Self::Up => [inner, hidden],
            Self::Down => [hidden, inner],
        }
    }

    /// Whether the linear has a bias.
    pub fn has_bias(self, config: &ModelConfig) -> bool {
        match self {
            Self::Q | Self::K | Self::V => config.qkv_bias,
            Self::O => config.o_bias,
            Self::Gate | Self::Up | Self::Down => config.mlp_bias,
        }
    }
}

/// Every linear of the blocks: its block and kind, block by block.
pub fn linears(config: &ModelConfig) -> impl Iterator<Item = (usize, LinearKind)> + use<> {
    (0..config.num_blocks).flat_map(|block| LinearKind::ALL.map(|kind| (block, kind)))
}

/// Name of a tensor of block `block`: `model.layers.<block>.<rest>`.
pub fn block_tensor(block: usize, rest: &str) -> String {
    format!("model.layers.{block}.{rest}")
}

/// Name of a linear's weight.
pub fn weight_name(block: usize, kind: LinearKind) -> String {
    block_tensor(block, &format!("{}.weight", kind.module()))
}

/// The token embedding.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The norm before the head.
pub const FINAL_NORM: &str = "model.norm.weight";
/// The output head.
pub const HEAD: &str = "lm_head.weight";

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Rows looked up by token id.
    Embedding,
    /// A norm's weight.
    Norm {
        /// The block, or none for the final norm.
        block: Option<usize>,
    },
    /// A linear's weight.
    Linear {
        /// The block.
        block: usize,
        /// Which of the seven.
        kind: LinearKind,
    },
    /// A linear's bias.
    Bias {
        /// The block.
        block: usize,
        /// Which of the seven.
        kind: LinearKind,
    },
    /// The output head.
    Head,
    /// Not read by any forward pass; the reason says why it may go.
    Unused {
        /// Why.
        reason: &'static str,
    },
}

/// One tensor that the config implies.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// Its name in the file.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
}

/// Every tensor the config implies, in the order of the forward pass.
pub fn tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let mut out = Vec::new();
    let mut push = |name: String, shape: &[usize], role| {
        out.push(TensorSpec {
            name,
            shape: shape.into(),
            role,
        })
    };
    let embedding = [config.vocab_size, config.hidden_size];
    push(EMBEDDING.into(), &embedding, Role::Embedding);
    for block in 0..config.num_blocks {
        let norm = Role::Norm { block: Some(block) };
        for name in Sublayer::ALL.map(Sublayer::norm_name) {
            push(block_tensor(block, name), &[config.hidden_size], norm);
        }
        if config.qk_norm {
            for name in QK_NORMS {
                push(block_tensor(block, name), &[config.head_dim], norm);
            }
        }
        for kind in LinearKind::ALL {
            let shape = kind.shape(config);
            push(
                weight_name(block, kind),
                &shape,
                Role::Linear { block, kind },
            );
            if kind.has_bias(config) {
                push(
                    bias_name(block, kind),
                    &shape[..1],
                    Role::Bias { block, kind },
                );
            }
        }
    }
    push(
        FINAL_NORM.into(),
        &[config.hidden_size],
        Role::Norm { block: None },
    );
    if !config.tie_word_embeddings {
        push(HEAD.into(), &embedding, Role::Head);
    }
    out
}

/// The norms on the heads of q and of k.
pub(crate) const QK_NORMS: [&str; 2] = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"];

/// Name of a linear's bias.
pub fn bias_name(block: usize, kind: LinearKind) -> String {
    block_tensor(block, &format!("{}.bias", kind.module()))
}

/// Checks a file against its config: every implied tensor is there with its shape and a float type, and
/// every tensor there is implied or known to be unused. Returns all of them, implied ones first.
///
/// # Errors
/// The first tensor that is missing, misshapen, of another type, or unknown.
pub fn account(config: &ModelConfig, model: &Model) -> Result<Vec<TensorSpec>, RuntimeError> {
    let mut all = tensors(config);
    let implied: BTreeMap<&str, &TensorSpec> =
        all.iter().map(|spec| (spec.name.as_str(), spec)).collect();
    let mut unused = Vec::new();
    for name in model.names() {
        if implied.contains_key(name) {
            continue;
        }
        let shape = model
            .weight(name)
            .map(|weight| weight.shape())
            .unwrap_or_default();
        // A quantized copy of a tied head is this runtime's own doing and is read.
        if name == HEAD && matches!(model, Model::Artifact(_)) {
            continue;
        }
        let reason = unused_reason(config, name).ok_or_else(|| RuntimeError::UnknownTensor {
            tensor: name.into(),
            shape: shape.clone(),
            architecture: config.architecture.name(),
        })?;
        unused.push(TensorSpec {
            name: name.into(),
            shape,
            role: Role::Unused { reason },
        });
    }
    for spec in &all {
        check(spec, model)?;
    }
    all.extend(unused);
    Ok(all)
}

fn unused_reason(config: &ModelConfig, name: &str) -> Option<&'static str> {
    if name == HEAD && config.tie_word_embeddings {
        return Some("the head is tied to the embedding");
    }
    name.ends_with("rotary_emb.inv_freq")
        .then_some("rotary frequencies are computed from the config")
}

fn check(spec: &TensorSpec, model: &Model) -> Result<(), RuntimeError> {
    let weight = model
        .weight(&spec.name)
        .ok_or_else(|| RuntimeError::MissingTensor {
            tensor: spec.name.clone(),
            expected: spec.shape.clone(),
        })?;
    if weight.shape() != spec.shape {
        return Err(RuntimeError::Shape {
            tensor: spec.name.clone(),
            expected: spec.shape.clone(),
            got: weight.shape(),
        });
    }
    match weight {
        Weight::Dense(view) if !matches!(view.dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16) => {
            Err(RuntimeError::Dtype {
                tensor: spec.name.clone(),
                got: format!("{:?}", view.dtype),
            })
        }
        _ => Ok(()),
    }
}
