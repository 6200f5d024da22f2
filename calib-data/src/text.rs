//! Texts and JSON Lines to one stream of token ids.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::chat::Message;
use crate::error::{Error, RecordFault, Result};
use crate::path::{display, read_error};
use crate::tokenizer::Tokenizer;
use crate::window::hex;

/// Text is tokenized in batches of about this many bytes: enough for all threads, little memory.
const BATCH_BYTES: usize = 4 << 20;

/// One text to be tokenized on its own.
pub(crate) enum Document {
    /// Ordinary text, special tokens written out in it meaning nothing.
    Text(String),
    /// Chat messages, for the chat template.
    Chat(Vec<Message>),
}

/// Documents in, one stream of token ids out: the end token stands between documents.
pub(crate) struct Stream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    batch: Vec<String>,
    batch_bytes: usize,
    /// The batch holds rendered chats.
    chats: bool,
}

impl<'a> Stream<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            ids: Vec::new(),
            batch: Vec::new(),
            batch_bytes: 0,
            chats: false,
        }
    }

    pub(crate) fn push(&mut self, document: Document) -> Result<()> {
        let (text, chat) = match document {
            Document::Text(text) => (text, false),
            Document::Chat(messages) => (self.tokenizer.render_chat(&messages, false)?, true),
        };
        if chat != self.chats {
            self.flush()?;
            self.chats = chat;
        }
        self.batch_bytes += text.len();
        self.batch.push(text);
        if self.batch_bytes >= BATCH_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    /// All ids.
    pub(crate) fn finish(mut self) -> Result<Vec<u32>> {
        self.flush()?;
        Ok(self.ids)
    }

    fn flush(&mut self) -> Result<()> {
        for document in self.tokenizer.encode_batch(&self.batch, self.chats)? {
            join(&mut self.ids, &document, self.tokenizer.eos());
        }
        self.batch.clear();
        self.batch_bytes = 0;
        Ok(())
    }
}

/// Appends a document to a stream, with the first of `eos` before it unless one stands there.
pub(crate) fn join(stream: &mut Vec<u32>, document: &[u32], eos: &[u32]) {
    if document.is_empty() {
        return;
    }
    if let (Some(last), Some(&end)) = (stream.last(), eos.first())
        && !eos.contains(last)
    {
        stream.push(end);
    }
    stream.extend_from_slice(document);
}

/// Reads a plain text file as one document, without any change, and returns its SHA-256.
pub(crate) fn read_plain(path: &Path, stream: &mut Stream<'_>) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|error| read_error(path, error))?;
    let sha256 = hex(Sha256::new_with_prefix(&bytes));
    let text = String::from_utf8(bytes).map_err(|error| Error::NotUtf8 {
        file: display(path),
        offset: error.utf8_error().valid_up_to(),
    })?;
    stream.push(Document::Text(text))?;
    Ok(sha256)
}

/// Reads a JSON Lines file, one document a line (blank lines are passed over), and returns the
/// SHA-256 of its bytes. `progress` is told the bytes read.
pub(crate) fn read_json_lines(
    path: &Path,
    field: &str,
    stream: &mut Stream<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<String> {
    let file = File::open(path).map_err(|error| read_error(path, error))?;
    let mut reader = BufReader::new(file);
    let mut hasher = Sha256::new();
    let (mut bytes, mut read, mut line) = (Vec::new(), 0, 0);
    loop {
        bytes.clear();
        let count = reader
            .read_until(b'\n', &mut bytes)
            .map_err(|error| read_error(path, error))?;
        if count == 0 {
            return Ok(hex(hasher));
        }
        hasher.update(&bytes);
        read += count as u64;
        line += 1;
        if bytes.trim_ascii().is_empty() {
            continue;
        }
        let pushed = document(&bytes, field).and_then(|document| push(stream, document));
        pushed.map_err(|fault| Error::Record {
            file: display(path),
            line,
            fault,
        })?;
        progress(read);
    }
}

/// Pushes a record; a chat that the template refuses is the record's fault.
fn push(stream: &mut Stream<'_>, document: Document) -> Result<(), RecordFault> {
    stream
        .push(document)
        .map_err(|error| RecordFault::Chat(Box::new(error)))
}

/// The document of one line of JSON.
fn document(line: &[u8], field: &str) -> Result<Document, RecordFault> {
    let text = str::from_utf8(line).map_err(|_| RecordFault::NotUtf8)?;
    let record = match serde_json::from_str(text)? {
        Value::Object(record) => record,
        other => return Err(RecordFault::NotObject(type_name(&other))),
    };
    match (record.get(field), record.get("messages")) {
        (Some(Value::String(text)), _) => Ok(Document::Text(text.clone())),
        (Some(Value::Array(list)), _) => messages(list, field),
        (Some(other), _) => Err(field_type(field, other)),
        (None, Some(Value::Array(list))) => messages(list, "messages"),
        (None, Some(other)) => Err(field_type("messages", other)),
        (None, None) => Err(RecordFault::NoField {
            field: field.to_owned(),
            keys: keys(&record),
        }),
    }
}

fn messages(list: &[Value], field: &str) -> Result<Document, RecordFault> {
    let message = |(index, value): (usize, &Value)| {
        let part = |key: &'static str| {
            let text = value[key].as_str().map(str::to_owned);
            text.ok_or_else(|| RecordFault::Message {
                field: field.to_owned(),
                index,
                key,
            })
        };
        Ok(Message {
            role: part("role")?,
            content: part("content")?,
        })
    };
    Ok(Document::Chat(
        list.iter()
            .enumerate()
            .map(message)
            .collect::<Result<_, RecordFault>>()?,
    ))
}

fn field_type(field: &str, value: &Value) -> RecordFault {
    RecordFault::FieldType {
        field: field.to_owned(),
        got: type_name(value),
    }
}

fn keys(record: &Map<String, Value>) -> String {
    let keys: Vec<String> = record
        .keys()
        .take(12)
        .map(|key| format!("`{key}`"))
        .collect();
    if keys.is_empty() {
        "none".to_owned()
    } else {
        keys.join(", ")
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
