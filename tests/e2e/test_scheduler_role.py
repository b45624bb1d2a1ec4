"""The scheduler role's bookkeeping, with a service that only writes down what it is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.requests import BLOCK_SIZE, Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flexkv.blocks import Blocks


class NotingService:
    """Everything of the first ``num_resident`` blocks can be loaded."""

    def __init__(self, num_resident: int) -> None:
        self.alive = True
        self.num_resident = num_resident
        self.pins: list[Any] = []
        self.loads: list[tuple[str, int, list[int], int]] = []
        self.stores: list[tuple[str, int, list[int]]] = []
        self.touched: list[int] = []
        self.discarded: list[str] = []
        self.counted: list[tuple[int, int]] = []
        self.storing: set[str] = set()

    def lease(self, blocks: Blocks) -> Any:
        num_blocks = min(self.num_resident, len(blocks))
        if not num_blocks:
            return None
        self.pins.append(SimpleNamespace(num_blocks=num_blocks))
        return self.pins[-1]

    def release(self, pin: Any) -> None:
        self.pins.remove(pin)

    def touch(self, blocks: Blocks) -> None:
        self.touched.append(len(blocks))

    def count_request(self, num_requested: int, num_hit: int) -> None:
        self.counted.append((num_requested, num_hit))

    def load(
        self, name: str, blocks: Blocks, ids: list[int], first: int, step: int, pin: Any
    ) -> int:
        if pin is not None:
            self.pins.remove(pin)
        assert len(ids) == len(blocks) - first
        self.loads.append((name, step, ids, first))
        return len(self.loads)

    def store(self, name: str, blocks: Blocks, ids: Sequence[int], _: int = 0) -> bool:
        assert len(blocks) == len(ids)
        self.stores.append((name, len(blocks), list(ids)))
        return True

    def discard(self, name: str) -> None:
        self.discarded.append(name)

    def finish(self, name: str) -> bool:
        return name in self.storing


class Stage:
    def __init__(self, num_resident: int = 0) -> None:
        from flexkv.integration.vllm.scheduler import SchedulerRole  # noqa: PLC0415  # needs vLLM

        self.service = NotingService(num_resident)
        self.role = SchedulerRole(self.service, BLOCK_SIZE, offers_loads=True)  # type: ignore[arg-type]  # a stand-in
        self.block_ids: dict[str, list[int]] = {}

    def step(self, *scheduled: Request, preempted: Sequence[str] = ()) -> Any:
        names = [request.request_id for request in scheduled]
        state = SimpleNamespace(get_block_ids=lambda name: (self.block_ids[name],))
        return self.role.build_connector_meta(
            SimpleNamespace(
                num_scheduled_tokens=dict.fromkeys(names, 1),
                preempted_req_ids=set(preempted),
                kv_connector_block_state=state,
            )
        )

    def allocate(self, request: Request, ids: list[int], num_external: int) -> None:
        self.block_ids[request.request_id] = ids
        blocks = SimpleNamespace(get_block_ids=lambda: (ids,))
        self.role.update_state_after_alloc(request, blocks, num_external)


@pytest.fixture
def request_of_21() -> Request:
    return Request(list(range(21)))


def test_what_was_not_allocated_is_released_with_the_step(request_of_21: Request) -> None:
    stage = Stage(num_resident=3)
    assert stage.role.get_num_new_matched_tokens(request_of_21, 4) == (8, True)
    assert len(stage.service.pins) == 1
    metadata = stage.step()
    assert stage.service.pins == []
    assert metadata.loads == []


def test_a_request_that_asks_again_and_again_holds_one_pin_and_counts_once(
    request_of_21: Request,
) -> None:
    stage = Stage(num_resident=3)
    for _ in range(5):
        stage.role.get_num_new_matched_tokens(request_of_21, 0)
    assert len(stage.service.pins) == 1
    assert stage.service.counted == [(5, 3)]


def test_one_token_is_always_left_to_compute() -> None:
    stage = Stage(num_resident=99)
    assert stage.role.get_num_new_matched_tokens(Request(list(range(20))), 0) == (16, True)


def test_exactly_what_vllm_took_is_loaded_and_promised(request_of_21: Request) -> None:
    stage = Stage(num_resident=4)
    assert stage.role.get_num_new_matched_tokens(request_of_21, 4) == (12, True)
    stage.allocate(request_of_21, [7, 8, 9, 10, 11, 12], 6)  # less than offered, within a block
    metadata = stage.step()
    assert stage.service.loads == [("a", metadata.step, [8, 9], 1)]
    assert [(job.request_id, job.block_ids) for job in metadata.loads] == [("a", [8, 9])]
    assert stage.step().loads == []
    assert stage.service.pins == []


def test_a_load_that_vllm_takes_up_in_a_later_step_is_started_all_the_same(
    request_of_21: Request,
) -> None:
    stage = Stage(num_resident=4)
    stage.role.get_num_new_matched_tokens(request_of_21, 0)
    stage.step()
    stage.allocate(request_of_21, [7, 8, 9, 10, 11, 12], 16)
    assert [job.block_ids for job in stage.step().loads] == [[7, 8, 9, 10]]


def test_a_request_whose_load_failed_is_offered_none_before_it_has_run(
    request_of_21: Request,
) -> None:
    stage = Stage(num_resident=4)
    stage.role.get_num_new_matched_tokens(request_of_21, 0)
    stage.allocate(request_of_21, [7, 8, 9, 10, 11, 12], 16)
    stage.step()
    stage.role.update_connector_output(SimpleNamespace(finished_recving={"a"}))
    assert stage.role.get_num_new_matched_tokens(request_of_21, 0) == (0, False)
    stage.step(request_of_21)
    assert stage.role.get_num_new_matched_tokens(request_of_21, 0) == (16, True)


def test_a_scheduled_request_touches_its_chain_once(request_of_21: Request) -> None:
    stage = Stage()
    stage.block_ids["a"] = list(range(1, 7))
    stage.role.get_num_new_matched_tokens(request_of_21, 0)
    for _ in range(3):
        stage.step(request_of_21)
    assert stage.service.touched == [5]


def test_the_null_block_and_what_follows_it_are_never_stored(request_of_21: Request) -> None:
    stage = Stage()
    stage.block_ids["a"] = [3, 4, 0, 5, 6, 7]
    stage.role.get_num_new_matched_tokens(request_of_21, 0)
    stage.step(request_of_21)
    request_of_21.num_computed_tokens = 21
    stage.step(request_of_21)
    assert stage.service.stores == [("a", 2, [3, 4])]


def test_a_request_that_ends_before_it_ran_is_not_stored(request_of_21: Request) -> None:
    stage = Stage()
    stage.role.get_num_new_matched_tokens(request_of_21, 0)
    request_of_21.num_computed_tokens = 16
    assert not stage.role.request_finished(request_of_21, [1, 2, 3, 4])
    assert stage.service.stores == []


def test_a_request_that_ends_while_it_is_stored_is_named_to_the_workers(
    request_of_21: Request,
) -> None:
    stage = Stage()
    stage.service.storing.add("a")
    stage.role.get_num_new_matched_tokens(request_of_21, 0)
    stage.block_ids["a"] = list(range(1, 7))
    stage.step(request_of_21)
    request_of_21.num_computed_tokens = 21
    assert stage.role.request_finished(request_of_21, list(range(1, 7)))
    assert stage.service.stores == [("a", 5, [1, 2, 3, 4, 5])]
    assert stage.step().finishing == ["a"]
    assert stage.step().finishing == []


def test_what_a_preempted_request_was_storing_is_discarded_in_the_same_step(
    request_of_21: Request,
) -> None:
    stage = Stage()
    stage.role.get_num_new_matched_tokens(request_of_21, 0)
    stage.step(preempted=["a"])
    assert stage.service.discarded == ["a"]


def test_a_dead_engine_is_told_to_the_workers(request_of_21: Request) -> None:
    stage = Stage()
    assert stage.step().alive
    stage.service.alive = False
    assert not stage.step(request_of_21).alive
