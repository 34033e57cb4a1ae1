"""vLLM's metrics page -> EngineSample, or a TelemetryError that says what is wrong with the page.

A page may come damaged: empty, of another program, an error page with status 200, or cut. A cut at the end
of a line still parses, so a page counts as whole only when every family that all versions print is there,
each histogram is complete and agrees with its count, and every engine of a data-parallel deployment shows
in every family. A page is never read in part: it gives a whole sample or an error.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from prometheus_client.parser import text_string_to_metric_families

from rlgov.engine.samples import EngineSample, Histogram
from rlgov.engine.telemetry.names import (
    CREATED,
    FAMILIES,
    HISTOGRAMS,
    PROCESS_START,
    Family,
    sample_names,
)
from rlgov.errors import TelemetryError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prometheus_client.samples import Sample

MAX_PAGE_BYTES: Final = 8 * 2**20
"""A page of 0.32 has 50 kB an engine."""
MAX_PAGE_LINES: Final = 50_000
MAX_SERIES: Final = 20_000
"""Of the families that are read: some 150 an engine."""

START_SEPARATOR: Final = "@"
"""Between an engine's name and the start of its process, in the ``engine_id`` of a sample."""

_SERVED = frozenset({"stop", "length", "repetition"})
_NAME = re.compile(r"[^\s{]*")
_EOF = "# EOF"
_OVER_FULL = 1.001  # a KV usage a little above 1 is rounding

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class _Series:
    part: str  # "", bucket, count, sum
    labels: dict[str, str]
    value: float

    @property
    def engine(self) -> str:
        return self.labels.get("engine", "")


_WANTED: Final[dict[str, tuple[Family, str, str]]] = {
    name: (family, spelling, part)
    for family in FAMILIES
    for spelling in family.spellings
    for name, part in sample_names(family, spelling).items()
}


def sample_from_page(text: str, *, at_s: float, engine_id: str) -> EngineSample:
    """What an engine's metrics page says.

    Several engines of one page (data parallelism) are added up; KV usage is that of the fullest one, since
    that one preempts first. ``prefill_tokens`` leaves out recomputation after preemption, which the page
    does not tell, and counts a prompt when it is done; on versions that do not tell prompt tokens by source
    it counts prefix hits as well. ``finished`` leaves out aborts and errors, which are ``failed``.

    Args:
        text: The page.
        at_s: Monotonic time at which it was asked for.
        engine_id: Name of the engine; the sample's has the start of its process appended, so that a
            restart shows even when every counter has outgrown its former value.

    Raises:
        TelemetryError: The page is not vLLM's, or not a whole one.
    """
    _check_text(text)
    found, start_s = _read(text)
    _check_families(found)
    engines = {series.engine for series in found["running"]}
    for name, listed in found.items():
        if name == "rejections":  # told for the whole server
            continue
        here = {series.engine for series in listed}
        if here != engines:
            raise TelemetryError(
                f"the metrics page has engines {sorted(engines)} in num_requests_running and {sorted(here)} "
                f"in {_spelt(name)}: it was cut, or an engine is starting; read it again"
            )
    histograms: dict[str, Histogram] = {
        name: _histogram(name, found[name]) for name in HISTOGRAMS if name in found
    }
    steps = found.get("iteration_tokens")
    gaps = histograms["token_gap_s"]
    served, failed = _ended(found, histograms["e2e_s"])
    prompt_tokens = _total(found["prompt_tokens"])
    kv_usage = max(series.value for series in found["kv_usage"])
    if kv_usage > _OVER_FULL:
        raise TelemetryError(
            f"the metrics page says that {kv_usage:g} of the KV cache is in use, which is above 1; "
            "this version of vLLM counts in another unit and cannot be read"
        )
    return EngineSample(
        at_s=at_s,
        source="metrics",
        engine_id=engine_id if start_s is None else f"{engine_id}{START_SEPARATOR}{start_s:.3f}",
        running=round(_total(found["running"])),
        waiting=round(_total(found["waiting"])),
        kv_usage=min(kv_usage, 1.0),
        generated_tokens=_total(found["generated_tokens"]),
        prompt_tokens=prompt_tokens,
        prefill_tokens=_computed(found, prompt_tokens),
        preemptions=_total(found["preemptions"]),
        finished=served,
        failed=failed,
        token_gaps=gaps.count,
        token_gap_s=gaps.sum,
        iterations=None if steps is None else _histogram("iteration_tokens", steps).count,
        kv_capacity_tokens=_kv_capacity(found.get("cache_config", ())),
        histograms=histograms,
    )


def is_of_engine(sample_id: str, engine_id: str) -> bool:
    """Whether a sample with ``sample_id`` is of the engine named ``engine_id``, in whichever life."""
    return sample_id == engine_id or sample_id.startswith(engine_id + START_SEPARATOR)


def _check_text(text: str) -> None:
    if len(text) > MAX_PAGE_BYTES:
        raise TelemetryError(
            f"the metrics page has {len(text)} characters, more than {MAX_PAGE_BYTES}; "
            "something else answers there, check the address"
        )
    begin = text[:200].lstrip()
    if not begin:
        raise TelemetryError(
            "the metrics page is empty; check that the address is vLLM's and ends in /metrics"
        )
    if begin[0] in "<{":
        what = "HTML" if begin[0] == "<" else "JSON"
        raise TelemetryError(
            f"the metrics page is {what}, not Prometheus text ({begin[:60]!r}); "
            "a proxy or another program answers there, check the address"
        )
    if not text.endswith("\n"):
        raise TelemetryError("the metrics page ends in the middle of a line: it was cut; read it again")
    if text.count("\n") > MAX_PAGE_LINES:
        raise TelemetryError(
            f"the metrics page has more than {MAX_PAGE_LINES} lines; "
            "take labels away from the server's metrics"
        )


def _selected(text: str) -> Iterator[str]:
    """The lines that are read at all: the parser is slow, and most of a page is of no interest."""
    ended = False
    for line in text.split("\n"):
        if not line or line.isspace():
            continue
        if ended:
            raise TelemetryError(f"the metrics page goes on after its end mark {_EOF!r}; read it again")
        if line.startswith("#"):
            ended = line.rstrip() == _EOF
            continue
        match = _NAME.match(line)
        name = match.group() if match else ""
        if name in _WANTED or name == PROCESS_START or name in CREATED:
            yield line


def _parsed(lines: list[str]) -> list[Sample]:
    if len(lines) > MAX_SERIES:
        raise TelemetryError(
            f"the metrics page has {len(lines)} series of the families in use, more than {MAX_SERIES}; "
            "take labels away from the server's metrics"
        )
    try:
        families = list(text_string_to_metric_families("\n".join(lines) + "\n"))
    except (ValueError, IndexError) as error:
        raise TelemetryError(
            f"the metrics page is not Prometheus text ({str(error) or 'a line cannot be parsed'}); "
            "read it again, and check the address if it stays so"
        ) from error
    samples = [sample for family in families for sample in family.samples]
    seen: set[tuple[str, Labels]] = set()
    for sample in samples:
        key = (sample.name, frozenset(sample.labels.items()))
        if key in seen:
            raise TelemetryError(
                f"the metrics page has {sample.name}{sample.labels} twice: two pages were put together; "
                "name the address of one engine"
            )
        seen.add(key)
        if not (math.isfinite(sample.value) and sample.value >= 0):
            raise TelemetryError(
                f"the metrics page says {sample.name} is {sample.value}; "
                "only finite numbers from 0 can be used"
            )
    return samples


def _read(text: str) -> tuple[dict[str, list[_Series]], float | None]:
    """Series by family, and when the process began if the page tells."""
    by_spelling: dict[tuple[str, str], list[_Series]] = {}
    starts: list[float] = []
    created: list[float] = []
    for sample in _parsed(list(_selected(text))):
        if sample.name == PROCESS_START:
            starts.append(sample.value)
        elif sample.name in CREATED:
            created.append(sample.value)
        else:
            family, spelling, part = _WANTED[sample.name]
            series = _Series(part, sample.labels, float(sample.value))
            by_spelling.setdefault((family.name, spelling), []).append(series)
    found: dict[str, list[_Series]] = {}
    for family in FAMILIES:
        here = [s for s in family.spellings if (family.name, s) in by_spelling]
        if here:
            found[family.name] = by_spelling[family.name, here[0]]
    began = starts or created
    return found, min(began) if began else None


def _spelt(name: str) -> str:
    return next(family.spellings[0] for family in FAMILIES if family.name == name)


def _check_families(found: dict[str, list[_Series]]) -> None:
    missing = [family for family in FAMILIES if family.name not in found]
    if any(family.sentinel for family in missing):
        names = ", ".join(f"vllm:{family.spellings[0]}" for family in missing if family.sentinel)
        raise TelemetryError(
            f"the metrics page lacks {names}: it is not vLLM's, or it was cut; "
            "check the address, and that vLLM runs without --disable-log-stats"
        )
    names = ", ".join(f"vllm:{'|'.join(family.spellings)}" for family in missing if family.required)
    if names:
        raise TelemetryError(
            f"the metrics page lacks {names}: it was cut, or this version of vLLM is not known; read it again"
        )


def _total(listed: Iterable[_Series]) -> float:
    return math.fsum(series.value for series in listed)


def _ended(found: dict[str, list[_Series]], e2e: Histogram) -> tuple[float, float]:
    """Requests served and failed."""
    ended = found.get("ended", ())
    if not ended and e2e.count > 0:
        raise TelemetryError(
            f"the metrics page lacks vllm:{_spelt('ended')} although requests have ended: "
            "it was cut; read it again"
        )
    served = _total(series for series in ended if series.labels.get("finished_reason") in _SERVED)
    failed = _total(series for series in ended if series.labels.get("finished_reason") not in _SERVED)
    return served, failed + _total(found.get("rejections", ()))


def _computed(found: dict[str, list[_Series]], prompt_tokens: float) -> float:
    listed = found.get("prompt_tokens_by_source", ())
    local = [series for series in listed if series.labels.get("source") == "local_compute"]
    return _total(local) if local else prompt_tokens


def _kv_capacity(listed: Iterable[_Series]) -> int | None:
    """KV tokens of all engines; None if one does not tell."""
    total = 0
    for series in listed:
        tokens = _whole(series.labels.get("kv_cache_size_tokens"))
        if tokens is None:
            blocks, size = (_whole(series.labels.get(name)) for name in ("num_gpu_blocks", "block_size"))
            tokens = None if blocks is None or size is None else blocks * size
        if tokens is None:
            return None
        total += tokens
    return total or None


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


def _histogram(name: str, listed: list[_Series]) -> Histogram:
    """All label sets of one family added up, each checked for completeness."""
    groups: dict[Labels, list[_Series]] = {}
    for series in listed:
        key = frozenset((k, v) for k, v in series.labels.items() if k != "le")
        groups.setdefault(key, []).append(series)
    whole = [_one_histogram(name, group) for group in groups.values()]
    bounds = whole[0].bounds
    if any(one.bounds != bounds for one in whole):
        raise TelemetryError(
            f"the engines of the metrics page have different buckets in {_spelt(name)}: "
            "it was cut; read it again"
        )
    counts = tuple(math.fsum(column) for column in zip(*(one.counts for one in whole), strict=True))
    return Histogram(bounds, counts, math.fsum(one.sum for one in whole), counts[-1])


def _one_histogram(name: str, group: list[_Series]) -> Histogram:
    counts: dict[float, float] = {}
    totals: dict[str, float] = {}
    for series in group:
        if series.part == "bucket":
            counts[_bound(name, series.labels.get("le", ""))] = series.value
        else:
            totals[series.part] = series.value
    bounds = tuple(sorted(counts))
    values = tuple(counts[bound] for bound in bounds)
    wrong = ""
    if not bounds or bounds[-1] != math.inf:
        wrong = "has no bucket +Inf"
    elif {"count", "sum"} - totals.keys():
        wrong = "has no count or no sum"
    elif any(a > b for a, b in pairwise(values)):
        wrong = "has buckets that shrink"
    elif values[-1] != totals["count"]:
        wrong = f"counts {totals['count']:g} observations and has {values[-1]:g} in its last bucket"
    if wrong:
        raise TelemetryError(
            f"histogram {_spelt(name)} of the metrics page {wrong}: it was cut; read it again"
        )
    return Histogram(bounds, values, totals["sum"], totals["count"])


def _bound(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise TelemetryError(
            f"histogram {_spelt(name)} of the metrics page has a bucket with le={text!r}; read it again"
        ) from None
