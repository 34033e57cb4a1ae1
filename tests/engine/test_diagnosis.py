from __future__ import annotations

from pathlib import Path

import pytest

from rlgov.engine.diagnosis import diagnose, failure, read_tail, rotate

CONSEQUENCE = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "free memory"),
        ("ValueError: No available memory for the cache blocks.", "--gpu-memory-utilization"),
        (
            "ValueError: Free memory on device cuda:0 (1.2/79.2 GiB) on startup is less than desired",
            "nvidia-smi",
        ),
        ("OSError: [Errno 98] Address already in use", "port"),
        ("OSError: /no/model is not a local folder and is not a valid model identifier", "model"),
        ("vllm: error: unrecognized arguments: --no-such", "--help=all"),
        (
            "Value error, Total number of attention heads (4) must be divisible by tensor parallel size (3).",
            "degree",
        ),
        ("ValueError: World size (4) is larger than the number of available GPUs (2)", "fewer GPUs"),
        ("AssertionError: Not enough allowed NUMA nodes to bind threads of 2 CPUWorkers.", "THREADS_BIND"),
        ("ModuleNotFoundError: No module named 'rlgov'", "without the plugin"),
    ],
)
def test_known_causes_have_a_remedy(line: str, remedy: str) -> None:
    log = "\n".join(
        [
            "INFO 11-23 09:00:00 [api_server.py:10] starting",
            "(EngineCore pid=7) Traceback (most recent call last):",
            f"(EngineCore pid=7) ERROR 11-23 09:00:01 [core.py:1] {line}",
            "(APIServer pid=6) Traceback (most recent call last):",
            f"(APIServer pid=6) {CONSEQUENCE}",
        ]
    )
    found = diagnose(log)
    assert found.line == line
    assert remedy in found.remedy


def test_an_unknown_cause_is_the_last_error_that_is_no_consequence() -> None:
    log = f"ValueError: first\nKeyError: 'the cause'\n{CONSEQUENCE}\ngoodbye"
    assert diagnose(log).line == "KeyError: 'the cause'"
    assert diagnose(log).remedy == ""
    assert diagnose(CONSEQUENCE).line == CONSEQUENCE
    assert diagnose("hello\nsegmentation fault\n\n").line == "segmentation fault"
    assert diagnose("").line == ""


def test_the_message_leads_with_the_cause(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text(
        "".join(f"line {n}\n" for n in range(100)) + "OSError: [Errno 98] Address already in use\n"
    )
    first, second, *_rest = failure("engine e1 exited", log).splitlines()
    assert first == "engine e1 exited: OSError: [Errno 98] Address already in use"
    assert second.startswith("Remedy: ")
    assert "line 99" in failure("", log)
    assert "line 12" not in failure("", log)
    assert "its log is empty" in failure("engine e1 exited", tmp_path / "none.log")


def test_a_huge_log_is_read_from_its_end(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_bytes(b"\xff" * 1_000_000 + b"\nthe end\n")
    assert read_tail(log).endswith("the end\n")
    assert len(read_tail(log)) < 500_000


def test_earlier_logs_are_kept_and_numbered(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "engine.log"
    for start in range(9):
        rotate(log)
        log.write_text(str(start))
    assert {path.name: path.read_text() for path in log.parent.iterdir()} == {
        "engine.log": "8",
        **{f"engine.log.{age}": str(8 - age) for age in range(1, 6)},
    }
