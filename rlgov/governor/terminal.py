"""The status page for a person at a terminal. Pure: a document in, something to print out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

_STYLES: Final = {"info": "cyan", "warning": "yellow", "critical": "bold red"}
_UNKNOWN: Final = "-"


def render(document: Mapping[str, Any]) -> RenderableType:
    """Everything that fits on a screen, the most urgent first."""
    tick = document["tick"]
    parts: list[RenderableType] = [_headline(document), *_conditions(document["conditions"])]
    if tick is None:
        parts.append(Text("no window was seen yet"))
        return Group(*parts)
    parts += [
        _configuration(tick),
        _serving(tick, document["governed"]),
        _energy(document),
        _reasons(document),
    ]
    return Group(*parts)


def _headline(document: Mapping[str, Any]) -> Text:
    governed, health, tick = document["governed"], document["health"], document["tick"]
    text = Text(f"{governed['model'] or 'a deployment'} by {governed['policy'] or 'no policy'}", style="bold")
    if tick is not None:
        mode = f"{tick['mode']}, {'acting' if tick['acting'] else 'not acting'}"
        text.append(f"  {mode}", style="green" if tick["acting"] else "")
        text.append(f"  tick {tick['number']}: {tick['reason']}{' (baseline)' if tick['baseline'] else ''}")
    text.append(f"  up {_span(document['uptime_s'])}", style="dim")
    for why in health["why"]:
        text.append(f"\nnot ready: {why}" if health["alive"] else f"\nNOT ALIVE: {why}", style="bold red")
    return text


def _conditions(conditions: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    if not conditions:
        return [Text("nothing is the matter", style="green")]
    table = _table("condition", "for", "what", "what to do")
    for held in conditions:
        style = _STYLES.get(held["severity"], "")
        table.add_row(
            Text(held["name"], style=style), _span(held["for_s"]), Text(held["message"]), Text(held["remedy"])
        )
    return [table]


def _configuration(tick: Mapping[str, Any]) -> Table:
    table = _table("", "asked", "decided", "in force", "measured", "locked by", "")
    decision, window, done = tick["decision"] or {}, tick["window"], tick["actuation"]
    asked, applied = decision.get("asked") or {}, decision.get("applied") or {}
    seen = {} if window["blind"] else window
    lease = done["lease_left_s"]
    note = f"lease {lease:.1f} s, {done['verdict']}" if lease is not None else done["verdict"]
    table.add_row(
        "SM clock, MHz",
        _number(asked.get("sm_clock_mhz")),
        _number(applied.get("sm_clock_mhz")),
        _number(seen.get("sm_clock_mhz")),
        _number(seen.get("measured_clock_mhz")),
        done["clocks"],
        note,
    )
    for name, key, holder in (("batch cap", "batch_cap", done["cap_holder"]), ("TP degree", "tp_degree", "")):
        row = (_number(part.get(key)) for part in (asked, applied, seen))
        table.add_row(
            name, *row, "", holder, "switching" if key == "tp_degree" and seen.get("switching") else ""
        )
    return table


def _serving(tick: Mapping[str, Any], governed: Mapping[str, Any]) -> Table:
    level = governed["limits"]["service_level"]
    window = {} if tick["window"]["blind"] else tick["window"]
    table = _table("", "p50", "p99", "limit", "", "")
    for name, limit_s in (("ttft", level["ttft_s"]), ("tpot", level["tpot_s"])):
        table.add_row(
            f"{name.upper()}, ms",
            _number(window.get(f"{name}_p50_s"), 1e3),
            _number(window.get(f"{name}_p99_s"), 1e3),
            _number(limit_s, 1e3),
            f"running {_number(window.get('running'))}"
            if name == "ttft"
            else f"KV {_share(window.get('kv_usage'))}",
            f"waiting {_number(window.get('waiting'))}"
            if name == "ttft"
            else f"OOD {_plain(tick['ood_score'])}",
        )
    return table


def _energy(document: Mapping[str, Any]) -> Table:
    tick, totals = document["tick"], document["totals"]
    window, predicted = tick["window"], tick["prediction"] or {}
    energy_j, duration_s = window["energy_j"], window["duration_s"]
    power_w = energy_j / duration_s if energy_j is not None and duration_s else None
    table = _table(
        "power, W", "predicted, W", "energy, kJ", "saved (active)", "would be saved (shadow)", "misses"
    )
    shares = [totals["compared"][basis]["saved_share"] for basis in ("active", "shadow")]
    table.add_row(
        _number(power_w),
        _number(predicted.get("power_w")),
        _number(totals["energy_j"], 1e-3),
        *(_share(share) for share in shares),
        f"{_number(totals['misses'])} of {_number(totals['arrivals'])}",
    )
    return table


def _reasons(document: Mapping[str, Any]) -> Text:
    reasons: Mapping[str, int] = document["totals"]["reasons"]
    total = sum(reasons.values()) or 1
    most = sorted(reasons.items(), key=lambda item: -item[1])
    return Text("  ".join(f"{reason} {100 * count / total:.0f} %" for reason, count in most), style="dim")


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _number(value: float | None, factor: float = 1.0) -> str:
    return _UNKNOWN if value is None else f"{value * factor:,.0f}"


def _plain(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{100 * value:.1f} %"


def _span(seconds: float) -> str:
    """A length of time, as people say it."""
    for name, length_s in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds / length_s:.1f} {name}"
    return f"{seconds:.0f} s"
