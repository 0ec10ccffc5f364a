"""What the trained model can do: answers to held-out questions, faults in stories, the card.

It knows the questions, the critic of stories and how to complete a prompt. It knows nothing of
training.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from chat_format import BOS, render
from model import CONFIG, Llama
from questions import QUESTIONS, ask
from stories import story_faults
from tokenizers import Tokenizer


@torch.no_grad()
def complete(model: Llama, tokenizer: Tokenizer, prompt: str, temperature: float = 0.0,
             seed: int = 0, max_tokens: int = 320) -> str:  # fmt: skip
    """The continuation of a rendered prompt up to <|eos|> or <|end|>, greedy at temperature 0."""
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
    generator, length = torch.Generator().manual_seed(seed), ids.shape[1]
    for _ in range(max_tokens):
        logits = model(ids)[0, -1]
        if temperature:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            token = logits.argmax()
        if int(token) in CONFIG["eos_token_id"]:
            break
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
    return tokenizer.decode(ids[0, length:].tolist())


def chat_prompt(question: str) -> str:
    return render([{"role": "user", "content": question}]) + "<|assistant|>"


@torch.no_grad()
def measure(model: Llama, tokenizer: Tokenizer, questions: int, stories: int) -> dict[str, Any]:
    """Held-out questions answered to the letter (right, asked), and faults in sampled stories."""
    accuracy = {}
    for kind in QUESTIONS:
        rng = random.Random(kind)
        drawn = (ask(rng, kind, test=True) for _ in range(20 * questions))
        turns = list({turn.question: turn for turn in drawn}.values())[:questions]  # all different
        answers = [
            complete(model, tokenizer, chat_prompt(turn.question), max_tokens=60) for turn in turns
        ]
        right = [answer in turn.answers for turn, answer in zip(turns, answers, strict=True)]
        accuracy[kind] = (sum(right), len(right))
        wrong = [(t.question, a) for t, a, ok in zip(turns, answers, right, strict=True) if not ok]
        print(f"{kind:14} {sum(right)} of {len(right)}  wrong: {wrong[:3]}", flush=True)
    told = [
        complete(model, tokenizer, f"{BOS}Once upon a time", 0.7, seed) for seed in range(stories)
    ]
    faults = [story_faults("Once upon a time" + text) for text in told]
    print("faults:", [fault for fault in faults if fault], flush=True)
    sound = sum(not fault for fault in faults) / max(1, len(faults))
    return {
        "accuracy": accuracy, "stories": stories, "sound": sound,
    }  # fmt: skip


SAMPLES = ["Tell me a story about a fox.", "What is 8 plus 5?", "What is the opposite of hot?",
           "Tom has a red kite. Mia has a blue ball. What does Mia have?", "Who are you?",
           "What is the capital of France?"]  # fmt: skip


def write_card(model: Llama, tokenizer: Tokenizer, result: dict[str, Any], path: Path) -> None:
    """Fills card.md with what was measured and with samples of this very model."""
    accuracy = result["accuracy"].items()
    rows = [f"| {kind} | {right / asked:.0%} | {asked} |" for kind, (right, asked) in accuracy]
    samples = [f"> **Once upon a time**{complete(model, tokenizer, BOS + 'Once upon a time', 0.7)}"]
    for question in SAMPLES:
        answer = complete(model, tokenizer, chat_prompt(question), temperature=0.7)
        samples.append(f"> **User:** {question}\\\n> **Model:** {answer}")
    card = (Path(__file__).parent / "card.md").read_text()
    result |= {"rows": "\n".join(rows), "samples": "\n\n".join(samples), "config": CONFIG}
    path.write_text(card.format(**result))
