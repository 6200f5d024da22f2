"""Golden chat prompts: three templates of our own, rendered by transformers' `apply_chat_template`.

    python tests/oracle/chat.py

The templates are written for this file in the manner of three that are in wide use; they lean on what
renderers differ in: blocks that take their line's whitespace along, slices of lists, Python's string
methods, namespaces, loop variables, `tojson`, list-shaped contents, `raise_exception`.
"""

import jinja2
import transformers

from record import GOLDEN, TESTS, provenance, write

HEADERS = """\
{% set loop_messages = messages %}
{% for message in loop_messages %}
    {% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}
    {% if loop.index0 == 0 %}
        {% set content = bos_token + content %}
    {% endif %}
    {{- content }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{% endif %}
"""

CHATML = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a careful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- if tools %}
    {{- '<|im_start|>tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last_user = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}
    {%- endif %}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last_user %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

INST = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user and assistant, message ' ~ loop.index0 ~ ' is from ' ~ message['role']) }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"].strip() + eos_token }}
    {%- endif %}
{%- endfor %}
"""


def say(role, content):
    return {"role": role, "content": content}


SINGLE = [say("user", "What is a tide?")]
SYSTEM = [say("system", "Answer in one sentence."), say("user", "  Why is the sea salty? \n")]
LONG = [
    say("system", "Be brief."),
    say("user", "Write `a < b && c` in words."),
    say("assistant", "\n a is less than b and c holds. \n"),
    say("user", "And \"quotes\", {{ braces }}, {% tags %}, ünïcödé 🙂?"),
]
WRONG_ORDER = [say("user", "one"), say("user", "two")]
THINKING = [
    say("user", "2 + 2?"),
    say("assistant", "<think>\nadd\n</think>\n\n4"),
    say("user", "and 3 + 3?"),
    say("assistant", "<think>\nadd again\n</think>\n\n6"),
]
PARTS = [say("user", [{"type": "text", "text": "two"}, {"type": "image"}, {"type": "text", "text": "parts"}])]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "depth",
            "description": "Depth of the sea at a place, in <mètres> & 'fathoms'",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]

COMMON = [(SINGLE, None), (SYSTEM, None), (LONG, None)]
TEMPLATES = {
    "headers": (HEADERS, COMMON),
    "chatml": (CHATML, COMMON + [(THINKING, None), (PARTS, None), (SINGLE, TOOLS)]),
    "inst": (INST, COMMON + [(WRONG_ORDER, None)]),
}


def render(tokenizer, template, messages, tools, prompt):
    """`{"rendered": …}`, or `{"error": …}` where the template refuses the messages."""
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tools=tools, tokenize=False, add_generation_prompt=prompt
        )
    except jinja2.exceptions.TemplateError as error:
        return {"error": str(error)}
    return {"rendered": text}


def main():
    tokenizer = transformers.AutoTokenizer.from_pretrained(TESTS / "models" / "tiny-1m")
    for name, (template, conversations) in TEMPLATES.items():
        cases = [
            {"messages": messages, "tools": tools, "add_generation_prompt": prompt}
            | render(tokenizer, template, messages, tools, prompt)
            for messages, tools in conversations
            for prompt in (False, True)
        ]
        write(
            GOLDEN / "chat" / f"{name}.json",
            provenance("python tests/oracle/chat.py", ["transformers", "jinja2"])
            | {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
            | {"template": template, "cases": cases},
        )


if __name__ == "__main__":
    main()
