"""Submissions get their own tokens, end alone, and leave nothing in the engine."""

from __future__ import annotations

import pytest

from pace_nb.engine.completion import Completion, Submission
from pace_nb.engine.submissions import Submissions
from pace_nb.errors import InvalidRequestError


def make(scripted, name, prompts, **params):
    """A submission of scripted requests; they have no text."""
    params = {"ignore_eos": True, **params}
    return Submission(
        name,
        None,
        [
            Completion(i, scripted.request(f"{name}-{i}", prompt, **params), None)
            for i, prompt in enumerate(prompts)
        ],
    )


def tokens(submission):
    return [one.token_ids for one in submission.output().outputs]


def test_each_gets_what_it_gets_alone(scripted):
    setup = scripted.setup()
    submissions = Submissions(setup.engine)
    both = make(scripted, "a", [[1, 2], [3]]), make(scripted, "b", [[4] * 20])
    for one in both:
        submissions.begin(one)
    assert len(submissions) == 3
    assert submissions.step() == list(both)  # each once, though two of its requests moved
    while submissions:
        submissions.step()
    assert all(one.finished for one in both)
    expected = []
    for prompt in ([1, 2], [3], [4] * 20):
        request = scripted.request("x", prompt, ignore_eos=True)
        scripted.setup().run(request)
        expected.append(request.generated_token_ids)
    assert tokens(both[0]) + tokens(both[1]) == expected
    setup.expect_idle()


def test_what_is_withdrawn_says_nothing_and_what_is_aborted_ends(scripted):
    setup = scripted.setup()
    submissions = Submissions(setup.engine)
    withdrawn, aborted, kept = (make(scripted, name, [[1, 2]]) for name in "abc")
    for one in (withdrawn, aborted, kept):
        submissions.begin(one)
    submissions.step()
    submissions.withdraw(withdrawn)
    submissions.withdraw(withdrawn)
    submissions.abort(aborted)
    assert not withdrawn.finished
    assert aborted.output().outputs[0].finish_reason == "abort"
    assert len(tokens(aborted)[0]) == 1
    assert submissions.step() == [kept]
    submissions.clear()
    setup.expect_idle()


def test_one_that_never_began_can_be_aborted(scripted):
    submissions = Submissions(scripted.setup().engine)
    never = make(scripted, "a", [[1]])
    submissions.abort(never)
    assert never.output().outputs[0].finish_reason == "abort"


def test_all_requests_of_a_submission_begin_or_none(scripted):
    setup = scripted.setup()
    submissions = Submissions(setup.engine)
    with pytest.raises(InvalidRequestError, match="token id is 99"):
        submissions.begin(make(scripted, "a", [[1], [99]]))
    assert not submissions
    setup.expect_idle()


def test_after_a_failure_everything_is_given_back(scripted):
    setup = scripted.setup()
    submissions = Submissions(setup.engine)
    both = make(scripted, "a", [[1], [2]]), make(scripted, "b", [[3]])
    for one in both:
        submissions.begin(one)
    submissions.step()
    assert submissions.fail("it\nbroke") == list(both)
    assert [one.stop_reason for one in both[0].output().outputs] == ["it broke"] * 2
    assert all(one.finished for one in both) and not submissions
    setup.expect_idle()
