"""`DraftLengths`: how many guesses each request gets, so that tokens come as fast as they can.

Knows what was measured: how often each request's guesses hold, and what a step and a draft cost by
the number of their rows. Does not know tokens, models or caches.

    gain    of a request's i-th guess: a^i tokens, where each guess holds with probability a
    cost    target: seconds(rows) = t0 + t1 rows; draft: d0 + d1 rows; both fitted to the last steps
    rate    (B + sum of gains) / (t0 + t1 (B + m) + d0 + d1 (B + m))    for m guesses in all

Guesses are handed out one by one, the most promising first, for as long as the rate rises. Where it
does not come out above B / (t0 + t1 B), which is the rate without guesses, nobody gets any: that is
so where many requests run, as a step is then bound by arithmetic and each row has its price.

What is never done is never measured. So after some steps without guesses, 4, then 8, at last always
PROBE_EVERY, they are made all the same, one for each request if no more are promising, and better
times are noticed: the first ones of a process, with caches cold, are no guide. And steps of one
number of rows do not tell what a row costs: after some of them a step goes without guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pace_nb.engine.request import Request

FIRST_PROBE = 4
PROBE_EVERY = 64
COST_DECAY = 0.95  # of a step's weight in the fit, per step after it: the last 20 count
LUCK_DECAY = 0.9  # of a verification's weight in a request's acceptance: the last 10 count
PRIOR_WEIGHT = 4.0  # guesses that the acceptance of all requests counts for in that of a new one
FIRST_ACCEPTANCE = 0.8  # before anything was verified: high, so that guessing is tried
TRIED = 32  # guesses in a step, of all requests, before it is known what they cost
SKIPPED = 2  # first measurements, in which kernels are compiled
SPREAD = 0.05  # of the mean: where numbers of rows deviate less, they do not tell what a row costs
OUTLIER = 2.0  # times what was to be expected: what is slower counts as this much


@dataclass
class LinearCost:
    """seconds(rows) = fixed + per_row * rows, fitted by least squares to the last observations.

    varied: their rows differ enough to tell `per_row`; while they do not, it stays what it was.
    """

    fixed: float = 0.0
    per_row: float = 0.0
    varied: bool = False
    _num: int = 0
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)  # 1, x, y, x x, x y

    def observe(self, rows: int, seconds: float) -> None:
        """It took so long."""
        self._num += 1
        if self._num <= SKIPPED:
            return
        weight, x, y, xx, xy = self._sums
        if weight > 0:
            expected = max(self.fixed + self.per_row * rows, y / weight)
            seconds = min(seconds, OUTLIER * expected)
        new = (1.0, rows, seconds, rows * rows, rows * seconds)
        self._sums = [COST_DECAY * old + one for old, one in zip(self._sums, new, strict=True)]
        weight, x, y, xx, xy = self._sums
        spread = weight * xx - x * x
        self.varied = spread > (SPREAD * x) ** 2
        slope = (weight * xy - x * y) / spread if self.varied else self.per_row
        # No row is free of cost below zero, and none costs more than all of it.
        self.per_row = min(max(slope, 0.0), y / max(x, 1e-9))
        self.fixed = (y - self.per_row * x) / weight

    @property
    def known(self) -> bool:
        """It was measured."""
        return self._num > SKIPPED


class _Luck:
    """How often guesses hold."""

    def __init__(self) -> None:
        self.held = self.tried = 0.0

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        self.held = LUCK_DECAY * self.held + num_accepted
        # After the first that failed the others were not tried.
        self.tried = LUCK_DECAY * self.tried + min(num_accepted + 1, num_drafted)


class DraftLengths:
    """Hands out guesses; told afterwards what they cost and which of them held."""

    def __init__(self) -> None:
        self.target, self.draft = LinearCost(), LinearCost()
        self._all = _Luck()
        self._each: dict[Request, _Luck] = {}
        self._rested = 0  # steps without guesses, since they were last made
        self._rest = FIRST_PROBE  # so many, and they are tried again

    def verified(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        """The first `num_accepted` of a request's guesses held."""
        self._each.setdefault(request, _Luck()).observe(num_drafted, num_accepted)
        self._all.observe(num_drafted, num_accepted)

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._each.pop(request, None)

    def acceptance(self, request: Request) -> float:
        """With what probability a guess for it holds, given that those before it did."""
        common = (self._all.held + FIRST_ACCEPTANCE) / (self._all.tried + 1)
        luck = self._each.get(request)
        if luck is None:
            return common
        return (luck.held + PRIOR_WEIGHT * common) / (luck.tried + PRIOR_WEIGHT)

    def choose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[int]:
        """How many guesses each gets, at most `limits[i]`."""
        if not self.target.known:
            return [min(limit, max(1, TRIED // len(limits))) for limit in limits]
        gains = []
        for index, (request, limit) in enumerate(zip(requests, limits, strict=True)):
            acceptance = gain = self.acceptance(request)
            for _ in range(limit):
                gains.append((gain, index))
                gain *= acceptance
        gains.sort(key=lambda pair: -pair[0])
        num, per_row = len(requests), self.target.per_row + self.draft.per_row
        plain = self.target.fixed + self.target.per_row * num
        seconds = plain + self.draft.fixed + self.draft.per_row * num
        tokens, chosen = float(num), [0] * num
        for gain, index in gains:
            if gain * seconds <= tokens * per_row:  # the rate would not rise
                break
            tokens, seconds = tokens + gain, seconds + per_row
            chosen[index] += 1
        if tokens * plain <= num * seconds:  # they do not pay
            self._rested += 1
            if self._rested < self._rest:
                return [0] * num
            self._rested, self._rest = 0, min(2 * self._rest, PROBE_EVERY)
            return chosen if any(chosen) else [min(limit, 1) for limit in limits]
        self._rested = 0
        if not self.target.varied:
            return [0] * num
        return chosen
