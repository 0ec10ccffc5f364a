"""What goes through the socket as JSON: `SamplingParams` one way, `RequestOutput`s the other.

Knows the two records and that JSON has only text as keys. The engine's process sends what is new
(`Submission.news`); `merge` joins what came in several pieces, so that a client that reads slowly
gets fewer, larger pieces and nobody has to wait for it or keep a list for it.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pace_nb.outputs import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from pace_nb.sampling_params import SamplingParams
from pace_nb.structured_outputs import StructuredOutputsParams

_DEFAULTS = SamplingParams()


def params_to_json(params: SamplingParams) -> dict[str, Any]:
    """The fields that differ from the defaults."""
    found = {
        field.name: value
        for field in fields(SamplingParams)
        if (value := getattr(params, field.name)) != getattr(_DEFAULTS, field.name)
    }
    if isinstance(params.structured_outputs, StructuredOutputsParams):
        found["structured_outputs"] = params.structured_outputs.to_json()
    return found


def params_from_json(found: dict[str, Any]) -> SamplingParams:
    """The same again; keys of `logit_bias` may be text, as everywhere."""
    return SamplingParams(**found)


def output_to_json(output: RequestOutput, *, first: bool) -> dict[str, Any]:
    """A piece of news. first: with the log-probabilities of the prompt, once and for all.

    The prompt itself stays here: the receiver has it.
    """
    found: dict[str, Any] = {
        "outputs": [_completion_to_json(one) for one in output.outputs],
        "finished": output.finished,
        "num_cached_tokens": output.num_cached_tokens,
    }
    if output.metrics is not None:
        found["metrics"] = [getattr(output.metrics, f.name) for f in fields(RequestMetrics)]
    if first and output.prompt_logprobs is not None:
        found["prompt_logprobs"] = [
            None if entries is None else _logprobs_to_json(entries)
            for entries in output.prompt_logprobs
        ]
    return found


def output_from_json(
    found: dict[str, Any], request_id: str, prompt: str | None, prompt_token_ids: list[int]
) -> RequestOutput:
    """The same again, with the prompt that the receiver kept."""
    prompt_logprobs = found.get("prompt_logprobs")
    metrics = found.get("metrics")
    return RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=prompt_token_ids,
        prompt_logprobs=None
        if prompt_logprobs is None
        else [None if one is None else _logprobs_from_json(one) for one in prompt_logprobs],
        outputs=[_completion_from_json(one) for one in found["outputs"]],
        finished=found["finished"],
        num_cached_tokens=found["num_cached_tokens"],
        metrics=None if metrics is None else RequestMetrics(*metrics),
    )


def _completion_to_json(one: CompletionOutput) -> dict[str, Any]:
    found: dict[str, Any] = {"index": one.index, "text": one.text, "token_ids": one.token_ids}
    if one.logprobs is not None:
        found["logprobs"] = [_logprobs_to_json(entries) for entries in one.logprobs]
        found["cumulative_logprob"] = one.cumulative_logprob
    if one.finish_reason is not None:
        found["finish_reason"] = one.finish_reason
        found["stop_reason"] = one.stop_reason
    return found


def _completion_from_json(found: dict[str, Any]) -> CompletionOutput:
    logprobs = found.get("logprobs")
    return CompletionOutput(
        index=found["index"],
        text=found["text"],
        token_ids=found["token_ids"],
        cumulative_logprob=found.get("cumulative_logprob"),
        logprobs=None if logprobs is None else [_logprobs_from_json(one) for one in logprobs],
        finish_reason=found.get("finish_reason"),
        stop_reason=found.get("stop_reason"),
    )


def _logprobs_to_json(entries: TokenLogprobs) -> list[list[Any]]:
    """In the order they have: the token that is there comes first."""
    return [
        [token_id, one.logprob, one.rank, one.decoded_token] for token_id, one in entries.items()
    ]


def _logprobs_from_json(found: list[list[Any]]) -> TokenLogprobs:
    return {token_id: Logprob(*rest) for token_id, *rest in found}
