//! Token ids to text as they come, never half a character.

use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// Decodes ids one by one. The pieces together are the text of all ids.
///
/// Tokens cannot be decoded alone: a character may be spread over several, and some tokenizers write
/// a leading space or not, by what came before. So the last piece's tokens are decoded again
/// together with the new ones, and what has been added is the new piece.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The last piece's ids, then the ids not yet shown.
    ids: Vec<u32>,
    /// How many of `ids` are shown.
    shown: usize,
    /// The text of the shown ids.
    text: String,
}

impl Tokenizer {
    /// Decodes ids as they are generated.
    #[must_use]
    pub fn decode_stream(&self) -> DecodeStream<'_> {
        DecodeStream {
            tokenizer: self,
            ids: Vec::new(),
            shown: 0,
            text: String::new(),
        }
    }
}

impl DecodeStream<'_> {
    /// The text that `id` completes, if it completes any.
    ///
    /// # Errors
    /// [`Error::Decode`](crate::Error::Decode) if the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids)?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            // Half a character, or none: the next ids tell.
            return Ok(None);
        }
        self.show(&text)
    }

    /// The text of the ids still held back, at the end of generation.
    ///
    /// # Errors
    /// [`Error::Decode`](crate::Error::Decode) if the tokenizer's decoder fails.
    pub fn finish(mut self) -> Result<Option<String>> {
        let text = self.tokenizer.decode(&self.ids)?;
        self.show(&text)
    }

    fn show(&mut self, text: &str) -> Result<Option<String>> {
        // The shown text is a prefix, but for decoders that look ahead (WordPiece joins "do n't").
        let same = text
            .chars()
            .zip(self.text.chars())
            .take_while(|(new, old)| new == old);
        let same: usize = same.map(|(new, _)| new.len_utf8()).sum();
        if same == text.len() {
            return Ok(None);
        }
        let piece = text[same..].to_owned();
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        self.text = self.tokenizer.decode(&self.ids)?;
        Ok(Some(piece))
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::tiny;

    #[test]
    fn what_is_shown_is_forgotten() {
        let tokenizer = tiny();
        let mut stream = tokenizer.decode_stream();
        for id in tokenizer.encode(&"word after word ".repeat(50)).unwrap() {
            stream.push(id).unwrap();
            assert!(
                stream.ids.len() <= 2,
                "every step decodes {} ids",
                stream.ids.len()
            );
        }
    }
}
