//! Calibration text that the model itself generates.
//!
//! # Source
//! Williams, Chrysostomou, Aletras: self-calibration for language model quantization and pruning,
//! arXiv 2410.17170: sequences sampled from the beginning-of-text token alone. Our differences: mixed
//! temperatures, loops dropped, sequences packed into full windows, and for chat models every other
//! window begins with a user turn that the model writes and then answers.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::chat::Message;
use crate::error::{Error, Result};
use crate::loops::is_loop;
use crate::tokenizer::Tokenizer;
use crate::window::{WindowSpec, Windows, below};

/// Text in, token ids out: what self-generation asks of a runtime.
pub trait Generator {
    /// Continues every prompt by up to `max_tokens`, each with its own temperature and seed, and stops
    /// a sequence at the model's end token.
    ///
    /// Returns one continuation per request, in their order, without the prompt and with the end token
    /// where there was one. Equal requests must give equal continuations, whatever the others are.
    ///
    /// # Errors
    /// Whatever keeps the runtime from running.
    fn generate(
        &mut self,
        requests: &[Request],
        max_tokens: usize,
    ) -> Result<Vec<Vec<u32>>, Box<dyn std::error::Error + Send + Sync>>;
}

/// One sequence to be generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Token ids to continue, at least one.
    pub prompt: Vec<u32>,
    /// Sampling temperature.
    pub temperature: f32,
    /// Seed of the sampling.
    pub seed: u64,
}

/// Mixed temperatures calibrate better than any one of them.
const TEMPERATURES: [f32; 3] = [0.7, 1.0, 1.3];
/// A run may generate this many times the tokens it is asked for: it fails when about seven of eight
/// tokens are dropped.
const TOKEN_BUDGET: usize = 8;
/// Rounds in a row without a token gained before it fails.
const IDLE_ROUNDS: usize = 16;
/// Tokens per distinct token that are too many. Prose has about one distinct token in ten.
const LEAST_DIVERSITY: usize = 64;
/// A user turn that no user writes, to find where a template puts it.
const PLACEHOLDER: &str = "qbin-user-turn";

/// Fills every window: sequences are packed one after another, the last one of a window cut off.
///
/// # Errors
/// [`Error::Degenerate`] if too much is dropped, [`Error::LowDiversity`] if too few different tokens
/// are left, [`Error::OutsideVocabulary`] if a prompt is none of the model's, [`Error::Generator`].
pub(crate) fn load(
    generator: &mut dyn Generator,
    tokenizer: &Tokenizer,
    spec: &WindowSpec,
    vocab_limit: usize,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Windows> {
    let mut run = Run::new(tokenizer, spec, vocab_limit)?;
    let total = spec.windows * spec.tokens;
    let mut idle = 0;
    while run.tokens() < total {
        if idle == IDLE_ROUNDS || run.generated > TOKEN_BUDGET * total {
            return Err(run.degenerate());
        }
        idle = if run.round(generator)? { 0 } else { idle + 1 };
        progress(run.tokens() as u64, total as u64);
    }
    run.windows()
}

/// One window being filled.
#[derive(Clone, Debug, Default)]
struct Slot {
    ids: Vec<u32>,
    /// A chat whose user turn is written: the prompt of the answer.
    answer: Option<Vec<u32>>,
}

/// How a fresh sequence begins.
enum Opening {
    /// These tokens.
    Ids(Vec<u32>),
    /// A model without a beginning or an end token starts anywhere, below this id.
    AnyBelow(usize),
}

struct Run<'a> {
    tokenizer: &'a Tokenizer,
    spec: WindowSpec,
    slots: Vec<Slot>,
    plain: Opening,
    /// The user turn's opening, or why there is none.
    chat: Result<Vec<u32>, String>,
    rng: ChaCha8Rng,
    rounds: usize,
    /// Tokens generated, kept or not.
    generated: usize,
    sequences: usize,
    loops: usize,
    empty: usize,
}

impl<'a> Run<'a> {
    fn new(tokenizer: &'a Tokenizer, spec: &WindowSpec, vocab_limit: usize) -> Result<Self> {
        let first = tokenizer.bos().or(tokenizer.eos().first().copied());
        let vocab = tokenizer.vocab_size().min(vocab_limit);
        let plain = first.map_or(Opening::AnyBelow(vocab), |id| Opening::Ids(vec![id]));
        let chat = chat_opening(tokenizer, spec.tokens);
        let prompts = first.iter().chain(chat.iter().flatten());
        if let Some(&id) = prompts.into_iter().find(|&&id| id as usize >= vocab_limit) {
            let origin = "the opening of self-generated text".to_owned();
            return Err(Error::OutsideVocabulary {
                origin,
                id,
                window: 0,
                vocab: vocab_limit,
            });
        }
        Ok(Self {
            tokenizer,
            spec: *spec,
            slots: vec![Slot::default(); spec.windows],
            plain,
            chat,
            rng: ChaCha8Rng::seed_from_u64(spec.seed),
            rounds: 0,
            generated: 0,
            sequences: 0,
            loops: 0,
            empty: 0,
        })
    }

    fn tokens(&self) -> usize {
        self.slots.iter().map(|slot| slot.ids.len()).sum()
    }

    /// One sequence for each window that is not full; true if anything was gained.
    fn round(&mut self, generator: &mut dyn Generator) -> Result<bool> {
        let (mut open, mut requests, mut longest) = (Vec::new(), Vec::new(), 0);
        let mut gained = false;
        for index in 0..self.slots.len() {
            let room = self.room(index);
            if room == 0 {
                continue;
            }
            let request = self.request(index);
            if request.prompt.len() >= room {
                self.slots[index]
                    .ids
                    .extend_from_slice(&request.prompt[..room]);
                gained = true;
                continue;
            }
            longest = longest.max(room - request.prompt.len());
            open.push(index);
            requests.push(request);
        }
        self.rounds += 1;
        if requests.is_empty() {
            return Ok(gained);
        }
        let continuations = generator
            .generate(&requests, longest)
            .map_err(|source| Error::Generator { source })?;
        assert_eq!(
            continuations.len(),
            requests.len(),
            "one continuation per request"
        );
        for ((index, request), continuation) in open.into_iter().zip(requests).zip(continuations) {
            gained |= self.keep(index, request.prompt, continuation)?;
        }
        Ok(gained)
    }

    /// Tokens missing in a window.
    fn room(&self, index: usize) -> usize {
        self.spec.tokens - self.slots[index].ids.len()
    }

    fn request(&mut self, index: usize) -> Request {
        let prompt = match (&self.slots[index].answer, &self.chat, &self.plain) {
            (Some(answer), _, _) => answer.clone(),
            (None, Ok(opening), _) if is_chat(index) => opening.clone(),
            (None, _, Opening::Ids(ids)) => ids.clone(),
            (None, _, &Opening::AnyBelow(vocab)) => vec![below(&mut self.rng, vocab) as u32],
        };
        // The round counts too: a window whose cool sequences loop gets its turn with warm ones.
        let temperature = TEMPERATURES[(index + self.rounds) % TEMPERATURES.len()];
        Request {
            prompt,
            temperature,
            seed: self.rng.next_u64(),
        }
    }

    /// Adds a sequence to its window, unless it is dropped; true if it was kept.
    fn keep(&mut self, index: usize, prompt: Vec<u32>, mut continuation: Vec<u32>) -> Result<bool> {
        self.sequences += 1;
        self.generated += continuation.len();
        continuation.truncate(self.room(index) - prompt.len());
        let answers = self.slots[index].answer.take().is_some();
        let end = continuation
            .iter()
            .position(|id| self.tokenizer.eos().contains(id));
        let text = &continuation[..end.unwrap_or(continuation.len())];
        if text.is_empty() {
            self.empty += 1;
            return Ok(false);
        }
        if is_loop(text) {
            self.loops += 1;
            return Ok(false);
        }
        if let Some(end) = end {
            if is_chat(index) && self.chat.is_ok() && !answers {
                return self.ask(index, &continuation[..end]);
            }
            continuation.truncate(end + 1);
        }
        let ids = &mut self.slots[index].ids;
        ids.extend(prompt);
        ids.extend(continuation);
        Ok(true)
    }

    /// The user turn is written: the next round answers it.
    fn ask(&mut self, index: usize, user_turn: &[u32]) -> Result<bool> {
        let text = self.tokenizer.decode(user_turn)?;
        if text.trim().is_empty() {
            self.empty += 1;
            return Ok(false);
        }
        let answer = self
            .tokenizer
            .encode_chat(&[Message::user(text.trim())], true)?;
        self.slots[index].answer = Some(answer);
        Ok(true)
    }

    fn degenerate(&self) -> Error {
        let full = self
            .slots
            .iter()
            .filter(|slot| slot.ids.len() == self.spec.tokens)
            .count();
        Error::Degenerate {
            filled: full,
            wanted: self.spec.windows,
            sequences: self.sequences,
            loops: self.loops,
            empty: self.empty,
        }
    }

    fn windows(self) -> Result<Windows> {
        let source = self.describe();
        let ids: Vec<u32> = self.slots.into_iter().flat_map(|slot| slot.ids).collect();
        let total = ids.len();
        let windows = Windows::from_ids(ids, self.spec.tokens, source);
        let distinct = windows.distinct_tokens();
        let least = total
            .min(self.tokenizer.vocab_size())
            .div_ceil(LEAST_DIVERSITY);
        if distinct < least {
            return Err(Error::LowDiversity {
                distinct,
                total,
                least,
            });
        }
        Ok(windows)
    }

    fn describe(&self) -> String {
        let plain = match (&self.plain, self.tokenizer.bos()) {
            (Opening::AnyBelow(_), _) => "a random token",
            (Opening::Ids(_), Some(_)) => "bos",
            (Opening::Ids(_), None) => "eos",
        };
        let openings = match &self.chat {
            Ok(_) => format!("{plain} and chat turns by halves"),
            Err(reason) => format!("{plain} ({reason})"),
        };
        let &Self {
            sequences,
            loops,
            empty,
            ..
        } = self;
        format!(
            "self-generated from {openings}, temperatures 0.7, 1.0 and 1.3, seed {}; \
             {sequences} sequences, dropped {loops} loops and {empty} empty ones",
            self.spec.seed
        )
    }
}

/// Every other window holds chats.
fn is_chat(index: usize) -> bool {
    index % 2 == 1
}

/// The ids before the user's text in a chat of one user turn, or why they cannot be had.
fn chat_opening(tokenizer: &Tokenizer, tokens: usize) -> Result<Vec<u32>, String> {
    if !tokenizer.has_chat_template() {
        return Err("no chat template".to_owned());
    }
    let text = tokenizer
        .render_chat(&[Message::user(PLACEHOLDER)], false)
        .map_err(|_| "the chat template cannot be rendered".to_owned())?;
    let (before, _) = text
        .split_once(PLACEHOLDER)
        .ok_or("the chat template leaves out the user's text")?;
    let ids = tokenizer
        .encode_marked(before)
        .map_err(|error| error.to_string())?;
    match ids.len() {
        0 => Err("the chat template opens with nothing".to_owned()),
        length if length * 2 > tokens => {
            Err("the chat's opening is longer than half a window".to_owned())
        }
        _ => Ok(ids),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::{Generator, LEAST_DIVERSITY, Request, TEMPERATURES, load};
    use crate::error::Result;
    use crate::testing::{BOS, EOS, VOCAB, says, tiny, with_template};
    use crate::tokenizer::Tokenizer;
    use crate::window::{WindowSpec, Windows, below};
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::SeedableRng;

    type Continue = Box<dyn FnMut(&Request, usize) -> Vec<u32>>;

    /// Continues every prompt alone, and keeps what it was asked.
    struct Mock {
        next: Continue,
        asked: Vec<Request>,
    }

    impl Mock {
        fn new(next: impl FnMut(&Request, usize) -> Vec<u32> + 'static) -> Self {
            Self {
                next: Box::new(next),
                asked: Vec::new(),
            }
        }

        /// Random ordinary tokens by the request's seed, ended after `length` of them.
        fn words(length: usize) -> Self {
            Self::new(move |request, max_tokens| words(request.seed, length, max_tokens))
        }
    }

    fn words(seed: u64, length: usize, max_tokens: usize) -> Vec<u32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let ordinary = (0..length).map(|_| 300 + below(&mut rng, 3000) as u32);
        ordinary.chain([EOS]).take(max_tokens).collect()
    }

    impl Generator for Mock {
        fn generate(
            &mut self,
            requests: &[Request],
            max_tokens: usize,
        ) -> Result<Vec<Vec<u32>>, Box<dyn std::error::Error + Send + Sync>> {
            self.asked.extend_from_slice(requests);
            Ok(requests
                .iter()
                .map(|request| (self.next)(request, max_tokens))
                .collect())
        }
    }

    fn spec(windows: usize, tokens: usize) -> WindowSpec {
        WindowSpec {
            windows,
            tokens,
            seed: 5,
        }
    }

    fn run(mock: &mut dyn Generator, tokenizer: &Tokenizer, spec: &WindowSpec) -> Result<Windows> {
        load(mock, tokenizer, spec, VOCAB + 2, &mut |_, _| ())
    }

    #[test]
    fn long_sequences_fill_a_window_each() {
        let mut mock = Mock::words(1000);
        let windows = run(&mut mock, &tiny(), &spec(6, 200)).unwrap();
        assert_eq!(windows.windows(), 6);
        for (window, request) in windows.iter().zip(&mock.asked) {
            assert_eq!(window[0], BOS);
            assert_eq!(window[1..], words(request.seed, 1000, 199));
        }
        assert_eq!(mock.asked.len(), 6);
        let temperatures: Vec<f32> = mock
            .asked
            .iter()
            .map(|request| request.temperature)
            .collect();
        assert_eq!(temperatures, [TEMPERATURES, TEMPERATURES].concat());
        let seeds: HashSet<u64> = mock.asked.iter().map(|request| request.seed).collect();
        assert_eq!(seeds.len(), 6);
    }

    #[test]
    fn ended_sequences_are_packed() {
        let mut mock = Mock::words(30);
        let windows = run(&mut mock, &tiny(), &spec(3, 200)).unwrap();
        for window in windows.iter() {
            // bos, 30 tokens, eos: six whole sequences of 32, then 8 tokens of a seventh.
            let starts: Vec<usize> = (0..200).filter(|&at| window[at] == BOS).collect();
            let ends: Vec<usize> = (0..200).filter(|&at| window[at] == EOS).collect();
            assert_eq!(starts, [0, 32, 64, 96, 128, 160, 192]);
            assert_eq!(ends, [31, 63, 95, 127, 159, 191]);
        }
        assert!(
            windows.source.contains("21 sequences"),
            "{}",
            windows.source
        );
    }

    #[test]
    fn what_follows_an_end_token_is_cut_off() {
        let babbling = |request: &Request, max_tokens: usize| {
            let mut ids = words(request.seed, 30, max_tokens);
            ids.resize(max_tokens, 299);
            ids
        };
        let windows = run(&mut Mock::new(babbling), &tiny(), &spec(3, 200)).unwrap();
        assert!(!windows.ids().contains(&299));
    }

    #[test]
    fn a_window_of_one_token_more_than_a_sequence_takes_a_bare_prompt() {
        let windows = run(&mut Mock::words(30), &tiny(), &spec(2, 33)).unwrap();
        assert!(windows.iter().all(|window| window[31..] == [EOS, BOS]));
    }

    #[test]
    fn deterministic_by_seed() {
        let by_seed = |seed| {
            let spec = WindowSpec {
                seed,
                ..spec(5, 100)
            };
            run(&mut Mock::words(40), &tiny(), &spec).unwrap()
        };
        assert_eq!(by_seed(1), by_seed(1));
        assert_ne!(by_seed(1).ids(), by_seed(2).ids());
    }

    #[test]
    fn loops_are_dropped_and_made_anew() {
        let looping = |request: &Request, max_tokens: usize| match request.temperature {
            0.7 => [300, 301, 302]
                .into_iter()
                .cycle()
                .take(max_tokens)
                .collect(),
            _ => words(request.seed, 1000, max_tokens),
        };
        let mut mock = Mock::new(looping);
        let windows = run(&mut mock, &tiny(), &spec(6, 100)).unwrap();
        assert!(windows.iter().all(|window| window[1..4] != [300, 301, 302]));
        assert!(
            windows
                .source
                .contains("8 sequences, dropped 2 loops and 0 empty"),
            "{}",
            windows.source
        );
        let seeds: HashSet<u64> = mock.asked.iter().map(|request| request.seed).collect();
        assert_eq!(seeds.len(), 8, "a sequence made anew has a new seed");
    }

    #[test]
    fn a_model_that_only_loops_is_an_error_with_counts() {
        let mut mock = Mock::new(|_, max_tokens| vec![300; max_tokens]);
        let words = ["0 of 4 windows", "were loops", "`--calib builtin`"];
        says(run(&mut mock, &tiny(), &spec(4, 100)), &words);
        let generated = mock.asked.len() * 99;
        assert!(
            generated <= 10 * 400,
            "{generated} tokens generated in vain"
        );
    }

    #[test]
    fn a_model_that_stops_at_once_is_an_error_with_counts() {
        let mut mock = Mock::new(|_, _| vec![EOS]);
        says(
            run(&mut mock, &tiny(), &spec(4, 100)),
            &["0 of 4 windows", "64 sequences", "64 were empty"],
        );
        says(
            run(&mut Mock::new(|_, _| vec![]), &tiny(), &spec(4, 100)),
            &["64 were empty"],
        );
    }

    #[test]
    fn too_few_different_tokens_are_an_error() {
        // No loop by itself: 40 tokens in ever another order.
        let few = |request: &Request, max_tokens: usize| -> Vec<u32> {
            let mut rng = ChaCha8Rng::seed_from_u64(request.seed);
            (0..max_tokens)
                .map(|_| 300 + below(&mut rng, 40) as u32)
                .collect()
        };
        says(
            run(&mut Mock::new(few), &tiny(), &spec(32, 128)),
            &["41 distinct tokens in 4096", "64"],
        );
        assert_eq!(4096 / LEAST_DIVERSITY, 64);
    }

    #[test]
    fn failures_of_the_runtime_are_passed_on() {
        struct Broken;
        impl Generator for Broken {
            fn generate(
                &mut self,
                _: &[Request],
                _: usize,
            ) -> Result<Vec<Vec<u32>>, Box<dyn std::error::Error + Send + Sync>> {
                Err("no memory".into())
            }
        }
        says(
            run(&mut Broken, &tiny(), &spec(1, 10)),
            &["cannot generate", "no memory"],
        );
    }

    #[test]
    fn openings_without_bos() {
        let json = crate::testing::TOKENIZER_JSON;
        let ended = br#"{"eos_token": "<|eos|>"}"#;
        let tokenizer = Tokenizer::from_files(json, Some(ended), None, None, None).unwrap();
        let windows = run(&mut Mock::words(500), &tokenizer, &spec(4, 100)).unwrap();
        assert!(windows.iter().all(|window| window[0] == EOS));
        assert!(
            windows
                .source
                .starts_with("self-generated from eos (no chat template)")
        );

        let bare = Tokenizer::from_files(json, None, None, None, None).unwrap();
        let windows = run(&mut Mock::words(500), &bare, &spec(8, 100)).unwrap();
        let first: HashSet<u32> = windows.iter().map(|window| window[0]).collect();
        assert!(first.len() > 4, "{first:?}");
        assert!(windows.source.contains("a random token"));
    }

    const CHAT: &str = "{% for m in messages %}{{ '<|start|>' + m.role + ' ' + m.content + '<|end|>' }}\
                        {% endfor %}{% if add_generation_prompt %}{{ '<|start|>model ' }}{% endif %}";

    #[test]
    fn every_other_window_is_a_chat_of_the_models_own() {
        let tokenizer = with_template(CHAT);
        let part = |text: &str| tokenizer.encode(text).unwrap();
        let (question, opening) = (part("Why is that"), part("user "));
        let user = [&[4096], opening.as_slice()].concat();
        let mut mock = {
            let (question, user) = (question.clone(), user.clone());
            Mock::new(move |request, max_tokens| {
                if request.prompt == user {
                    return question.iter().copied().chain([4097]).collect();
                }
                words(request.seed, 30, max_tokens)
            })
        };
        let windows = run(&mut mock, &tokenizer, &spec(4, 100)).unwrap();
        let asked = [
            &[4096],
            part("user Why is that").as_slice(),
            &[4097, 4096],
            &part("model "),
        ]
        .concat();
        for (index, window) in windows.iter().enumerate() {
            if index % 2 == 0 {
                assert_eq!(window[0], BOS);
            } else {
                assert!(window.starts_with(&asked), "{window:?}");
                assert_eq!(window[asked.len() + 30], EOS, "the answer and its end");
                assert!(
                    window[asked.len() + 31..].starts_with(&asked),
                    "the next chat"
                );
            }
        }
        assert!(
            windows.source.contains("bos and chat turns by halves"),
            "{}",
            windows.source
        );
    }

    #[test]
    fn a_template_that_cannot_be_used_is_said_so() {
        let source = |template: &str, tokens| {
            run(
                &mut Mock::words(500),
                &with_template(template),
                &spec(4, tokens),
            )
            .unwrap()
            .source
        };
        assert!(
            source("{{ raise_exception('no') }}", 50)
                .contains("(the chat template cannot be rendered)")
        );
        assert!(
            source("always the same", 50)
                .contains("(the chat template leaves out the user's text)")
        );
        assert!(
            source("{{ messages[0].content }}", 50)
                .contains("(the chat template opens with nothing)")
        );
        let long = format!("{}{{{{ messages[0].content }}}}", "word ".repeat(100));
        assert!(source(&long, 50).contains("longer than half a window"));
    }

    #[test]
    fn openings_outside_the_vocabulary_stop_before_generating() {
        let mut mock = Mock::new(|_, _| panic!("must not be asked"));
        let got = load(
            &mut mock,
            &with_template(CHAT),
            &spec(2, 100),
            VOCAB,
            &mut |_, _| (),
        );
        says(got, &["token id 4096", "vocabulary of 4096"]);
    }

    #[test]
    fn progress_counts_tokens() {
        let mut seen = Vec::new();
        let mut progress = |done, total| seen.push((done, total));
        load(
            &mut Mock::words(30),
            &tiny(),
            &spec(3, 100),
            VOCAB,
            &mut progress,
        )
        .unwrap();
        assert!(seen.is_sorted());
        assert_eq!(seen.last(), Some(&(300, 300)));
    }
}
