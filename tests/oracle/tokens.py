"""Golden token ids of the tiny model's tokenizer, from transformers.

    python tests/oracle/tokens.py
"""

import tokenizers
import transformers

from record import GOLDEN, TESTS, provenance, write

TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t\tindented\twith tabs",
    "trailing space ",
    " leading space",
    "many      spaces      inside",
    "line one\nline two\r\nline three\r\n\r\n   indented",
    "Hello, world!",
    "The lighthouse keeper counted the waves until the fog came in.",
    "don't can't we'll they're I'd you've it's SHOUTN'T I'M",
    "CamelCase snake_case kebab-case SCREAMING_CASE",
    "0 1 12 123 1234 12345 3.14159 1,000,000 1e-5 0xFF 1/2",
    "e-mail: someone@example.org, see https://example.org/path?q=1&r=%20#top",
    "fn main() {\n    let x: Vec<u8> = vec![0; 16];\n    println!(\"{:?}\", &x[..4]);\n}\n",
    "def f(x):\n\treturn {k: v**2 for k, v in x.items() if v != None}  # comment\n",
    "SELECT name, COUNT(*) FROM t WHERE a >= 3 GROUP BY name;",
    '{"a": [1, 2.5, null, true], "b": {"c": "d\\n"}}',
    "<html><body class=\"x\">&nbsp;</body></html>",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "$$\\int_0^1 x^2\\,dx = \\frac{1}{3}$$",
    "naïve café, Ångström, İstanbul, ßtraße",
    "e\u0301 composed by two, \u00e9 by one",
    "Привет, мир! Как дела?",
    "Γειά σου Κόσμε",
    "你好，世界。今天天气很好。",
    "こんにちは世界。カタカナとひらがな",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "🙂 👍🏽 👩‍👩‍👧‍👦 🇨🇭 🏴‍☠️",
    "zero\u200bwidth\u200djoiner\u00a0nbsp\u3000ideographic\u2028separator\ufeffbom",
    "controls \x00 \x01 \x1b[0m \x7f end",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ℕ ⊂ ℤ, ½ ² ™ ﬁ",
    "\ufffd replacement, and \U0010ffff the last code point",
    "<|bos|>",
    "<|bos|>text between<|eos|>",
    "a <|eos|> b<|eos|>\n<|bos|> c",
    "<|bos |> <|user|> <s></s> [INST]",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!???...---===***###",
    "(\"quoted\" 'single' “curly” «guillemets» —dash–en…)",
]


def main():
    folder = TESTS / "models" / "tiny-1m"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    cases = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == plain.encode(text, add_special_tokens=False).ids, text
        decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        cases.append({"text": text, "ids": ids, "decoded": decoded})
    write(
        GOLDEN / "tokens" / "tiny-1m.json",
        provenance("python tests/oracle/tokens.py", ["transformers", "tokenizers"])
        | {"model": "tests/models/tiny-1m", "add_special_tokens": False, "cases": cases},
    )


if __name__ == "__main__":
    main()
