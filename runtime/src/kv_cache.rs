//! Keys and values of the positions a sequence has already passed, as the attention kernel reads them.
//!
//! Positions come in pages of [`PAGE`]. A page holds, for each key-value head, the keys transposed, `[channel words, PAGE]`,
//! so that a vector holds one channel of neighbouring keys, and then the values, `[position words, value_width]`, so that it
//! holds neighbouring channels of one value. A word has 32 bits: of f32 it holds one element, of bf16 two, which one
//! instruction multiplies: channel `c` of a key beside channel `c + channel words`, and position `p` of 32 beside `p + 16`, so that
//! pairs of probabilities are made from whole vectors.

use crate::kernels::{Pool, bf16, pages};
use crate::{ModelConfig, Path};

/// Positions of a page.
pub(crate) const PAGE: usize = 64;

/// Positions between the two of a word.
pub(crate) const APART: usize = 16;

/// What a cache holds of a key or a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDtype {
    /// All of it.
    F32,
    /// Rounded to bf16: half the memory, and half the time of a product where there is an instruction for pairs.
    Bf16,
}

impl KvDtype {
    /// That of a path: only the fast one rounds.
    pub fn of(path: Path) -> Self {
        match path {
            Path::Fast => Self::Bf16,
            Path::Reference | Path::Bf16 => Self::F32,
        }
    }

    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        size_of::<u32>() / self.per_word()
    }

    /// Elements of a word.
    pub(crate) fn per_word(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
        }
    }

    /// How many of a page's words of positions hold those before `end`.
    pub(crate) fn position_words(self, end: usize) -> usize {
        match self {
            Self::F32 => end,
            Self::Bf16 => end / (2 * APART) * APART + (end % (2 * APART)).min(APART),
        }
    }
}

/// The cache of one sequence.
#[derive(Clone, Debug)]
pub struct KvCache {
    blocks: Vec<BlockCache>,
}

/// `K` and `V` of one block.
#[derive(Clone, Debug)]
pub(crate) struct BlockCache {
    shape: HeadShape,
    /// `[pages, heads, HeadShape::len]`; what stands from `len` on is never read as a position.
    pages: Vec<u32>,
    len: usize,
}

/// Sizes of the key-value heads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadShape {
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) dtype: KvDtype,
}

impl HeadShape {
    pub(crate) fn of(config: &ModelConfig, dtype: KvDtype) -> Self {
        Self {
            heads: config.num_kv_heads,
            head_dim: config.head_dim,
            dtype,
        }
    }

    /// Words of a key.
    pub(crate) fn key_words(self) -> usize {
        self.head_dim.div_ceil(self.dtype.per_word())
    }

    /// Channels of a stored value: whole vectors, what is beyond `head_dim` is 0.
    pub(crate) fn value_width(self) -> usize {
        self.head_dim.next_multiple_of(16)
    }

    /// Words of one head in one page.
    fn len(self) -> usize {
        PAGE * self.key_words() + PAGE / self.dtype.per_word() * self.value_width()
    }

    fn page_len(self) -> usize {
        self.heads * self.len()
    }
}

impl KvCache {
    /// An empty cache with room for `positions` positions; it grows beyond them when needed.
    pub fn new(config: &ModelConfig, dtype: KvDtype, positions: usize) -> Self {
        let shape = HeadShape::of(config, dtype);
        let blocks = (0..config.num_blocks)
            .map(|_| BlockCache::new(shape, positions))
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
        self.blocks.iter_mut().for_each(|block| block.truncate(len));
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

    /// Forgets all positions from `len` on.
    pub(crate) fn truncate(&mut self, len: usize) {
        if len >= self.len {
            return;
        }
        self.len = len;
        if self.shape.dtype == KvDtype::Bf16 {
            self.forget_late(len);
        }
    }

    /// Clears the later positions of words whose earlier ones are kept: they are multiplied by 0, but not if infinite.
    fn forget_late(&mut self, len: usize) {
        let (shape, width) = (self.shape, self.shape.value_width());
        let first = len / PAGE * shape.page_len();
        let (group, slot) = (len % PAGE / (2 * APART), len % (2 * APART));
        let forgotten = slot.saturating_sub(APART)..APART;
        let words = (group * APART + forgotten.start) * width..(group + 1) * APART * width;
        for head in self.pages[first..][..shape.page_len()].chunks_exact_mut(shape.len()) {
            let values = &mut head[shape.key_words() * PAGE..];
            for word in &mut values[words.clone()] {
                *word &= bf16::EARLY;
            }
        }
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
            self.pages.resize(pages, 0);
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

    /// Keys `[key words, PAGE]` and values `[position words, value_width]` of one head in one page.
    pub(crate) fn page(&self, page: usize, head: usize) -> (&[u32], &[u32]) {
        let at = page * self.shape.page_len() + head * self.shape.len();
        self.pages[at..at + self.shape.len()].split_at(self.shape.key_words() * PAGE)
    }
}

/// Writes one position into its page.
fn write(shape: HeadShape, page: &mut [u32], slot: usize, key: &[f32], value: &[f32]) {
    let (dim, width) = (shape.head_dim, shape.value_width());
    let key_words = shape.key_words();
    let heads = key.chunks_exact(dim).zip(value.chunks_exact(dim));
    for (head, (key, value)) in page.chunks_exact_mut(shape.len()).zip(heads) {
        let (keys, values) = head.split_at_mut(key_words * PAGE);
        let columns = keys.chunks_exact_mut(PAGE).map(|column| &mut column[slot]);
        match shape.dtype {
            KvDtype::F32 => {
                for (word, key) in columns.zip(key) {
                    *word = key.to_bits();
                }
                for (word, value) in values[slot * width..].iter_mut().zip(value) {
                    *word = value.to_bits();
                }
            }
            KvDtype::Bf16 => {
                let late = key[key_words..].iter().chain(&[0.0]);
                for ((word, early), late) in columns.zip(key).zip(late) {
                    *word = bf16::pair(*early, *late);
                }
                let (group, slot) = (slot / (2 * APART), slot % (2 * APART));
                let row = &mut values[(group * APART + slot % APART) * width..];
                for (word, value) in row.iter_mut().zip(value) {
                    // The later position of a word is written later: what it may still hold is of a time before.
                    *word = match slot < APART {
                        true => bf16::pair(*value, 0.0),
                        false => *word & bf16::EARLY | bf16::pair(0.0, *value),
                    };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_found_where_they_were_put() {
        // Whole numbers below 256 are bf16 as they are; 7 channels make 4 words of two.
        for (dtype, head_dim) in [(KvDtype::F32, 6), (KvDtype::Bf16, 6), (KvDtype::Bf16, 7)] {
            let shape = HeadShape {
                heads: 2,
                head_dim,
                dtype,
            };
            let dim = 2 * head_dim;
            let value_of = |position: usize, at: usize| ((position * 31 + at * 7) % 256) as f32;
            let rows: Vec<Vec<f32>> = (0..150)
                .map(|position| (0..2 * dim).map(|at| value_of(position, at)).collect())
                .collect();
            let pool = Pool::new(2);
            let mut cache = BlockCache::new(shape, 3);
            for (start, len) in [(0, 1), (1, 62), (63, 2), (65, 85), (100, 50)] {
                cache.len = start;
                cache.append(&pool, len, |token| rows[start + token].split_at(dim));
            }
            assert_eq!(cache.len, 150);
            let element = |word: u32, late: bool| match (dtype, late) {
                (KvDtype::F32, _) => f32::from_bits(word),
                (_, false) => f32::from_bits(word & bf16::EARLY),
                (_, true) => f32::from_bits(word << 16),
            };
            for (position, row) in rows.iter().enumerate() {
                for head in 0..2 {
                    let (keys, values) = cache.page(position / PAGE, head);
                    let slot = position % PAGE;
                    for channel in 0..head_dim {
                        let word = keys[channel % shape.key_words() * PAGE + slot];
                        let key = element(word, channel >= shape.key_words());
                        assert_eq!(key, row[head * head_dim + channel]);
                        let (at, late) = match dtype {
                            KvDtype::F32 => (slot, false),
                            KvDtype::Bf16 => (slot / 32 * 16 + slot % 16, slot % 32 >= 16),
                        };
                        let value = element(values[at * 16 + channel], late);
                        assert_eq!(value, row[dim + head * head_dim + channel]);
                    }
                }
            }
        }
    }

    #[test]
    fn words_of_positions_hold_all_before_an_end() {
        for end in 0..=PAGE {
            let expected = (0..end).map(|slot| slot / 32 * 16 + slot % 16 + 1).max();
            assert_eq!(KvDtype::Bf16.position_words(end), expected.unwrap_or(0));
        }
    }
}
