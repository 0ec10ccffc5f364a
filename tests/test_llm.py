"""The front door on the bundled model: every form of prompt, every way to end, nothing left."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pace_nb.errors import ConfigError, InvalidRequestError, ModelFormatError, PaceError
from pace_nb.kernels import jit
from pace_nb.llm import LLM
from pace_nb.models import hub
from pace_nb.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
STORY = "Once upon a time"


@pytest.fixture(scope="module")
def shared():
    with LLM(kernels="reference") as llm:
        yield llm


@pytest.fixture
def llm(shared):
    """The NumPy engine on the bundled model; idle before and after each test."""
    yield shared
    assert_idle(shared)


def assert_idle(llm):
    cache = llm._engine._cache
    cache.check()
    assert cache.num_free_tokens == cache.num_total_tokens
    assert llm._engine.num_unfinished == 0 and not llm._submissions


def generate(llm, prompts, params=GREEDY):
    return llm.generate(prompts, params, use_tqdm=False)


def text_of(output):
    (completion,) = output.outputs
    return completion.text


# ---- generate ----------------------------------------------------------------------------------
def test_outputs_are_in_the_order_of_the_prompts_and_complete(llm):
    prompts = ["The cat", STORY, "A"]
    lengths = [7, 2, 4]
    params = [replace(GREEDY, max_tokens=length) for length in lengths]
    outputs = generate(llm, prompts, params)
    assert [output.prompt for output in outputs] == prompts
    assert len({output.request_id for output in outputs}) == 3
    for output, prompt, length in zip(outputs, prompts, lengths, strict=True):
        (completion,) = output.outputs
        assert output.prompt_token_ids == llm.get_tokenizer().encode(prompt)
        assert len(completion.token_ids) == length
        assert completion.text == llm.get_tokenizer().decode(completion.token_ids)
        assert (completion.index, completion.finish_reason) == (0, "length")
        assert output.finished and output.prompt_logprobs is None and completion.logprobs is None
        metrics = output.metrics
        assert metrics.arrival_time < metrics.first_token_time <= metrics.finished_time


def test_every_form_of_prompt_is_the_same_prompt(llm):
    ids = llm.get_tokenizer().encode(STORY)
    forms = [STORY, ids, tuple(ids), np.array(ids), {"prompt": STORY}, {"prompt_token_ids": ids}]
    expected = text_of(generate(llm, STORY)[0])
    for form in forms:
        assert [text_of(output) for output in generate(llm, form)] == [expected]
    assert [text_of(output) for output in generate(llm, forms)] == [expected] * len(forms)
    (output,) = generate(llm, {"prompt": "shown", "prompt_token_ids": ids})
    assert output.prompt == "shown" and text_of(output) == expected
    assert generate(llm, []) == []


def test_by_default_the_model_says_how_to_sample(llm):
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.7, top_p=0.95)
    (output,) = llm.generate(STORY, use_tqdm=False)
    assert 1 <= len(output.outputs[0].token_ids) <= 16


def test_n_completions_are_those_of_n_seeds(llm):
    params = replace(GREEDY, temperature=2.0, seed=2**64 - 1, n=3, prompt_logprobs=0)
    (output,) = generate(llm, STORY, params)
    alone = [replace(params, n=1, seed=seed, prompt_logprobs=None) for seed in (2**64 - 1, 0, 1)]
    expected = [text_of(one) for one in generate(llm, [STORY] * 3, alone)]
    assert [completion.text for completion in output.outputs] == expected
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len(set(expected)) == 3
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


def test_logprobs_come_with_their_text(llm):
    (output,) = generate(llm, STORY, replace(GREEDY, logprobs=2, prompt_logprobs=1))
    (completion,) = output.outputs
    tokenizer = llm.get_tokenizer()
    total = 0.0
    for token_id, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        assert next(iter(entries)) == token_id and len(entries) == 2
        assert entries[token_id].rank == 1
        for other, entry in entries.items():
            assert entry.decoded_token == tokenizer.token_text(other)
        total += entries[token_id].logprob
    assert completion.cumulative_logprob == total

    logits = llm.forward(output.prompt_token_ids).astype(np.float64)
    exact = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    first, *rest = output.prompt_logprobs
    assert first is None
    for row, (token_id, entries) in enumerate(zip(output.prompt_token_ids[1:], rest, strict=True)):
        assert abs(entries[token_id].logprob - exact[row, token_id]) < 1e-4
        assert tokenizer.token_text(token_id) == entries[token_id].decoded_token


def test_a_stop_string_ends_it_and_is_cut_off(llm):
    params = replace(GREEDY, max_tokens=20)
    whole = text_of(generate(llm, STORY, params)[0])
    stop = whole[9:13]
    (output,) = generate(llm, STORY, replace(params, stop=stop))
    (completion,) = output.outputs
    assert completion.text == whole[: whole.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert len(completion.token_ids) < 20


def test_a_bad_word_does_not_occur(llm):
    params = replace(GREEDY, max_tokens=12)
    whole = text_of(generate(llm, STORY, params)[0])
    word = max(whole.split(), key=len).strip(".,")
    text = text_of(generate(llm, STORY, replace(params, bad_words=[word]))[0])
    assert word in whole and word not in text


def test_a_long_prompt_is_cut_at_its_beginning_where_that_is_asked_for(llm):
    ids = list(range(10, 40))
    (output,) = generate(llm, [ids], replace(GREEDY, truncate_prompt_tokens=7))
    assert output.prompt_token_ids == ids[-7:]
    (output,) = generate(llm, [[5] * 2000], replace(GREEDY, truncate_prompt_tokens=-1))
    assert len(output.prompt_token_ids) == llm.max_model_len - 1
    assert len(output.outputs[0].token_ids) == 1


def test_the_context_bounds_what_is_generated(llm):
    (output,) = generate(llm, [[5] * 1021], replace(GREEDY, max_tokens=None))
    assert len(output.outputs[0].token_ids) == 3
    assert output.outputs[0].finish_reason == "length"


def test_a_beginning_that_was_computed_before_is_found_by_those_of_the_same_salt(llm):
    def cached(length, **salt):
        ids = [7, 9, 11] * 15 + [length + 3] * length
        (output,) = generate(llm, {"prompt_token_ids": ids, **salt})
        return output.num_cached_tokens

    assert cached(0) == 0
    assert [cached(0), cached(4), cached(20)] == [32, 32, 32]
    assert cached(20) == 64
    assert cached(20, cache_salt="mine") == 0
    assert cached(20, cache_salt="mine") == 64
    assert cached(20, cache_salt="\ud800") == 0  # as JSON can bring it
    assert_idle(llm)


def test_n_completions_share_their_prompt(llm):
    params = replace(GREEDY, n=3, max_tokens=3)
    prompt = {"prompt_token_ids": [13, 15] * 20, "cache_salt": "n"}
    stream = llm.stream(prompt, params)
    next(stream)
    next(stream)
    # 3 x 2 full blocks of the same tokens are 2; each has a block of its own for the rest.
    cache = llm._engine._cache
    assert cache.num_total_tokens - cache.num_free_tokens == (2 + 3) * 16
    stream.close()


def test_the_bar_shows_rates(llm, capsys):
    llm.generate([STORY, "A"], GREEDY, use_tqdm=True)
    shown = capsys.readouterr().err
    assert "2/2" in shown and "tokens/s" in shown
    llm.generate([STORY, "A"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


# ---- chat and stream ---------------------------------------------------------------------------
def test_chat_is_the_template_and_then_generate(llm):
    one = [{"role": "user", "content": "Who are you?"}]
    two = [*one, {"role": "assistant", "content": "A model."}, {"role": "user", "content": "Oh."}]
    outputs = llm.chat([one, two], GREEDY, use_tqdm=False)
    prompts = [llm.get_tokenizer().encode_chat(messages) for messages in (one, two)]
    assert [output.prompt for output in outputs] == [prompt.text for prompt in prompts]
    assert [output.prompt_token_ids for output in outputs] == [p.token_ids for p in prompts]
    expected = generate(llm, [prompt.token_ids for prompt in prompts])
    assert [text_of(output) for output in outputs] == [text_of(output) for output in expected]
    assert text_of(llm.chat(one, GREEDY, use_tqdm=False)[0]) == text_of(expected[0])
    streamed = [text_of(output) for output in llm.stream_chat(one, GREEDY)]
    assert "".join(streamed) == text_of(expected[0])


@pytest.mark.parametrize(
    "messages",
    [[{"role": "user", "content": "a\ud800"}], [{"role": "user\udce9", "content": "a"}]],
)
def test_a_lone_surrogate_in_a_conversation_is_refused(llm, messages):
    with pytest.raises(InvalidRequestError, match="lone surrogate at character"):
        llm.chat(messages, GREEDY, use_tqdm=False)


def test_a_conversation_goes_on_from_what_was_computed(llm):
    messages = [{"role": "user", "content": "Who are you? " * 8}]
    options = {"use_tqdm": False, "cache_salt": "a conversation"}
    (answer,) = llm.chat(messages, GREEDY, **options)
    num_prompt = len(answer.prompt_token_ids)
    assert answer.num_cached_tokens == 0 and num_prompt > 32
    messages += [
        {"role": "assistant", "content": text_of(answer)},
        {"role": "user", "content": "I see."},
    ]
    assert llm.chat(messages, GREEDY, **options)[0].num_cached_tokens >= num_prompt // 16 * 16
    *_, last = llm.stream_chat(messages, GREEDY, cache_salt="a conversation")
    assert last.num_cached_tokens >= num_prompt // 16 * 16


def test_a_stream_adds_up_to_what_generate_gives(llm):
    params = replace(GREEDY, max_tokens=9, logprobs=1, n=2, temperature=1.5, seed=5)
    (whole,) = generate(llm, STORY, params)
    news = list(llm.stream(STORY, params))
    assert [output.finished for output in news] == [False] * (len(news) - 1) + [True]
    for completion in whole.outputs:
        own = [new for output in news for new in output.outputs if new.index == completion.index]
        assert len(own) == 9
        assert "".join(new.text for new in own) == completion.text
        assert [i for new in own for i in new.token_ids] == completion.token_ids
        assert [entries for new in own for entries in new.logprobs] == completion.logprobs
        assert own[-1].cumulative_logprob == completion.cumulative_logprob
        assert [new.finish_reason for new in own] == [None] * 8 + ["length"]


def test_a_stream_that_is_dropped_gives_everything_back(llm):
    stream = llm.stream(STORY, GREEDY)
    next(stream)
    assert llm._engine.num_unfinished == 1
    stream.close()
    assert_idle(llm)
    llm.stream(STORY, GREEDY)  # never begun, so nothing to give back


def test_streams_and_generate_in_turn_do_not_disturb_each_other(llm):
    expected = {prompt: text_of(generate(llm, prompt)[0]) for prompt in (STORY, "The cat", "A dog")}
    first, second = llm.stream(STORY, GREEDY), llm.stream("The cat", GREEDY)
    texts = [text_of(next(first)), text_of(next(second)), text_of(next(first))]
    assert text_of(generate(llm, "A dog")[0]) == expected["A dog"]
    assert texts[0] + texts[2] + "".join(map(text_of, first)) == expected[STORY]
    assert texts[1] + "".join(map(text_of, second)) == expected["The cat"]


# ---- what is refused ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    "prompt, message",
    [
        ([1536], "prompt token id is 1536, expected an integer from 0 to 1535"),
        ([-1], "prompt token id is -1"),
        ([[]], "the prompt is empty"),
        ([5] * 1024, "the prompt has 1024 tokens, expected at most 1023"),
        ([1.5], "holds something else"),
        ([b"bytes"], "token ids are bytes"),
        ({"prompt": 5}, "prompt is a int, expected text"),
        ({}, "expected 'prompt' or 'prompt_token_ids'"),
        ({"prompt": "a", "images": []}, r"\['images'\], expected 'prompt'"),
        ({"prompt_token_ids": "abc"}, "token ids are str"),
        ({"cache_salt": "a"}, "expected 'prompt' or 'prompt_token_ids'"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt is '', expected a non-empty string"),
        ({"prompt": "a", "cache_salt": 5}, "cache_salt is 5, expected a non-empty string"),
        (7, "prompts is a int, expected a list"),
        (np.array(3), "prompts is a ndarray, expected a list"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_runs(llm, monkeypatch, prompt, message):
    monkeypatch.setattr(llm, "step", lambda: pytest.fail("it ran"))
    with pytest.raises(InvalidRequestError, match=message) as caught:
        generate(llm, prompt)
    assert "\n" not in str(caught.value)
    if not isinstance(prompt, int | list | np.ndarray):
        with pytest.raises(InvalidRequestError, match=message):
            generate(llm, [STORY, prompt])
        with pytest.raises(InvalidRequestError, match=message):
            llm.stream(prompt, GREEDY)  # at once, not at the first next()


@pytest.mark.parametrize(
    "params, message",
    [
        ({"logit_bias": {9999: 1}}, "logit_bias key is 9999"),
        ({"stop_token_ids": [5, 1536]}, "stop_token_ids entry is 1536, expected .* 0 to 1535"),
        ({"allowed_token_ids": [1, 9999]}, "allowed_token_ids entry is 9999"),
    ],
)
def test_parameters_that_do_not_fit_the_model(llm, params, message):
    with pytest.raises(InvalidRequestError, match=message):
        generate(llm, [STORY, STORY], [GREEDY, replace(GREEDY, **params)])


def test_parameters_of_the_wrong_kind_or_number(llm):
    with pytest.raises(InvalidRequestError, match="1 sampling_params for 2 prompts"):
        generate(llm, [STORY, STORY], [GREEDY])
    with pytest.raises(InvalidRequestError, match="sampling_params is a dict"):
        generate(llm, [STORY], [{"max_tokens": 3}])
    for params, kind in ((5, "int"), ({"n": 1}, "dict"), ("x", "str")):
        with pytest.raises(InvalidRequestError, match=f"sampling_params is a {kind}, expected"):
            generate(llm, [STORY], params)


@pytest.mark.parametrize("messages", [None, 5, "Hi", {"role": "user", "content": "Hi"}])
def test_a_conversation_is_a_list(llm, messages):
    for chat in (llm.chat, llm.stream_chat):
        with pytest.raises(InvalidRequestError, match=r"messages is a .*, expected a list"):
            chat(messages)


def test_options_that_cannot_be():
    with pytest.raises(ConfigError, match="LLM has no option 'quantise', expected model"):
        LLM(quantise=True)
    with pytest.raises(ConfigError, match=r"max_model_len is 1025, .* at most 1024"):
        LLM(kernels="reference", max_model_len=1025)
    with pytest.raises(ConfigError, match="the KV cache holds 32 tokens"):
        LLM(kernels="reference", max_model_len=100, kv_cache_memory_bytes=2 * 16 * 1536)


# ---- what goes wrong on the way ----------------------------------------------------------------
def test_an_interrupt_leaves_nothing_behind(llm, monkeypatch):
    run = llm._engine._runner.run
    calls = iter(range(100))

    def interrupted(scheduled):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return run(scheduled)

    monkeypatch.setattr(llm._engine._runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(llm, [STORY, "The cat"])
    assert_idle(llm)
    assert generate(llm, STORY)[0].finished


def test_nan_logits_end_their_completion_with_the_reason(llm, monkeypatch):
    model = llm._engine._runner._model
    logits = type(model).logits

    def poisoned(self, hidden, rows):
        found = logits(self, hidden, rows)
        found[:1] = np.nan
        return found

    monkeypatch.setattr(type(model), "logits", poisoned)
    outputs = generate(llm, [STORY, "The cat"])
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "error"]
    assert "the model gave logits whose largest is nan" in outputs[0].outputs[0].stop_reason
    assert len(outputs[0].outputs[0].token_ids) == 0
    assert len(outputs[1].outputs[0].token_ids) == 1  # it was the second in one step, then alone


def test_a_decoder_that_raises_ends_its_own_completion(llm, monkeypatch):
    from pace_nb.engine import completion

    class Failing(completion.IncrementalDecoder):
        def push(self, token_ids):
            raise UnicodeError("broken\ntable")

    expected = text_of(generate(llm, "The cat")[0])
    other = llm.stream("The cat", GREEDY)
    texts = [text_of(next(other))]
    monkeypatch.setattr(completion, "IncrementalDecoder", Failing)
    (output,) = generate(llm, STORY)
    assert output.outputs[0].finish_reason == "error"
    assert output.outputs[0].stop_reason == "UnicodeError: broken table"
    assert "".join(texts + [text_of(news) for news in other]) == expected


# ---- models without this or that ---------------------------------------------------------------
@pytest.fixture
def partial_model(tmp_path):
    """Copies the bundled model, without the files that are named."""

    def build(*left_out):
        for path in filter(Path.is_file, hub.DEMO_MODEL.iterdir()):
            if path.suffix in (".json", ".safetensors") and path.name not in left_out:
                shutil.copy(path, tmp_path)
        return tmp_path

    return build


def test_a_model_without_tokenizer_takes_and_gives_token_ids(partial_model, llm):
    ids = llm.get_tokenizer().encode(STORY)
    with LLM(partial_model("tokenizer.json"), kernels="reference") as bare:
        (output,) = generate(bare, [ids])
        assert output.outputs[0].token_ids == generate(llm, [ids])[0].outputs[0].token_ids
        assert output.outputs[0].text == ""
        assert bare._text.eos_token_ids == {1, 2}
        with pytest.raises(InvalidRequestError, match="has no tokenizer: give token ids"):
            generate(bare, STORY)
        with pytest.raises(InvalidRequestError, match="stop strings need a tokenizer"):
            generate(bare, [ids], replace(GREEDY, stop="x"))
        with pytest.raises(ModelFormatError, match=r"no tokenizer\.json"):
            bare.chat([{"role": "user", "content": "Hi"}])
        assert_idle(bare)


def test_a_tokenizer_from_elsewhere(partial_model, llm):
    directory = partial_model("tokenizer.json")
    with LLM(directory, tokenizer=hub.DEMO_MODEL, kernels="reference") as borrowed:
        assert text_of(generate(borrowed, STORY)[0]) == text_of(generate(llm, STORY)[0])


def test_a_generation_config_that_cannot_be(partial_model):
    directory = partial_model()
    (directory / "generation_config.json").write_text(json.dumps({"temperature": -1}))
    with (
        LLM(directory, kernels="reference") as broken,
        pytest.raises(ModelFormatError, match=r"generation_config\.json: temperature"),
    ):
        broken.generate(STORY)


@pytest.mark.parametrize("value", ["x", [1, "a"], 1.5, True, -1, 10**9])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_end_tokens_that_cannot_be(partial_model, file, value):
    """With and without a tokenizer the error names file and field."""
    directory = partial_model()
    for name in {"config.json", "generation_config.json"}:
        values = json.loads((directory / name).read_text())
        values.pop("eos_token_id", None)
        if name == file:
            values["eos_token_id"] = value
        (directory / name).write_text(json.dumps(values))
    for _ in range(2):
        with pytest.raises(ModelFormatError, match=rf"/{file}: eos_token_id is .*, expected 0 to"):
            LLM(directory, kernels="reference")
        (directory / "tokenizer.json").unlink(missing_ok=True)


def test_an_error_about_a_field_names_the_directory(partial_model):
    directory = partial_model()
    values = json.loads((directory / "config.json").read_text())
    for wrong in ({"hidden_size": 0}, {"hidden_size": 8}, {"architectures": ["X"]}):
        (directory / "config.json").write_text(json.dumps(values | wrong))
        with pytest.raises(PaceError) as caught:
            LLM(directory, kernels="reference")
        assert str(caught.value).count(str(directory)) == 1


def test_a_pool_too_small_for_the_context_shrinks_the_context():
    with LLM(kernels="reference", kv_cache_memory_bytes=3 * 16 * 1536) as small:
        assert small.max_model_len == 48
        assert "48 tokens x 1536 bytes" in small.kv_cache_arithmetic
        (output,) = generate(small, [[5] * 40], replace(GREEDY, max_tokens=None))
        assert len(output.outputs[0].token_ids) == 8
        assert_idle(small)


# ---- forward and close -------------------------------------------------------------------------
def test_forward_gives_the_logits_that_generate_uses(llm):
    (output,) = generate(llm, STORY)
    ids = output.prompt_token_ids + output.outputs[0].token_ids
    logits = llm.forward(np.array(ids))
    assert logits.shape == (len(ids), 1536) and logits.dtype == np.float32
    predicted = logits.argmax(axis=1)[len(output.prompt_token_ids) - 1 : -1]
    assert predicted.tolist() == output.outputs[0].token_ids
    with pytest.raises(InvalidRequestError, match="forward got 0 tokens"):
        llm.forward([])


def test_what_is_closed_says_so():
    with LLM(kernels="reference") as llm:
        stream = llm.stream(STORY, GREEDY)
        next(stream)
    llm.close()
    for use in (lambda: llm.generate("a"), lambda: llm.forward([1]), lambda: next(stream)):
        with pytest.raises(PaceError, match="closed"):
            use()


# ---- compiled kernels --------------------------------------------------------------------------
@pytest.mark.skipif(jit.INTERPRETED, reason="minutes without compiled kernels")
def test_tokens_and_logprobs_are_the_same_bits_in_any_company():
    """Alone; among neighbours; cut in chunks; with a tight pool; with one thread and with all."""
    prompts = [[5 + i % 40 for i in range(length)] for length in (1, 17, 70, 150)]
    params = [
        SamplingParams(temperature=t, seed=3, max_tokens=12, ignore_eos=True, logprobs=3,
                       prompt_logprobs=1)
        for t in (0.0, 1.0, 0.7, 0.0)
    ]  # fmt: skip
    threads = jit.num_threads()

    def seen(output):
        return output.outputs[0].token_ids, output.outputs[0].logprobs, output.prompt_logprobs

    try:
        with LLM() as llm:
            together = [seen(output) for output in generate(llm, prompts, params)]
            for prompt, own, expected in zip(prompts, params, together, strict=True):
                assert seen(generate(llm, [prompt], own)[0]) == expected
            assert_idle(llm)
        tight = {"max_num_batched_tokens": 23, "kv_cache_memory_bytes": 16 * 16 * 1536}
        with LLM(num_threads=1, max_num_seqs=4, **tight) as llm:
            assert [seen(output) for output in generate(llm, prompts, params)] == together
            assert_idle(llm)
        with LLM(enable_chunked_prefill=False) as llm:
            assert [seen(output) for output in generate(llm, prompts[::-1], params[::-1])] == (
                together[::-1]
            )
    finally:
        jit.set_num_threads(threads)


# ---- piece by piece ----------------------------------------------------------------------------
def test_submissions_move_step_by_step_and_are_what_generate_gives(llm):
    prompts, params = ["The cat", STORY], replace(GREEDY, n=2)
    submissions = [llm.submit(prompt, params) for prompt in prompts]
    assert llm.get_load().num_waiting == 4
    assert llm.step() == submissions  # both moved, and each is told once
    load = llm.get_load()
    assert (load.num_running, load.num_waiting) == (4, 0)
    assert load.num_step_tokens >= len(llm.get_tokenizer().encode("The cat"))
    assert 0 < load.kv_cache_usage < 1
    while not all(one.finished for one in submissions):
        llm.step()
    expected = generate(llm, prompts, params)
    assert [one.output().outputs for one in submissions] == [one.outputs for one in expected]
    assert llm.get_load() == (0, 0, 0.0, llm.get_load().num_step_tokens)


def test_a_withdrawn_submission_leaves_the_others(llm):
    kept, given_up = (llm.submit(prompt, GREEDY) for prompt in ("The cat", STORY))
    llm.step()
    llm.withdraw(given_up)
    llm.withdraw(given_up)
    assert llm.get_load().num_running == 1
    while not kept.finished:
        assert llm.step() == [kept]
    assert kept.output().outputs == generate(llm, "The cat")[0].outputs
    assert not given_up.finished


def test_a_submission_that_cannot_be_served_leaves_nothing(llm):
    with pytest.raises(InvalidRequestError, match="integer from 0"):
        llm.submit([10**6], GREEDY)
    assert llm.get_load().num_waiting == 0
