"""What the demo model says, greedily, to many beginnings: the text its PARD draft learns from.

    python notebooks/demo_model/continuations.py --prompts 4000 --seed 1 --out build/said.npz

It knows how beginnings are drawn from the corpus and runs pace_nb. It knows nothing of training,
and needs no torch. A draft is to guess what its target will say, so its best text is the target's
own, not the corpus: where the corpus might go on in many ways, a greedy target goes on in one.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from chat_format import BOS, ROLES, render
from corpus import chat, story_request
from stories import story

from pace_nb import LLM, SamplingParams

TRAINING_SEEDS, TRAINING_PROMPTS = range(2, 6), 1200  # of pace_nb/demo/draft


def beginnings(seed: int) -> Iterator[str]:
    """Rendered prompts, endlessly: 5 in 10 the first words of a story, 4 a request for a story, 1
    a conversation up to one of its answers."""
    rng = random.Random(seed)
    while True:
        form = rng.randrange(10)
        if form < 5:
            words = story(rng).split(" ")
            yield BOS + " ".join(words[: rng.randint(3, max(3, min(60, len(words) - 5)))])
        elif form < 9:
            message = {"role": "user", "content": story_request(rng)[0]}
            yield render([message]) + ROLES["assistant"]
        else:
            messages = chat(rng)
            last = rng.randrange(0, len(messages))
            while messages[last]["role"] == "assistant":
                last -= 1
            yield render(messages[: last + 1]) + ROLES["assistant"]


def trained_on() -> set[str]:
    """The beginnings that the bundled draft has learned from."""
    return {text for seed in TRAINING_SEEDS for text in distinct(seed, TRAINING_PROMPTS)}


def distinct(seed: int, num: int) -> list[str]:
    """The first `num` different beginnings of a seed."""
    drawn, texts = beginnings(seed), dict[str, None]()
    while len(texts) < num:
        texts[next(drawn)] = None
    return list(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    option = parser.add_argument
    option("--prompts", type=int, default=4000)
    option("--seed", type=int, default=1)
    option("--max-tokens", type=int, default=160)
    option("--out", type=Path, default=Path("build/said.npz"))
    arguments = parser.parse_args()
    texts = distinct(arguments.seed, arguments.prompts)
    with LLM(max_model_len=512) as llm:
        prompts = [llm.get_tokenizer().encode(text, add_special_tokens=False) for text in texts]
        prompts = [prompt for prompt in prompts if len(prompt) <= 320]
        params = SamplingParams(temperature=0, max_tokens=arguments.max_tokens, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": one} for one in prompts], params)
    ids = [[*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        arguments.out,
        ids=np.concatenate([np.array(one, np.int16) for one in ids]),
        lengths=np.array([len(one) for one in ids], np.int32),
        prompt_lengths=np.array([len(one) for one in prompts], np.int32),
    )
    print(f"{len(ids)} texts, {sum(map(len, ids))} tokens, {sum(map(len, prompts))} of prompts")


if __name__ == "__main__":
    main()
