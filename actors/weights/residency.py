"""Which models' weights are in the arena, and the switch that brings one in: a transaction that leaves the old state or the new one.

Reserve a range (evicting by value, moving what stays where that is cheaper), load the image into it, verify, commit. A switch returns when
the first layer can run; the others are waited for one by one. On any error, then or later, the range is given back, an active model that
had to be evicted is loaded again, and the error is raised: the worker still serves the model it had.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace

from torch import Tensor

from polymux.actors.arena import Arena, Span
from polymux.actors.weights.image import ImageManifest
from polymux.actors.weights.load import Fetch, ImageSource, Load
from polymux.actors.weights.loader import Loader
from polymux.disagg.eviction import EvictionPlan, Popularity, cost_s, plan_room, value
from polymux.disagg.views import ArenaView, CachedView, ResidentView
from polymux.transport.errors import OutOfMemory, PolymuxError
from polymux.transport.image_maps import ImageMaps
from polymux.transport.messages import ModelSpec
from polymux.transport.units import ModelName

log = logging.getLogger("polymux.residency")

_SMOOTHING = 0.3  # weight of a new measurement of the copy's speed
FIRST_GROUPS = 2  # of an image: what comes before the layers, and the first of them


@dataclass(slots=True)
class Resident:
    """One model's weights in the arena, or on their way there while `load` is set."""

    spec: ModelSpec
    span: Span
    weights: Tensor  # uint8 [nbytes], a view of the arena
    load: Load | None
    is_prefetched: bool  # loaded ahead, and not used since
    used_s: float
    known_manifest: ImageManifest | None = None

    @property
    def manifest(self) -> ImageManifest:
        if self.known_manifest is None:
            assert self.load is not None
            self.known_manifest = self.load.manifest
        return self.known_manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """What one change of the active model took, up to where its first layer can run."""

    source: ModelName | None
    target: ModelName
    seconds: float
    nbytes: int  # copied for it, a prefetch included; 0 when the target was resident
    evicted: tuple[ModelName, ...]
    bytes_per_s: float = 0.0  # of the copies so far; 0 when there were none
    first_layer_s: float = 0.0  # from the load's beginning until its first layer was there; 0 when the target was resident
    waited_s: float = 0.0  # of `seconds`, for bytes
    was_prefetched: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A load that ended well."""

    model: ModelName
    nbytes: int
    began_s: float
    ended_s: float
    copy_s: float  # in copies, all threads together
    waited_s: float  # by the engine thread, in the switch and layer by layer: what the load cost where nothing hid it
    was_prefetched: bool


@dataclass(slots=True)
class Residency:
    """The resident models of one arena, and the active one. Not thread-safe: the engine thread owns it."""

    arena: Arena
    source: ImageSource
    clock: Callable[[], float] = time.monotonic
    on_leave: Callable[[ModelName], None] = lambda _: None  # the weights are no longer where they were
    on_loaded: Callable[[Loaded], None] = lambda _: None
    make_loader: Callable[[Fetch, Callable[[], float], ImageMaps], Loader] = Loader
    residents: dict[ModelName, Resident] = field(default_factory=dict)
    popularity: dict[ModelName, Popularity] = field(default_factory=dict)
    active: ModelName | None = None
    bytes_per_s: float = 5e9  # of the last copies, smoothed; starts from a guess at host memory
    loader: Loader = field(init=False)
    _former: ModelSpec | None = None  # what is served again when the active model's load fails
    _waited_s: dict[ModelName, float] = field(default_factory=dict)  # on loads under way

    def __post_init__(self) -> None:
        maps = ImageMaps(self.arena.device.keep_images_s, self.arena.device.forget_image)
        self.loader = self.make_loader(lambda model: self.source.fetch(model), self.clock, maps)

    # -- the switch ---------------------------------------------------------------------------------------------------

    def switch(self, spec: ModelSpec, *, wanted: Collection[ModelName] = ()) -> Switch:
        """Make `spec`'s model active. Models in `wanted` have work waiting and are evicted last.

        Raises OutOfMemory when it cannot fit even alone, CheckpointError when its image is corrupt, and whatever the source raises;
        in each case the model that was active still is. So it is when the rest of the load fails: see `await_layer`.
        """
        began_s = self.clock()
        self.settle()
        former = self._active_spec()
        evicted: list[ModelName] = []
        try:
            resident = self.residents.get(spec.model) or self._begin(spec, self._plan_switch(spec, wanted), evicted, is_urgent=True)
            load = resident.load
            waited_s = self._wait(resident, FIRST_GROUPS)
        except BaseException:
            self._restore(former, spec.model)
            raise
        self.active, self._former = spec.model, former if resident.load is not None else None
        self._note_kept()
        now_s = self.clock()
        self.popularity[spec.model] = self.popularity.get(spec.model, Popularity()).touched(now_s)
        was_prefetched, resident.is_prefetched, resident.used_s = resident.is_prefetched, False, now_s
        is_new = load is not None or was_prefetched
        return Switch(
            source=former.model if former is not None else None,
            target=spec.model,
            seconds=now_s - began_s,
            nbytes=spec.weight_bytes if is_new else 0,
            evicted=tuple(evicted),
            bytes_per_s=load.bytes_per_s if load is not None else self.bytes_per_s * was_prefetched,
            first_layer_s=(load.first_layer_s or 0.0) if load is not None else 0.0,
            waited_s=waited_s,
            was_prefetched=was_prefetched,
        )

    def await_layer(self, layer: int) -> float:
        """Return once this layer of the active model is in place; one past the last waits for all. The seconds that it took.

        Raises what the load met; the model that was active before is active again then.
        """
        assert self.active is not None
        resident = self.residents[self.active]
        if resident.load is None:
            return 0.0
        try:
            num_groups = layer + FIRST_GROUPS
            is_last = num_groups >= len(resident.manifest.groups)
            return self._wait(resident, None if is_last and not resident.load.is_async else num_groups)
        except BaseException:
            self._restore(self._former, resident.spec.model)
            raise

    def prefetch(self, spec: ModelSpec, *, wanted: Collection[ModelName] = ()) -> bool:
        """Begin to load `spec`'s model behind the active one, whose successor it is. Blocks for no byte.

        False, and nothing done, when it is resident or on its way, or when the room would cost more than the load.
        """
        self.settle()
        if spec.model in self.residents:
            return False
        view = self._view(wanted, may_evict_busy=False, is_pinned=spec.is_pinned)
        plan = plan_room(view, spec.weight_bytes, move_bytes_per_s=self.bytes_per_s)
        if plan is None or cost_s(view, plan, self.bytes_per_s) >= spec.weight_bytes / self.bytes_per_s:
            return False
        self._begin(spec, plan, [], is_urgent=False)
        return True

    # -- the books ----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Take note of loads that have ended. One that failed, and that nobody waits for, leaves no trace but a log line."""
        for resident in [r for r in self.residents.values() if r.load is not None]:
            load = resident.load
            assert load is not None
            try:
                is_there = load.is_everywhere
            except PolymuxError as reason:
                load.error = load.error or reason
            if load.error is not None and resident.spec.model != self.active:
                log.warning("prefetch.failed model=%s error=%s", resident.spec.model, load.error)
                self.evict(resident.spec.model)
            elif load.error is None and is_there:
                self._settle(resident, load)

    def evict(self, model: ModelName) -> None:
        """Give back a resident's range, its load cancelled. Its image stays in the host store."""
        resident = self.residents.pop(model)
        if resident.load is not None:
            resident.load.cancel()
        self._waited_s.pop(model, None)
        self.on_leave(model)
        self.arena.free_weights(resident.span)
        if self.active == model:
            self.active = None
        self._note_kept()

    def vacate(self, offset: int) -> None:
        """Clear everything from `offset` on, which is past the reserve: idle models leave, the active one moves down."""
        active = self.residents.get(self.active) if self.active is not None else None
        for resident in [r for r in self.residents.values() if r.span.end > offset and r is not active]:
            self.evict(resident.spec.model)
        if active is None or active.span.end <= offset:
            return
        plan = self._plan_below(active, offset)
        assert plan is not None, "weights that could not make way were said to be kept"
        for victim in plan.victims:
            self.evict(victim)
        for move in plan.moves:
            self._move(self.residents[move.model], move.offset)
        self._move(active, plan.offset)

    def borrowed(self) -> tuple[CachedView, ...]:
        """The models that hold room past the reserve, with what a byte of each is worth."""
        views = self._view((), may_evict_busy=False).residents
        past = self.arena.weight_reserve_bytes
        return tuple(CachedView(holder=r.model, nbytes=r.nbytes, value=value(r)) for r in views if r.offset + r.nbytes > past)

    def _plan_below(self, resident: Resident, end: int) -> EvictionPlan | None:
        """How a resident would come to lie below `end`, if anything but pinned models may leave for it."""
        view = self._view((), may_evict_busy=True)
        others = tuple(r for r in view.residents if r.model != resident.spec.model and r.offset + r.nbytes <= end)
        return plan_room(replace(view, end=end, residents=others), resident.span.nbytes, move_bytes_per_s=self.bytes_per_s)

    def _note_kept(self) -> None:
        """The active model keeps what it borrowed while it is being loaded, and where pinned ones leave it no other place."""
        active = self.residents.get(self.active) if self.active is not None else None
        reserve = self.arena.weight_reserve_bytes
        makes_way = active is None or active.span.end <= reserve or (active.load is None and self._plan_below(active, reserve) is not None)
        self.arena.kept_end = 0 if makes_way or active is None else active.span.end

    def check(self) -> None:
        """Assert that the arena's ranges are the residents', and that there is an active one if the books say so."""
        self.arena.check()
        spans = sorted((r.span for r in self.residents.values()), key=lambda span: span.offset)
        assert list(self.arena.weight_spans) == spans, "the arena holds other ranges than the residents"
        assert self.active is None or self.active in self.residents
        assert self._waited_s.keys() <= self.residents.keys()

    def close(self) -> None:
        """Cancel what is under way, and let go of everything."""
        self.loader.close()
        for model in list(self.residents):
            self.evict(model)

    def _wait(self, resident: Resident, num_groups: int | None) -> float:
        if resident.load is None:
            return 0.0
        self.loader.hurry(resident.load)
        waited_s = resident.load.wait(num_groups)
        resident.load.order(num_groups)
        self._waited_s[resident.spec.model] = self._waited_s.get(resident.spec.model, 0.0) + waited_s
        if resident.load.is_everywhere:
            self._settle(resident, resident.load)
        return waited_s

    def _settle(self, resident: Resident, load: Load) -> None:
        assert load.ended_s is not None
        model = resident.spec.model
        resident.known_manifest, resident.load = load.manifest, None
        self.bytes_per_s += _SMOOTHING * (load.bytes_per_s - self.bytes_per_s)
        if model == self.active:
            self._former = None
        self._note_kept()
        loaded = Loaded(
            model=model,
            nbytes=resident.span.nbytes,
            began_s=load.began_s,
            ended_s=load.ended_s,
            copy_s=load.copy_s,
            waited_s=self._waited_s.pop(model, 0.0),
            was_prefetched=load.was_prefetch,
        )
        self.on_loaded(loaded)

    def _begin(self, spec: ModelSpec, plan: EvictionPlan, evicted: list[ModelName], *, is_urgent: bool) -> Resident:
        """Make the planned room, and start the load into it."""
        for victim in plan.victims:
            evicted.append(victim)
            self.evict(victim)
        for move in plan.moves:
            self._move(self.residents[move.model], move.offset)
        span = self.arena.place_weights(spec.weight_bytes, plan.offset)
        weights = self.arena.memory[span.offset : span.end]
        load = self.loader.begin(spec, self.arena.target(span), is_urgent=is_urgent)
        resident = Resident(spec, span, weights, load, is_prefetched=not is_urgent, used_s=self.clock())
        self.residents[spec.model] = resident
        self._note_kept()  # what is new may be pinned, and leave the active one no other place
        return resident

    def _move(self, resident: Resident, offset: int) -> None:
        assert resident.load is None, "weights that are being written do not move"
        resident.span = self.arena.move_weights(resident.span, offset)
        resident.weights = self.arena.memory[resident.span.offset : resident.span.end]
        self._note_kept()
        self.on_leave(resident.spec.model)

    def _restore(self, former: ModelSpec | None, failed: ModelName) -> None:
        """Undo a switch to `failed`; a failure in here leaves no active model, and the next switch loads one."""
        resident = self.residents.get(failed)
        if resident is not None and resident.load is not None:
            self.evict(failed)
        self._former = None
        if former is None or former.model == failed:
            return
        with suppress(PolymuxError):
            if former.model not in self.residents:
                self._begin(former, self._plan_switch(former, ()), [], is_urgent=True)
            try:
                self._wait(self.residents[former.model], None)
            except PolymuxError:
                self.evict(former.model)
                raise
            self.active = former.model
            self._note_kept()

    # -- views for the policy -----------------------------------------------------------------------------------------

    def _active_spec(self) -> ModelSpec | None:
        return self.residents[self.active].spec if self.active is not None else None

    def _plan_switch(self, spec: ModelSpec, wanted: Collection[ModelName]) -> EvictionPlan:
        """The active model, and what is being loaded, leave only when nothing else makes room."""
        for may_evict_busy in (False, True):
            view = self._view(wanted, may_evict_busy=may_evict_busy, is_pinned=spec.is_pinned)
            plan = plan_room(view, spec.weight_bytes, move_bytes_per_s=self.bytes_per_s)
            if plan is not None:
                return plan
        raise OutOfMemory(
            f"a weight image of {spec.weight_bytes} bytes does not fit beside pinned models into the {self.arena.weight_reserve_bytes} "
            "kept for weights; raise the pool's arena_bytes"
        )

    def _view(self, wanted: Collection[ModelName], *, may_evict_busy: bool, is_pinned: bool = False) -> ArenaView:
        """What a new model may be placed among. A pinned one stays inside the reserve, where nothing can ask it to move."""
        now_s = self.clock()
        former = self._former.model if self._former is not None else None
        turns = {r.spec.model: turn for turn, r in enumerate(sorted(self.residents.values(), key=lambda r: r.used_s), start=1)}
        return ArenaView(
            start=0,
            end=self.arena.weight_reserve_bytes if is_pinned else max(self.arena.border, self.arena.weight_reserve_bytes),
            residents=tuple(
                ResidentView(
                    model=model,
                    offset=resident.span.offset,
                    nbytes=resident.span.nbytes,
                    reload_s=resident.span.nbytes / self.bytes_per_s,
                    reuse_chance=self.popularity.get(model, Popularity()).chance(now_s),
                    has_work=model in wanted,
                    is_locked=resident.spec.is_pinned
                    or (not may_evict_busy and (model in (self.active, former) or resident.load is not None)),
                    is_fixed=resident.load is not None or resident.spec.is_pinned,
                    turns_ahead=turns[model],
                )
                for model, resident in self.residents.items()
            ),
        )
