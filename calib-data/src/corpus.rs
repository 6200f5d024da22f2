//! The built-in corpus: original texts of many domains, in the public domain (CC0).

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::text::join;
use crate::tokenizer::Tokenizer;
use crate::window::{self, WindowSpec, Windows, below, hex};

/// One file of the corpus.
#[derive(Clone, Copy, Debug)]
pub struct CorpusText {
    /// File name without `.txt`.
    pub name: &'static str,
    /// Domain: several files may share one, as the programming languages share `code`.
    pub domain: &'static str,
    /// Documents, divided by two blank lines.
    pub text: &'static str,
}

macro_rules! corpus {
    ($($domain:literal: $($name:literal)+;)+) => {
        &[$($(CorpusText {
            name: $name,
            domain: $domain,
            text: include_str!(concat!("../corpus/", $name, ".txt")),
        },)+)+]
    };
}

/// All texts of the corpus.
pub const CORPUS: &[CorpusText] = corpus! {
    "narrative": "narrative";
    "encyclopedic": "encyclopedic";
    "technical": "technical";
    "dialogue": "dialogue";
    "instructions": "instructions";
    "mathematics": "mathematics";
    "tables": "tables-json";
    "code": "code-c" "code-javascript" "code-python" "code-rust" "code-sql-shell";
    "languages": "lang-ar" "lang-de" "lang-es" "lang-fr" "lang-hi" "lang-it" "lang-ja" "lang-pt"
                 "lang-ru" "lang-zh";
};

const DIVIDER: &str = "\n\n\n";

/// Windows of the corpus with all its texts in proportion.
pub(crate) fn load(
    tokenizer: &Tokenizer,
    spec: &WindowSpec,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Windows> {
    let total = CORPUS.iter().map(|text| text.text.len() as u64).sum();
    let mut rng = ChaCha8Rng::seed_from_u64(spec.seed);
    let mut hasher = Sha256::new();
    let mut texts = Vec::with_capacity(CORPUS.len());
    let mut done = 0;
    for CorpusText { text, .. } in CORPUS {
        hasher.update(text);
        let mut documents: Vec<String> = documents(text).map(str::to_owned).collect();
        shuffle(&mut documents, &mut rng);
        texts.push(tokenizer.encode_batch(&documents, false)?);
        done += text.len() as u64;
        progress(done, total);
    }
    let mut stream = Vec::new();
    for document in interleave(texts) {
        join(&mut stream, &document, tokenizer.eos());
    }
    let mut windows = window::cut(&stream, spec, "the built-in corpus")?;
    windows.files = vec![("builtin".to_owned(), hex(hasher))];
    Ok(windows)
}

fn documents(text: &str) -> impl Iterator<Item = &str> {
    text.split(DIVIDER)
        .map(|document| document.trim_matches('\n'))
        .filter(|text| !text.is_empty())
}

/// Fisher–Yates.
fn shuffle<T>(items: &mut [T], rng: &mut ChaCha8Rng) {
    for last in (1..items.len()).rev() {
        items.swap(last, below(rng, last + 1));
    }
}

/// Documents of all texts in one order in which every stretch has of each text what is its share: a
/// document's place is where its middle lies within its own text, from 0 to 1.
fn interleave(texts: Vec<Vec<Vec<u32>>>) -> Vec<Vec<u32>> {
    let mut placed = Vec::new();
    for documents in texts {
        let total: usize = documents.iter().map(Vec::len).sum();
        let mut before = 0;
        for document in documents {
            let middle = (before as f64 + document.len() as f64 / 2.0) / total.max(1) as f64;
            before += document.len();
            placed.push((middle, document));
        }
    }
    // Stable: equal places keep the order of the texts.
    placed.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    placed.into_iter().map(|(_, document)| document).collect()
}

#[cfg(test)]
mod tests {
    use super::{CORPUS, documents, interleave, load};
    use crate::error::Error;
    use crate::testing::{EOS, says, tiny};
    use crate::window::WindowSpec;

    fn spec(windows: usize, seed: u64) -> WindowSpec {
        WindowSpec {
            windows,
            tokens: 128,
            seed,
        }
    }

    #[test]
    fn the_table_is_the_folder() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus");
        let names = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let texts =
            names.filter(|path| path.extension().is_some_and(|extension| extension == "txt"));
        let mut found: Vec<String> = texts
            .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
            .collect();
        let mut listed: Vec<&str> = CORPUS.iter().map(|text| text.name).collect();
        found.sort();
        listed.sort_unstable();
        assert_eq!(listed, found);
    }

    #[test]
    fn it_is_large_and_mixed() {
        let bytes: usize = CORPUS.iter().map(|text| text.text.len()).sum();
        assert!(bytes >= 150_000, "{bytes} bytes");
        let of = |domain| CORPUS.iter().filter(move |text| text.domain == domain);
        assert!(of("languages").count() >= 5 && of("code").count() >= 3);
        for text in CORPUS {
            assert!(!text.text.contains('\r'), "{}", text.name);
            assert!(documents(text.text).count() >= 3, "{}", text.name);
            let documents = documents(text.text).collect::<std::collections::BTreeSet<_>>();
            assert_eq!(
                documents.len(),
                super::documents(text.text).count(),
                "{}",
                text.name
            );
        }
    }

    #[test]
    fn every_stretch_has_every_text_in_its_share() {
        // Three texts of 60, 30 and 10 documents, a document being ten times the text's number.
        let text = |number: u32, documents: usize| vec![vec![number; 10]; documents];
        let stream = interleave(vec![text(0, 60), text(1, 30), text(2, 10)]);
        for (number, expected) in [(0, 12), (1, 6), (2, 2)] {
            for fifth in stream.chunks(20) {
                let count = fifth
                    .iter()
                    .filter(|document| document[0] == number)
                    .count();
                assert!(
                    count.abs_diff(expected) <= 1,
                    "text {number}: {count} in {fifth:?}"
                );
            }
        }
    }

    #[test]
    fn windows_by_seed_with_end_tokens_between_documents() {
        let tokenizer = tiny();
        let mut seen = Vec::new();
        let mut progress = |done, total| seen.push((done, total));
        let windows = load(&tokenizer, &spec(64, 7), &mut progress).unwrap();
        assert_eq!((windows.windows(), windows.tokens()), (64, 128));
        assert_eq!(
            load(&tokenizer, &spec(64, 7), &mut |_, _| ()).unwrap(),
            windows
        );
        assert_ne!(
            load(&tokenizer, &spec(64, 8), &mut |_, _| ())
                .unwrap()
                .ids(),
            windows.ids()
        );
        assert!(windows.ids().contains(&EOS));
        assert!(
            windows.distinct_tokens() > 1000,
            "{}",
            windows.distinct_tokens()
        );
        assert!(seen.is_sorted() && seen.last().is_some_and(|(done, total)| done == total));
        let too_many = load(&tokenizer, &spec(100_000, 7), &mut |_, _| ());
        let Err(Error::TooShort { available, .. }) = too_many else {
            panic!("{too_many:?}")
        };
        says(too_many, &["built-in corpus", "100000"]);
        // With every window taken, the seed still orders the documents.
        let all = |seed| load(&tokenizer, &spec(available, seed), &mut |_, _| ()).unwrap();
        assert_ne!(all(7).ids(), all(8).ids());
    }
}
