"""Tokens of a request become text and log-probabilities, all at once or piece by piece."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from pace_nb.engine.completion import Completion, Submission
from pace_nb.errors import InvalidRequestError
from pace_nb.outputs import Logprob
from pace_nb.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte: the id of "a" is 97."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    of_byte = list(map(chr, range(33, 127)))  # these bytes stand for themselves
    vocab = {c: ord(c) for c in of_byte}
    vocab |= {c: 200 + i for i, c in enumerate(sorted(set(alphabet) - set(of_byte)))}
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def ids(text):
    return [ord(c) for c in text]


def feed(completion, token_ids, finish_reason=None, stop_reason=None):
    """What the engine does to a request, and then the completion's turn."""
    request = completion.request
    request.token_ids += token_ids
    if request.logprobs is not None:
        request.logprobs += [{t: Logprob(-0.5, 1), 98: Logprob(-2.0, 2)} for t in token_ids]
    request.finish_reason, request.stop_reason = finish_reason, stop_reason
    completion.take(token_ids)


def test_text_grows_with_the_tokens(scripted, tokenizer):
    completion = Completion(3, scripted.request("a", ids("x")), tokenizer)
    assert completion.news() is None
    feed(completion, ids("he"))
    feed(completion, ids("y"))
    news = completion.news()
    assert (news.index, news.text, news.token_ids) == (3, "hey", ids("hey"))
    assert (news.finish_reason, news.logprobs, news.cumulative_logprob) == (None, None, None)
    assert completion.news() is None
    feed(completion, ids("!"), "length")
    assert (completion.news().text, completion.finish_reason) == ("!", "length")
    assert completion.news() is None
    whole = completion.output()
    assert (whole.text, whole.token_ids) == ("hey!", ids("hey!"))


def test_an_end_without_tokens_is_news(scripted, tokenizer):
    completion = Completion(0, scripted.request("a", ids("x")), tokenizer)
    completion.request.error = "it broke"
    feed(completion, [], "error")
    news = completion.news()
    assert (news.text, news.finish_reason, news.stop_reason) == ("", "error", "it broke")
    assert completion.news() is None


def test_a_stop_string_ends_it_before_its_request(scripted, tokenizer):
    request = scripted.request("a", ids("x"), stop=["stop"], logprobs=1)
    completion = Completion(0, request, tokenizer)
    feed(completion, ids("go s"[:2]))
    feed(completion, ids("sto"))
    assert completion.news().text == "go"  # what may become the stop string is held back
    feed(completion, ids("pping"))
    output = completion.output()
    assert (output.text, output.finish_reason, output.stop_reason) == ("go", "stop", "stop")
    assert output.token_ids == ids("gostop") and len(output.logprobs) == 6
    assert request.finish_reason is None


def test_logprobs_get_text_and_add_up(scripted, tokenizer):
    completion = Completion(0, scripted.request("a", ids("x"), logprobs=1), tokenizer)
    feed(completion, ids("ac"))
    feed(completion, ids("d"), "length")
    output = completion.output()
    assert [
        entries[t].decoded_token for t, entries in zip(ids("acd"), output.logprobs, strict=True)
    ] == list("acd")
    assert {entries[98].decoded_token for entries in output.logprobs} == {"b"}
    assert output.cumulative_logprob == -1.5


def test_prompt_logprobs_get_text(scripted, tokenizer):
    request = scripted.request("a", ids("xy"), prompt_logprobs=0)
    completion = Completion(0, request, tokenizer)
    request.prompt_logprobs.append({121: Logprob(-1.0, 4)})
    assert completion.prompt_logprobs() == [None, {121: Logprob(-1.0, 4, "y")}]
    assert Completion(0, scripted.request("a", ids("x")), tokenizer).prompt_logprobs() is None


@pytest.mark.parametrize("detokenize, known", [(False, True), (True, False)])
def test_without_text_there_are_only_tokens(scripted, tokenizer, detokenize, known):
    request = scripted.request("a", [1], detokenize=detokenize, logprobs=0)
    completion = Completion(0, request, tokenizer if known else None)
    feed(completion, ids("hi"), "length")
    output = completion.output()
    assert (output.text, output.token_ids) == ("", ids("hi"))
    assert output.logprobs[0][104].decoded_token is None


def test_stop_strings_need_a_tokenizer(scripted):
    with pytest.raises(InvalidRequestError, match="stop strings need a tokenizer"):
        Completion(0, scripted.request("a", [1], stop="x"), None)


def test_whatever_raises_ends_it_with_the_reason(scripted, tokenizer):
    completion = Completion(0, scripted.request("a", ids("x")), tokenizer)
    completion.take(["not an id"])
    assert completion.finish_reason == "error"
    assert "not an id" in completion.output().stop_reason
    assert "\n" not in completion.output().stop_reason


def test_a_submission_tells_of_those_that_moved(scripted, tokenizer):
    requests = [scripted.request(f"7-{i}", ids("xy")) for i in range(2)]
    first, second = (Completion(i, request, tokenizer) for i, request in enumerate(requests))
    submission = Submission("7", "xy", [first, second])
    assert submission.news() is None and not submission.finished
    feed(second, ids("b"), "length")
    news = submission.news()
    assert [output.index for output in news.outputs] == [1]
    assert (news.request_id, news.prompt, news.prompt_token_ids) == ("7", "xy", ids("xy"))
    assert not news.finished
    feed(first, ids("a"), "stop", 97)
    assert submission.news().finished and submission.finished
    assert [output.token_ids for output in submission.output().outputs] == [ids("a"), ids("b")]
    assert submission.output().outputs[0].stop_reason == 97
