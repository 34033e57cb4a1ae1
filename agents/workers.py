"""Independent jobs in this process or in several, with results in the order of the jobs."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_J = TypeVar("_J")
_R = TypeVar("_R")


class Pool:
    """``map`` in order, in this process or, with more than one worker, in spawned ones."""

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(workers, mp_context=context) if workers > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._executor is not None:
            # after an error or Ctrl-C the jobs that have not begun are not worth waiting for
            self._executor.shutdown(cancel_futures=exception[0] is not None)

    def map(self, work: Callable[[_J], _R], jobs: Sequence[_J]) -> Iterator[_R]:
        """``work`` of every job, in order."""
        return map(work, jobs) if self._executor is None else self._executor.map(work, jobs)
