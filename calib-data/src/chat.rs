//! Chat templates as `transformers` renders them.

use std::sync::OnceLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, ErrorKind};
use serde::ser::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use crate::error::{Error, Result};
use crate::strftime::{DEFAULT_NOW, strftime};

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant` in most templates.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of the user.
    #[must_use]
    pub fn user(content: impl Into<String>) -> Self {
        Self {
            role: "user".to_owned(),
            content: content.into(),
        }
    }
}

/// A template comes with the model and is not trusted: this bounds its time (some seconds) and its
/// memory, and leaves room for chats of many megabytes.
const FUEL: u64 = 100_000_000;

const NAME: &str = "chat_template";

/// A model's chat template; compiled when first used.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    source: String,
    /// `bos_token`, `eos_token` and the like, which templates print.
    tokens: Vec<(String, String)>,
    now: i64,
    environment: OnceLock<Environment<'static>>,
}

impl ChatTemplate {
    pub(crate) fn new(source: &str, tokens: Vec<(String, String)>) -> Self {
        let source = without_generation_tags(source);
        Self {
            source,
            tokens,
            now: DEFAULT_NOW,
            environment: OnceLock::new(),
        }
    }

    pub(crate) fn set_now(&mut self, unix_seconds: i64) {
        self.now = unix_seconds;
        self.environment = OnceLock::new();
    }

    /// The chat as text.
    pub(crate) fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String> {
        let failed = |source| Error::ChatTemplate { source };
        let environment = match self.environment.get() {
            Some(environment) => environment,
            None => {
                let compiled = compile(&self.source, self.now).map_err(failed)?;
                self.environment.get_or_init(|| compiled)
            }
        };
        let messages: Vec<Value> = messages.iter().map(message_value).collect();
        let variables = [
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            // Templates ask `tools is not none`, so that these must be there.
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        let tokens = self
            .tokens
            .iter()
            .map(|(key, text)| (key.as_str(), Value::from(text.as_str())));
        let context = Value::from_pairs(variables.into_iter().chain(tokens));
        let template = environment.get_template(NAME).map_err(failed)?;
        template.render(context).map_err(failed)
    }
}

fn message_value(message: &Message) -> Value {
    Value::from_pairs([
        ("role", message.role.as_str()),
        ("content", message.content.as_str()),
    ])
}

/// The environment of `transformers`: trimmed blocks, Python's methods, and its three additions.
fn compile(source: &str, now: i64) -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()?,
    );
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", move |format: String| {
        strftime(now, &format).map_err(|directive| {
            let text = format!("`strftime_now` does not know `{directive}`");
            minijinja::Error::new(ErrorKind::InvalidOperation, text)
        })
    });
    environment.add_filter("tojson", tojson);
    environment.add_template_owned(NAME, source.to_owned())?;
    Ok(environment)
}

fn raise_exception(text: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`; the engine's own filter escapes HTML.
fn tojson(value: &Value, arguments: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = arguments.get("indent")?;
    let ensure_ascii: Option<bool> = arguments.get("ensure_ascii")?;
    arguments.assert_all_used()?;
    if ensure_ascii == Some(true) {
        let text = "`tojson` with `ensure_ascii` is not supported";
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, text));
    }
    let json = json(value)?;
    let mut out = Vec::new();
    let written = match indent {
        Some(spaces) => {
            let indent = " ".repeat(spaces.min(16));
            let pretty = PrettyFormatter::with_indent(indent.as_bytes());
            json.serialize(&mut Serializer::with_formatter(&mut out, pretty))
        }
        None => json.serialize(&mut Serializer::with_formatter(&mut out, PythonFormatter)),
    };
    written.expect("a `Vec` takes every JSON value");
    Ok(String::from_utf8(out).expect("JSON text is UTF-8"))
}

/// `, ` and `: ` between items, as Python writes JSON on one line.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
    ) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

fn json(value: &Value) -> Result<serde_json::Value, minijinja::Error> {
    Ok(match value.kind() {
        ValueKind::None => serde_json::Value::Null,
        ValueKind::Bool => value.is_true().into(),
        ValueKind::Number if value.is_integer() => i64::try_from(value.clone())?.into(),
        ValueKind::Number => f64::try_from(value.clone())?.into(),
        ValueKind::String => value.as_str().unwrap_or_default().into(),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Result<Vec<_>, _> = value.try_iter()?.map(|item| json(&item)).collect();
            items?.into()
        }
        ValueKind::Map => {
            let mut map = serde_json::Map::new();
            for key in value.try_iter()? {
                map.insert(key.to_string(), json(&value.get_item(&key)?)?);
            }
            map.into()
        }
        kind => {
            let text = format!("`tojson` of {kind}, expected a JSON value");
            return Err(minijinja::Error::new(ErrorKind::InvalidOperation, text));
        }
    })
}

/// The template with `{% generation %}` … `{% endgeneration %}` turned into `if true` … `endif`.
///
/// These tags, of `transformers` alone, mark the model's answers for training and print nothing.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else {
            break;
        };
        let (before, tag) = (&rest[..start + 2], &rest[start + 2..start + length]);
        let signs: &[char] = &['-', '+'];
        let replacement = match tag.trim_matches(signs).trim() {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        out.push_str(before);
        match replacement {
            None => out.push_str(tag),
            Some(new) => {
                let lead = tag.strip_prefix(signs).map_or("", |_| &tag[..1]);
                let tail = tag
                    .strip_suffix(signs)
                    .map_or("", |_| &tag[tag.len() - 1..]);
                out.push_str(&format!("{lead} {new} {tail}"));
            }
        }
        rest = &rest[start + length..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::{Message, without_generation_tags};
    use crate::testing::{BOS, says, with_template};

    fn chat(turns: &[(&str, &str)]) -> Vec<Message> {
        let message = |&(role, content): &(&str, &str)| Message {
            role: role.to_owned(),
            content: content.to_owned(),
        };
        turns.iter().map(message).collect()
    }

    #[track_caller]
    fn check(template: &str, turns: &[(&str, &str)], prompt: bool, expected: &str) {
        let rendered = with_template(template).render_chat(&chat(turns), prompt);
        assert_eq!(rendered.unwrap(), expected);
    }

    /// In the manner of Llama 3: headers, `trim`, the date, `bos_token` from the files.
    const HEADERS: &str = r#"{{- bos_token }}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|head|>system<|/head|>\n\n" }}
{%- if tools is not none %}
    {{- "Tools: " + (tools | tojson(indent=4)) }}
{%- endif %}
{{- "Date: " + strftime_now("%d %b %Y") + "\n\n" + system + "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|/head|>\n\n' + message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\n\n' }}
{%- endif %}
"#;

    #[test]
    fn headers_with_system_turn_and_date() {
        check(
            HEADERS,
            &[
                ("system", " Be brief. "),
                ("user", "Hi!\n"),
                ("assistant", "Hello."),
            ],
            true,
            "<|bos|><|head|>system<|/head|>\n\nDate: 26 Jul 2024\n\nBe brief.<|eot|>\
             <|head|>user<|/head|>\n\nHi!<|eot|><|head|>assistant<|/head|>\n\nHello.<|eot|>\
             <|head|>assistant<|/head|>\n\n",
        );
        check(
            HEADERS,
            &[("user", "<b> & \"c\"")],
            false,
            "<|bos|><|head|>system<|/head|>\n\nDate: 26 Jul 2024\n\n<|eot|>\
             <|head|>user<|/head|>\n\n<b> & \"c\"<|eot|>",
        );
    }

    #[test]
    fn tools_and_documents_are_none() {
        let asked = "{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}";
        check(asked, &[], true, "True True True");
    }

    #[test]
    fn the_date_can_be_set() {
        let tokenizer = with_template("{{ strftime_now('%Y-%m-%d') }}").with_now(0);
        assert_eq!(tokenizer.render_chat(&[], false).unwrap(), "1970-01-01");
        // Also once a chat has been rendered.
        let tokenizer = tokenizer.with_now(86_400);
        assert_eq!(tokenizer.render_chat(&[], false).unwrap(), "1970-01-02");
        let unknown = with_template("{{ strftime_now('%Q') }}");
        says(unknown.render_chat(&[], false), &["does not know `%Q`"]);
    }

    /// ChatML in the manner of Qwen: block tags on lines of their own, a default system turn, Python's
    /// string methods, a namespace, slices from the end, tags for training.
    const CHATML: &str = r#"{%- set ns = namespace(last=-1) %}
{% for message in messages[::-1] %}
    {% if message.role == "user" and ns.last == -1 %}
        {% set ns.last = messages|length - 1 - loop.index0 %}
    {% endif %}
{% endfor %}
{%- if messages[0].role != 'system' %}
<|start|>system
You are helpful.<|end|>
{% endif %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- if loop.index0 < ns.last %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
    {%- endif %}
    {%- if message.role == 'assistant' %}
<|start|>assistant
{% generation %}{{ content }}<|end|>{% endgeneration %}

    {%- else %}
<|start|>{{ message.role.lower() }}
{{ content }}<|end|>
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}
<|start|>assistant
{% endif %}
"#;

    #[test]
    fn chatml_with_python_methods_and_training_tags() {
        check(
            CHATML,
            &[
                ("USER", "x"),
                ("assistant", "<think>y</think>\n\nz"),
                ("user", "w"),
            ],
            true,
            "<|start|>system\nYou are helpful.<|end|>\n<|start|>user\nx<|end|>\
             <|start|>assistant\nz<|end|><|start|>user\nw<|end|><|start|>assistant\n",
        );
        check(
            CHATML,
            &[("system", "s")],
            false,
            "<|start|>system\ns<|end|>",
        );
    }

    /// In the manner of Mistral: turns must alternate, only answers end in the end token.
    const ALTERNATING: &str = "{{ bos_token }}{% for message in messages %}\
        {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
        {{ raise_exception('roles must alternate user/assistant') }}{% endif %}\
        {% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
        {% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}\
        {% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}";

    #[test]
    fn alternating_turns_or_the_templates_own_complaint() {
        let turns = [("user", "a"), ("assistant", "b"), ("user", "c")];
        check(
            ALTERNATING,
            &turns,
            false,
            "<|bos|>[INST] a [/INST]b<|eos|>[INST] c [/INST]",
        );
        let refused = with_template(ALTERNATING).encode_chat(&chat(&turns[1..]), false);
        says(
            refused,
            &["chat template", "roles must alternate user/assistant"],
        );
    }

    #[test]
    fn special_tokens_of_a_template_are_tokens() {
        let tokenizer = with_template(CHATML);
        let ids = tokenizer
            .encode_chat(&chat(&[("system", "s")]), false)
            .unwrap();
        let text = tokenizer.encode("system\ns").unwrap();
        assert_eq!(ids, [&[4096], text.as_slice(), &[4097]].concat());
        let tokenizer = with_template(ALTERNATING);
        let ids = tokenizer
            .encode_chat(&chat(&[("user", "s")]), false)
            .unwrap();
        assert_eq!(ids.iter().filter(|&&id| id == BOS).count(), 1);
    }

    #[test]
    fn json_is_written_as_python_writes_it() {
        let template = r#"{{ {"a": [1, -2.5, none, true], "b": "<é'\"\n>", "c": {}} | tojson }}"#;
        let expected = r#"{"a": [1, -2.5, null, true], "b": "<é'\"\n>", "c": {}}"#;
        check(template, &[], false, expected);
        check(
            "{{ [1, {'k': []}]|tojson(indent=2) }}",
            &[],
            false,
            "[\n  1,\n  {\n    \"k\": []\n  }\n]",
        );
    }

    #[test]
    fn the_file_wins_over_the_config() {
        let tokenizer = crate::Tokenizer::from_files(
            crate::testing::TOKENIZER_JSON,
            Some(br#"{"chat_template": [{"name": "default", "template": "config"}]}"#),
            None,
            Some(b"file"),
            None,
        );
        assert_eq!(tokenizer.unwrap().render_chat(&[], false).unwrap(), "file");
    }

    #[test]
    fn broken_endless_and_missing_templates_are_errors() {
        says(
            with_template("{% if %}").render_chat(&[], false),
            &["chat template", "syntax error"],
        );
        let endless = "{% for a in range(100000) %}{% for b in range(100000) %}{{ a }}{% endfor %}{% endfor %}";
        says(with_template(endless).render_chat(&[], false), &["fuel"]);
        let without = crate::testing::tiny().encode_chat(&chat(&[("user", "a")]), false);
        says(without, &["no chat template", "`chat_template.jinja`"]);
    }

    #[test]
    fn training_tags_keep_their_whitespace_signs() {
        let check = |tag, expected: &str| assert_eq!(without_generation_tags(tag), expected);
        check(
            "a{%- generation -%}b{% endgeneration%}c",
            "a{%- if true -%}b{% endif %}c",
        );
        check("{% generations %}{% x", "{% generations %}{% x");
    }
}
