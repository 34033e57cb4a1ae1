"""The run folder: one owner, and a state that is read back whole or not at all."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgov.engine.identity import ProcessIdentity, boot_id
from rlgov.engine.spec import EngineSpec
from rlgov.engine.switch.journal import (
    STATE_FILE,
    STATE_SCHEMA,
    EngineRecord,
    RunFolder,
    StackRecord,
    SwitchRecord,
)
from rlgov.engine.switch.machine import Done, Strategy, advance, plan
from rlgov.engine.switch.recovery import recover
from rlgov.errors import ConfigError

PHASES = ("starting", "warming", "active", "draining", "asleep", "stopping", "failed")


def _engine(name: str, phase: str = "active", degree: int = 2) -> EngineRecord:
    spec = EngineSpec(
        engine_id=name, command=("vllm",), model="m", tp_degree=degree, gpu_uuids=(), host="127.0.0.1",
        port=8000, max_num_seqs=8, arguments=("--max-model-len", "64"), environment={"A": "1"},
        log_path=Path("engine.log"), token="secret", plugin=True,  # noqa: S106  # of this test
    )  # fmt: skip
    return EngineRecord(spec, ProcessIdentity(7, 99, boot_id()), phase)


def _record(
    *engines: EngineRecord, routed: str | None = None, switch: SwitchRecord | None = None
) -> StackRecord:
    return StackRecord(STATE_SCHEMA, boot_id(), "m", 2, routed, engines, switch, {2: 1.5}, {2: 4096})


@pytest.mark.parametrize("strategy", list(Strategy))
def test_every_state_of_a_switch_is_read_back_unchanged(tmp_path: Path, strategy: Strategy) -> None:
    folder = RunFolder(tmp_path)
    state = plan(strategy)
    while True:
        announced = replace(_engine("b", "starting", 1), identity=None)
        switch = SwitchRecord("a", "b", 2, 1, state)
        record = _record(_engine("a"), announced, routed="a", switch=switch)
        folder.save(record)
        assert folder.load() == record
        if state.step is None:
            break
        state = advance(state, Done())


def test_nobody_else_may_read_the_tokens(tmp_path: Path) -> None:
    RunFolder(tmp_path).save(_record(_engine("a")))
    assert stat.S_IMODE((tmp_path / STATE_FILE).stat().st_mode) == 0o600


def test_no_state_and_that_of_an_earlier_boot_are_nothing_to_take_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.load() is None
    folder.save(replace(_record(_engine("a")), boot_id="another"))
    assert folder.load() is None
    (tmp_path / STATE_FILE).write_text('{"boot_id": "another", "of": "a later version"}', encoding="utf-8")
    assert folder.load() is None


@pytest.mark.parametrize("damage", ["", "{", "[]", "extra", "missing"])
def test_a_state_that_is_not_understood_is_refused_with_what_to_do(tmp_path: Path, damage: str) -> None:
    folder = RunFolder(tmp_path)
    folder.save(_record(_engine("a")))
    path = tmp_path / STATE_FILE
    content = json.loads(path.read_bytes())
    if damage == "extra":
        damage = json.dumps({**content, "more": 1})
    elif damage == "missing":
        damage = json.dumps({name: value for name, value in content.items() if name != "engines"})
    path.write_text(damage, encoding="utf-8")
    with pytest.raises(ConfigError, match="remove the file"):
        folder.load()


def test_one_owner_at_a_time_also_between_processes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.lock()
    with pytest.raises(ConfigError, match="another `rlgov serve`"):
        RunFolder(tmp_path).lock()
    code = (
        "import sys, pathlib\n"
        "from rlgov.engine.switch.journal import RunFolder\n"
        "RunFolder(pathlib.Path(sys.argv[1])).lock()"
    )
    taken = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "another `rlgov serve`" in taken.stderr
    folder.unlock()
    folder.unlock()
    RunFolder(tmp_path).lock()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="name a writable folder with --run"):
        RunFolder(tmp_path / "file" / "run").lock()


engines = st.lists(st.sampled_from(PHASES), max_size=4).map(
    lambda phases: [_engine(f"e{i}", phase) for i, phase in enumerate(phases)]
)


@given(engines, st.data())
def test_recovery_decides_about_every_living_engine_once(
    found: list[EngineRecord], data: st.DataObject
) -> None:
    names = [engine.spec.engine_id for engine in found]
    pick = st.sets(st.sampled_from(names)) if names else st.just(set[str]())
    alive, usable = data.draw(pick), data.draw(pick)
    routed = data.draw(st.sampled_from([None, *names]))
    decided = recover(_record(*found, routed=routed), alive, usable)
    assert sorted((*decided.candidates, *decided.stop)) == sorted(alive)
    phases = {engine.spec.engine_id: engine.phase for engine in found}
    assert all(name in usable for name in decided.candidates)
    assert all(phases[name] not in {"stopping", "failed"} for name in decided.candidates)
    if routed in decided.candidates:
        assert decided.candidates[0] == routed


def test_the_old_engine_comes_first_while_requests_are_held() -> None:
    switch = SwitchRecord("a", "b", 2, 1, plan(Strategy.RESTART))
    record = _record(_engine("b", "warming", 1), _engine("a", "draining"), switch=switch)
    assert recover(record, {"a", "b"}, {"a", "b"}).candidates == ("a", "b")
    assert recover(record, {"b"}, {"b"}).candidates == ("b",)
