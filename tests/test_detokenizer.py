"""Ids back to text as they come: no character is cut, nothing is taken back, nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from pace_nb.detokenizer import HOLD_BACK, Detokenizer, library_errors
from pace_nb.errors import InvalidRequestError, ModelFormatError
from pace_nb.tokenizer import IncrementalDecoder, Tokenizer

TEXT = "Once upon a time, a naïve café ☕ by the sea. 日本語 and 😀 and 👩‍👩‍👧! Ünïcödé"


def byte_level() -> Backend:
    """As GPT-2, Llama 3 and Qwen: pieces written in an alphabet of bytes."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [TEXT] * 3,
        trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<s>", "</s>", "<|im end|>"],
            show_progress=False,
        ),
    )
    return backend


def byte_fallback() -> Backend:
    """As Llama 2 and Mistral: SentencePiece pieces, and bytes for what they cannot write."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "h", "e", "l", "o", "é", "▁h", "he", "ll", "▁▁"]
    backend = Backend(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("▁", "h"), ("h", "e"), ("l", "l"), ("▁", "▁")],
            unk_token=pieces[0],
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def word_piece() -> Backend:
    pieces = ["[UNK]", "[CLS]", "the", "dog", "##s", ".", "don", "'", "t", "##t", ","]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.WordPiece(vocab, unk_token=pieces[0]))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[CLS]"])
    return backend


def metaspace() -> Backend:
    """As T5: Unigram, with a decoder that treats the first piece in its own way."""
    pieces = ["<unk>", "▁", "▁the", "▁dog", "s", "a", "▁▁", "<s>"]
    backend = Backend(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<s>"])
    return backend


def no_decoder() -> Backend:
    pieces = ["a", "bc", "<s>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.WordLevel(vocab, unk_token=pieces[0]))
    backend.add_special_tokens(["<s>"])
    return backend


def byte_fallback_in_a_window() -> Backend:
    """A decoder that fits no rule of ours (a regular expression), yet makes U+FFFD."""
    backend = byte_fallback()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace("zzz", "zzz"),
        ]
    )
    return backend


BUILDERS = [byte_level, byte_fallback, word_piece, metaspace, no_decoder]
TOKENIZERS = {build.__name__: Tokenizer(build()) for build in BUILDERS}
BACKENDS = {build.__name__: build() for build in BUILDERS}
WINDOWED = Tokenizer(byte_fallback_in_a_window())
some_ids = st.lists(st.integers(0, 310), max_size=14)


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    """One text per id, and what the flush gives."""
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
    return [*(decoder.push([i]) for i in ids), decoder.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(ids=some_ids, skip=st.booleans())
def test_the_parts_are_the_whole(name: str, ids: list[int], skip: bool) -> None:
    """R50: for any ids the texts add up to the full decode; U+FFFD only where that has it."""
    parts = stream(TOKENIZERS[name], ids, skip)
    whole = TOKENIZERS[name].decode(ids, skip)
    assert "".join(parts) == whole
    assert "\ufffd" not in "".join(parts) or "\ufffd" in whole


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(ids=some_ids, skip=st.booleans())
def test_the_whole_is_what_the_library_decodes(name: str, ids: list[int], skip: bool) -> None:
    """To the letter; but where a run of byte pieces holds one wrong byte, the library gives up the
    whole run, and a text that has been shown cannot be taken back."""
    theirs = BACKENDS[name].decode(ids, skip_special_tokens=skip)
    if name != "byte_fallback" or "\ufffd" not in theirs:
        assert TOKENIZERS[name].decode(ids, skip) == theirs


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@settings(deadline=None)
@given(text=st.text(max_size=20), cut=st.integers(0, 60))
@example(text="é" * 10, cut=1)
@example(text="  hello", cut=1)
def test_any_text_comes_back_whole_wherever_the_prompt_ends(name: str, text: str, cut: int) -> None:
    """In context: prompt and texts add up, though the prompt may end inside a character."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    prompt, generated = ids[:cut], ids[cut:]
    decoder = IncrementalDecoder(tokenizer, prompt)
    parts = [*(decoder.push([i]) for i in generated), decoder.flush()]
    shown_before = tokenizer.decode(prompt)
    if not whole.startswith(shown_before):  # it ends inside a character: U+FFFD so far
        shown_before = shown_before.rstrip("\ufffd")
    if generated:
        assert shown_before + "".join(parts) == whole
    if "\ufffd" not in whole:
        assert "\ufffd" not in "".join(parts)


def test_characters_are_shown_when_complete() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = tokenizer.encode("☕😀", add_special_tokens=False)
    assert len(ids) == 8  # the metaspace, then 3 and 4 bytes
    assert stream(tokenizer, ids) == ["", "", "", "☕", "", "", "", "😀", ""]


def test_an_incomplete_character_is_shown_at_the_end_only() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("x😀", add_special_tokens=False)
    parts = stream(tokenizer, ids[:-1])
    assert parts[0] == "x"
    assert set(parts[1:-1]) <= {""}
    assert parts[-1] == "\ufffd"


def test_wrong_bytes_do_not_hold_the_text_back() -> None:
    """R52: they can become no character, so they are shown at once, one U+FFFD each."""
    parts = stream(TOKENIZERS["byte_fallback"], [3 + 0xBF] * 20)
    assert parts == ["\ufffd"] * 20 + [""]


def test_a_window_waits_for_a_character_but_not_for_ever() -> None:
    byte = 3
    good = [byte + b for b in "☕".encode()]
    assert stream(WINDOWED, [*good, byte + 0x41]) == ["", "", "☕", "A", ""]
    parts = stream(WINDOWED, [byte + 0xBF] * 20)
    assert parts[HOLD_BACK - 1] == "\ufffd" * HOLD_BACK
    assert "".join(parts) == "\ufffd" * 20
    assert max(map(len, parts)) <= HOLD_BACK


@pytest.mark.parametrize("held", [1, 2])
def test_a_prompt_that_ends_inside_a_character(held: int) -> None:
    """R51: the first text is generated text: the character, or what came instead of it."""
    cup = [3 + b for b in "☕".encode()]
    letter = 3 + ord("A")
    tokenizer = TOKENIZERS["byte_fallback"]
    prompt = [*tokenizer.encode("hello", add_special_tokens=False), *cup[:held]]
    for completed in (tokenizer, WINDOWED):
        decoder = IncrementalDecoder(completed, prompt)
        assert "".join(decoder.push([i]) for i in cup[held:]) == "☕"
    decoder = IncrementalDecoder(tokenizer, prompt)
    assert decoder.push([letter]) == "A"  # the U+FFFD before it is the prompt's
    decoder = IncrementalDecoder(tokenizer, prompt)
    assert decoder.push([]) + decoder.flush() == ""


def test_the_first_space_is_dropped_at_the_beginning_of_a_text_only() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    hello = tokenizer.encode("hello", add_special_tokens=False)
    beginning_of_text = 1
    for prompt, expected in (([], "hello"), ([beginning_of_text], "hello"), (hello, " hello")):
        decoder = IncrementalDecoder(tokenizer, prompt)
        assert decoder.push(hello) + decoder.flush() == expected


def test_special_tokens_are_shown_when_asked() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a<|im end|>b", add_special_tokens=False)
    assert stream(tokenizer, ids) == ["a", "", "b", ""]
    assert stream(tokenizer, ids, skip=False) == ["a", "<|im end|>", "b", ""]


def test_a_special_token_inside_a_character_does_not_break_it() -> None:
    cup = [3 + b for b in "☕".encode()]
    assert "".join(stream(TOKENIZERS["byte_fallback"], [cup[0], 1, *cup[1:]])) == "☕"


def test_ids_without_a_piece_add_nothing() -> None:
    """An embedding is often padded beyond the tokenizer's last id; such an id can be sampled."""
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.decode([5000]) == ""
        assert stream(tokenizer, [5000]) == ["", ""]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("wrong", [-1, 2**40, "a", None, 1.5, [1], {}])
def test_what_is_no_id_is_refused(name: str, wrong: object) -> None:
    with pytest.raises(InvalidRequestError):
        TOKENIZERS[name].decode([wrong])  # type: ignore[list-item]


def test_bytes_of_tokens_add_up_to_the_text() -> None:
    """R56: what logprobs show for each token."""
    for name in ("byte_level", "byte_fallback"):
        tokenizer = TOKENIZERS[name]
        ids = tokenizer.encode(TEXT, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().lstrip(" ") == TEXT
    assert TOKENIZERS["byte_fallback"].token_text(3 + 0xE2) == "\ufffd"
    assert TOKENIZERS["word_piece"].token_bytes(3) == b"dog"


def test_which_decoders_are_bytes() -> None:
    """The rule is read from tokenizer.json; whatever it does not cover goes through a window."""
    backend = byte_fallback()
    for steps, covered in (
        ([decoders.ByteLevel()], True),
        ([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()], True),
        ([decoders.Fuse(), decoders.Strip(" ", 1, 0)], True),
        ([decoders.Fuse(), decoders.Strip(" ", 0, 1)], False),  # the end is not known yet
        ([decoders.Strip(" ", 1, 0)], False),  # of every piece
        ([decoders.ByteFallback(), decoders.Replace("a", "b")], False),
        ([decoders.WordPiece()], False),
    ):
        backend.decoder = decoders.Sequence(steps)
        kind = type(Detokenizer(backend, ()).stream((), True)).__name__
        assert kind == ("ByteStream" if covered else "Window"), steps


class PanicException(BaseException):
    """As pyo3's: no Exception."""


def test_whatever_the_library_raises_is_ours() -> None:
    with pytest.raises(ModelFormatError, match=r"^file: index out of bounds: the len$"):
        with library_errors("file"):
            raise PanicException("index out of bounds:\n the len")
    with pytest.raises(ModelFormatError, match=r"^file: no$"), library_errors("file"):
        raise ValueError("no")
    with pytest.raises(KeyboardInterrupt), library_errors("file"):
        raise KeyboardInterrupt
