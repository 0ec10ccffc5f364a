"""A plugin of pytest that puts each fault of pace_nb.verify around its kernel in tests/kernels.

    python -m pytest -p tests.verify.plant TESTS

Every test that a Plant names runs once for that plant, with the faulty kernel in the namespace of
its module (lists that hold the kernel too), until a case of it fails; and its first case without a
fault. PACE_NB_PLANTED names a file for what came of it: {"gemm:lost-tail": ["passed", "failed"]}.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pace_nb.verify import PLANTS

NONE = ("none", "none")
seen: dict[str, list[str]] = {}


@pytest.fixture(autouse=True, params=[NONE, *PLANTS], ids=":".join)
def _planted(request, monkeypatch):
    if "failed" in seen.get(":".join(request.param), []):
        pytest.skip("this plant has been caught")
    if request.param == NONE:
        return
    plant, module = PLANTS[request.param], request.module
    real = getattr(module, plant.name)
    wrong = plant.fault(real)
    if plant.name == "apply":  # test_exp.py: apply(which, x)

        def wrong(which, x):
            return plant.fault(lambda y: real(which, y))(x)

    monkeypatch.setattr(module, plant.name, wrong)
    for name, value in vars(module).copy().items():
        if isinstance(value, list) and any(v is real for v in value):
            monkeypatch.setattr(module, name, [wrong if v is real else v for v in value])


def pytest_collection_modifyitems(items):
    kept, sound = [], set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        chosen = item.callspec.params["_planted"]
        if chosen == NONE and test not in sound:
            sound.add(test)
            kept.append(item)
        elif chosen != NONE and PLANTS[chosen].test == test:
            kept.append(item)
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.when == "call" or report.failed:
        plant = ":".join(item.callspec.params["_planted"])
        seen.setdefault(plant, []).append(report.outcome)
    return report


def pytest_sessionfinish():
    Path(os.environ["PACE_NB_PLANTED"]).write_text(json.dumps(seen))
