from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgov.errors import JournalError
from rlgov.journal import (
    FileSink,
    Header,
    Interval,
    JournalWriter,
    Request,
    decode,
    decode_journal,
    encode,
    observation_digest,
    read_journal,
)
from rlgov.records import WINDOW_FIELDS, Configuration, Decision, Limits, ServiceLevel, Window

LIMITS = Limits(
    sm_clocks_mhz=(1980, 1200),
    batch_caps=(64, 8),
    tp_degrees=(2, 1),
    interval_s=1.0,
    service_level=ServiceLevel(1.0, 0.075),
    allotted_gpus=2,
    tdp_w=700.0,
    kv_capacity_tokens=(1000, 400),
    switch_s=(5.0, 5.0),
    max_num_batched_tokens=8192,
)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
WINDOWS = st.builds(
    Window,
    **{f.name: st.none() | NUMBERS if "None" in str(f.type) else NUMBERS for f in fields(Window)},
)
CONFIGURATIONS = st.builds(Configuration, *[st.integers(1, 4000)] * 3)
DECISIONS = st.builds(
    Decision, NUMBERS, CONFIGURATIONS, CONFIGURATIONS, st.text(), st.none() | NUMBERS, st.text()
)
WINDOW = Window(**(dict.fromkeys(WINDOW_FIELDS, 0.5) | {"blind": 0.0}))
HEADER = Header(LIMITS, seed=3, policy_digest="d", versions={"rlgov": "0"})
LINES = [encode(HEADER), encode(Interval(WINDOW)), encode(Request(0.25, 10, 2))]


@given(st.builds(Interval, WINDOWS, st.none() | DECISIONS, st.text()))
def test_an_interval_survives_the_round_trip_exactly(interval: Interval) -> None:
    text = encode(interval)
    assert "\n" not in text
    assert decode(text, where="x:1") == interval


@given(st.builds(Request, NUMBERS, *[st.integers(0, 10**9)] * 3))
def test_a_request_survives_the_round_trip_exactly(request_: Request) -> None:
    assert decode(encode(request_), where="x:1") == request_


def test_a_header_survives_the_round_trip() -> None:
    assert decode(encode(HEADER), where="x:1") == HEADER


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_hold_is_refused_when_written(value: float) -> None:
    with pytest.raises(JournalError, match="NaN or infinity"):
        encode(Interval(replace(WINDOW, energy_j=value)))


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.jsonl"
    with JournalWriter(FileSink(path), HEADER) as writer:
        writer.write(Request(0.25, 10, 2))
        writer.write(Interval(WINDOW))
        assert path.read_text().count("\n") == 3  # a killed run keeps what was written
    journal = read_journal(path)
    assert journal.header == HEADER
    assert journal.intervals == (Interval(WINDOW),)
    assert journal.requests == (Request(0.25, 10, 2),)


def broken(change: dict[str, object], *path: str) -> str:
    """The interval line with some entries changed at a path; None takes an entry out."""
    line = json.loads(LINES[1])
    part = line
    for name in path:
        part = part[name]
    for name, value in change.items():
        if value is None:
            del part[name]
        else:
            part[name] = value
    return json.dumps(line)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "kind must be one of header, interval, request"),
        ('{"kind":"gossip"}', "'gossip'"),
        (broken({"energy_j": "many"}, "interval", "window"), "field interval.interval.window.energy_j"),
        (broken({"energy_j": True}, "interval", "window"), "energy_j"),
        (broken({"energy_j": None}, "interval", "window"), "interval.window: missing energy_j"),
        (broken({"blind": None}, "interval", "window"), "interval.window: missing blind"),
        (broken({"colour": 1}, "interval", "window"), "interval.window: unknown colour"),
        (broken({"colour": 1}), "colour"),
        ("", "not JSON"),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join([LINES[0], LINES[1], text, LINES[2], ""]))
    with pytest.raises(JournalError) as caught:
        read_journal(path)
    assert f"{path}:3: " in str(caught.value)
    assert message.replace("field interval.interval", "field interval") in str(caught.value)


@pytest.mark.parametrize("version", [1, 99])  # windows of schema 1 had no tp_refused
def test_another_schema_is_refused(version: int) -> None:
    line = json.loads(LINES[0]) | {"schema_version": version}
    message = rf"j:1: schema_version {version} cannot be read, only 2; record the run again"
    with pytest.raises(JournalError, match=message):
        decode_journal([json.dumps(line)], name="j")


def test_a_window_without_a_meter_survives_the_round_trip() -> None:
    entry = Interval(replace(WINDOW, energy_j=None, tp_refused=5.0))
    assert decode(encode(entry), where="x:1") == entry


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "empty"),
        (LINES[:1], "at least one interval"),
        (LINES[1:], "j:1: the header must be the first"),
        ([LINES[0], LINES[0], LINES[1]], "j:2: the header must be the first"),
        (
            [LINES[0], encode(Interval(replace(WINDOW, start_s=9.0))), LINES[1]],
            "j:3: field window.start_s",
        ),
    ],
)
def test_a_journal_out_of_order_is_refused(lines: list[str], message: str) -> None:
    with pytest.raises(JournalError, match=message):
        decode_journal(lines, name="j")


def test_a_line_cut_off_by_a_kill_is_an_error_unless_allowed(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(f"{LINES[0]}\n{LINES[1]}\n{LINES[2][:9]}")
    with pytest.raises(JournalError, match=r"run\.jsonl:3: the last line is cut off"):
        read_journal(path)
    assert read_journal(path, allow_cut=True).intervals == (Interval(WINDOW),)


def test_a_missing_file_is_a_journal_error(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="cannot be read"):
        read_journal(tmp_path / "none.jsonl")


def test_a_full_disk_is_a_journal_error() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full to play a full disk")
    sink = FileSink.__new__(FileSink)
    sink._file = full.open("w", encoding="utf-8")
    sink._path = full
    with pytest.raises(JournalError, match="cannot be written"):
        sink.write_line("x")
    with pytest.raises(JournalError, match="cannot be written"):
        sink.close()
    sink.close()


def test_the_digest_depends_on_every_bit() -> None:
    observation = np.zeros(5, dtype=np.float32)
    digest = observation_digest(observation)
    assert digest == observation_digest(observation.copy())
    observation[4] = np.nextafter(np.float32(0), np.float32(1))
    assert observation_digest(observation) != digest
