"""The gateway beside nginx and beside no proxy at all, taken in turns in one run.

Upstream, proxy and client are processes of their own; on two cores or more the proxy has one for itself. The
budgets: at least half of nginx's requests/s at 32 connections, and a TTFT p50 within 5 ms of nginx's at 64
streams with 20 ms tokens. Processor time per request is what a busy machine does not change.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import which
from typing import Any

from tests.benchmarks.timing import CLOCK, Figure

ROLES = "tests.benchmarks.gateway_roles"
ROUNDS = 5
CONNECTIONS, STREAMS, TOKEN_MS = 32, 64, 20.0
SECONDS_S = 2.0
BUDGET_SHARE, BUDGET_MS = 0.5, 5.0
NGINX = """
daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log crit;
events {{ worker_connections 1024; }}
http {{
  access_log off; keepalive_requests 1000000;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream engine {{ server 127.0.0.1:{upstream}; keepalive 128; keepalive_requests 1000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=512;
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for; proxy_buffering off; tcp_nodelay on;
    }}
  }}
}}
"""


def measure() -> list[Figure]:
    """All figures; without nginx on this machine those beside it are left out."""
    paths = ["direct", "gateway"] + (["nginx"] if nginx() else [])
    rates = _rounds(paths, 0.0, CONNECTIONS)
    delays = _rounds(paths, TOKEN_MS, STREAMS)
    figures = []
    for path in paths:
        figures.append(
            Figure(
                f"gateway_{path}_requests_per_s",
                rates[path]["requests_per_s"],
                "1/s",
                f"{path}, {CONNECTIONS} connections",
            )
        )
        if path != "direct":
            figures.append(
                Figure(
                    f"gateway_{path}_cpu_us", rates[path]["cpu_us"], "us", f"{path}, processor time a request"
                )
            )
        for name in ("p50", "p99"):
            value = delays[path][f"ttft_{name}_ms"]
            figures.append(
                Figure(
                    f"gateway_{path}_ttft_{name}_ms", value, "ms", f"{path}, TTFT {name}, {STREAMS} streams"
                )
            )
    if not nginx():
        note = "there is no nginx here to compare with; Debian has it as nginx-light"
        figures = [
            replace(figure, note=note) if "gateway_gateway" in figure.key else figure for figure in figures
        ]
    else:
        share = rates["gateway"]["requests_per_s"] / rates["nginx"]["requests_per_s"]
        later_ms = delays["gateway"]["ttft_p50_ms"] - delays["nginx"]["ttft_p50_ms"]
        figures.append(
            Figure(
                "gateway_share_of_nginx",
                share,
                "",
                "gateway's requests/s over nginx's",
                f"budget: at least {BUDGET_SHARE}",
            )
        )
        figures.append(
            Figure(
                "gateway_ttft_over_nginx_ms",
                later_ms,
                "ms",
                "gateway's TTFT p50 less nginx's",
                f"budget: at most {BUDGET_MS:g}",
            )
        )
    return figures


def nginx() -> str | None:
    """The nginx of this machine, if it has one."""
    return which("nginx") or which("nginx", path="/usr/sbin")


def _rounds(paths: list[str], token_ms: float, streams: int) -> dict[str, dict[str, float]]:
    """Medians by path over rounds in which each path has its turn."""
    seen: dict[str, dict[str, list[float]]] = {path: defaultdict(list) for path in paths}
    with contextlib.ExitStack() as stack:
        engine_port, _ = stack.enter_context(_role("upstream", _other_core(), token_ms))
        ports = {"direct": (engine_port, 0)}
        ports["gateway"] = stack.enter_context(_role("gateway", _proxy_core(), engine_port))
        if "nginx" in paths:
            ports["nginx"] = stack.enter_context(_nginx(engine_port))
        for _ in range(ROUNDS):
            for path in paths:
                port, pid = ports[path]
                before_s = _cpu_s(pid)
                result = _client(port, streams)
                if pid:
                    result["cpu_us"] = 1e6 * (_cpu_s(pid) - before_s) / result.pop("all_requests", 1)
                for key, value in result.items():
                    seen[path][key].append(value)
    return {
        path: {key: statistics.median(values) for key, values in by_key.items()}
        for path, by_key in seen.items()
    }


def _client(port: int, streams: int) -> dict[str, float]:
    command = [sys.executable, "-m", ROLES, "client", _other_core(), str(port), str(streams), str(SECONDS_S)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


@contextlib.contextmanager
def _role(role: str, core: str, *arguments: float) -> Iterator[tuple[int, int]]:
    command = [sys.executable, "-m", ROLES, role, core, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or not (line := process.stdout.readline()):
                raise RuntimeError(f"{role} did not start")
            yield int(json.loads(line)), process.pid
        finally:
            process.terminate()


@contextlib.contextmanager
def _nginx(upstream: int) -> Iterator[tuple[int, int]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "nginx.conf").write_text(
            NGINX.format(folder=folder, upstream=upstream, port=port), encoding="utf-8"
        )
        command: list[Any] = [nginx(), "-p", folder, "-c", folder / "nginx.conf", "-e", folder / "error.log"]
        core = _proxy_core()
        with subprocess.Popen(command) as process:
            try:
                if core != "-":
                    os.sched_setaffinity(process.pid, {int(core)})
                _wait_for(port)
                yield port, process.pid
            finally:
                process.terminate()


def _wait_for(port: int) -> None:
    until_s = CLOCK.monotonic_s() + 10
    while CLOCK.monotonic_s() < until_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        CLOCK.sleep_s(0.05)
    raise RuntimeError(f"nothing listens at port {port}")


def _cpu_s(pid: int) -> float:
    if not pid:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _proxy_core() -> str:
    return "1" if (os.cpu_count() or 1) > 1 else "-"


def _other_core() -> str:
    return "0" if (os.cpu_count() or 1) > 1 else "-"


if __name__ == "__main__":
    for figure in measure():
        print(f"{figure.value:10.3f} {figure.unit:4} {figure.what} {figure.note}")  # noqa: T201  # a report
