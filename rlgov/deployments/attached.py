"""A vLLM that somebody else started, as a deployment: no gateway, its TP degree fixed.

Telemetry comes from its metrics page (:mod:`rlgov.deployments.scraped` says what that can tell). The clock is
ours to set; the batch cap only where the rlgov plugin is loaded there and its token is known.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Protocol

import requests

from rlgov.deployments.live import LiveDeployment
from rlgov.deployments.live_limits import live_limits
from rlgov.deployments.live_parts import LiveSettings
from rlgov.deployments.scraped import ScrapedWindows
from rlgov.engine.samples import EngineInfo, StackInterval, StackLimits, StackState, Traffic
from rlgov.engine.telemetry.scraper import Scraper
from rlgov.errors import DeploymentError, EngineError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rlgov.clock import Clock
    from rlgov.deployments.live_open import GpuGroup
    from rlgov.deployments.live_parts import Workload
    from rlgov.engine.telemetry.scraper import Reading
    from rlgov.hardware.meter import MeterReading
    from rlgov.journal import Request
    from rlgov.records import Configuration, Limits, Window

_ENGINE: Final = "attached"
_SCRAPES_PER_INTERVAL: Final = 2  # with one, some windows would find nothing new


class PageSource(Protocol):
    """Gives the last reading of a metrics page; :class:`rlgov.engine.telemetry.scraper.Scraper` is one."""

    def latest(self) -> Reading:
        """What is known now; does not wait."""
        ...

    def close(self) -> None:
        """Stop reading."""
        ...


class CapControl(Protocol):
    """Sets the batch cap of an engine."""

    @property
    def largest(self) -> int:
        """The cap that stands for none."""
        ...

    @property
    def holder(self) -> str:
        """Who holds the cap: ``plugin`` or ``none``."""
        ...

    def set(self, batch_cap: int, lease_s: float | None) -> int:
        """Ask for a cap; the one in force. Raises EngineError when that fails."""
        ...


class NoCap:
    """Nobody can set the cap of that engine."""

    holder = "none"

    def __init__(self, largest: int) -> None:
        self.largest = largest

    def set(self, batch_cap: int, lease_s: float | None) -> int:  # noqa: ARG002  # the protocol's signature
        """Leave it where it is."""
        return self.largest


class PluginCap:
    """The cap of an engine that has the rlgov plugin.

    Args:
        url: The engine.
        token: What it was given as RLGOV_PLUGIN_TOKEN.
        timeout_s: Longest wait for an answer.

    Raises:
        EngineError: The plugin is not there, knows another token, or cannot set the cap.
    """

    holder = "plugin"

    def __init__(self, url: str, token: str, timeout_s: float) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"}
        self._timeout_s = timeout_s
        state = self._call("GET", "/rlgov/v1/state", None)
        plugin, sample = state["plugin"], state["sample"]
        if not plugin["cap_supported"] or not sample or not sample["max_num_seqs"]:
            raise EngineError(f"{self._url}: the plugin cannot set the batch cap: {plugin['note']}")
        self.largest = int(sample["max_num_seqs"])

    def set(self, batch_cap: int, lease_s: float | None) -> int:
        """Ask for a cap; the one in force."""
        asked = None if batch_cap >= self.largest else batch_cap
        answer = self._call(
            "POST", "/rlgov/v1/cap", {"batch_cap": asked, "lease_s": lease_s if asked else None}
        )
        return int(answer["batch_cap"])

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        where = f"{self._url}{path}"
        try:
            with requests.Session() as session:
                session.trust_env = False  # no proxies and no credentials but ours
                answer = session.request(
                    method, where, json=body, headers=self._headers, timeout=self._timeout_s,
                    allow_redirects=False,
                )  # fmt: skip
            content = answer.json()
        except requests.exceptions.RequestException as error:
            raise EngineError(
                f"{where} cannot be reached ({error}); check that the engine runs and has the rlgov plugin"
            ) from error
        if answer.status_code != HTTPStatus.OK or not isinstance(content, dict):
            raise EngineError(
                f"{where} answered with status {answer.status_code}: {content}; start vLLM with "
                "RLGOV_PLUGIN=1 and the RLGOV_PLUGIN_TOKEN given here"
            )
        return content


class AttachedStack:
    """One foreign engine behind the interface of a serving stack.

    Args:
        url: The engine.
        tp_degree: Which it was started with; nothing tells.
        pages: Its metrics page.
        cap: Its batch cap.
        clock: Dates what is read.
    """

    def __init__(self, url: str, tp_degree: int, pages: PageSource, cap: CapControl, clock: Clock) -> None:
        self.scraped: Reading = pages.latest()
        """The page as of the last interval."""
        self._url = url
        self._tp_degree = tp_degree
        self._pages = pages
        self._cap = cap
        self._clock = clock
        self._batch_cap = cap.largest

    def limits(self) -> StackLimits:
        """One TP degree, and caps up to the engine's own."""
        return StackLimits(
            model="", batch_caps=(self._cap.largest,), tp_degrees=(self._tp_degree,), gpu_uuids=(),
            allotted_gpus=self._tp_degree, max_num_batched_tokens=0, kv_capacity_tokens=(0,), switch_s=(0.0,),
            strategy="attached",
        )  # fmt: skip

    def state(self) -> StackState:
        """The engine now; ready once its page was read."""
        scraped = self._pages.latest()
        conditions = {}
        if scraped.blind:
            conditions["EngineUnread"] = scraped.failure or "its metrics page was not read yet"
        if scraped.stalled:
            conditions["EngineStalled"] = "it has work and makes no progress; look at its log"
        engine = EngineInfo(_ENGINE, self._tp_degree, (), "active", self._url, None, None, self._cap.holder)
        return StackState(
            now_s=self._clock.monotonic_s(), tp_degree=self._tp_degree, batch_cap=self._batch_cap,
            switching=False, ready=not scraped.blind, held=0, tp_refused={}, engines=(engine,),
            conditions=conditions,
        )  # fmt: skip

    def interval(self, after: int) -> StackInterval:  # noqa: ARG002  # no requests are known
        """The state; what the page says is in :attr:`scraped`."""
        self.scraped = self._pages.latest()
        state = self.state()
        return StackInterval(state, Traffic(state.now_s, 0, (), ()), ())

    def configure(
        self,
        *,
        batch_cap: int | None = None,
        tp_degree: int | None = None,  # noqa: ARG002  # the engine's is fixed
        lease_s: float | None = None,
    ) -> StackState:
        """Set the cap, where somebody can. Raises EngineError when that fails."""
        if batch_cap is not None:
            self._batch_cap = self._cap.set(batch_cap, lease_s)
        return self.state()

    def close(self) -> None:
        """Stop reading the page."""
        self._pages.close()


class AttachedWindows:
    """Windows of a foreign engine; no requests are known, so none can be recorded."""

    open_requests = 0
    unrecorded = 0

    def __init__(self, stack: AttachedStack) -> None:
        self._stack = stack
        self._scraped = ScrapedWindows()

    @property
    def blind_because(self) -> str:
        """Why the last window was blind; empty when it was not."""
        return self._scraped.blind_because

    def start(self, interval: StackInterval, reading: MeterReading, limits: Limits) -> None:
        """Time 0 of an episode is now."""
        self._scraped.start(self._stack.scraped, interval.traffic.now_s, reading, limits)

    def next(
        self,
        interval: StackInterval,
        reading: MeterReading,
        configuration: Configuration,
        *,
        handed_s: float | None = None,  # noqa: ARG002  # the age is the page's
    ) -> Window:
        """The window up to now."""
        return self._scraped.next(self._stack.scraped, interval.traffic.now_s, reading, configuration)

    def unread(
        self, at_s: float, reading: MeterReading, configuration: Configuration, *, why: str = ""
    ) -> Window:
        """The blind window up to ``at_s``."""
        unknown = replace(self._stack.scraped, blind=True, failure=why)
        return self._scraped.next(unknown, at_s, reading, configuration)

    def take(self, until_s: float) -> Iterable[Request]:  # noqa: ARG002  # the protocol's signature
        """Nothing."""
        return ()


def attach_live(  # noqa: PLR0913  # the parts of a deployment, each replaceable by a stand-in
    url: str,
    profile: Limits,
    clock: Clock,
    *,
    tp_degree: int,
    gpus: GpuGroup,
    token: str | None = None,
    workload: Workload | None = None,
    pages: PageSource | None = None,
    settings: LiveSettings | None = None,
    acting: bool = True,
) -> LiveDeployment:
    """Govern a running vLLM. Nothing is moved before the first ``start``.

    Args:
        url: Its address, such as ``http://127.0.0.1:8000``.
        profile: What the policy was made for, with the SLO and the interval that shall hold.
        clock: Paces the intervals.
        tp_degree: Which vLLM was started with; the other degrees of the profile are refused.
        gpus: Meter and clocks of its GPUs; taken over.
        token: Of the plugin, for the batch cap; None: the cap stays vLLM's own.
        workload: Traffic to play in every episode.
        pages: Reads the metrics page; by default a scraper that asks twice an interval.
        settings: How it is held, None for the defaults.
        acting: Whether it moves anything, to begin with.

    Raises:
        DeploymentError: The profile does not offer that TP degree, or the plugin does not answer.
    """
    with ExitStack() as undo:
        undo.callback(gpus.close)
        if tp_degree not in profile.tp_degrees:
            msg = (
                f"the profile has TP degrees {profile.tp_degrees}, not {tp_degree}; choose the profile of "
                "this engine"
            )
            raise DeploymentError(msg)
        cap: CapControl = NoCap(profile.batch_caps[0])
        if token is not None:
            cap = PluginCap(url, token, timeout_s=profile.interval_s)
        if pages is None:
            scraper = Scraper(
                f"{url.rstrip('/')}/metrics",
                clock,
                interval_s=profile.interval_s / _SCRAPES_PER_INTERVAL,
                stale_after_s=3 * profile.interval_s,
            )
            undo.callback(scraper.close)
            scraper.start()
            pages = scraper
        stack = AttachedStack(url, tp_degree, pages, cap, clock)
        deployment = LiveDeployment(
            stack,
            live_limits(profile, stack.limits(), gpus.clocks.supported_mhz),
            AttachedWindows(stack),
            gpus.meter,
            gpus.clocks,
            clock,
            workload=workload,
            settings=LiveSettings() if settings is None else settings,
            acting=acting,
            closers=(gpus.close,),
        )
        undo.pop_all()
    return deployment
