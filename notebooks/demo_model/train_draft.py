"""Trains the PARD draft of the demo model (pace_nb/demo/draft): eight tokens guessed in one pass.

    python notebooks/demo_model/continuations.py --seed 1 --out build/said.npz
    python notebooks/demo_model/train_draft.py build/said.npz --minutes 30

It needs torch and safetensors; the package never does. The draft is the demo model with fewer and
narrower layers, cut out of it, and it learns what the demo model says (continuations.py).

The method is PARD's (An et al. 2025, arXiv:2504.18583). At inference the draft reads a text and
K - 1 mask tokens after it, and guesses a token at its last token and at each mask. So it is
trained on pairs (i, j): a guess of token i + j + 1, made from the tokens up to i and j masks.

    slot (i, 0)   token i, at position i, sees the tokens up to i
    slot (i, j)   a mask, at position i + j, sees the tokens up to i and the masks (i, 1) .. (i, j)

All pairs of a text of N tokens would be N K slots. Conditional drop: of the slots of distance j
only a share of KEEP ** j is kept, at least LEAST, and of those only such whose slots of smaller
distance were kept, as they are what it sees. That leaves 3.4 N slots of 8 N.

A run stops with its clock and goes on from its checkpoint; the learning rate falls with the steps.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import model as demo
import numpy as np
import torch
import torch.nn.functional as F
from chat_format import MASK, SPECIAL_TOKENS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
LAYERS = (0, 2, 5)  # of the demo model's six, those the draft begins with
INTERMEDIATE_SIZE = 192  # of 512: with three layers of that the weights take 1.8 MB
NUM_DRAFTS = 8  # K
KEEP, LEAST = 0.7, 0.2  # the paper's
NUM_TOKENS, NUM_ROWS = 192, 10  # of a step
MASK_ID = SPECIAL_TOKENS.index(MASK)
CONFIG = {
    **demo.CONFIG,
    "intermediate_size": INTERMEDIATE_SIZE,
    "num_hidden_layers": len(LAYERS),
    "pard_token": MASK_ID,
}


class Draft(demo.Llama):
    """The demo model's Llama of other sizes, over slots instead of a text."""

    def __init__(self) -> None:
        whole = dict(demo.CONFIG)
        demo.CONFIG.update(CONFIG)
        try:
            super().__init__()
        finally:
            demo.CONFIG.clear()
            demo.CONFIG.update(whole)

    def forward(self, ids: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """ids[B, L], positions[L], seen bool[L, L] -> logits[B, L, V]."""
        x, cos, sin = self.embed_tokens(ids), self.cos[positions], self.sin[positions]
        for layer in self.layers:
            x = x + attend(layer.self_attn, layer.input_layernorm(x), cos, sin, seen)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return F.linear(self.norm(x), self.embed_tokens.weight)


def attend(own: nn.Module, x: Tensor, cos: Tensor, sin: Tensor, seen: Tensor) -> Tensor:
    """`demo.Attention.forward` with any mask."""
    B, L, _ = x.shape
    q = own.q_proj(x).view(B, L, own.heads, own.dim).transpose(1, 2)
    k = own.k_proj(x).view(B, L, own.kv_heads, own.dim).transpose(1, 2)
    v = own.v_proj(x).view(B, L, own.kv_heads, own.dim).transpose(1, 2)
    q, k = demo.rotate(q, cos, sin).to(v.dtype), demo.rotate(k, cos, sin).to(v.dtype)
    group = own.heads // own.kv_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return own.o_proj(y.transpose(1, 2).reshape(B, L, own.heads * own.dim))


def cut_out_of(target: dict[str, Tensor], draft: Draft) -> None:
    """Begin with layers of the target, of their MLPs the neurons whose weights weigh most."""
    state = {}
    for name in draft.state_dict():
        if not name.startswith("layers."):
            state[name] = target[f"model.{name}"].float()
            continue
        _, index, rest = name.split(".", 2)
        prefix = f"model.layers.{LAYERS[int(index)]}."
        weight = target[prefix + rest].float()
        if rest.startswith("mlp."):
            up, down = (target[f"{prefix}mlp.{n}_proj.weight"].float() for n in ("up", "down"))
            strength = up.norm(dim=1) * down.norm(dim=0)
            kept = strength.topk(INTERMEDIATE_SIZE).indices.sort().values
            weight = weight[:, kept] if "down" in rest else weight[kept]
        state[name] = weight
    draft.load_state_dict(state)


def slots(num_tokens: int, keep: Sequence[float], generator: torch.Generator) -> Tensor:
    """(i, j) of each slot, int64[2, L]: of distance j a share of keep[j], nested."""
    anchors, pairs = torch.arange(num_tokens), []
    for j, share in enumerate(keep):
        size = min(len(anchors), round(share * num_tokens))
        chosen = torch.randperm(len(anchors), generator=generator)[:size].sort().values
        anchors = anchors[chosen] if j else anchors
        anchors = anchors[anchors + j < num_tokens]
        pairs.append(torch.stack([anchors, torch.full_like(anchors, j)]))
    return torch.cat(pairs, dim=1)


def seen_by(i: Tensor, j: Tensor) -> Tensor:
    """bool[L, L]: what slot a sees of slot b."""
    texts = (j[None, :] == 0) & (i[None, :] <= i[:, None])
    masks = (i[None, :] == i[:, None]) & (j[None, :] <= j[:, None])
    return texts | masks


class Said:
    """Texts end to end: `ids`, and `wanted`, which is -100 where the demo model did not choose the
    token."""

    def __init__(self, paths: Sequence[Path]) -> None:
        ids, wanted = [], []
        for path in paths:
            found = np.load(path)
            ids.append(found["ids"].astype(np.int64))
            starts = np.cumsum(found["lengths"]) - found["lengths"]
            given = np.zeros(len(ids[-1]), bool)
            for start, length in zip(starts, found["prompt_lengths"], strict=True):
                given[start : start + length] = True
            wanted.append(np.where(given, -100, ids[-1]))
        self.ids = torch.from_numpy(np.concatenate(ids))
        self.wanted = torch.from_numpy(np.concatenate(wanted))

    def rows(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """ids[num, N] and what follows, wanted[num, N + K], from random places."""
        last = len(self.ids) - NUM_TOKENS - NUM_DRAFTS - 1
        starts = torch.randint(last, (num, 1), generator=generator)
        where = starts + torch.arange(NUM_TOKENS + NUM_DRAFTS)
        return self.ids[where[:, :NUM_TOKENS]], self.wanted[where]


def guesses(draft: Draft, ids: Tensor, wanted: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """logits[B, L, V] and the tokens that they should give, [B, L]."""
    i, j = pairs
    inputs = torch.where(j == 0, ids[:, i], MASK_ID)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = draft(inputs, i + j, seen_by(i, j))
    return logits.float(), wanted[:, i + j + 1]


def train(draft: Draft, said: Said, held_back: Said, arguments: argparse.Namespace) -> None:
    groups = [
        {"params": [p for p in draft.parameters() if p.ndim == 2], "weight_decay": 0.05},
        {"params": [p for p in draft.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments.rate, betas=(0.9, 0.98), fused=True)
    steps = 0
    if arguments.checkpoint.exists():
        state = torch.load(arguments.checkpoint, weights_only=True)
        draft.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        steps = state["steps"]
    generator = torch.Generator().manual_seed(arguments.seed + steps)
    keep = [max(KEEP**j, LEAST) if j else 1.0 for j in range(NUM_DRAFTS)]
    end, smooth, first = time.monotonic() + 60 * arguments.minutes, 0.0, steps
    while time.monotonic() < end and steps < arguments.steps:
        warm, progress = min(1, (steps + 1) / 100), steps / arguments.steps
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * warm * 0.5 * (1 + math.cos(math.pi * progress))
        ids, wanted = said.rows(NUM_ROWS, generator)
        logits, tokens = guesses(draft, ids, wanted, slots(NUM_TOKENS, keep, generator))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        smooth += (loss.item() - smooth) / min(steps - first, 50)
    draft.eval()
    accepted = mean_accepted_length(draft, held_back)
    print(f"step {steps}  loss {smooth:.4f}  mean accepted length {accepted:.3f}", flush=True)
    state = {"model": draft.state_dict(), "optimizer": optimizer.state_dict(), "steps": steps}
    temporary = arguments.checkpoint.with_suffix(".part")
    torch.save(state, temporary)
    temporary.replace(arguments.checkpoint)  # whole or not at all


@torch.no_grad()
def mean_accepted_length(draft: Draft, said: Said, num_batches: int = 8) -> float:
    """1 + the number of guesses that are right before the first wrong one, over all places.

    What the engine measures is this over the places where it happens to stand.
    """
    generator, total, places = torch.Generator().manual_seed(0), 0, 0
    for _ in range(num_batches):
        ids, wanted = said.rows(4, generator)
        pairs = slots(NUM_TOKENS, [1.0] + [0.25] * (NUM_DRAFTS - 1), generator)
        logits, tokens = guesses(draft, ids, wanted, pairs)
        right = (logits.argmax(-1) == tokens) & (tokens != -100)
        anchors = pairs[0, pairs[1] == NUM_DRAFTS - 1]
        run = torch.ones(len(ids), len(anchors), dtype=torch.bool)
        counted = tokens[:, anchors] != -100  # slots of distance 0 come first, in order
        for j in range(NUM_DRAFTS):
            column = torch.full((NUM_TOKENS,), -1)
            here = (pairs[1] == j).nonzero()[:, 0]
            column[pairs[0, here]] = here
            run &= right[:, column[anchors]]
            total += int((run & counted).sum())
        places += int(counted.sum())
    return 1 + total / places


def export(draft: Draft, directory: Path) -> None:
    """config.json and the weights in BF16; the vocabulary is the demo model's."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        f"model.{name}": w.to(torch.bfloat16).contiguous() for name, w in draft.state_dict().items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # save_file leaves it to its owner alone
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    option = parser.add_argument
    option("said", type=Path, nargs="+", help="texts made by continuations.py")
    option("--held-back", type=Path, required=True, help="texts of another seed, to be measured on")
    option("--minutes", type=float, default=30, help="wall clock to train for")
    option("--steps", type=int, default=2500, help="of all runs together; the rate falls with them")
    option("--seed", type=int, default=1)
    option("--rate", type=float, default=2e-3, help="highest learning rate")
    option("--checkpoint", type=Path, default=ROOT / "build" / "demo_draft.pt")
    option("--target", type=Path, default=ROOT / "pace_nb" / "demo")
    option("--out", type=Path, default=ROOT / "pace_nb" / "demo" / "draft")
    arguments = parser.parse_args()
    arguments.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    draft = Draft()
    cut_out_of(load_file(arguments.target / "model.safetensors"), draft)
    train(draft, Said(arguments.said), Said([arguments.held_back]), arguments)
    export(draft, arguments.out)


if __name__ == "__main__":
    main()
