//! Keys and values of the positions a sequence has already passed.

use crate::ModelConfig;

/// The cache of one sequence: per block `K` and `V`, each `[positions, kv_dim]`, contiguous f32.
#[derive(Clone, Debug)]
pub struct KvCache {
    blocks: Vec<BlockCache>,
    kv_dim: usize,
}

/// `K` and `V` of one block.
#[derive(Clone, Debug, Default)]
pub(crate) struct BlockCache {
    pub(crate) keys: Vec<f32>,
    pub(crate) values: Vec<f32>,
}

impl KvCache {
    /// An empty cache with room for `positions` positions; it grows beyond them when needed.
    pub fn new(config: &ModelConfig, positions: usize) -> Self {
        let kv_dim = config.kv_dim();
        let reserve = || Vec::with_capacity(positions * kv_dim);
        let blocks = (0..config.num_blocks)
            .map(|_| BlockCache {
                keys: reserve(),
                values: reserve(),
            })
            .collect();
        Self { blocks, kv_dim }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.blocks
            .first()
            .map_or(0, |block| block.keys.len() / self.kv_dim)
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        for block in &mut self.blocks {
            block.keys.truncate(len * self.kv_dim);
            block.values.truncate(len * self.kv_dim);
        }
    }

    pub(crate) fn block_mut(&mut self, block: usize) -> &mut BlockCache {
        &mut self.blocks[block]
    }
}
