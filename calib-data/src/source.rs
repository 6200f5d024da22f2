//! The three sources of calibration tokens, and the one door to them.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::path::{display, file_name, origin, read_error};
use crate::self_generation::{self, Generator};
use crate::text::{self, Stream};
use crate::tokenizer::Tokenizer;
use crate::window::{self, WindowSpec, Windows};
use crate::{corpus, npy};

/// Where calibration tokens come from.
pub enum Source<'a> {
    /// Files by extension: `.jsonl`, `.parquet`, `.npy`; everything else is plain text.
    Files(Vec<PathBuf>),
    /// The corpus that comes with this crate, [`CORPUS`](crate::CORPUS).
    Builtin,
    /// Text that the model itself generates.
    SelfGenerated(&'a mut dyn Generator),
}

/// Loads exactly `spec.windows` windows of `spec.tokens` tokens.
///
/// - Plain text: one document, as it stands. JSON Lines: one document a line, the string in `field`,
///   or a list of chat messages there or in `messages`. Parquet: one document a row, the column
///   `field`.
/// - Documents are tokenized without special tokens, joined to one stream with the model's end token
///   between them (where it has one and the document does not end in it), and cut into consecutive
///   windows. Where there are more than asked, one is drawn from each of equal parts of the stream.
/// - `.npy`: `[rows, tokens]` integers, the first rows as they are; no tokenizer is needed.
/// - Built-in: the same, all domains in proportion. Self-generated: see [`Generator`].
///
/// `vocab_limit` is the model's vocabulary: every id is below it. `progress` is told what is done and
/// how much there is, in bytes for files and the corpus and in tokens for generated text.
///
/// # Errors
/// Fewer windows than asked are an error, [`Error::TooShort`]; and all others of [`Error`].
pub fn load(
    source: Source<'_>,
    tokenizer: Option<&Tokenizer>,
    spec: &WindowSpec,
    field: &str,
    vocab_limit: usize,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Windows> {
    spec.check()?;
    let with_tokenizer = |origin: &str| {
        tokenizer.ok_or_else(|| Error::NoTokenizer {
            origin: origin.to_owned(),
        })
    };
    let windows = match source {
        Source::Files(paths) => match kind(&paths)? {
            Kind::Ids => npy::load(&paths, spec)?,
            Kind::Text => {
                let tokenizer = with_tokenizer(&origin(&paths))?;
                from_texts(&paths, tokenizer, spec, field, progress)?
            }
        },
        Source::Builtin => corpus::load(with_tokenizer("the built-in corpus")?, spec, progress)?,
        Source::SelfGenerated(generator) => {
            let tokenizer = with_tokenizer("self-generated text")?;
            self_generation::load(generator, tokenizer, spec, vocab_limit, progress)?
        }
    };
    windows.check_vocabulary(vocab_limit)?;
    Ok(windows)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Ids,
    Text,
}

/// What the files hold, which must be one and the same.
fn kind(paths: &[PathBuf]) -> Result<Kind> {
    let ids = paths.iter().find(|path| extension(path) == "npy");
    let text = paths.iter().find(|path| extension(path) != "npy");
    match (ids, text) {
        (None, None) => Err(Error::NoFiles),
        (Some(_), None) => Ok(Kind::Ids),
        (None, Some(_)) => Ok(Kind::Text),
        (Some(npy), Some(text)) => Err(Error::MixedKinds {
            npy: display(npy),
            text: display(text),
        }),
    }
}

fn from_texts(
    paths: &[PathBuf],
    tokenizer: &Tokenizer,
    spec: &WindowSpec,
    field: &str,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Windows> {
    let mut sizes = Vec::with_capacity(paths.len());
    for path in paths {
        let metadata = std::fs::metadata(path).map_err(|error| read_error(path, error))?;
        sizes.push(metadata.len());
    }
    let total: u64 = sizes.iter().sum();
    let mut stream = Stream::new(tokenizer);
    let mut files = Vec::with_capacity(paths.len());
    let mut before = 0;
    for (path, size) in paths.iter().zip(sizes) {
        let mut report = |read: u64| progress(before + read, total);
        let sha256 = match extension(path).as_str() {
            "jsonl" => text::read_json_lines(path, field, &mut stream, &mut report)?,
            "parquet" => read_parquet(path, field, &mut stream, &mut report)?,
            _ => text::read_plain(path, &mut stream)?,
        };
        before += size;
        progress(before, total);
        files.push((file_name(path), sha256));
    }
    let mut windows = window::cut(&stream.finish()?, spec, &origin(paths))?;
    windows.files = files;
    Ok(windows)
}

#[cfg(feature = "parquet")]
use crate::parquet::read as read_parquet;

#[cfg(not(feature = "parquet"))]
fn read_parquet(
    path: &Path,
    _field: &str,
    _stream: &mut Stream<'_>,
    _progress: &mut dyn FnMut(u64),
) -> Result<String> {
    Err(Error::ParquetNotBuilt {
        file: display(path),
    })
}

/// The extension in lower case, empty without one.
fn extension(path: &Path) -> String {
    path.extension()
        .unwrap_or_default()
        .to_string_lossy()
        .to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::{Source, load};
    use crate::testing::{EOS, VOCAB, file, says, tiny, with_template};
    use crate::window::{WindowSpec, Windows};
    use crate::{Result, Tokenizer};

    fn spec(windows: usize, tokens: usize) -> WindowSpec {
        WindowSpec {
            windows,
            tokens,
            seed: 3,
        }
    }

    fn from_files(tokenizer: &Tokenizer, paths: &[PathBuf], spec: &WindowSpec) -> Result<Windows> {
        let files = Source::Files(paths.to_vec());
        load(
            files,
            Some(tokenizer),
            spec,
            "text",
            VOCAB + 2,
            &mut |_, _| (),
        )
    }

    /// One window of the whole stream of a file.
    fn stream(tokenizer: &Tokenizer, name: &str, bytes: &str, tokens: usize) -> Vec<u32> {
        let (_folder, path) = file(name, bytes);
        from_files(tokenizer, &[path], &spec(1, tokens))
            .unwrap()
            .ids()
            .to_vec()
    }

    fn says_of(name: &str, bytes: impl AsRef<[u8]>, words: &[&str]) {
        let (_folder, path) = file(name, bytes);
        says(from_files(&tiny(), &[path], &spec(1, 4)), words);
    }

    #[test]
    fn plain_text_is_one_document_as_it_stands() {
        let tokenizer = tiny();
        let text = "First line.\r\n\n\n\n  Second <|eos|> line.\n";
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(stream(&tokenizer, "a.txt", text, ids.len()), ids);
        assert_eq!(stream(&tokenizer, "a", text, ids.len()), ids);
    }

    #[test]
    fn documents_are_joined_by_the_end_token() {
        let tokenizer = tiny();
        let [one, two] = ["One text.", "Another."].map(|text| tokenizer.encode(text).unwrap());
        let expected = [one.as_slice(), &[EOS], &two].concat();
        let lines =
            "{\"text\": \"One text.\"}\n\n{\"n\": 1, \"text\": \"\"}\r\n{\"text\": \"Another.\"}";
        assert_eq!(
            stream(&tokenizer, "a.JSONL", lines, expected.len()),
            expected
        );

        // An empty document at the end adds nothing.
        let (_folder, path) = file("a.jsonl", "{\"text\": \"One text.\"}\n{\"text\": \"\"}\n");
        let longer = from_files(&tokenizer, &[path], &spec(1, one.len() + 1));
        says(longer, &[&format!("({} tokens)", one.len())]);

        let (_a, first) = file("a.txt", "One text.");
        let (_b, second) = file("b.jsonl", "{\"text\": \"Another.\"}\n");
        let windows = from_files(&tokenizer, &[first, second], &spec(1, expected.len())).unwrap();
        assert_eq!(windows.ids(), expected);
        let names: Vec<&str> = windows
            .files
            .iter()
            .map(|(name, _)| name.as_str())
            .collect();
        assert_eq!(names, ["a.txt", "b.jsonl"]);
        // printf 'One text.' | sha256sum
        assert_eq!(windows.files[0].1, ONE_TEXT_SHA256);
        assert_eq!(
            windows.source,
            "`a.txt` and 1 more; 1 of 1 windows, seed 3, no bos"
        );
    }

    const ONE_TEXT_SHA256: &str =
        "3638f28994bd454c7da2ab8e636841d9e6821b8adac4b02772131b5e642e321d";

    #[test]
    fn chats_go_through_the_template() {
        let template = "{% for m in messages %}{{ '<|start|>' + m.role + ':' + m.content + '<|end|>' }}{% endfor %}";
        let tokenizer = with_template(template);
        let part = |text: &str| tokenizer.encode(text).unwrap();
        let lines = r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Ho"}]}
{"text": "plain"}
{"text": [{"role": "user", "content": "Hi"}]}"#;
        let (hi, ho, plain) = (part("user:Hi"), part("bot:Ho"), part("plain"));
        // A chat that ends in an end token gets no second one.
        let (s, e): (&[u32], &[u32]) = (&[4096], &[4097]);
        let expected = [s, &hi, e, s, &ho, e, &plain, &[EOS], s, &hi, e].concat();
        assert_eq!(
            stream(&tokenizer, "a.jsonl", lines, expected.len()),
            expected
        );
    }

    #[test]
    fn the_field_is_chosen() {
        let (_folder, path) = file("a.jsonl", "{\"body\": \"One text.\", \"text\": \"no\"}");
        let tokenizer = tiny();
        let files = Source::Files(vec![path]);
        let windows = load(
            files,
            Some(&tokenizer),
            &spec(1, 3),
            "body",
            VOCAB,
            &mut |_, _| (),
        );
        assert_eq!(
            windows.unwrap().ids(),
            &tokenizer.encode("One text.").unwrap()[..3]
        );
    }

    #[test]
    fn bad_text_files() {
        says_of("a.txt", "", &["`a.txt`", "empty", "`--calib self`"]);
        says_of("a.txt", b"abc\xffdef", &["a.txt`", "byte 3", "UTF-8"]);
        says_of(
            "a.txt",
            "a b",
            &["asked for 1 windows of 4 tokens", "there are 0 (2 tokens)"],
        );
        let missing = PathBuf::from("no-such-folder/a.txt");
        says(
            from_files(&tiny(), &[missing], &spec(1, 4)),
            &["`no-such-folder/a.txt` cannot be read"],
        );
        says(
            from_files(&tiny(), &[], &spec(1, 4)),
            &["list of calibration files is empty"],
        );
        let ids = |name: &str| PathBuf::from(name);
        says(
            from_files(&tiny(), &[ids("a.npy"), ids("b.txt")], &spec(1, 4)),
            &["`a.npy`", "`b.txt`"],
        );
    }

    #[test]
    fn bad_lines_are_named_by_file_and_line() {
        let after = |line: &str| format!("{{\"text\": \"good\"}}\n\n{line}\n");
        let check = |line: &str, words: &[&str]| {
            says_of("a.jsonl", after(line), &[&["a.jsonl:3`"], words].concat());
        };
        check("{\"text\": ", &["not JSON", "EOF"]);
        check("[1]", &["got a list, expected a JSON object"]);
        check(
            "{\"body\": \"a\", \"n\": 1}",
            &["no field `text`", "`body`, `n`", "name the field"],
        );
        check("{}", &["the fields are none"]);
        check(
            "{\"text\": 3}",
            &["`text` is a number", "expected a string or a list"],
        );
        check("{\"messages\": \"a\"}", &["`messages` is a string"]);
        check(
            "{\"text\": [{\"role\": \"user\"}]}",
            &["message 0 of `text`", "`content`"],
        );
        check(
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}",
            &["no chat template", "`chat_template.jinja`"],
        );
        says_of(
            "a.jsonl",
            b"{\"text\": \"\xff\"}",
            &["a.jsonl:1`", "not UTF-8"],
        );
    }

    #[test]
    fn text_needs_a_tokenizer() {
        let (_folder, path) = file("a.txt", "text");
        let files = Source::Files(vec![path]);
        let words = ["`a.txt` is text", "without a tokenizer", "`.npy`"];
        says(
            load(files, None, &spec(1, 4), "text", VOCAB, &mut |_, _| ()),
            &words,
        );
        let builtin = load(
            Source::Builtin,
            None,
            &spec(1, 4),
            "text",
            VOCAB,
            &mut |_, _| (),
        );
        says(builtin, &["the built-in corpus is text"]);
    }

    #[test]
    fn no_window_is_no_request() {
        let none = load(
            Source::Builtin,
            Some(&tiny()),
            &spec(0, 4),
            "text",
            VOCAB,
            &mut |_, _| (),
        );
        says(none, &["0 windows of 4 tokens"]);
    }

    #[test]
    fn ids_must_lie_in_the_models_vocabulary() {
        let tokenizer = tiny();
        let builtin = load(
            Source::Builtin,
            Some(&tokenizer),
            &spec(8, 64),
            "text",
            100,
            &mut |_, _| (),
        );
        says(
            builtin,
            &["the built-in corpus", "vocabulary of 100", "another model"],
        );
    }

    #[test]
    fn progress_ends_with_everything_done() {
        let (_folder, path) = file("a.jsonl", "{\"text\": \"One text.\"}\n".repeat(20));
        let total = path.metadata().unwrap().len();
        let mut seen = Vec::new();
        let files = Source::Files(vec![path]);
        let mut progress = |done, total| seen.push((done, total));
        load(
            files,
            Some(&tiny()),
            &spec(2, 4),
            "text",
            VOCAB,
            &mut progress,
        )
        .unwrap();
        assert!(seen.is_sorted() && seen.len() >= 20);
        assert_eq!(seen[0], (total / 20, total));
        assert_eq!(seen.last(), Some(&(total, total)));
    }

    #[cfg(not(feature = "parquet"))]
    #[test]
    fn parquet_says_how_to_build() {
        says_of(
            "a.parquet",
            "PAR1",
            &["a.parquet`", "built without", "`--features parquet`"],
        );
    }
}
