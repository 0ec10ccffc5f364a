"""What a service says of itself while its engines come, stall and go."""

from __future__ import annotations

import asyncio

import pytest

import pace_nb
from pace_nb.errors import ApiError, ConfigError
from pace_nb.server.engine_client import EngineOptions, State
from pace_nb.server.service import Service
from pace_nb.server.settings import Settings

OPTIONS = EngineOptions(model=pace_nb.__path__[0] + "/demo", options={"seed": 5})
FACTS = {"max_model_len": 99, "default_params": {"top_k": 3}, "num_kv_tokens": 10}


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setattr(
        "pace_nb.server.service.assign_cpus", lambda num: [[index] for index in range(num)]
    )
    return Service(Settings(data_parallel_size=2), OPTIONS, 4)


def test_each_engine_has_cpus_and_a_seed_of_its_own(service):
    options = [engine._options for engine in service.router.engines]
    assert [(one.cpus, one.options["seed"]) for one in options] == [([0], 5), ([1], 6)]
    (alone,) = Service(Settings(), OPTIONS, 4).router.engines
    assert alone._options.cpus is None


def test_more_engines_than_cores_are_refused():
    with pytest.raises(ConfigError, match="data_parallel_size is 5000"):
        Service(Settings(data_parallel_size=5000), OPTIONS, 4)


def test_its_state_in_words(service):
    first, second = service.router.engines
    assert (service.status, service.ready) == ("Loading model", False)
    assert service.max_model_len is None and service.default_params == {}
    first.facts, first.state = FACTS, State.READY
    assert (service.status, service.ready) == ("ok", True)
    assert service.max_model_len == 99 and service.default_params == {"top_k": 3}
    first.state = State.DOWN
    assert (service.status, service.ready) == ("Engine down", False)
    second.state = State.STALLED
    assert (service.status, service.ready) == ("Engine stalled", False)
    first.state = State.READY
    service.draining = True
    assert (service.status, service.ready) == ("Shutting down", False)


def test_it_has_failed_when_no_engine_can_come_back(service):
    first, second = service.router.engines
    first.state, second.state = State.FAILED, State.DOWN
    service._engine_changed()
    assert not service.failed.is_set()
    second.state = State.FAILED
    service._engine_changed()
    assert service.failed.is_set() and service.fatal is None
    second.fatal = "no such file"
    assert service.fatal == "no such file"


def test_everything_under_way_can_be_ended(service):
    async def main():
        mailboxes = [service.open_mailbox(1) for _ in range(3)]
        service.close_mailbox(mailboxes[0])
        service.close_mailbox(mailboxes[0])
        assert service.num_requests == 2
        service.fail_all("it is late")
        assert mailboxes[0].error is None
        for mailbox in mailboxes[1:]:
            with pytest.raises(ApiError, match="it is late") as caught:
                await mailbox.get(1)
            assert caught.value.status == 503

    asyncio.run(main())
