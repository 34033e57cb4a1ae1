from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgov.engine.arguments import (
    RESERVED,
    SCHEDULER,
    api_key,
    check_arguments,
    command_line,
    process_environment,
)
from rlgov.engine.spec import EngineSpec
from rlgov.errors import ConfigError

SPEC = EngineSpec(
    engine_id="e1",
    command=("/opt/vllm/bin/vllm",),
    model="org/model",
    tp_degree=2,
    gpu_uuids=("GPU-a", "GPU-b"),
    host="127.0.0.1",
    port=8100,
    max_num_seqs=64,
    arguments=("--dtype", "bfloat16"),
    environment={"HF_HUB_OFFLINE": "1"},
    log_path=Path("engine.log"),
    token="secret-token",  # noqa: S106  # of a test
    plugin=True,
    shutdown_timeout_s=0.5,
)


def _value(line: list[str], name: str) -> str:
    assert line.count(name) == 1
    return line[line.index(name) + 1]


def test_command_line() -> None:
    line = command_line(SPEC)
    assert line[:3] == ["/opt/vllm/bin/vllm", "serve", "org/model"]
    assert line[-2:] == ["--dtype", "bfloat16"]
    assert _value(line, "--tensor-parallel-size") == "2"
    assert _value(line, "--max-num-seqs") == "64"
    assert _value(line, "--port") == "8100"
    assert _value(line, "--scheduler-cls") == SCHEDULER
    assert _value(line, "--shutdown-timeout") == "1"  # whole seconds; 0 would abort requests in flight
    assert "--scheduler-cls" not in command_line(replace(SPEC, plugin=False))
    assert not any("secret-token" in part for part in line)  # command lines are everybody's to read


def test_the_scheduler_exists_where_vllm_is_told_to_find_it() -> None:
    module, _, name = SCHEDULER.rpartition(".")
    source = Path(__file__).resolve().parents[2] / (module.replace(".", "/") + ".py")
    assert name in source.read_text(encoding="utf-8")


def test_an_operators_own_choice_of_quiet_paths_stays() -> None:
    mine = ("--disable_access_log_for_endpoints=/health",)
    line = command_line(replace(SPEC, arguments=mine))
    assert [part for part in line if "access" in part] == list(mine)


@pytest.mark.parametrize("reserved", sorted(RESERVED))
def test_rlgovs_own_arguments_are_refused(reserved: str) -> None:
    for argument in ((reserved, "1"), (f"{reserved}=1",)):
        with pytest.raises(ConfigError, match=r"rlgov's own .*: \w"):
            check_arguments(("--dtype", "auto", *argument))


@pytest.mark.parametrize(
    "argument",
    ["--tensor_parallel_size=4", "--tensor-par", "--max_num_s", "--schedu=x", "--shutdown", "--po"],
)
def test_other_spellings_of_them_are_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match="rlgov's own"):
        check_arguments((argument,))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--max-num-batched-tokens", "8192"),
        ("--max-model-len=1024", "--api-key", "k"),
        ("--data-parallel-backend", "mp"),
        ("--seed", "-1"),
        ("--port-range-of-something-else", "1"),
    ],
)
def test_other_arguments_pass(arguments: tuple[str, ...]) -> None:
    check_arguments(arguments)
    assert command_line(replace(SPEC, arguments=arguments))[-len(arguments) :] == list(arguments)


@given(st.lists(st.text(max_size=20), max_size=5))
def test_what_passes_leaves_one_port(arguments: list[str]) -> None:
    try:
        line = command_line(replace(SPEC, arguments=tuple(arguments)))
    except ConfigError:
        return
    assert sum(part.partition("=")[0].replace("_", "-") == "--port" for part in line) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("port: 9", "rlgov's own"),
        ("tensor_parallel_size: 4", "rlgov's own"),
        ("api-key: k", "--api-key"),
        ("[1, 2]", "mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_config_file_hides_nothing(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "vllm.yaml"
    path.write_text(text, encoding="utf-8")
    for arguments in (("--config", str(path)), (f"--config={path}",)):
        with pytest.raises(ConfigError, match=told):
            check_arguments(arguments)
    path.write_text("dtype: auto\nmodel: other\n", encoding="utf-8")
    check_arguments(("--config", str(path)))


def test_a_missing_config_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no-such\.yaml"):
        check_arguments(("--config", "no-such.yaml"))


def test_environment() -> None:
    made = process_environment(SPEC, {"PATH": "/bin", "VLLM_SERVER_DEV_MODE": "1"})
    assert made["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert made["RLGOV_PLUGIN"] == "1"
    assert made["RLGOV_PLUGIN_TOKEN"] == "secret-token"  # noqa: S105  # of a test
    assert made["RLGOV_ENGINE_ID"] == "e1"
    assert made["VLLM_PLUGINS"] == "rlgov"
    assert made["HF_HUB_OFFLINE"] == "1"
    assert made["PATH"] == "/bin"
    assert "VLLM_SERVER_DEV_MODE" not in made


def test_environment_without_plugin_and_gpus() -> None:
    bare = replace(SPEC, plugin=False, gpu_uuids=())
    made = process_environment(bare, {"CUDA_VISIBLE_DEVICES": "0,1", "RLGOV_PLUGIN": "1"})
    assert made["RLGOV_PLUGIN"] == "0"
    assert "VLLM_PLUGINS" not in made
    assert made["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize(
    ("own", "wanted"), [("", "rlgov"), ("mine", "mine,rlgov"), ("rlgov", "rlgov"), ("a,b", "a,b,rlgov")]
)
def test_the_operators_plugins_stay(own: str, wanted: str) -> None:
    inherited = process_environment(SPEC, {"VLLM_PLUGINS": own})
    assert inherited["VLLM_PLUGINS"] == wanted
    assert process_environment(replace(SPEC, environment={"VLLM_PLUGINS": own}), {}) == {
        **process_environment(replace(SPEC, environment={}), {}),
        "VLLM_PLUGINS": wanted,
    }


def test_development_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="VLLM_SERVER_DEV_MODE"):
        process_environment(replace(SPEC, environment={"VLLM_SERVER_DEV_MODE": "0"}), {})


def test_programs_beside_vllm_are_found(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").touch()
    made = process_environment(replace(SPEC, command=(str(tmp_path / "bin" / "vllm"),)), {"PATH": "/usr/bin"})
    assert made["PATH"] == f"{tmp_path / 'bin'}:/usr/bin"


def test_the_key_of_the_engines_api() -> None:
    assert api_key(SPEC, {}) is None
    assert api_key(SPEC, {"VLLM_API_KEY": "env"}) == "env"
    assert api_key(replace(SPEC, arguments=("--api-key", "one", "two")), {"VLLM_API_KEY": "env"}) == "one"
    assert api_key(replace(SPEC, arguments=("--api_key=three",)), {}) == "three"


def test_secrets_stay_out_of_the_repr() -> None:
    spec = replace(SPEC, environment={"HF_TOKEN": "hf-secret"})
    assert "secret" not in repr(spec)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"command": ()}, "no command"),
        ({"tp_degree": 0}, "tp_degree"),
        ({"tp_degree": 4}, "2 GPUs for a TP degree of 4"),
        ({"shutdown_timeout_s": 0}, "aborts every request"),
        ({"token": ""}, "token"),
    ],
)
def test_a_spec_that_cannot_be(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace(SPEC, **changes)  # type: ignore[arg-type]  # wrong values on purpose
