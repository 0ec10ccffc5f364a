"""How a document of the corpus becomes the text the tokenizer reads.

It knows the special tokens and their order. It knows nothing of the corpus or of training.
`render` and `CHAT_TEMPLATE` say the same thing twice, once for training (plain Python) and once
for everyone who uses the model (Jinja, in tokenizer_config.json); a test compares them.
"""

from __future__ import annotations

BOS, EOS, END, MASK = "<|bos|>", "<|eos|>", "<|end|>", "<|mask|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
# The order gives the ids 0 to 6. <|mask|> is never trained on: it waits for a PARD draft.
SPECIAL_TOKENS = [BOS, EOS, END, *ROLES.values(), MASK]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role must be system, user or assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def render(document: str | list[dict[str, str]]) -> str:
    """The training text: `<|bos|>story<|eos|>`, or `<|bos|>` and then every message as
    `<|role|>content<|end|>`."""
    if isinstance(document, str):
        return f"{BOS}{document}{EOS}"
    return BOS + "".join(f"{ROLES[m['role']]}{m['content'].strip()}{END}" for m in document)
