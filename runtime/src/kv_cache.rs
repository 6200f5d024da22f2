//! Keys and values of the positions a sequence has already passed, as the attention kernel reads them.
//!
//! Positions come in pages of [`PAGE`]. A page holds, for each key-value head, the keys transposed, `[head_dim, PAGE]`,
//! so that a vector holds one channel of neighbouring keys, and then the values, `[PAGE, value_width]`, so that it
//! holds neighbouring channels of one value.

use crate::ModelConfig;
use crate::kernels::{Pool, pages};

/// Positions of a page.
pub(crate) const PAGE: usize = 64;

/// The cache of one sequence, f32.
#[derive(Clone, Debug)]
pub struct KvCache {
    blocks: Vec<BlockCache>,
}

/// `K` and `V` of one block.
#[derive(Clone, Debug)]
pub(crate) struct BlockCache {
    shape: HeadShape,
    /// `[pages, heads, HeadShape::len]`; what stands from `len` on is never read as a position.
    pages: Vec<f32>,
    len: usize,
}

/// Sizes of the key-value heads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadShape {
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
}

impl HeadShape {
    pub(crate) fn of(config: &ModelConfig) -> Self {
        Self {
            heads: config.num_kv_heads,
            head_dim: config.head_dim,
        }
    }

    /// Channels of a stored value: whole vectors, what is beyond `head_dim` is 0.
    pub(crate) fn value_width(self) -> usize {
        self.head_dim.next_multiple_of(16)
    }

    /// Elements of one head in one page.
    fn len(self) -> usize {
        PAGE * (self.head_dim + self.value_width())
    }

    fn page_len(self) -> usize {
        self.heads * self.len()
    }
}

impl KvCache {
    /// An empty cache with room for `positions` positions; it grows beyond them when needed.
    pub fn new(config: &ModelConfig, positions: usize) -> Self {
        let blocks = (0..config.num_blocks)
            .map(|_| BlockCache::new(HeadShape::of(config), positions))
            .collect();
        Self { blocks }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.blocks.first().map_or(0, |block| block.len)
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        for block in &mut self.blocks {
            block.len = block.len.min(len);
        }
    }

    pub(crate) fn block_mut(&mut self, block: usize) -> &mut BlockCache {
        &mut self.blocks[block]
    }
}

impl BlockCache {
    pub(crate) fn new(shape: HeadShape, positions: usize) -> Self {
        Self {
            shape,
            pages: pages::zeros(positions.div_ceil(PAGE) * shape.page_len()),
            len: 0,
        }
    }

    pub(crate) fn shape(&self) -> HeadShape {
        self.shape
    }

    /// Appends `tokens` positions; `row(token)` gives the key and the value of one, `[heads · head_dim]` each.
    pub(crate) fn append<'a>(
        &mut self,
        pool: &Pool,
        tokens: usize,
        row: impl Fn(usize) -> (&'a [f32], &'a [f32]) + Sync,
    ) {
        let (shape, from, to) = (self.shape, self.len, self.len + tokens);
        let pages = to.div_ceil(PAGE) * shape.page_len();
        if self.pages.len() < pages {
            self.pages.resize(pages, 0.0);
        }
        let first_page = from / PAGE;
        let fresh = &mut self.pages[first_page * shape.page_len()..pages];
        pool.parts(fresh, shape.page_len(), |page, out| {
            let start = (first_page + page) * PAGE;
            for position in start.max(from)..(start + PAGE).min(to) {
                let (key, value) = row(position - from);
                write(shape, out, position - start, key, value);
            }
        });
        self.len = to;
    }

    /// Keys `[head_dim, PAGE]` and values `[PAGE, value_width]` of one head in one page.
    pub(crate) fn page(&self, page: usize, head: usize) -> (&[f32], &[f32]) {
        let at = page * self.shape.page_len() + head * self.shape.len();
        self.pages[at..at + self.shape.len()].split_at(self.shape.head_dim * PAGE)
    }
}

/// Writes one position into its page.
fn write(shape: HeadShape, page: &mut [f32], slot: usize, key: &[f32], value: &[f32]) {
    let (dim, width) = (shape.head_dim, shape.value_width());
    let heads = key.chunks_exact(dim).zip(value.chunks_exact(dim));
    for (head, (key, value)) in page.chunks_exact_mut(shape.len()).zip(heads) {
        let (keys, values) = head.split_at_mut(dim * PAGE);
        for (column, &key) in keys.chunks_exact_mut(PAGE).zip(key) {
            column[slot] = key;
        }
        values[slot * width..slot * width + dim].copy_from_slice(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_found_where_they_were_put() {
        let shape = HeadShape {
            heads: 2,
            head_dim: 6,
        };
        let value_of = |position: usize, at: usize| (position * 100 + at) as f32;
        let rows: Vec<Vec<f32>> = (0..150)
            .map(|position| (0..24).map(|at| value_of(position, at)).collect())
            .collect();
        let pool = Pool::new(2);
        let mut cache = BlockCache::new(shape, 3);
        for (start, len) in [(0, 1), (1, 62), (63, 2), (65, 85)] {
            cache.append(&pool, len, |token| rows[start + token].split_at(12));
        }
        assert_eq!(cache.len, 150);
        for position in 0..150 {
            for head in 0..2 {
                let (keys, values) = cache.page(position / PAGE, head);
                for channel in 0..6 {
                    let key = keys[channel * PAGE + position % PAGE];
                    assert_eq!(key, value_of(position, head * 6 + channel));
                    let value = values[position % PAGE * 16 + channel];
                    assert_eq!(value, value_of(position, 12 + head * 6 + channel));
                }
            }
        }
    }
}
