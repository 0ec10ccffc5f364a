"""llama.cpp behind the protocol, by llama-cpp-python's C bindings. Runs in that environment only.

    python -m bench.peers.run_llama_cpp MODEL.gguf THREADS

Knows llama.cpp's C interface. The low-level calls, not the `Llama` class: its Python loop handles
one sequence and copies the logits of every token. Settings are llama.cpp's defaults (n_batch 2048,
n_ubatch 512, flash attention "auto", F16 cache, one stream per sequence), but for the thread counts
and the context, which is as long as the case needs. Greedy by NumPy's argmax, which takes less time
than llama.cpp's own sampler chain.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import llama_cpp as api
import numpy as np

from bench.peers import protocol

N_BATCH = 2048
GRANULE = 256  # llama.cpp rounds the cells of a stream up to it


class Runner:
    """One model, and the context of the case at hand."""

    def __init__(self, path: str, threads: int) -> None:
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"{path}: llama.cpp cannot load it")
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.threads = threads
        self.context: Any = None
        self.shape: tuple[int, int] | None = None
        self.batch = api.llama_batch_init(N_BATCH, 0, 1)

    def open_context(self, sequences: int, length: int) -> None:
        """A context for so many sequences; the one there is where it fits."""
        shape = sequences, -(-length // GRANULE) * GRANULE
        if shape == self.shape:
            api.llama_memory_clear(api.llama_get_memory(self.context), False)
            return
        if self.context is not None:
            api.llama_free(self.context)
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = shape[0] * shape[1], sequences
        params.n_batch = N_BATCH
        params.n_threads = params.n_threads_batch = self.threads
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp made no context for {shape}")
        self.shape = shape

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """(token, position, sequence, wanted) each, at most N_BATCH -> argmax where wanted."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if api.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        chosen = []
        for i, (_, _, _, wanted) in enumerate(tokens):
            if wanted:
                logits = api.llama_get_logits_ith(self.context, i)
                pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
                chosen.append(int(np.ctypeslib.as_array(pointer, (self.vocab_size,)).argmax()))
        return chosen

    def generate(self, prompts: list[list[int]], output_len: int) -> list[int]:
        """Prefill in batches of N_BATCH tokens, then one token of each sequence per step."""
        return [len(tokens) for tokens in self.tokens(prompts, output_len)]

    def tokens(self, prompts: list[list[int]], output_len: int) -> list[list[int]]:
        """The greedy tokens themselves, [sequence][step]."""
        self.open_context(len(prompts), max(map(len, prompts)) + output_len)
        flat = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        newest: list[int] = []
        for start in range(0, len(flat), N_BATCH):
            newest += self.decode(flat[start : start + N_BATCH])
        columns = [newest]
        for step in range(output_len - 1):
            rows = [
                (token, len(prompts[sequence]) + step, sequence, True)
                for sequence, token in enumerate(newest)
            ]
            newest = self.decode(rows)
            columns.append(newest)
        return [list(row) for row in zip(*columns, strict=True)]


def main() -> None:
    answers = protocol.private_stdout()
    runner = Runner(sys.argv[1], int(sys.argv[2]))
    facts = {
        "version": f"llama-cpp-python {api.__version__}",
        "system": api.llama_print_system_info().decode(),
    }
    protocol.serve(runner.generate, runner.vocab_size, facts, sys.stdin, answers)


if __name__ == "__main__":
    main()
