"""Keeps one engine serving: the first start, taking over after a crash, restarts, switches, liveness."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from rlgov.engine.fleet import Engine, Phase, headline
from rlgov.engine.identity import boot_id
from rlgov.engine.liveness import Progress
from rlgov.engine.serving import EXPECTED_FAILURES
from rlgov.engine.switch.executor import carry_out
from rlgov.engine.switch.feasibility import Refusals
from rlgov.engine.switch.hands import SwitchHands
from rlgov.engine.switch.journal import STATE_SCHEMA, StackRecord, SwitchRecord
from rlgov.engine.switch.machine import Outcome, Role, Strategy, Switch, plan
from rlgov.engine.takeover import take_over
from rlgov.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from rlgov.clock import Clock
    from rlgov.engine.fleet import Fleet
    from rlgov.engine.serving import Serving
    from rlgov.engine.stack_metrics import Tally
    from rlgov.engine.stack_settings import Offer, StackSettings
    from rlgov.engine.switch.journal import RunFolder

LOG = logging.getLogger(__name__)

ENGINE_DOWN = "EngineDown"
ENGINE_HUNG = "EngineHung"
STATE_UNWRITTEN = "StateUnwritten"


class Supervisor:
    """Decides what the engines of a stack do next, and does it in tasks of its own.

    Args:
        settings: Of the stack.
        offered: Degrees and strategy.
        fleet: The engines.
        serving: Where new requests go.
        folder: Where the state is written.
        tally: Counts what happened, for metrics.
        clock: For timing.
    """

    def __init__(
        self,
        settings: StackSettings,
        offered: Offer,
        *,
        fleet: Fleet,
        serving: Serving,
        folder: RunFolder,
        tally: Tally,
        clock: Clock,
    ) -> None:
        self._timing = settings.timing
        self._settings = settings
        self._offer = offered
        self._fleet = fleet
        self._serving = serving
        self._folder = folder
        self._tally = tally
        self._clock = clock
        self._refusals = Refusals(self._timing.refuse_first_s, self._timing.refuse_longest_s)
        self._progress = Progress(clock.monotonic_s(), clock.monotonic_s())
        self._failures = 0  # starts in a row that failed, or engines that died soon after
        self._record: SwitchRecord | None = None
        self._moving: asyncio.Task[None] | None = None  # a switch or a restart
        self._looking: list[asyncio.Task[None]] = []
        self.strategy = offered.strategy
        self.degree = offered.start_degree
        self.switch_s: dict[int, float] = {}
        self.last_switch: dict[str, float | str] = {}
        self.conditions: dict[str, str] = {}

    @property
    def switching(self) -> bool:
        """Whether a switch is in progress."""
        return self._record is not None

    def refused(self) -> dict[int, str]:
        """The degrees that cannot be had now, with the reason."""
        return {**self._offer.infeasible, **self._refusals.active(self._clock.monotonic_s())}

    # The state file.

    def write_down(self) -> None:
        """Replace the state file. A folder that cannot be written is a condition, not the end of serving."""
        try:
            self._save()
        except OSError as error:
            LOG.exception("the state cannot be written")
            self.conditions[STATE_UNWRITTEN] = (
                f"{self._folder.path}: {error.strerror}; after a crash engines might not be found: make room"
            )
        else:
            self.conditions.pop(STATE_UNWRITTEN, None)

    def _save(self) -> None:
        routed = self._serving.routed
        self._folder.save(
            StackRecord(
                schema_version=STATE_SCHEMA,
                boot_id=boot_id(),
                model=self._settings.model,
                tp_degree=self.degree,
                routed=routed.engine_id if routed is not None else None,
                engines=self._fleet.records(),
                switch=self._record,
                switch_s=dict(self.switch_s),
                kv_capacity_tokens=dict(self._fleet.kv_capacity_tokens),
            )
        )

    # Beginning and end.

    async def begin(self, record: StackRecord | None) -> None:
        """Serve: with an engine that an earlier run left, else with a new one.

        Raises:
            EngineError: The first engine does not start.
        """
        engine = None
        if record is not None:
            self.switch_s = {d: s for d, s in record.switch_s.items() if d in self._offer.tp_degrees}
            self._fleet.kv_capacity_tokens = dict(record.kv_capacity_tokens)
            engine = await take_over(record, self._fleet, self._timing)
        if engine is None:
            if self.strategy is Strategy.SLEEP:
                await self._fill_pool()
            engine = await self._start(self._offer.start_degree)
        await self._serve(engine)
        self._looking = [
            asyncio.ensure_future(self._every(self._timing.watch_s, self._watch)),
            asyncio.ensure_future(self._every(self._timing.health_s, self._look_for_hung)),
        ]

    async def end(self) -> None:
        """Stop deciding: a switch in progress stays where it is."""
        tasks = [*self._looking, *([self._moving] if self._moving is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _start(self, degree: int) -> Engine:
        """A new engine that is fit to serve. Raises EngineError, with nothing left behind."""
        engine = await self._fleet.launch(degree)
        try:
            await self._fleet.ready(engine)
            await self._fleet.warm_up(engine)
        except BaseException:
            await self._fleet.stop(engine, grace_s=0.0)
            raise
        return engine

    async def _serve(self, engine: Engine) -> None:
        self.degree = engine.spec.tp_degree
        await self._serving.apply_cap(engine)
        now_s = self._clock.monotonic_s()
        self._progress = Progress(now_s, now_s)
        self._serving.route(engine)
        LOG.info("engine %s (TP %d) takes requests", engine.engine_id, self.degree)

    async def _fill_pool(self) -> None:
        """Start an engine of every other degree and put it to sleep; where that is not possible, say so."""
        for degree in self._offer.tp_degrees:
            if degree == self._offer.start_degree:
                continue
            try:
                engine = await self._start(degree)
            except EngineError as error:
                self._refusals.refuse(degree, headline(str(error)), self._clock.monotonic_s())
                continue
            if engine.plugin is None or not engine.plugin.sleep_supported:
                await self._give_up_sleep(engine, "vLLM offers no sleep mode here")
                return
            try:
                await self._fleet.sleep(engine)
            except EXPECTED_FAILURES as error:
                await self._give_up_sleep(engine, str(error))
                return

    async def _give_up_sleep(self, engine: Engine, reason: str) -> None:
        if self._settings.strategy is Strategy.SLEEP:
            await self._fleet.stop(engine, grace_s=0.0)
            raise EngineError(f"cannot switch by sleep: {reason}; use --switch auto")
        LOG.warning("engines cannot be kept asleep (%s): a switch of the TP degree restarts them", reason)
        for pooled in [*self._fleet.engines.values()]:
            await self._fleet.stop(pooled, grace_s=0.0)
        self.strategy = Strategy.RESTART
        self._fleet.pooled = False

    # Switches.

    def want(self, degree: int) -> None:
        """Begin a switch to a degree, unless one is in progress, the degree is refused, or nothing serves."""
        old = self._serving.routed
        if self._busy() or old is None or degree == old.spec.tp_degree or degree in self.refused():
            return
        asleep = self._fleet.find_asleep(degree)
        strategy, room = self._how(old, degree, asleep)
        if strategy is None:
            self._refusals.refuse(degree, "too few GPUs are free for it", self._clock.monotonic_s())
            return
        switch = plan(strategy, asleep=asleep is not None, room_for_both=room)
        hands = SwitchHands(
            self._fleet,
            self._serving,
            old=old,
            degrees=(old.spec.tp_degree, degree),
            new=asleep,
            note=lambda state: self._note_switch(hands, old.spec.tp_degree, degree, state),
        )
        self._record = SwitchRecord(
            old.engine_id, hands.engine_id(Role.NEW), old.spec.tp_degree, degree, switch
        )
        self._move(self._change(switch, hands, old.spec.tp_degree, degree))

    def _how(self, old: Engine, degree: int, asleep: Engine | None) -> tuple[Strategy | None, bool]:
        """By which strategy, and whether both engines may be awake; no strategy if none is possible now."""
        fits = self._fleet.gpus_for(degree) is not None
        if self.strategy is Strategy.SIDE_BY_SIDE:
            return (Strategy.SIDE_BY_SIDE if fits else None), False
        if self.strategy is Strategy.RESTART:
            # Chosen, not asked for: where both fit for once, nothing has to be held.
            chosen = self._settings.strategy is None and bool(self._settings.gpu_uuids) and fits
            return (Strategy.SIDE_BY_SIDE if chosen else Strategy.RESTART), False
        place = asleep.spec.gpu_uuids if asleep is not None else self._fleet.place(degree)
        return Strategy.SLEEP, bool(place) and not set(place) & set(old.spec.gpu_uuids)

    def _note_switch(self, hands: SwitchHands, old_degree: int, new_degree: int, state: Switch) -> None:
        names = hands.engine_id(Role.OLD), hands.engine_id(Role.NEW)
        self._record = SwitchRecord(*names, old_degree, new_degree, state)
        self._save()

    async def _change(self, switch: Switch, hands: SwitchHands, old_degree: int, new_degree: int) -> None:
        began_s, held_s = self._clock.monotonic_s(), self._serving.held_s
        try:
            ended = await carry_out(switch, hands, poll_s=self._timing.poll_s)
        except OSError as error:
            self._refusals.refuse(new_degree, f"the switch cannot be written down: {error}", began_s)
            self._record = None
            return
        now_s = self._clock.monotonic_s()
        held_s = self._serving.held_s - held_s
        outcome = ended.outcome or Outcome.BROKEN
        routed = self._serving.routed
        if routed is not None:
            self.degree = routed.spec.tp_degree
        if outcome is Outcome.DONE:
            self.switch_s[new_degree] = max(0.0, self._serving.since_s - began_s)
            self._refusals.forgive(new_degree)
        else:
            self._refusals.refuse(new_degree, headline(ended.reason), now_s)
        self.last_switch = {
            "from": float(old_degree),
            "to": float(new_degree),
            "strategy": str(ended.strategy),
            "outcome": str(outcome),
            "total_s": now_s - began_s,
            "held_s": held_s,
            "reason": headline(ended.reason),
            "notes": "; ".join(map(headline, ended.notes)),
        }
        self._tally.switched(str(ended.strategy), str(outcome), now_s - began_s, held_s)
        LOG.info("switch from TP %d to TP %d: %s", old_degree, new_degree, self.last_switch)
        self._progress = Progress(now_s, now_s)
        self._record = None
        self.write_down()

    def _move(self, work: Coroutine[None, None, None]) -> None:
        self._moving = asyncio.ensure_future(work)
        self._moving.add_done_callback(self._moved)

    def _moved(self, task: asyncio.Task[None]) -> None:
        self._record = None
        if not task.cancelled() and (error := task.exception()) is not None:
            LOG.error("a move of the stack failed unexpectedly", exc_info=error)

    # Restarts and liveness.

    def _busy(self) -> bool:
        """Whether a switch or a restart is in progress."""
        return self._moving is not None and not self._moving.done()

    async def _every(self, period_s: float, look: Callable[[], Awaitable[None]]) -> None:
        """Look again and again; what goes wrong in one look does not end the next."""
        while True:
            await asyncio.sleep(period_s)
            try:
                await look()
            except Exception:
                LOG.exception("looking after the engines failed; the next look is in %g s", period_s)

    async def _watch(self) -> None:
        await self._serving.expire()
        if not self._busy():
            await self._look_for_dead()

    async def _look_for_dead(self) -> None:
        routed = self._serving.routed
        for engine in [*self._fleet.engines.values()]:
            reason = engine.obituary()
            if reason is None:
                continue
            LOG.error("%s", reason)
            engine.phase = Phase.FAILED
            self._serving.lost(engine)
            await self._fleet.stop(engine, grace_s=0.0)
            if engine is routed:
                self.conditions[ENGINE_DOWN] = reason
                self.conditions.pop(ENGINE_HUNG, None)
        if self._serving.routed is None:
            self._move(self._revive())

    async def _revive(self) -> None:
        """Start an engine of the same degree again, with growing pauses, until one serves."""
        for left in [*self._fleet.engines.values()]:
            if left.phase is not Phase.ASLEEP:
                await self._fleet.stop(left, grace_s=0.0)  # it would hold the GPUs the new one needs
        served_s = self._clock.monotonic_s() - self._serving.since_s
        self._failures = self._failures + 1 if served_s < self._timing.restart_longest_s else 0
        while True:
            if self._failures:
                pause_s = self._timing.restart_first_s * 2.0 ** min(self._failures - 1, 30)
                await asyncio.sleep(min(pause_s, self._timing.restart_longest_s))
            self._tally.restarts += 1
            try:
                asleep = self._fleet.find_asleep(self.degree)
                engine = await (self._start(self.degree) if asleep is None else self._awaken(asleep))
            except EXPECTED_FAILURES as error:
                self._failures += 1
                LOG.error("restart %d failed: %s", self._failures, error)  # noqa: TRY400  # the error says it all
                self.conditions[ENGINE_DOWN] = (
                    f"{self._failures} starts in a row failed, the last: {headline(str(error))}"
                )
                continue
            await self._serve(engine)
            self.conditions.pop(ENGINE_DOWN, None)
            return

    async def _awaken(self, engine: Engine) -> Engine:
        try:
            await self._fleet.wake(engine)
            await self._fleet.warm_up(engine)
        except BaseException:
            await self._fleet.stop(engine, grace_s=0.0)
            raise
        return engine

    async def _look_for_hung(self) -> None:
        engine = self._serving.routed
        if engine is None or self._busy():
            return
        if not engine.hung:
            self.conditions.pop(ENGINE_HUNG, None)  # of an engine that has been replaced since
        timing = self._timing
        sample = await self._fleet.read(engine)
        now_s = self._clock.monotonic_s()
        dispatched = self._serving.in_flight(engine)
        before = self._progress
        self._progress = before.seen(None if isinstance(sample, str) else sample, dispatched, now_s)
        if self._progress.work > before.work:
            self._well(engine)
        if not self._progress.needs_probe(now_s, timing.hung_after_s, timing.idle_probe_s, hung=engine.hung):
            return
        answered = await engine.running.probe(timing.probe_timeout_s)
        if self._serving.routed is not engine or self._busy() or not engine.alive:
            return  # it died, or is being replaced
        self._progress = self._progress.probed(self._clock.monotonic_s(), answered=answered)
        if answered:
            self._well(engine)
            return
        self._hung(engine)

    def _well(self, engine: Engine) -> None:
        if engine.hung:
            LOG.warning("engine %s gets on with its work again", engine.engine_id)
            engine.note = engine.running.note
        engine.hung = False
        self.conditions.pop(ENGINE_HUNG, None)

    def _hung(self, engine: Engine) -> None:
        engine.hung = True
        engine.note = "hangs: no progress, and no answer to a probe"
        self.conditions[ENGINE_HUNG] = (
            f"engine {engine.engine_id} makes no progress and gives no token within "
            f"{self._timing.probe_timeout_s:g} s, whatever its health check says; look at "
            f"{engine.spec.log_path}, and end its process to have it restarted, or run with --restart-hung"
        )
        LOG.error("%s", self.conditions[ENGINE_HUNG])
        if self._settings.restart_hung:
            self.conditions[ENGINE_DOWN] = f"engine {engine.engine_id} hung and was ended: a new one starts"
            self.conditions.pop(ENGINE_HUNG)
            self._move(self._replace(engine))

    async def _replace(self, engine: Engine) -> None:
        self._serving.lost(engine)
        await self._fleet.stop(engine, grace_s=0.0)
        await self._revive()
