"""pace_nb behind the protocol.

    python -m bench.peers.run_pace_nb DIRECTORY THREADS

Knows `pace_nb.LLM`. Defaults, but for the longest sequence, the size of the KV cache (the same for
all engines) and prefix caching, which is off for all engines that have it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.peers import protocol


def main() -> None:
    answers = protocol.private_stdout()
    from pace_nb import LLM, SamplingParams, __version__

    directory, threads = sys.argv[1], int(sys.argv[2])
    llm = LLM(
        directory,
        num_threads=threads,
        max_model_len=protocol.LONGEST,
        max_num_seqs=protocol.MOST_SEQUENCES,
        kv_cache_memory_bytes=protocol.KV_BYTES,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], output_len: int) -> list[int]:
        params = SamplingParams(
            max_tokens=output_len, temperature=0, ignore_eos=True, detokenize=False
        )
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    vocab_size = json.loads((Path(directory) / "config.json").read_text())["vocab_size"]
    facts = {"version": f"pace_nb {__version__}"}
    protocol.serve(generate, vocab_size, facts, sys.stdin, answers)


if __name__ == "__main__":
    main()
