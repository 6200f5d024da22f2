//! The whole decoder: token ids in, logits out.

use crate::batch::{Batch, Rows};
use crate::block::{Block, Buffers, load_linear, load_vector, rms_norm};
use crate::buffers::Buffer;
use crate::config::ModelConfig;
use crate::rope::Rope;
use crate::spec::{self, EMBEDDING, FINAL_NORM, HEAD};
use crate::{Cpu, KvCache, KvDtype, Linear, RuntimeError};
use qbin_format::{Model, Weight};
use std::ops::Range;

/// The parts of a model that its blocks borrow.
pub struct Parts<'m> {
    /// The file.
    pub model: &'m Model,
    /// Its shape.
    pub config: ModelConfig,
    /// What it runs on.
    pub cpu: Cpu,
    rope: Rope,
}

impl<'m> Parts<'m> {
    /// Reads the config and accounts for every tensor.
    ///
    /// # Errors
    /// A missing or unusable `config.json`, or a tensor that does not fit it.
    pub fn new(model: &'m Model, cpu: &Cpu) -> Result<Self, RuntimeError> {
        let text = model
            .file("config.json")
            .ok_or(RuntimeError::MissingFile("config.json"))?;
        let config = ModelConfig::from_json(text)?;
        spec::account(&config, model)?;
        let rope = Rope::new(&config);
        Ok(Self {
            model,
            config,
            cpu: cpu.clone(),
            rope,
        })
    }

    /// Block `index`, its linears still in the file.
    ///
    /// # Errors
    /// A norm or bias that is not finite.
    pub fn block(&self, index: usize) -> Result<Block<'_>, RuntimeError> {
        Block::load(self.model, &self.config, &self.rope, &self.cpu, index)
    }

    /// The embeddings of `tokens`, `[tokens, hidden]`.
    ///
    /// # Errors
    /// An id outside the vocabulary, or an embedding row that is not finite.
    pub fn embed(&self, tokens: &[u32]) -> Result<Vec<f32>, RuntimeError> {
        let (hidden, vocab) = (self.config.hidden_size, self.config.vocab_size);
        let table: Weight<'_> = self
            .model
            .weight(EMBEDDING)
            .expect("accounted for in `new`");
        let mut out = vec![0.0; tokens.len() * hidden];
        for (&id, out) in tokens.iter().zip(out.chunks_exact_mut(hidden)) {
            let row = id as usize;
            if row >= vocab {
                return Err(RuntimeError::TokenOutOfRange { id, vocab });
            }
            table.read_rows_f32(row..row + 1, out);
            if let Some(channel) = out.iter().position(|value| !value.is_finite()) {
                return Err(RuntimeError::NonFinite {
                    tensor: EMBEDDING.into(),
                    index: row * hidden + channel,
                    value: out[channel],
                });
            }
        }
        Ok(out)
    }
}

/// A model ready to run.
pub struct Decoder<'m> {
    parts: &'m Parts<'m>,
    blocks: Vec<Block<'m>>,
    norm: Vec<f32>,
    head: Linear<'m>,
}

impl<'m> Decoder<'m> {
    /// Puts the decoder together; weights stay in the mapped file.
    ///
    /// # Errors
    /// A norm or bias that is not finite.
    pub fn new(parts: &'m Parts<'m>) -> Result<Self, RuntimeError> {
        let config = &parts.config;
        let blocks = (0..config.num_blocks)
            .map(|index| parts.block(index))
            .collect::<Result<_, _>>()?;
        let norm = load_vector(parts.model, FINAL_NORM)?;
        // A tied head may still have been given a (quantized) copy of its own.
        let tied = config.tie_word_embeddings
            && !(matches!(parts.model, Model::Artifact(_)) && parts.model.weight(HEAD).is_some());
        let name = if tied { EMBEDDING } else { HEAD };
        let head = load_linear(
            parts.model,
            name.into(),
            [config.vocab_size, config.hidden_size],
            None,
        )?;
        Ok(Self {
            parts,
            blocks,
            norm,
            head,
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.parts.config
    }

    /// What it runs on.
    pub fn cpu(&self) -> &Cpu {
        &self.parts.cpu
    }

    /// An empty cache for one sequence.
    pub fn cache(&self, positions: usize) -> KvCache {
        KvCache::new(self.config(), KvDtype::of(self.cpu().path), positions)
    }

    /// Runs new tokens of several sequences; returns the normed stream `[all tokens, hidden]`, sequences
    /// one after the other. With `caches` (one for each sequence) the tokens follow what is cached and
    /// are added to it; without, every sequence starts at position 0.
    ///
    /// # Errors
    /// An id outside the vocabulary, or activations that are not finite.
    ///
    /// # Panics
    /// If there are caches, but not one for each sequence.
    pub fn forward(
        &self,
        sequences: &[&[u32]],
        caches: Option<&mut [KvCache]>,
    ) -> Result<Vec<f32>, RuntimeError> {
        let all: Vec<_> = sequences.iter().map(|tokens| 0..tokens.len()).collect();
        self.forward_for(sequences, caches, &all)
    }

    /// The same, of which only the stream of the tokens `wanted` (a range for each sequence) is returned,
    /// `[wanted tokens, hidden]`, with the same bits. The last block caches keys and values of all tokens, and does
    /// the rest for these alone.
    ///
    /// # Errors
    /// An id outside the vocabulary, or activations of wanted tokens that are not finite.
    ///
    /// # Panics
    /// If there is not one range, and one cache if any, for each sequence, or a sequence has not the tokens wanted.
    pub fn forward_for(
        &self,
        sequences: &[&[u32]],
        caches: Option<&mut [KvCache]>,
        wanted: &[Range<usize>],
    ) -> Result<Vec<f32>, RuntimeError> {
        assert_eq!(wanted.len(), sequences.len(), "a range for each sequence");
        let past: Vec<usize> = match &caches {
            Some(caches) => {
                assert_eq!(caches.len(), sequences.len(), "one cache for each sequence");
                caches.iter().map(KvCache::len).collect()
            }
            None => vec![0; sequences.len()],
        };
        let mut rows = Vec::with_capacity(sequences.len());
        let mut first = 0;
        for (tokens, past) in sequences.iter().zip(past) {
            rows.push(Rows {
                first,
                len: tokens.len(),
                past,
            });
            first += tokens.len();
        }
        let mut x = self.parts.embed(&sequences.concat())?;
        let mut caches = caches;
        let Parts { cpu, rope, .. } = self.parts;
        let mut batch = Batch::new(cpu, rope, rows);
        let mut buffers = Buffers::default();
        for (index, block) in self.blocks.iter().enumerate() {
            if index + 1 == self.blocks.len() {
                batch = batch.wanting(cpu, rope, wanted);
            }
            block.forward(&mut x, &batch, caches.as_deref_mut(), &mut buffers);
        }
        let last = self.blocks.len().saturating_sub(1);
        finite(&x, last, self.config().hidden_size, |row| batch.row(row))?;
        let mut out = vec![0.0; x.len()];
        rms_norm(cpu, &x, &self.norm, self.config().rms_norm_eps, &mut out);
        Ok(out)
    }

    /// The logits of rows of [`Decoder::forward`]'s result, `[rows, vocab]`.
    pub fn logits(&self, hidden: &[f32]) -> Vec<f32> {
        self.head.apply(&self.parts.cpu, hidden)
    }

    /// The same in a buffer.
    pub(crate) fn logits_in<'b>(&self, hidden: &[f32], out: &'b mut Buffer) -> &'b [f32] {
        self.head.apply_in(&self.parts.cpu, hidden, out)
    }
}

/// Checks rows `[rows, hidden]` of the residual stream behind block `block`; `token` says which one a row is.
pub(crate) fn finite(
    x: &[f32],
    block: usize,
    hidden: usize,
    token: impl Fn(usize) -> usize,
) -> Result<(), RuntimeError> {
    match x.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(at) => Err(RuntimeError::NonFiniteActivation {
            block,
            token: token(at / hidden),
            channel: at % hidden,
        }),
    }
}
