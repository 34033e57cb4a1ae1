"""Download public traces: resumable, bounded, checked against a known hash, put in place atomically."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import requests
import tenacity

from rlgov.errors import TraceError
from rlgov.workload.readers import detect_kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 13  # a chunk under way is lost when the connection breaks
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
ATTEMPTS = 6
MAX_BYTES = 2 << 30  # no trace of the catalogue comes near; a runaway server must not fill the disk
_SERVER_TROUBLE = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class PublicTrace:
    """One public trace. ``sha256`` is None where the hash of the real file is not known."""

    name: str
    url: str
    file_name: str
    kind: str
    sha256: str | None
    licence: str
    citation: str

    @property
    def unverified(self) -> bool:
        """True when there is no hash to check a download against."""
        return self.sha256 is None


@dataclass(frozen=True, slots=True)
class FetchedTrace:
    """A trace on disk. ``verified`` says that its hash is the one of the catalogue."""

    path: Path
    sha256: str
    size_bytes: int
    verified: bool
    downloaded: bool  # False when the file was already there


class Progress(Protocol):
    """Told how much is there. ``total_bytes`` is None when the server does not say."""

    def __call__(self, done_bytes: int, total_bytes: int | None) -> None: ...  # noqa: D102  # see the class


_AZURE = (
    "https://raw.githubusercontent.com/Azure/AzurePublicDataset/790921015d50dd6aae7f7e47f39ba0e235ad6b08/data"
)
_MOONCAKE = (
    "https://raw.githubusercontent.com/kvcache-ai/Mooncake/"
    "3cca71daccf2a7afb8fe3f0295358f70e3a69fdb/FAST25-release/traces"
)
_BURSTGPT = "https://github.com/HPMLL/BurstGPT/releases/download/v2.0"
_CITE_AZURE = "Patel et al., Splitwise: Efficient Generative LLM Inference Using Phase Splitting, ISCA 2024"
_CITE_MOONCAKE = "Qin et al., Mooncake: Trading More Storage for Less Computation, FAST 2025"
_CITE_BURSTGPT = (
    "Wang et al., BurstGPT: A Real-World Workload Dataset to Optimize LLM Serving Systems, KDD 2025"
)

# Hashes: BurstGPT's from the large-file pointers in its own repository; Mooncake's as several independent
# projects report them for this commit. For the Azure files no published hash was found, so there is none.
CATALOGUE: Mapping[str, PublicTrace] = {
    trace.name: trace
    for trace in (
        PublicTrace(
            name="azure-conversation-2023",
            url=f"{_AZURE}/AzureLLMInferenceTrace_conv.csv",
            file_name="AzureLLMInferenceTrace_conv.csv",
            kind="azure",
            sha256=None,
            licence="CC-BY-4.0",
            citation=_CITE_AZURE,
        ),
        PublicTrace(
            name="azure-code-2023",
            url=f"{_AZURE}/AzureLLMInferenceTrace_code.csv",
            file_name="AzureLLMInferenceTrace_code.csv",
            kind="azure",
            sha256=None,
            licence="CC-BY-4.0",
            citation=_CITE_AZURE,
        ),
        PublicTrace(
            name="burstgpt-1",
            url=f"{_BURSTGPT}/BurstGPT_1.csv",
            file_name="BurstGPT_1.csv",
            kind="burstgpt",
            sha256="4bb3783693d0a435686fbfc885615d2349bd067239079fa4b749f2e679e12122",
            licence="CC-BY-4.0",
            citation=_CITE_BURSTGPT,
        ),
        PublicTrace(
            name="burstgpt-without-fails-1",
            url=f"{_BURSTGPT}/BurstGPT_without_fails_1.csv",
            file_name="BurstGPT_without_fails_1.csv",
            kind="burstgpt",
            sha256="a4d068a7113ec0290e74063a1b3447dc6001a30e4298eb313581b71006dda1f4",
            licence="CC-BY-4.0",
            citation=_CITE_BURSTGPT,
        ),
        PublicTrace(
            name="mooncake-conversation",
            url=f"{_MOONCAKE}/conversation_trace.jsonl",
            file_name="mooncake_conversation_trace.jsonl",
            kind="mooncake",
            sha256="b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
            licence="Apache-2.0",
            citation=_CITE_MOONCAKE,
        ),
        PublicTrace(
            name="mooncake-toolagent",
            url=f"{_MOONCAKE}/toolagent_trace.jsonl",
            file_name="mooncake_toolagent_trace.jsonl",
            kind="mooncake",
            sha256="48a2db1a13d3bc05e6330140c64f604ba366df20d3c9e128b5c35a01c1fa5f71",
            licence="Apache-2.0",
            citation=_CITE_MOONCAKE,
        ),
    )
}


class _TransientError(Exception):
    """Worth another attempt: the connection broke, or the server asks to come back later."""


def ignore_progress(done_bytes: int, total_bytes: int | None) -> None:
    """Null object for callers that show no progress."""


def fetch_trace(
    name: str,
    directory: str | Path,
    *,
    catalogue: Mapping[str, PublicTrace] = CATALOGUE,
    progress: Progress = ignore_progress,
    attempts: int = ATTEMPTS,
    first_wait_s: float = 1.0,
    max_bytes: int = MAX_BYTES,
) -> FetchedTrace:
    """Download a public trace into ``directory``, unless it is already there.

    An interrupted download leaves ``FILE.part``, and the next call goes on from there, provided that
    the catalogue knows the file's hash; without a hash a stale part could not be told, so it starts
    afresh. The finished file is checked before it gets its name.

    Raises:
        TraceError: The name is unknown, the download failed, or the file is not the one expected.
    """
    if name not in catalogue:
        msg = f"unknown trace {name!r}; known are {', '.join(sorted(catalogue))}"
        raise TraceError(msg)
    trace = catalogue[name]
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / trace.file_name
    if target.exists():
        return _already_there(trace, target)
    partial = target.with_name(target.name + ".part")
    resumed = partial.exists() and not trace.unverified
    if not resumed:
        partial.unlink(missing_ok=True)
    download = _Download(trace.url, partial, progress, max_bytes)
    _with_retries(download, attempts, first_wait_s)
    sha256 = _sha256(partial)
    if resumed and sha256 != trace.sha256:
        # What an earlier call left may be of another version: once more, from the first byte.
        logger.warning("%s: the resumed download does not match; starting afresh", trace.name)
        partial.unlink()
        _with_retries(_Download(trace.url, partial, progress, max_bytes), attempts, first_wait_s)
        sha256 = _sha256(partial)
    _check(trace, partial, sha256)
    os.replace(partial, target)  # noqa: PTH105  # atomic on one file system
    return FetchedTrace(target, sha256, target.stat().st_size, not trace.unverified, downloaded=True)


def _already_there(trace: PublicTrace, target: Path) -> FetchedTrace:
    sha256 = _sha256(target)
    if trace.sha256 is not None and sha256 != trace.sha256:
        msg = (
            f"{target}: sha256 is {sha256}, {trace.name} has {trace.sha256}; "
            "move the file away and fetch again"
        )
        raise TraceError(msg)
    _warn_if_unverified(trace, sha256)
    return FetchedTrace(target, sha256, target.stat().st_size, not trace.unverified, downloaded=False)


def _check(trace: PublicTrace, partial: Path, sha256: str) -> None:
    """Delete the download and raise unless it is what the catalogue promises."""
    if trace.sha256 is not None and sha256 != trace.sha256:
        partial.unlink()
        msg = (
            f"{trace.url}: sha256 is {sha256}, expected {trace.sha256}; nothing was kept. The file changed "
            "at its source or on the way: try another network, or download and check it by hand"
        )
        raise TraceError(msg)
    try:
        kind = detect_kind(partial)
    except TraceError as error:
        partial.unlink()
        msg = f"{trace.url}: what came is no trace ({error}); nothing was kept. Check the network's proxy"
        raise TraceError(msg) from error
    if kind != trace.kind:
        partial.unlink()
        msg = f"{trace.url}: expected a trace of kind {trace.kind}, got {kind}; nothing was kept"
        raise TraceError(msg)
    _warn_if_unverified(trace, sha256)


def _warn_if_unverified(trace: PublicTrace, sha256: str) -> None:
    if trace.unverified:
        logger.warning("%s: UNVERIFIED, no known hash to check against; sha256 is %s", trace.name, sha256)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _with_retries(download: _Download, attempts: int, first_wait_s: float) -> None:
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_TransientError),
        stop=tenacity.stop_after_attempt(attempts),
        wait=tenacity.wait_exponential(multiplier=first_wait_s, min=0, max=30),
        before_sleep=tenacity.before_sleep_log(logger, logging.INFO),
        reraise=True,
    )
    try:
        retrying(download.attempt)
    except _TransientError as error:
        msg = f"{download.url}: gave up after {attempts} attempts ({error}); run again to go on from there"
        raise TraceError(msg) from error


class _Download:
    """One file on its way. Each attempt goes on where the one before stopped."""

    def __init__(self, url: str, partial: Path, progress: Progress, max_bytes: int) -> None:
        self.url = url
        self._partial = partial
        self._progress = progress
        self._max_bytes = max_bytes
        self._validator: str | None = None  # the server's name for the version that we hold a part of

    def attempt(self) -> None:
        """Fetch the rest. Raises _TransientError when another attempt may help."""
        offset = self._partial.stat().st_size if self._partial.exists() else 0
        headers = {"Accept-Encoding": "identity"}  # ranges must count the file's own bytes
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if self._validator:
                headers["If-Range"] = self._validator
        try:
            with requests.get(
                self.url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
            ) as response:
                self._receive(response, offset)
        except (
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
        ) as error:
            msg = f"connection trouble: {error}"
            raise _TransientError(msg) from error
        except requests.RequestException as error:
            msg = f"{self.url}: cannot be downloaded ({error}); check the address and the network"
            raise TraceError(msg) from error
        except OSError as error:
            msg = f"{self._partial}: cannot write ({error}); free some space or choose another folder"
            raise TraceError(msg) from error

    def _receive(self, response: requests.Response, offset: int) -> None:
        status = response.status_code
        if status == requests.codes.requested_range_not_satisfiable:
            if _range_total(response) == offset:
                return  # the part is already the whole file
            self._partial.unlink(missing_ok=True)
            msg = "the part on disk does not fit the file; starting afresh"
            raise _TransientError(msg)
        if status in _SERVER_TROUBLE:
            msg = f"HTTP {status} {response.reason}"
            raise _TransientError(msg)
        if status not in (requests.codes.ok, requests.codes.partial_content):
            msg = f"{self.url}: HTTP {status} {response.reason}; has the file moved? See its project"
            raise TraceError(msg)
        if status == requests.codes.ok or _range_start(response) != offset:
            if status != requests.codes.ok:
                self._partial.unlink(missing_ok=True)
                msg = f"asked for bytes from {offset}, got {response.headers.get('Content-Range')!r}"
                raise _TransientError(msg)
            offset = 0  # the server does not do ranges, or the file has changed
        self._validator = _strong_validator(response)
        length = response.headers.get("Content-Length", "")
        total_bytes = offset + int(length) if length.isdigit() else None
        self._write(response.iter_content(CHUNK_BYTES), offset, total_bytes)

    def _write(self, chunks: Iterable[bytes], offset: int, total_bytes: int | None) -> None:
        if total_bytes is not None and total_bytes > self._max_bytes:
            self._too_large()
        done_bytes = offset
        with self._partial.open("ab" if offset else "wb") as file:
            for chunk in chunks:
                done_bytes += len(chunk)
                if done_bytes > self._max_bytes:
                    self._too_large()
                file.write(chunk)
                self._progress(done_bytes, total_bytes)
            file.flush()
            os.fsync(file.fileno())
        if total_bytes is not None and done_bytes != total_bytes:
            msg = f"the connection closed after {done_bytes} of {total_bytes} bytes"
            raise _TransientError(msg)

    def _too_large(self) -> None:
        self._partial.unlink(missing_ok=True)
        msg = f"{self.url}: larger than {self._max_bytes} bytes; nothing was kept. This is not the trace"
        raise TraceError(msg)


def _range_start(response: requests.Response) -> int | None:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _range_total(response: requests.Response) -> int | None:
    match = re.match(r"bytes \*/(\d+)$", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _strong_validator(response: requests.Response) -> str | None:
    """An ETag that promises byte equality; a weak one must not be used with ranges."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else None
