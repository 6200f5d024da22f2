//! The model's own tokenizer, from the bytes of the files beside the model.

use std::sync::OnceLock;

use crate::chat::{ChatTemplate, Message};
use crate::error::{Error, Result};
use crate::special::{Special, TOKENIZER_CONFIG};

/// Text to token ids and back, with the special tokens and the chat template of the model.
#[derive(Debug)]
pub struct Tokenizer {
    /// Special tokens written out in a text are ordinary text here.
    plain: tokenizers::Tokenizer,
    /// The same, reading them as special tokens. Made on first use, for large vocabularies take
    /// tens of megabytes and most runs never see a chat.
    marked: OnceLock<tokenizers::Tokenizer>,
    template: Option<ChatTemplate>,
    vocab_size: usize,
    bos: Option<u32>,
    adds_bos: bool,
    eos: Vec<u32>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, and where the model has them `tokenizer_config.json`,
    /// `special_tokens_map.json`, `chat_template.jinja` (which wins over the template of
    /// `tokenizer_config.json`, as in `transformers`) and `generation_config.json`, in this order.
    ///
    /// Truncation and padding of `tokenizer.json` are switched off: texts are encoded whole.
    ///
    /// # Errors
    /// [`Error::TokenizerJson`], [`Error::ConfigJson`], or [`Error::ConfigValue`] where a special
    /// token is unknown to the tokenizer or would get another id than stated. The chat template is
    /// compiled when it is first used: a broken one does not keep a model from running.
    pub fn from_files(
        tokenizer_json: &[u8],
        tokenizer_config: Option<&[u8]>,
        special_tokens_map: Option<&[u8]>,
        chat_template_file: Option<&[u8]>,
        generation_config: Option<&[u8]>,
    ) -> Result<Self> {
        let special = Special::from_files(tokenizer_config, special_tokens_map, generation_config)?;
        let mut plain = tokenizers::Tokenizer::from_bytes(tokenizer_json)
            .map_err(|source| Error::TokenizerJson { source })?;
        plain.with_padding(None);
        plain
            .with_truncation(None)
            .map_err(|source| Error::TokenizerJson { source })?;
        add_tokens(&mut plain, &special)?;

        let bos = special_id(&plain, &special, "bos_token")?;
        let mut eos: Vec<u32> = special_id(&plain, &special, "eos_token")?
            .into_iter()
            .collect();
        for &id in &special.generation_eos {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        let adds_bos = match special.add_bos {
            Some(adds) => adds && bos.is_some(),
            None => bos.is_some() && first_added(&plain)? == bos,
        };
        let vocab_size = plain
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |id| id as usize + 1);
        plain.set_encode_special_tokens(true);
        Ok(Self {
            plain,
            marked: OnceLock::new(),
            template: template(&special, chat_template_file)?,
            vocab_size,
            bos: bos.or(special.generation_bos),
            adds_bos,
            eos,
        })
    }

    /// Sets the moment that chat templates see as now, in seconds from 1970 (UTC).
    ///
    /// It is 2024-07-26 otherwise: templates print the date, and calibration must not depend on it.
    #[must_use]
    pub fn with_now(mut self, unix_seconds: i64) -> Self {
        if let Some(template) = &mut self.template {
            template.set_now(unix_seconds);
        }
        self
    }

    /// The ids of the whole text; nothing is added before or after it.
    ///
    /// As `tokenizer(text, add_special_tokens=False)` in `transformers`, with one difference: a
    /// special token written out in the text (`</s>` in an article on tokenizers) is encoded as the
    /// text it is, not as the token (`split_special_tokens=True` there).
    ///
    /// # Errors
    /// [`Error::Encode`] if the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        encode(&self.plain, text)
    }

    /// [`encode`](Self::encode) of many texts on all threads; with `special_tokens`, special tokens
    /// written out in them are read as such.
    pub(crate) fn encode_batch(
        &self,
        texts: &[String],
        special_tokens: bool,
    ) -> Result<Vec<Vec<u32>>> {
        let tokenizer = if special_tokens {
            self.marked()
        } else {
            &self.plain
        };
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let encodings = tokenizer
            .encode_batch_fast(texts, false)
            .map_err(|source| Error::Encode { source })?;
        Ok(encodings
            .iter()
            .map(|encoding| encoding.get_ids().to_vec())
            .collect())
    }

    /// The ids of a chat, through the model's chat template; special tokens are read as such.
    ///
    /// `add_generation_prompt` ends it with the opening of the model's answer. As
    /// `apply_chat_template(messages, add_generation_prompt)` in `transformers`.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`]; [`Error::ChatTemplate`] if the template is broken or refuses the
    /// messages; [`Error::Encode`].
    pub fn encode_chat(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>> {
        let text = self.render_chat(messages, add_generation_prompt)?;
        self.encode_marked(&text)
    }

    /// A chat as the text that the template makes of it.
    pub(crate) fn render_chat(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String> {
        let template = self.template.as_ref().ok_or(Error::NoChatTemplate)?;
        template.render(messages, add_generation_prompt)
    }

    /// The ids of a rendered chat, its special tokens read as such.
    pub(crate) fn encode_marked(&self, text: &str) -> Result<Vec<u32>> {
        encode(self.marked(), text)
    }

    fn marked(&self) -> &tokenizers::Tokenizer {
        self.marked.get_or_init(|| {
            let mut marked = self.plain.clone();
            marked.set_encode_special_tokens(false);
            marked
        })
    }

    /// True if the model has a chat template.
    #[must_use]
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// The text of the ids, without special tokens. Ids that the tokenizer does not know are left
    /// out, as in `transformers`: models have more rows in their embedding than tokens.
    ///
    /// # Errors
    /// [`Error::Decode`] if the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.plain
            .decode(ids, true)
            .map_err(|source| Error::Decode { source })
    }

    /// Largest id + 1, added tokens included.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that begins a text, from the tokenizer's files or else `generation_config.json`.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// True if the model expects [`bos`](Self::bos) before a text: by `add_bos_token`, or, where that
    /// is not set, because `tokenizer.json` adds it.
    #[must_use]
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// The tokens that end a text: the tokenizer's own first, then those of `generation_config.json`.
    #[must_use]
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>> {
    let encoding = tokenizer
        .encode_fast(text, false)
        .map_err(|source| Error::Encode { source })?;
    Ok(encoding.get_ids().to_vec())
}

/// Adds the tokens of `added_tokens_decoder` that `tokenizer.json` lacks, as `transformers` does.
fn add_tokens(tokenizer: &mut tokenizers::Tokenizer, special: &Special) -> Result<()> {
    for (id, token) in &special.added {
        if tokenizer.token_to_id(&token.content).is_none() {
            tokenizer
                .add_tokens([token.clone()])
                .map_err(|source| Error::TokenizerJson { source })?;
        }
        let got = tokenizer.token_to_id(&token.content);
        if got != Some(*id) {
            let got = got.map_or("no token".to_owned(), |got| format!("id {got}"));
            return Err(Error::ConfigValue {
                file: TOKENIZER_CONFIG,
                key: format!("added_tokens_decoder.{id}"),
                got: token.content.clone(),
                expected: format!("the token that `tokenizer.json` has there, but it gives {got}"),
            });
        }
    }
    Ok(())
}

/// The id of a named special token, if the model has one.
fn special_id(
    tokenizer: &tokenizers::Tokenizer,
    special: &Special,
    key: &str,
) -> Result<Option<u32>> {
    let Some(text) = special.token(key) else {
        return Ok(None);
    };
    match tokenizer.token_to_id(text) {
        Some(id) => Ok(Some(id)),
        None => Err(Error::ConfigValue {
            file: TOKENIZER_CONFIG,
            key: key.to_owned(),
            got: text.to_owned(),
            expected: "a token of `tokenizer.json`".to_owned(),
        }),
    }
}

/// The token that the post-processor of `tokenizer.json` puts before a text.
fn first_added(tokenizer: &tokenizers::Tokenizer) -> Result<Option<u32>> {
    let encoding = tokenizer
        .encode_fast("", true)
        .map_err(|source| Error::Encode { source })?;
    Ok(encoding.get_ids().first().copied())
}

fn template(special: &Special, file: Option<&[u8]>) -> Result<Option<ChatTemplate>> {
    let source = match file {
        Some(bytes) => match str::from_utf8(bytes) {
            Ok(text) => Some(text),
            Err(error) => {
                let offset = error.valid_up_to();
                return Err(Error::NotUtf8 {
                    file: "chat_template.jinja".to_owned(),
                    offset,
                });
            }
        },
        None => special.chat_template.as_deref(),
    };
    Ok(source.map(|source| ChatTemplate::new(source, special.tokens.clone())))
}

#[cfg(test)]
mod tests {
    use super::Tokenizer;
    use crate::testing::{BOS, EOS, TOKENIZER_JSON, VOCAB, chat_tokenizer_json, says, tiny};
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn load(
        tokenizer_json: &[u8],
        config: &Value,
        generation: Option<&Value>,
    ) -> crate::Result<Tokenizer> {
        let generation = generation.map(Value::to_string);
        let config = config.to_string();
        let generation = generation.as_ref().map(String::as_bytes);
        Tokenizer::from_files(
            tokenizer_json,
            Some(config.as_bytes()),
            None,
            None,
            generation,
        )
    }

    #[test]
    fn special_tokens_of_the_tiny_model() {
        let tokenizer = tiny();
        assert_eq!(tokenizer.vocab_size(), VOCAB);
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(BOS), &[EOS][..]));
        assert!(!tokenizer.adds_bos() && !tokenizer.has_chat_template());
    }

    proptest! {
        #![proptest_config(crate::testing::seeded())]

        #[test]
        fn every_text_comes_back(text in "(\\PC|[\\n\\r\\t ]|<\\|eos\\|>){0,200}") {
            let tokenizer = tiny();
            let ids = tokenizer.encode(&text).unwrap();
            prop_assert!(!ids.contains(&EOS), "a token written out in a text is text");
            prop_assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        }

        #[test]
        fn streamed_pieces_are_the_text(text in "\\PC{0,100}") {
            let tokenizer = tiny();
            let mut stream = tokenizer.decode_stream();
            let mut pieces = String::new();
            for id in tokenizer.encode(&text).unwrap() {
                pieces.extend(stream.push(id).unwrap());
            }
            pieces.extend(stream.finish().unwrap());
            prop_assert_eq!(pieces, text);
        }
    }

    #[test]
    fn streaming_holds_back_half_a_character() {
        let tokenizer = tiny();
        let ids = tokenizer.encode("a\u{1F980}b").unwrap();
        assert!(
            ids.len() > 3,
            "the character must be spread over tokens: {ids:?}"
        );
        let mut stream = tokenizer.decode_stream();
        let pieces: Vec<_> = ids
            .iter()
            .filter_map(|&id| stream.push(id).unwrap())
            .collect();
        assert_eq!(pieces, ["a", "\u{1F980}", "b"]);
    }

    #[test]
    fn broken_characters_come_out_with_what_follows_or_at_the_end() {
        let tokenizer = tiny();
        let first_byte = tokenizer.encode("\u{1F980}").unwrap()[0];
        let letter = tokenizer.encode("a").unwrap()[0];
        let mut stream = tokenizer.decode_stream();
        assert_eq!(stream.push(first_byte).unwrap(), None);
        assert_eq!(stream.push(letter).unwrap().as_deref(), Some("\u{FFFD}a"));
        assert_eq!(stream.push(first_byte).unwrap(), None);
        assert_eq!(stream.finish().unwrap().as_deref(), Some("\u{FFFD}"));
    }

    #[test]
    fn truncation_and_padding_are_switched_off() {
        let mut json: Value = serde_json::from_slice(TOKENIZER_JSON).unwrap();
        json["truncation"] = json!({
            "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
        });
        json["padding"] = json!({
            "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 1, "pad_type_id": 0, "pad_token": "<|eos|>",
        });
        let tokenizer = load(json.to_string().as_bytes(), &json!({}), None).unwrap();
        let text = "a text of more than four tokens and less than sixty-four";
        assert_eq!(
            tokenizer.encode(text).unwrap(),
            tiny().encode(text).unwrap()
        );
    }

    #[test]
    fn end_tokens_come_from_both_files_once_each() {
        let config = json!({"eos_token": "<|end|>"});
        let generation = json!({"eos_token_id": [1, 4097], "bos_token_id": 0});
        let tokenizer = load(&chat_tokenizer_json(), &config, Some(&generation)).unwrap();
        assert_eq!(tokenizer.eos(), [4097, 1]);
        assert_eq!(tokenizer.bos(), Some(0), "generation_config.json fills in");
        assert_eq!(tokenizer.vocab_size(), 4098);
        let one = load(
            &chat_tokenizer_json(),
            &json!({}),
            Some(&json!({"eos_token_id": 7})),
        )
        .unwrap();
        assert_eq!((one.eos(), one.bos()), (&[7][..], None));
    }

    #[test]
    fn the_config_wins_over_the_special_tokens_map() {
        let config = br#"{"eos_token": "<|end|>", "chat_template": "{{ eos_token }}"}"#;
        let map = br#"{"eos_token": "<|eos|>", "bos_token": {"content": "<|bos|>"}}"#;
        let json = chat_tokenizer_json();
        let tokenizer = Tokenizer::from_files(&json, Some(config), Some(map), None, None).unwrap();
        assert_eq!((tokenizer.eos(), tokenizer.bos()), (&[4097][..], Some(BOS)));
        assert_eq!(tokenizer.render_chat(&[], false).unwrap(), "<|end|>");
    }

    #[test]
    fn bos_is_added_by_flag_or_by_post_processor() {
        let mut json: Value = serde_json::from_slice(TOKENIZER_JSON).unwrap();
        json["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|bos|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}},
        });
        let adding = json.to_string();
        let adds_bos = |tokenizer: &[u8], config: &Value| {
            let tokenizer = load(tokenizer, config, None).unwrap();
            assert_eq!(tokenizer.encode("a").unwrap().len(), 1, "never in `encode`");
            tokenizer.adds_bos()
        };
        assert!(adds_bos(
            adding.as_bytes(),
            &json!({"bos_token": "<|bos|>"})
        ));
        assert!(!adds_bos(
            adding.as_bytes(),
            &json!({"bos_token": "<|bos|>", "add_bos_token": false})
        ));
        assert!(!adds_bos(TOKENIZER_JSON, &json!({"bos_token": "<|bos|>"})));
        assert!(adds_bos(
            TOKENIZER_JSON,
            &json!({"bos_token": "<|bos|>", "add_bos_token": true})
        ));
    }

    #[test]
    fn tokens_added_by_the_config_are_added() {
        let added =
            |id: &str| json!({"added_tokens_decoder": {id: {"content": "<x>", "special": true}}});
        let tokenizer = load(TOKENIZER_JSON, &added("4096"), None).unwrap();
        assert_eq!(tokenizer.vocab_size(), 4097);
        let two = json!({"added_tokens_decoder": {
            "4097": {"content": "<y>"}, "4096": {"content": "<x>", "special": true},
        }});
        let tokenizer = load(TOKENIZER_JSON, &two, None).unwrap();
        assert_eq!(
            tokenizer.encode("<y>").unwrap(),
            [4097],
            "an ordinary added token"
        );
        assert!(
            tokenizer.encode("<x>").unwrap().len() > 1,
            "a special one, written out"
        );
        says(
            load(TOKENIZER_JSON, &added("5000"), None),
            &["decoder.5000", "`<x>`", "id 4096"],
        );
        says(
            load(TOKENIZER_JSON, &added("five"), None),
            &["added_tokens_decoder", "an id"],
        );
    }

    #[test]
    fn bad_files_are_named() {
        let config = |config: Value| load(TOKENIZER_JSON, &config, None);
        says(load(b"{}", &json!({}), None), &["`tokenizer.json`"]);
        says(
            config(json!({"bos_token": "<s>"})),
            &["`bos_token` is `<s>`", "`tokenizer.json`"],
        );
        says(
            config(json!({"eos_token": 3})),
            &["`tokenizer_config.json`", "`eos_token` is `3`"],
        );
        says(
            config(json!({"add_bos_token": "yes"})),
            &["`add_bos_token`", "true or false"],
        );
        says(
            config(json!({"chat_template": [{"name": "tools", "template": ""}]})),
            &["`default`"],
        );
        says(
            config(json!([])),
            &["`tokenizer_config.json` cannot be read as JSON"],
        );
        let generation = json!({"eos_token_id": [1, -1]});
        says(
            load(TOKENIZER_JSON, &json!({}), Some(&generation)),
            &["`generation_config.json`", "`eos_token_id` is `-1`"],
        );
        let template = Tokenizer::from_files(TOKENIZER_JSON, None, None, Some(b"ab\xff"), None);
        says(template, &["`chat_template.jinja`", "byte 2"]);
    }
}
