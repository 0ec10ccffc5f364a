"""When a request ends: ids, limits and stop strings, whatever the cut into tokens and steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pace_nb.engine.stopping import StopChecker, check_tokens, ending_token_ids
from pace_nb.sampling_params import SamplingParams

EOS = frozenset({2, 7})


class PieceDecoder:
    """Token i is `pieces[i]`; holds the last `lag` pieces back, as an incomplete character is."""

    def __init__(self, pieces: Sequence[str], lag: int = 0) -> None:
        self.pieces, self.lag, self.waiting = pieces, lag, list[str]()

    def push(self, token_ids: Sequence[int]) -> str:
        self.waiting += [self.pieces[i] for i in token_ids]
        ready = max(0, len(self.waiting) - self.lag)
        text = "".join(self.waiting[:ready])
        del self.waiting[:ready]
        return text

    def flush(self) -> str:
        text = "".join(self.waiting)
        self.waiting.clear()
        return text


def characters(text: str) -> PieceDecoder:
    return PieceDecoder(text)


def run(params: SamplingParams, pieces: Sequence[str], lag: int = 0) -> tuple[object, ...]:
    """Push the pieces one id at a time, then a `length` verdict; what came out of it all."""
    checker = StopChecker(params, PieceDecoder(pieces, lag))
    shown = ""
    for i in range(len(pieces)):
        verdict = "length" if i == len(pieces) - 1 else None
        result = checker.push([i], verdict)
        shown += result.text
        if result.finish_reason is not None:
            break
    assert shown == checker.text
    return shown, checker.num_tokens, result.finish_reason, result.stop_reason


# ---- ids ----


@pytest.mark.parametrize(
    ("new", "generated", "options", "limit", "expected"),
    [
        ([5], 0, {}, 16, (1, None, None)),
        ([2], 0, {}, 16, (1, "stop", None)),  # an end token
        ([5, 7, 9], 0, {}, 16, (2, "stop", None)),  # what follows it is dropped
        ([5, 9, 4], 0, {"stop_token_ids": [9]}, 16, (2, "stop", 9)),
        ([2], 0, {"stop_token_ids": [2]}, 16, (1, "stop", None)),  # the model's own comes first
        ([2], 0, {"ignore_eos": True}, 16, (1, None, None)),
        ([9], 0, {"ignore_eos": True, "stop_token_ids": [9]}, 16, (1, "stop", 9)),
        ([5], 15, {}, 16, (1, "length", None)),
        ([5, 5, 5], 14, {}, 16, (2, "length", None)),
        ([2], 15, {}, 16, (1, "stop", None)),  # stop wins at the last token
        ([5], 999, {}, None, (1, None, None)),
        ([2], 2, {"min_tokens": 3}, 16, (1, None, None)),  # the third token may not end it
        ([2], 3, {"min_tokens": 3}, 16, (1, "stop", None)),
        ([2, 2], 2, {"min_tokens": 3}, 16, (2, "stop", None)),
        ([9], 0, {"min_tokens": 1, "stop_token_ids": [9]}, 16, (1, None, None)),
        ([2], 0, {"min_tokens": 1}, 1, (1, "length", None)),  # but max_tokens always does
        ([], 3, {}, 16, (0, None, None)),
    ],
)
def test_ids_and_limits(new, generated, options, limit, expected) -> None:  # type: ignore[no-untyped-def]
    assert check_tokens(new, generated, SamplingParams(**options), EOS, limit) == expected


@given(
    ids=st.lists(st.integers(0, 9), max_size=30),
    cuts=st.lists(st.integers(0, 30)),
    limit=st.none() | st.integers(1, 30),
    min_tokens=st.integers(0, 10),
    ignore_eos=st.booleans(),
)
def test_ids_end_the_same_however_they_are_batched(ids, cuts, limit, min_tokens, ignore_eos):  # type: ignore[no-untyped-def]
    params = SamplingParams(
        max_tokens=None, min_tokens=min_tokens, ignore_eos=ignore_eos, stop_token_ids=[9]
    )

    def end(steps: list[list[int]]) -> tuple[int, object, object]:
        kept = 0
        for step in steps:
            stop = check_tokens(step, kept, params, EOS, limit)
            kept += stop.num_kept
            if stop.finish_reason is not None:
                return kept, stop.finish_reason, stop.stop_reason
        return kept, None, None

    bounds = sorted({0, len(ids), *(c for c in cuts if c <= len(ids))})
    steps = [ids[a:b] for a, b in itertools.pairwise(bounds)]
    assert end(steps) == end([[i] for i in ids])


def test_ids_to_mask_before_min_tokens() -> None:
    assert ending_token_ids(SamplingParams(stop_token_ids=[9]), EOS) == {2, 7, 9}
    assert ending_token_ids(SamplingParams(stop_token_ids=[9], ignore_eos=True), EOS) == {9}


# ---- stop strings ----


def test_text_before_the_stop_string_is_shown_and_nothing_else() -> None:
    assert run(SamplingParams(stop="END"), "one END two") == ("one ", 7, "stop", "END")


def test_stop_string_kept_when_asked() -> None:
    params = SamplingParams(stop="END", include_stop_str_in_output=True)
    assert run(params, ["one EN", "D two"]) == ("one END", 2, "stop", "END")


def test_a_possible_beginning_is_held_and_then_shown() -> None:
    checker = StopChecker(SamplingParams(stop=["END"]), characters("a ENE ENx"))
    shown = [checker.push([i]).text for i in range(9)]
    # "EN" could become "END"; "ENE" cannot, but its last "E" could.
    assert shown == ["a", " ", "", "", "EN", "E ", "", "", "ENx"]


def test_held_text_is_flushed_at_the_end() -> None:
    assert run(SamplingParams(stop="END"), "one EN") == ("one EN", 6, "length", None)


def test_stop_string_at_the_very_start() -> None:
    assert run(SamplingParams(stop="\n"), ["\n", "text"]) == ("", 1, "stop", "\n")


def test_stop_string_wins_over_max_tokens_at_the_same_token() -> None:
    assert run(SamplingParams(stop="cd"), ["ab", "cd"]) == ("ab", 2, "stop", "cd")


def test_stop_string_wins_over_an_end_token_of_the_same_step() -> None:
    checker = StopChecker(SamplingParams(stop="b"), PieceDecoder(["a", "b", "</s>"]))
    assert checker.push([0, 1, 2], "stop") == (2, "a", "stop", "b")


def test_the_stop_string_that_is_complete_first_wins() -> None:
    # A reader of single characters sees "bc" before "abcd": so does one who gets them at once.
    for pieces in ("xabcd", ["xabcd"], ["xab", "cd"]):
        shown, _, _, reason = run(SamplingParams(stop=["abcd", "bc"]), pieces)
        assert (shown, reason) == ("xa", "bc")


def test_of_two_complete_at_once_the_longer_wins() -> None:
    for stops in (["b", "ab"], ["ab", "b"]):
        shown, _, _, reason = run(SamplingParams(stop=stops), ["x", "a", "b"])
        assert (shown, reason) == ("x", "ab")


def test_text_the_decoder_held_back_is_searched_too() -> None:
    assert run(SamplingParams(stop="\ufffd"), ["a", "\ufffd"], lag=1) == ("a", 2, "stop", "\ufffd")


def test_an_end_token_is_not_decoded_unless_asked() -> None:
    for options, text in (({}, "a"), ({"include_stop_str_in_output": True}, "a</s>")):
        for stop in ((), ("zzz",)):
            params = SamplingParams(stop=stop, skip_special_tokens=False, **options)
            checker = StopChecker(params, PieceDecoder(["a", "</s>"]))
            assert checker.push([0, 1], "stop", None) == (2, text, "stop", None)
            assert checker.num_tokens == 2


def test_the_engines_stop_id_is_passed_on() -> None:
    checker = StopChecker(SamplingParams(), PieceDecoder(["a", "b"]))
    assert checker.push([0, 1], "stop", 9) == (2, "a", "stop", 9)


def test_abort_flushes_and_stays_abort() -> None:
    checker = StopChecker(SamplingParams(stop=["abc"]), PieceDecoder(["ab", "?"], lag=1))
    assert checker.push([0, 1]).text == ""
    assert checker.push([], "abort") == (0, "ab?", "abort", None)
    with pytest.raises(RuntimeError, match="has ended"):
        checker.push([0])


def test_nothing_is_pushed_after_a_stop_string() -> None:
    checker = StopChecker(SamplingParams(stop="a"), characters("ab"))
    assert checker.push([0]).finish_reason == "stop"
    with pytest.raises(RuntimeError, match="has ended"):
        checker.push([1])


def test_min_tokens_ignores_stop_strings_that_end_within_it() -> None:
    params = SamplingParams(stop="b", min_tokens=2)
    assert run(params, "abcb") == ("abc", 4, "stop", "b")


def test_a_stop_string_may_begin_within_min_tokens() -> None:
    assert run(SamplingParams(stop="ab", min_tokens=1), "abab") == ("", 2, "stop", "ab")
    assert run(SamplingParams(stop="ab", min_tokens=2), "abab") == ("ab", 4, "stop", "ab")


def test_without_text_there_are_only_ids() -> None:
    checker = StopChecker(SamplingParams(detokenize=False), PieceDecoder(["a"]))
    assert checker.push([0, 0], "length") == (2, "", "length", None)
    checker = StopChecker(SamplingParams(), None)
    assert checker.push([5]) == (1, "", None, None)
    with pytest.raises(ValueError, match="decoder"):
        StopChecker(SamplingParams(stop="x"), None)


def first_stop(text: str, stops: Sequence[str], floor: int) -> tuple[int, int, str] | None:
    """The definition: the first position at which any stop string is complete, after `floor`."""
    for end in range(floor + 1, len(text) + 1):
        ended = [s for s in stops if text[:end].endswith(s)]
        if ended:
            stop = max(ended, key=len)
            return end - len(stop), end, stop
    return None


@given(
    pieces=st.lists(st.text("ab<", max_size=4), min_size=1, max_size=12),
    stops=st.lists(st.text("ab<", min_size=1, max_size=5), max_size=4, unique=True),
    keep=st.booleans(),
    min_tokens=st.integers(0, 4),
    lag=st.integers(0, 3),
    cuts=st.lists(st.integers(0, 12)),
)
@example(["a", "aab"], ["aab"], False, 0, 0, [])
def test_any_cut_gives_what_the_definition_says(pieces, stops, keep, min_tokens, lag, cuts):  # type: ignore[no-untyped-def]
    """R53: over every split into tokens and steps, and however late the decoder gives the text."""
    params = SamplingParams(
        stop=stops, include_stop_str_in_output=keep, min_tokens=min_tokens, max_tokens=None
    )
    bounds = sorted({0, len(pieces), *(c for c in cuts if c <= len(pieces))})
    checker = StopChecker(params, PieceDecoder(pieces, lag))
    shown, kept = "", 0
    for start, end in itertools.pairwise(bounds):
        result = checker.push(range(start, end), "length" if end == len(pieces) else None)
        shown += result.text
        kept += result.num_kept
        if result.finish_reason is not None:
            break

    text = "".join(pieces)
    # Characters the decoder had given by the end of the first min_tokens tokens.
    floor = len("".join(pieces[: max(0, min_tokens - lag)]))
    if min_tokens >= len(pieces):
        floor = len(text)
    match = first_stop(text, stops, floor)
    if match is None:
        assert (shown, result.finish_reason, result.stop_reason) == (text, "length", None)
        assert kept == len(pieces)
    else:
        start, end, stop = match
        assert (shown, result.finish_reason, result.stop_reason) == (
            text[: end if keep else start],
            "stop",
            stop,
        )
        needed = next(n for n in range(len(pieces) + 1) if len("".join(pieces[:n])) >= end)
        assert kept == min(len(pieces), max(needed, 1) + lag)
