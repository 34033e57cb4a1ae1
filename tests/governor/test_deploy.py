"""The files of `rlgov deploy`: valid where they go, hardened, and speaking of flags that exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlgov import cli
from rlgov.governor.assets import TARGETS, deployment_files
from rlgov.hardware.keeper.options import read_options

SERVICES = ("rlgov-keeper.service", "rlgov-restore.service", "rlgov-governor.service")
MOST_EXPOSED = {"rlgov-keeper.service": 2.5, "rlgov-restore.service": 2.5, "rlgov-governor.service": 2.0}
KUBERNETES = "1.33"


def _documents(target: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, content in deployment_files(target).items():
        if name.endswith(".yaml"):
            yield from ((name, document) for document in yaml.safe_load_all(content))


def _containers(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    spec = document.get("spec", {}).get("template", {}).get("spec", {})
    yield from spec.get("initContainers", [])
    yield from spec.get("containers", [])


def _commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of ours in every file, as (where, words)."""
    for name, content in deployment_files("systemd").items():
        for found in re.finditer(r"^Exec\w+=(.*)$", content, re.MULTILINE):
            yield f"systemd/{name}", shlex.split(found[1])
    for target in ("kubernetes", "compose"):
        for name, document in _documents(target):
            parts = [*_containers(document), *document.get("services", {}).values()]
            for part in parts:
                if not str(part["image"]).startswith("rlgov"):
                    continue
                program = part.get("entrypoint") or (part.get("command") if target == "kubernetes" else None)
                arguments = part.get("args") if target == "kubernetes" else part["command"]
                yield f"{target}/{name}", [*(program or ["rlgov"]), *arguments]
                for probe in (part.get("livenessProbe", {}).get("exec"), part.get("healthcheck")):
                    if probe is not None:
                        words = probe.get("command") or probe["test"]
                        yield f"{target}/{name} probe", [word for word in words if word != "CMD"]


COMMANDS = [pytest.param(words, id=f"{where}: {' '.join(words[:2])}") for where, words in _commands()]


def test_every_target_has_files() -> None:
    for target in TARGETS:
        assert deployment_files(target), target
    assert len(COMMANDS) >= 9


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_line_is_one_that_we_take(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program = Path(words[0]).name
    if program == "rlgov-keeper":
        options = read_options(words[1:], {})
        assert str(options.socket) == "/run/rlgov/keeper.sock"
        assert str(options.state_dir) == "/run/rlgov/state"
        return
    assert program == "rlgov"
    tokens = words[1:]
    if "--config" in tokens:  # the file comes from a ConfigMap; see the test of it below
        at = tokens.index("--config")
        tokens = tokens[:at] + tokens[at + 2 :]
    command, bound, _ = cli.build_app().parse_args(tokens, print_error=False, exit_on_error=False)
    assert command.__name__ == tokens[0]
    if tokens[0] == "govern":
        settings = bound.arguments["settings"]
        assert settings.clocks == "keeper"
        assert str(settings.keeper_socket) == "/run/rlgov/keeper.sock"
        assert settings.mode == "shadow"  # nothing acts before somebody says so
        assert settings.listen


def test_the_configuration_of_the_sidecar_is_one_that_we_take(tmp_path: Path) -> None:
    from rlgov.commands.sections import sections
    from rlgov.config import read_config_file

    (config,) = (document for _, document in _documents("kubernetes") if document["kind"] == "ConfigMap")
    path = tmp_path / "rlgov.yaml"
    path.write_text(config["data"]["rlgov.yaml"], encoding="utf-8")
    schemas = sections()
    values = read_config_file(path, schemas)
    assert set(values) == {"govern"}
    schemas["govern"](**values["govern"])  # takes it, or raises


# systemd


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, with programs that exist where they say."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze (package systemd)")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("rlgov", "rlgov-keeper"):
        (programs / name).write_text("#!/bin/sh\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    for name, content in deployment_files("systemd").items():
        (tmp_path / name).write_text(content.replace("/opt/rlgov/bin", str(programs)), encoding="utf-8")
    return tmp_path


def _analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    assert program is not None
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def test_systemd_takes_the_units(units: Path) -> None:
    done = _analyze("verify", "--man=no", *(str(units / name) for name in SERVICES))
    said = [line for line in done.stderr.splitlines() if "rlgov" in line]
    assert done.returncode == 0
    assert said == []  # a misspelt setting is only warned about


def test_systemd_would_have_complained(units: Path) -> None:
    """So that the test above could fail."""
    path = units / SERVICES[0]
    path.write_text(path.read_text(encoding="utf-8").replace("WatchdogSec", "WatchDogSecs"), encoding="utf-8")
    assert "WatchDogSecs" in _analyze("verify", "--man=no", str(path)).stderr


@pytest.mark.parametrize("name", SERVICES)
def test_units_are_hardened(units: Path, name: str) -> None:
    done = _analyze("security", "--offline=yes", "--no-pager", str(units / name))
    found = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    if found is None:
        pytest.skip(f"this systemd-analyze cannot judge a file: {done.stderr.strip()}")
    assert float(found[1]) <= MOST_EXPOSED[name]


def _settings(name: str) -> dict[str, list[str]]:
    settings: dict[str, list[str]] = {}
    for line in deployment_files("systemd")[name].splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            settings.setdefault(key, []).append(value)
    return settings


def test_the_keeper_gives_back_whatever_ends_it() -> None:
    keeper = _settings("rlgov-keeper.service")
    assert keeper["Type"] == ["notify"]
    assert keeper["Restart"] == ["always"]
    assert keeper["StartLimitIntervalSec"] == ["0"]
    assert "--restore-left" in keeper["ExecStopPost"][0]
    assert keeper["RuntimeDirectoryPreserve"] == ["yes"]  # else systemd would delete the saved clocks
    assert float(keeper["WatchdogSec"][0]) < 15  # a keeper that hangs is gone within what is promised
    assert keeper["CapabilityBoundingSet"] == ["CAP_SYS_ADMIN"]


def test_the_governor_has_no_rights_and_does_not_hang_on_the_keeper() -> None:
    governor = _settings("rlgov-governor.service")
    assert governor["User"] == ["rlgov"]
    assert governor["CapabilityBoundingSet"] == [""]
    assert not {"Requires", "BindsTo", "Requisite"} & set(governor)
    assert governor["Type"] == ["notify"]
    assert "WatchdogSec" in governor


# Kubernetes and compose


def test_kubernetes_takes_the_manifests() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    checked = []
    for name, document in _documents("kubernetes"):
        if document["apiVersion"].startswith("monitoring.coreos.com"):
            continue  # a custom resource, of which the schemas know nothing
        validator.validate(document, KUBERNETES, strict=True)
        checked.append((name, document["kind"]))
    assert {kind for _, kind in checked} == {"Namespace", "DaemonSet", "ConfigMap", "Deployment"}


def test_kubernetes_would_have_complained() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    for _, document in _documents("kubernetes"):
        if document["kind"] == "DaemonSet":
            document["spec"]["template"]["spec"]["containers"][0]["securityContext"]["privilleged"] = True
            with pytest.raises(validator.ValidationError):
                validator.validate(document, KUBERNETES, strict=True)
            return
    pytest.fail("no DaemonSet")


def _container(kind: str, name: str) -> dict[str, Any]:
    for _, document in _documents("kubernetes"):
        if document["kind"] == kind:
            for container in _containers(document):
                if container["name"] == name:
                    return container
    pytest.fail(f"no container {name} in a {kind}")


def test_the_sidecar_has_the_least_rights() -> None:
    sidecar = _container("Deployment", "governor")
    security = sidecar["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert sidecar["restartPolicy"] == "Always"


def test_the_sidecar_cannot_take_serving_down() -> None:
    sidecar = _container("Deployment", "governor")
    assert not {"readinessProbe", "startupProbe"} & set(sidecar)
    assert (
        sidecar["livenessProbe"]["httpGet"]["path"] == "/healthz"
    )  # not /readyz: Tripped is no reason to restart


def test_the_keeper_has_one_capability_and_no_more() -> None:
    keeper = _container("DaemonSet", "keeper")
    security = keeper["securityContext"]
    assert "privileged" not in security
    assert security["capabilities"] == {"drop": ["ALL"], "add": ["SYS_ADMIN"]}
    assert security["readOnlyRootFilesystem"] is True
    # The API server refuses this together with CAP_SYS_ADMIN, which no schema knows.
    assert "allowPrivilegeEscalation" not in security


def test_sidecar_and_keeper_share_the_group_of_the_socket() -> None:
    gid = _container("DaemonSet", "keeper")["securityContext"]["runAsGroup"]
    assert _container("Deployment", "governor")["securityContext"]["runAsGroup"] == gid
    for target in ("kubernetes", "compose"):
        assert f"groupadd --gid {gid} rlgov" in deployment_files(target)["Containerfile"]


def test_the_pod_monitor_finds_the_port() -> None:
    (monitor,) = (document for _, document in _documents("kubernetes") if document["kind"] == "PodMonitor")
    (deployment,) = (document for _, document in _documents("kubernetes") if document["kind"] == "Deployment")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    ports = [port["name"] for port in _container("Deployment", "governor")["ports"]]
    assert endpoint["port"] in ports
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_compose_starts_both_with_the_least_rights() -> None:
    ((_, document),) = _documents("compose")
    keeper, governor = document["services"]["keeper"], document["services"]["governor"]
    assert keeper["cap_drop"] == governor["cap_drop"] == ["ALL"]
    assert keeper["cap_add"] == ["SYS_ADMIN"]
    assert "cap_add" not in governor
    assert governor["user"] != "0"
    assert keeper["read_only"] is governor["read_only"] is True
    assert keeper["network_mode"] == "none"
    assert set(document) <= {"name", "services", "volumes"}
    assert {"privileged", "pid", "ipc"}.isdisjoint({*keeper, *governor})


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_docker_takes_the_compose_file(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if docker is None or _run(docker, "compose", "version").returncode:
        pytest.skip("needs docker with its compose plugin")
    path = tmp_path / "compose.yaml"
    path.write_text(deployment_files("compose")["compose.yaml"], encoding="utf-8")
    done = _run(docker, "compose", "--file", str(path), "config", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")


def test_prometheus_takes_the_alerts(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool (of Prometheus)")
    path = tmp_path / "rules.yaml"
    path.write_text(deployment_files("grafana")["rlgov-alerts.yaml"], encoding="utf-8")
    done = _run(promtool, "check", "rules", str(path))
    assert done.returncode == 0, done.stderr


# The command


def test_deploy_prints_or_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["deploy", "systemd"]) == 0
    printed = capsys.readouterr().out
    assert all(f"# ---- {name}\n" in printed for name in SERVICES)
    assert cli.run(["deploy", "systemd", "--out", str(tmp_path / "units")]) == 0
    written = capsys.readouterr().out.splitlines()
    assert {Path(line).name for line in written} == set(deployment_files("systemd"))
    assert (tmp_path / "units" / SERVICES[0]).read_text(encoding="utf-8") in printed
    assert cli.run(["deploy", "systemd", "--out", str(tmp_path / "units"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(written)


def test_deploy_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "compose.yaml").write_text("mine", encoding="utf-8")
    assert cli.run(["deploy", "compose", "--out", str(tmp_path)]) == 2
    assert "is there and differs" in capsys.readouterr().err
    assert (tmp_path / "compose.yaml").read_text(encoding="utf-8") == "mine"


def test_deploy_knows_no_other_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["deploy", "nomad"]) == 2
    assert "nomad" in capsys.readouterr().err
