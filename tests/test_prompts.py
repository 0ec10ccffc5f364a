"""Every form of prompt is read, and what is none is refused by what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pace_nb.errors import InvalidRequestError, ModelFormatError
from pace_nb.models import hub
from pace_nb.prompts import PromptReader, as_conversations, as_prompts, as_token_ids
from pace_nb.tokenizer import Tokenizer

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def tokenizer():
    with_template = Tokenizer.from_directory(hub.DEMO_MODEL)
    yield with_template
    with_template.close()


@pytest.fixture
def reader(tokenizer):
    return PromptReader(tokenizer, hub.DEMO_MODEL)


def test_text_and_token_ids(reader, tokenizer):
    ids = tokenizer.encode("A cat")
    assert reader.read("A cat") == ("A cat", ids, None)
    assert reader.read({"prompt": "A cat", "cache_salt": "s"}) == ("A cat", ids, "s")
    for form in (ids, tuple(ids), np.array(ids)):
        assert reader.read(form) == (None, ids, None)
    assert reader.read({"prompt_token_ids": ids}) == (None, ids, None)
    assert reader.read({"prompt": "shown", "prompt_token_ids": [5]}) == ("shown", [5], None)


def test_a_conversation_is_what_its_template_makes_of_it(reader, tokenizer):
    text, token_ids, salt = reader.read_chat(HI, cache_salt="s")
    assert (text, token_ids) == tokenizer.encode_chat(HI)
    assert salt == "s"
    assert reader.read_chat(HI, False).text == tokenizer.encode_chat(HI, False).text


def test_template_variables_under_vllms_name(reader, tokenizer):
    """They used to be one variable of that name, which no template reads."""
    template = "{{ messages[0].content }} {{ enable_thinking }}"
    for options in ({"chat_template_kwargs": {"enable_thinking": 7}}, {"enable_thinking": 7}):
        assert reader.read_chat(HI, chat_template=template, **options).text == "Hi 7"
    assert reader.read_chat(HI, chat_template_kwargs=None) == reader.read_chat(HI)
    for wrong in ({"chat_template": "x"}, {"messages": []}, {"self": 1}, "x"):
        with pytest.raises(InvalidRequestError, match=r"may not be a template|is a str"):
            reader.read_chat(HI, chat_template_kwargs=wrong)


def test_words_are_spelled_with_and_without_a_space(reader, tokenizer):
    spelled = reader.spell(["cat"])
    assert [tokenizer.decode(ids) for ids in spelled] == ["cat", " cat"]


def test_a_model_without_tokenizer_takes_token_ids():
    bare = PromptReader(None, Path("/m"))
    assert bare.read([1, 2]).token_ids == [1, 2]
    assert bare.spell([]) == []
    with pytest.raises(InvalidRequestError, match="/m has no tokenizer: give token ids"):
        bare.read("text")
    with pytest.raises(ModelFormatError, match=r"/m: no tokenizer\.json, expected one"):
        bare.read_chat(HI)


def test_one_and_many():
    assert as_prompts("a") == ["a"]
    assert as_prompts([1, 2]) == [[1, 2]]
    assert as_prompts({"prompt": "a"}) == [{"prompt": "a"}]
    assert as_prompts(["a", [1]]) == ["a", [1]]
    assert as_prompts([]) == []
    assert as_conversations(HI) == [HI]
    assert as_conversations([HI, HI]) == [HI, HI]
    for wrong in ("Hi", HI[0], 5):
        with pytest.raises(InvalidRequestError, match="expected a list of role and content"):
            as_conversations(wrong)


def test_token_ids_are_integers():
    assert as_token_ids(np.array([1, 2], np.int16)) == [1, 2]
    for wrong in ("12", b"12", [1.0], [None]):
        with pytest.raises(InvalidRequestError, match="token ids"):
            as_token_ids(wrong)
