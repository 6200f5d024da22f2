//! Windows of token ids: cut from one stream, chosen by a seed, identified by a digest.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// How many windows of how many tokens, and the seed of every random choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowSpec {
    /// Number of windows.
    pub windows: usize,
    /// Tokens per window.
    pub tokens: usize,
    /// Seed: equal seeds give equal windows.
    pub seed: u64,
}

impl WindowSpec {
    /// # Errors
    /// [`Error::EmptySpec`] if there would be no token.
    pub(crate) fn check(&self) -> Result<()> {
        let &Self {
            windows, tokens, ..
        } = self;
        if windows == 0 || tokens == 0 {
            return Err(Error::EmptySpec { windows, tokens });
        }
        Ok(())
    }
}

/// Token windows, where they came from, and the digests of both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    ids: Vec<u32>,
    tokens: usize,
    /// Where the tokens came from, in words, with every choice made on the way.
    pub source: String,
    /// Name (without its folder) and SHA-256 (of the file's bytes, hexadecimal) of each file used.
    pub files: Vec<(String, String)>,
}

impl Windows {
    /// Windows of `tokens` ids each, `ids` being `[windows, tokens]`, row major.
    ///
    /// # Panics
    /// If `ids` is no whole, positive number of windows.
    #[must_use]
    #[track_caller]
    pub fn from_ids(ids: Vec<u32>, tokens: usize, source: String) -> Self {
        assert!(
            tokens > 0 && !ids.is_empty(),
            "windows hold at least one token"
        );
        assert!(
            ids.len().is_multiple_of(tokens),
            "{} ids are no windows of {tokens}",
            ids.len()
        );
        Self {
            ids,
            tokens,
            source,
            files: Vec::new(),
        }
    }

    /// The windows, each of [`tokens`](Self::tokens) ids.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        self.ids.chunks_exact(self.tokens)
    }

    /// All ids, `[windows, tokens]`, row major.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Number of windows.
    #[must_use]
    pub fn windows(&self) -> usize {
        self.ids.len() / self.tokens
    }

    /// Tokens per window.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// SHA-256 over the ids as little-endian 32-bit integers, `[windows, tokens]`, hexadecimal.
    #[must_use]
    pub fn sha256(&self) -> String {
        let mut hasher = Sha256::new();
        for window in self.iter() {
            let bytes: Vec<u8> = window.iter().flat_map(|id| id.to_le_bytes()).collect();
            hasher.update(bytes);
        }
        hex(hasher)
    }

    /// Number of different ids. Few of them leave a Hessian without full rank.
    #[must_use]
    pub fn distinct_tokens(&self) -> usize {
        let mut sorted = self.ids.clone();
        sorted.sort_unstable();
        sorted.dedup();
        sorted.len()
    }

    /// # Errors
    /// [`Error::OutsideVocabulary`] at the first id that is not below `vocab`.
    pub(crate) fn check_vocabulary(&self, vocab: usize) -> Result<()> {
        match self.ids.iter().position(|&id| id as usize >= vocab) {
            None => Ok(()),
            Some(at) => Err(Error::OutsideVocabulary {
                origin: self.source.clone(),
                id: self.ids[at],
                window: at / self.tokens,
                vocab,
            }),
        }
    }
}

/// Consecutive windows of `stream`; where there are more than asked, an evenly spread choice.
///
/// `origin` names the texts in errors and begins [`Windows::source`].
///
/// # Errors
/// [`Error::Empty`] without a token, [`Error::TooShort`] with too few windows.
pub(crate) fn cut(stream: &[u32], spec: &WindowSpec, origin: &str) -> Result<Windows> {
    let &WindowSpec {
        windows,
        tokens,
        seed,
    } = spec;
    if stream.is_empty() {
        return Err(Error::Empty {
            origin: origin.to_owned(),
        });
    }
    let available = stream.len() / tokens;
    if available < windows {
        return Err(Error::TooShort {
            origin: origin.to_owned(),
            wanted: windows,
            tokens,
            available,
            found: stream.len(),
        });
    }
    let ids = choose(available, windows, seed)
        .flat_map(|at| &stream[at * tokens..(at + 1) * tokens])
        .copied()
        .collect();
    let source = format!("{origin}; {windows} of {available} windows, seed {seed}, no bos");
    Ok(Windows::from_ids(ids, tokens, source))
}

/// `wanted` of `available` indices, rising: one, drawn by `seed`, from each of `wanted` equal parts.
///
/// Equal parts instead of free draws: no stretch of the text is left out or crowded.
fn choose(available: usize, wanted: usize, seed: u64) -> impl Iterator<Item = usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..wanted).map(move |part| {
        // In 128 bits, for `available` is bounded by memory and not by a square root of it.
        let bound = |part: usize| (part as u128 * available as u128 / wanted as u128) as usize;
        let (start, end) = (bound(part), bound(part + 1));
        start + below(&mut rng, end - start)
    })
}

/// A random index below `n`, by one multiplication (the bias is below `n / 2^64`).
///
/// Written out, since the drawn windows must not change with a random-number library's version.
pub(crate) fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    ((u128::from(rng.next_u64()) * n as u128) >> 64) as usize
}

/// The digest in lower-case hexadecimal.
pub(crate) fn hex(hasher: Sha256) -> String {
    hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{WindowSpec, Windows, choose, cut};
    use crate::testing::says;
    use proptest::prelude::*;

    fn spec(windows: usize, tokens: usize, seed: u64) -> WindowSpec {
        WindowSpec {
            windows,
            tokens,
            seed,
        }
    }

    proptest! {
        #![proptest_config(crate::testing::seeded())]

        #[test]
        fn windows_are_consecutive_and_do_not_overlap(
            extra in 0usize..200, windows in 1usize..40, tokens in 1usize..20, seed: u64,
        ) {
            let stream: Vec<u32> = (0..(windows * tokens + extra) as u32).collect();
            let spec = spec(windows, tokens, seed);
            let cut_once = cut(&stream, &spec, "text").unwrap();
            prop_assert_eq!(cut_once.windows(), windows);
            prop_assert_eq!(cut_once.iter().len(), windows);
            let mut next = 0;
            for window in cut_once.iter() {
                prop_assert_eq!(window.len(), tokens);
                prop_assert!(window[0] >= next && (window[0] as usize).is_multiple_of(tokens));
                prop_assert!(window.windows(2).all(|pair| pair[1] == pair[0] + 1));
                next = window[0] + tokens as u32;
            }
            prop_assert_eq!(cut(&stream, &spec, "text").unwrap(), cut_once);
        }

        #[test]
        fn one_is_chosen_from_every_equal_part(wanted in 1usize..50, more in 0usize..500, seed: u64) {
            let available = wanted + more;
            for (part, at) in choose(available, wanted, seed).enumerate() {
                prop_assert!(part * available / wanted <= at);
                prop_assert!(at < (part + 1) * available / wanted);
            }
        }

        #[test]
        fn too_few_are_never_given(short in 1usize..20, windows in 1usize..40, seed: u64) {
            let tokens = 20;
            let stream = vec![0; windows * tokens - short];
            prop_assert!(cut(&stream, &spec(windows, tokens, seed), "text").is_err());
        }
    }

    #[test]
    fn the_seed_chooses() {
        let stream: Vec<u32> = (0..1000).collect();
        let by_seed = |seed| {
            cut(&stream, &spec(10, 10, seed), "text")
                .unwrap()
                .ids()
                .to_vec()
        };
        assert_ne!(by_seed(1), by_seed(2));
        // Written down: the choice must not change between versions of this crate.
        let starts: Vec<u32> = by_seed(0).chunks(10).map(|window| window[0] / 10).collect();
        assert_eq!(starts, STARTS_SEED_0);
    }

    const STARTS_SEED_0: [u32; 10] = [7, 14, 26, 30, 48, 55, 68, 79, 88, 91];

    #[test]
    fn too_short_says_both_numbers_and_the_way_out() {
        let words = [
            "128 windows of 20 tokens",
            "there are 30 (619 tokens)",
            "`--calib self`",
        ];
        says(cut(&[0; 619], &spec(128, 20, 0), "`a.txt`"), &words);
        says(cut(&[], &spec(1, 20, 0), "`a.txt`"), &["`a.txt`", "empty"]);
        says(spec(0, 20, 0).check(), &["0 windows of 20 tokens"]);
        says(spec(3, 0, 0).check(), &["3 windows of 0 tokens"]);
    }

    #[test]
    fn digest_is_over_little_endian_32_bit_integers() {
        let windows = Windows::from_ids(vec![1, 2, 3, 0x0102_0304], 2, String::new());
        // printf '\1\\0\\0\\0\\2\\0\\0\\0\\3\\0\\0\\0\\4\\3\\2\\1' | sha256sum
        assert_eq!(windows.sha256(), SHA256);
        assert_eq!(windows.distinct_tokens(), 4);
    }

    const SHA256: &str = "fba827db1c52c666397ba91ab0a87f120c9bc92a7547bd445c69ce49ea74cbc5";

    #[test]
    #[should_panic(expected = "3 ids are no windows of 2")]
    fn half_a_window_is_a_bug() {
        let _ = Windows::from_ids(vec![1, 2, 3], 2, String::new());
    }

    #[test]
    fn ids_outside_the_vocabulary_are_named() {
        let windows = Windows::from_ids(vec![1, 2, 3, 7], 2, "`a.npy`".to_owned());
        assert!(windows.check_vocabulary(8).is_ok());
        says(
            windows.check_vocabulary(7),
            &["`a.npy`", "token id 7 in window 1", "vocabulary of 7"],
        );
    }
}
