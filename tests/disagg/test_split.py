"""Who prefills and who decodes: the split follows the load, each role has a worker, and nothing swings."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymux.disagg.roles import BOTH, ArrivalRate, AutoSplit, SplitMemory
from polymux.disagg.views import RoleWorkerView, SplitView
from polymux.transport.errors import ConfigError
from polymux.transport.messages import Role
from polymux.transport.units import WorkerId

PREFILL, DECODE = frozenset({Role.PREFILL}), frozenset({Role.DECODE})


@dataclass
class Pool:
    """Workers that share each side's work evenly, looked at once a second."""

    roles: dict[str, frozenset[Role]]
    policy: AutoSplit = field(default_factory=AutoSplit)
    memory: SplitMemory = field(default_factory=SplitMemory)
    now_s: float = 0.0
    num_changes: int = 0

    @classmethod
    def of(cls, num_prefill: int, num_decode: int) -> Pool:
        return cls({f"w{i}": PREFILL if i < num_prefill else DECODE for i in range(num_prefill + num_decode)})

    @property
    def num_prefill(self) -> int:
        return sum(Role.PREFILL in roles for roles in self.roles.values())

    def look(self, prefill_rate: float, decode_load: float, backlog_s: float = 0.0) -> None:
        num_prefill, num_decode = (max(1, sum(role in one for one in self.roles.values())) for role in (Role.PREFILL, Role.DECODE))
        workers = tuple(
            RoleWorkerView(
                worker_id=WorkerId(name),
                roles=roles,
                prefill_s=backlog_s / num_prefill if Role.PREFILL in roles else 0.0,
                decode_load=decode_load / num_decode if Role.DECODE in roles else 0.0,
                num_seqs=0,
            )
            for name, roles in self.roles.items()
        )
        changes, self.memory = self.policy.assign(SplitView(now_s=self.now_s, workers=workers, prefill_rate=prefill_rate), self.memory)
        self.num_changes += len(changes)
        self.roles |= dict(changes)
        self.now_s += 1.0


def test_the_split_follows_long_prompts_then_long_answers_and_back() -> None:
    pool = Pool.of(2, 6)
    for prefill_rate, decode_load, expected in ((5.0, 1.5, 6), (0.6, 6.0, 1), (5.0, 1.5, 6)):
        for _ in range(40):
            pool.look(prefill_rate, decode_load)
        assert pool.num_prefill == expected
        before = pool.num_changes
        for _ in range(200):
            pool.look(prefill_rate, decode_load)
        assert pool.num_changes == before, "a load that stays moves nobody"


def test_one_worker_changes_at_a_time_and_only_after_the_load_has_lasted() -> None:
    pool = Pool.of(1, 7)
    seen = [pool.num_prefill]
    for _ in range(12):
        pool.look(6.0, 0.5)
        seen.append(pool.num_prefill)
    assert seen[:4] == [1, 1, 1, 1] and max(b - a for a, b in itertools.pairwise(seen)) == 1


def test_a_burst_that_is_over_before_the_hold_changes_nothing() -> None:
    pool = Pool.of(2, 2)
    for second in range(100):
        pool.look(*((1.9, 0.2) if second % 4 < 2 else (0.2, 1.9)))
    assert pool.num_changes == 0


def test_a_load_that_wobbles_around_the_balance_changes_little() -> None:
    pool = Pool.of(4, 4)
    for second in range(400):
        pool.look(3.0 + 0.3 * (second // 20 % 2), 3.3 - 0.3 * (second // 20 % 2))
    assert pool.num_changes == 0


def test_an_idle_pool_stays_as_it_is() -> None:
    pool = Pool.of(1, 7)
    for _ in range(50):
        pool.look(0.4, 0.001)
    assert pool.num_changes == 0


def test_a_backlog_of_prompts_brings_prefill_workers_though_no_more_arrive() -> None:
    pool = Pool.of(1, 3)
    for _ in range(5):
        pool.look(0.0, 0.5, backlog_s=30.0)
    assert pool.num_prefill > 1


def test_a_lone_worker_has_both_roles_and_a_second_takes_one_off_it() -> None:
    pool = Pool({"w0": DECODE})
    pool.look(0.0, 0.0)
    assert pool.roles == {"w0": BOTH}
    pool.roles["w1"] = DECODE
    pool.look(0.0, 0.0)
    assert sorted(pool.roles.values(), key=sorted) == [DECODE, PREFILL]


@given(
    roles=st.lists(st.sampled_from([PREFILL, DECODE, BOTH]), min_size=2, max_size=8),
    loads=st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), max_size=40),
)
def test_each_role_has_a_worker_whatever_comes(roles: list[frozenset[Role]], loads: list[tuple[float, float]]) -> None:
    pool = Pool({f"w{i}": one for i, one in enumerate(roles)})
    pool.look(0.0, 0.0)
    for load in loads:
        pool.look(*load)
        assert {role for one in pool.roles.values() for role in one} == set(Role)
        assert all(len(one) == 1 for one in pool.roles.values())


def test_the_arrival_rate_settles_on_what_arrives_and_forgets_it() -> None:
    rate = ArrivalRate()
    for tenth in range(1000):
        rate = rate.add(0.05, tenth / 10)
    assert rate.read(100.0) == pytest.approx(0.5, rel=0.05)
    assert rate.read(200.0) < 0.001


@pytest.mark.parametrize("name", ["hold_s", "min_pressure", "margin", "horizon_s"])
def test_settings_that_cannot_work_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        AutoSplit(**{name: 0.0})
