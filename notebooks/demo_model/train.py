"""Makes pace_nb/demo from nothing: corpus, tokenizer, training, export, measurement.

    python notebooks/demo_model/train.py --minutes 55

It needs torch, tokenizers and safetensors; the package never does. The model (model.py) is
small enough to be trained on one CPU core in an hour. It makes one pass over freshly generated
text: no story is read twice, so training loss and validation loss are the same thing.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from chat_format import BOS, CHAT_TEMPLATE, END, EOS, ROLES, SPECIAL_TOKENS, render
from corpus import documents
from measure import chat_prompt, measure, write_card
from model import CONFIG, Llama
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
TOKENS_PER_STEP = 4096
LENGTHS = [256] * 7 + [1024]  # mostly short sequences; some long, so that every position is trained
WARMUP_STEPS = 100


# ------------------------------------------------------------------------------------ Tokenizer


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE; every digit is a token of its own, so that sums are learned by the digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = (render(doc) for doc, _ in zip(documents(seed), range(20_000), strict=False))
    tokenizer.train_from_iterator(texts, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[bos]
    )
    return tokenizer


def token_stream(tokenizer: Tokenizer, seed: int, only: Sequence[str]) -> Iterator[np.ndarray]:
    """Documents as one endless line of ids, in pieces of a few thousand."""
    stream = documents(seed, only)
    while True:
        texts = [render(next(stream)) for _ in range(64)]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        yield np.concatenate([np.array(e.ids, dtype=np.int64) for e in encodings])


def batches(tokenizer: Tokenizer, seed: int, only: Sequence[str] = ()) -> Iterator[Tensor]:
    """ids[B, length + 1], packed without padding; B * length is TOKENS_PER_STEP."""
    stream, rest, step = token_stream(tokenizer, seed, only), np.empty(0, np.int64), 0
    while True:
        length = LENGTHS[step % len(LENGTHS)]
        rows = TOKENS_PER_STEP // length
        while len(rest) < rows * (length + 1):
            rest = np.concatenate([rest, next(stream)])
        batch, rest = np.split(rest, [rows * (length + 1)])
        yield torch.from_numpy(batch.reshape(rows, length + 1))
        step += 1


# ------------------------------------------------------------------------------------- Training


def loss_of(model: Llama, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), targets(batch).flatten())


def targets(batch: Tensor) -> Tensor:
    """The next token of each, but -100 (ignored) inside what a user or the system says.

    A segment is named by the special token that opens it; questions are drawn at random, so there
    is nothing to learn in predicting them.
    """
    ids = batch[:, 1:]
    position = torch.arange(ids.shape[1]).expand_as(ids)
    opener = torch.where(ids < len(SPECIAL_TOKENS), position, 0).cummax(dim=1).values
    inside = ids.gather(1, opener)  # the special token that each position comes after
    silent = [SPECIAL_TOKENS.index(ROLES[role]) for role in ("system", "user")]
    return ids.masked_fill(torch.isin(inside, torch.tensor(silent)), -100)


def train(model: Llama, tokenizer: Tokenizer, arguments: argparse.Namespace,
          steps: int = 0, minutes: float = 0.0) -> None:  # fmt: skip
    """Trains for `--minutes` of wall clock; the learning rate follows the clock down to zero.

    `steps` and `minutes` are what a resumed model has behind it; AdamW and its rate start anew.
    """
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.rate, betas=(0.9, 0.98), fused=True)
    start = saved = time.monotonic()
    smooth, first = 0.0, steps
    for batch in batches(tokenizer, arguments.seed + first, arguments.only):
        now = time.monotonic()
        progress, spent = (now - start) / (60 * arguments.minutes), minutes + (now - start) / 60
        if now - saved > 240 or progress >= 1:
            saved = now
            save_checkpoint(arguments.checkpoint, model, tokenizer, steps, spent)
        if progress >= 1:
            break
        warm = min(1, (steps - first + 1) / WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * warm * 0.5 * (1 + math.cos(math.pi * progress))
        loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        smooth += (loss.item() - smooth) / min(steps - first, 50)
        if steps % 50 == 0:
            rate, tokens = optimizer.param_groups[0]["lr"], steps * TOKENS_PER_STEP / 1e6
            print(f"{spent:6.1f} min  step {steps}  tokens {tokens:.2f} M"
                  f"  rate {rate:.5f}  loss {smooth:.4f}", flush=True)  # fmt: skip


def save_checkpoint(
    path: Path, model: Llama, tokenizer: Tokenizer, steps: int, minutes: float
) -> None:
    state = {"model": model.state_dict(), "tokenizer": tokenizer.to_str()}
    temporary = path.with_suffix(".part")
    torch.save(state | {"steps": steps, "minutes": minutes}, temporary)
    temporary.replace(path)  # whole or not at all


# --------------------------------------------------------------------------------------- Export


def export(model: Llama, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes the Hugging Face layout, weights in BF16, into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        f"model.{name}": w.to(torch.bfloat16).contiguous() for name, w in model.state_dict().items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # save_file leaves it to its owner alone
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    added = {
        str(i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False,
                 "single_word": False, "special": True}
        for i, token in enumerate(SPECIAL_TOKENS)
    }  # fmt: skip
    files = {
        "config.json": CONFIG,
        "generation_config.json": {
            "bos_token_id": CONFIG["bos_token_id"], "eos_token_id": CONFIG["eos_token_id"],
            "do_sample": True, "temperature": 0.7, "top_p": 0.95,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added, **special,
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }  # fmt: skip
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


@torch.no_grad()
def export_logits(model: Llama, tokenizer: Tokenizer, path: Path) -> None:
    """What another engine must reproduce: logits of the last positions, and a greedy answer.

    prompt_ids[T], logits f32[4, V] of the last four positions, greedy_ids[24], and margins f32[24],
    by how much each greedy token's logit led. Computed in float32 from BF16 weights.
    """
    text = chat_prompt("Tom has a red kite. Mia has a blue ball. What does Mia have?")
    text += (
        "Mia has a blue ball."
        + END
        + render([{"role": "user", "content": "What is 3 plus 4?"}])[len(BOS) :]
    )
    prompt = tokenizer.encode(text + "<|assistant|>", add_special_tokens=False).ids
    ids, margins = list(prompt), []
    logits = model(torch.tensor([prompt]))[0, -4:]
    for _ in range(24):
        best = model(torch.tensor([ids]))[0, -1].topk(2)
        ids.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
    np.savez_compressed(
        path, prompt_ids=np.array(prompt, np.int32), logits=logits.numpy().astype(np.float32),
        greedy_ids=np.array(ids[len(prompt):], np.int32), margins=np.array(margins, np.float32),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    option = parser.add_argument
    option("--minutes", type=float, default=55, help="wall clock to train for")
    option("--seed", type=int, default=1)
    option("--checkpoint", type=Path, default=ROOT / "build" / "demo_model.pt")
    option("--export-only", action="store_true", help="export the checkpoint, train nothing")
    option("--resume", action="store_true", help="train the checkpoint for --minutes more")
    option("--rate", type=float, default=3e-3, help="highest learning rate")
    option("--only", nargs="*", default=(), help="kinds of question to train on, nothing else")
    option("--questions", type=int, default=200, help="held-out questions asked per kind")
    option("--stories", type=int, default=100, help="stories sampled and looked over")
    option("--out", type=Path, default=ROOT / "pace_nb" / "demo")
    option("--logits", type=Path, default=ROOT / "tests" / "demo" / "demo_logits.npz")
    arguments = parser.parse_args()
    arguments.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    model = Llama()
    if arguments.resume:
        state = torch.load(arguments.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        tokenizer = Tokenizer.from_str(state["tokenizer"])
        train(model, tokenizer, arguments, state["steps"], state["minutes"])
    elif not arguments.export_only:
        train(model, train_tokenizer(seed=0), arguments)
    state = torch.load(arguments.checkpoint, weights_only=True)
    tokenizer = Tokenizer.from_str(state["tokenizer"])
    model.load_state_dict({k: w.bfloat16().float() for k, w in state["model"].items()})
    model.eval()
    export(model, tokenizer, arguments.out)
    export_logits(model, tokenizer, arguments.logits)
    held_back = batches(tokenizer, seed=10**6)  # a seed that training does not use
    with torch.no_grad():
        result = {"loss": sum(loss_of(model, next(held_back)).item() for _ in range(16)) / 16}
    result |= measure(model, tokenizer, arguments.questions, arguments.stories)
    result["parameters"] = sum(p.numel() for p in model.parameters()) / 1e6
    result |= {"minutes": state["minutes"], "tokens": state["steps"] * TOKENS_PER_STEP / 1e6}
    print(json.dumps(result, indent=2))
    write_card(model, tokenizer, result, arguments.out / "README.md")


if __name__ == "__main__":
    main()
