"""Which GPUs the workers of one model set get: close together, and both roles in every neighbourhood.

Prefill hands KV to decode, so the links between their GPUs matter. First workers are gathered into gangs, each inside one room: GPUs that
something fast joins, such as a host or a rack of NVLink. Then, where it is known which GPUs a gang has, neighbours are put next to each
other and the roles are dealt along that line, so that any stretch of it has its share of both.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from polymux.transport.messages import Role

MAX_SHARING = 8  # workers of one GPU: each has a context of its own, of some hundred MiB
EPSILON = 1e-6  # of a GPU: thirds are written 0.3333


class Link(enum.IntEnum):
    """What joins two workers' GPUs, slowest first."""

    NETWORK = 0  # they are in different hosts
    SYSTEM = 1  # in different sockets of one
    SOCKET = 2  # different PCIe host bridges of one socket
    PCIE = 3  # nothing but PCIe switches between them
    NVLINK = 4  # direct or by NVSwitch, of several hosts too
    SAME = 5  # one GPU, shared


# Bytes a second of KV over each, roughly: to tell a near worker from a far one, not to predict a transfer.
BYTES_PER_S = {
    Link.NETWORK: 5e9,
    Link.SYSTEM: 10e9,
    Link.SOCKET: 15e9,
    Link.PCIE: 20e9,
    Link.NVLINK: 150e9,
    Link.SAME: 1e12,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """GPUs that one gang may have: those of each of its hosts. A worker never spans hosts."""

    name: str
    gpus: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gang:
    """Workers, by their place in the line that was asked for, and the room that is large enough for them."""

    room: str
    members: tuple[int, ...]
    fits_one_host: bool = True


@dataclass(slots=True)
class _Host:
    """What is left of its GPUs, each 1 when nobody has it."""

    free: list[float] = field(default_factory=list)

    def take(self, num_gpus: float) -> bool:
        """Whole GPUs, or a share of the one that has least room for it."""
        if num_gpus >= 1:
            whole = [i for i, free in enumerate(self.free) if free > 1 - EPSILON][: round(num_gpus)]
            if len(whole) < round(num_gpus):
                return False
            for i in whole:
                self.free[i] = 0.0
            return True
        roomy = [i for i, free in enumerate(self.free) if free > num_gpus - EPSILON]
        if not roomy:
            return False
        self.free[min(roomy, key=lambda i: (self.free[i], i))] -= num_gpus
        return True


def gangs(demands: Sequence[float], rooms: Sequence[Room]) -> tuple[Gang, ...] | None:
    """All workers in the smallest host or room that holds them; else in as few rooms as it takes, the largest first. None: they do not fit.

    `demands` are GPUs of each worker, whole numbers or shares below one, in the order in which neighbours should stand. Ties by name.
    """
    everybody = tuple(range(len(demands)))
    hosts = sorted((count, room.name) for room in rooms for count in room.gpus)
    for count, name in hosts:
        if len(_fill((count,), demands)) == len(demands):
            return (Gang(room=name, members=everybody),)
    for room in sorted(rooms, key=lambda room: (sum(room.gpus), room.name)):
        if len(_fill(room.gpus, demands)) == len(demands):
            return (Gang(room=room.name, members=everybody, fits_one_host=False),)
    found: list[Gang] = []
    rest = list(everybody)
    for room in sorted(rooms, key=lambda room: (-sum(room.gpus), room.name)):
        placed = _fill(room.gpus, [demands[i] for i in rest])
        if placed:
            members = tuple(rest[i] for i in placed)
            fits_one_host = _fits_one_host(room, [demands[i] for i in members])
            found.append(Gang(room=room.name, members=members, fits_one_host=fits_one_host))
            rest = [one for one in rest if one not in members]
    return None if rest else tuple(found)


def _fits_one_host(room: Room, demands: Sequence[float]) -> bool:
    return any(len(_fill((count,), demands)) == len(demands) for count in room.gpus)


def _fill(host_gpus: Sequence[int], demands: Sequence[float]) -> list[int]:
    """The demands, by their index, that these hosts take in order; one that they cannot take ends nothing for smaller ones after it."""
    hosts = [_Host([1.0] * count) for count in host_gpus]
    return [i for i, num_gpus in enumerate(demands) if any(host.take(num_gpus) for host in hosts)]


def deal(num_prefill: int, num_decode: int) -> tuple[Role, ...]:
    """Roles along a line: any stretch of s of the n places has s * num_prefill / n prefill workers, give or take less than one."""
    total = num_prefill + num_decode

    def dealt(count: int) -> int:
        return (2 * count * num_prefill + total) // (2 * total)

    return tuple(Role.PREFILL if dealt(i + 1) > dealt(i) else Role.DECODE for i in range(total))


def near_order(num_slots: int, link: Callable[[int, int], Link]) -> tuple[int, ...]:
    """All slots in a line in which those that faster links join stand together. `link` is symmetric. Ties by the lower index.

    Groups joined by the best links lie inside groups joined by the next best, and so on: each is a stretch of the line.
    """

    def line(members: list[int], level: int) -> list[int]:
        if len(members) < 2 or level > max(Link):
            return members
        return [slot for group in _joined(members, lambda a, b: link(a, b) >= level) for slot in line(group, level + 1)]

    return tuple(line(list(range(num_slots)), min(Link) + 1))


def stretches(sizes: Sequence[int], line: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Slots of each worker, as many as its size: neighbours in the line, in which larger workers come first. Ties: in order."""
    found: dict[int, tuple[int, ...]] = {}
    begin = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found[i] = tuple(line[begin : begin + sizes[i]])
        begin += sizes[i]
    return tuple(found[i] for i in range(len(sizes)))


def _joined(members: Sequence[int], are_joined: Callable[[int, int], bool]) -> list[list[int]]:
    """Connected groups, each in ascending order, by their lowest member."""
    groups: list[list[int]] = []
    for member in members:
        touching = [group for group in groups if any(are_joined(member, other) for other in group)]
        merged = sorted([member, *(other for group in touching for other in group)])
        groups = sorted([*(group for group in groups if group not in touching), merged])
    return groups


def gpu_share(num_workers: int, num_gpus: int) -> float | None:
    """GPUs of each worker where nobody said how many: one, or where there are more workers than GPUs an equal share of one.

    None when more than `MAX_SHARING` would have to share one, or there is none. Shares are rounded down to what Ray can count.
    """
    if num_workers <= num_gpus:
        return 1.0
    if num_workers > MAX_SHARING * num_gpus:
        return None
    return int(10_000 / -(-num_workers // num_gpus)) / 10_000
