"""The decision problem: observation, action, guard, reward and the Gymnasium environments over them.

Importing this package makes ``rlgov/SimulatedServing-v0``, ``rlgov/ReplayedServing-v0`` and
``rlgov/LiveServing-v0`` known to Gymnasium, at once where that is loaded already, otherwise as soon as it is.
It does not load Gymnasium: the decision code itself (observation, action, guard, reward) needs only numpy,
and the process that governs a deployment shall not carry more.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_GYMNASIUM = "gymnasium"


class _RegisterAfter(Loader):
    """Loads a module as ``inner`` does, then registers the environments."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner  # what asks the module for its source shall find it
        module.__loader__ = self._inner
        self._inner.exec_module(module)
        _register()


class _WaitForGymnasium(MetaPathFinder):
    """Finds nothing but Gymnasium, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _GYMNASIUM:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def _register() -> None:
    from rlgov.envs.registration import register  # noqa: PLC0415  # imports Gymnasium

    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _WaitForGymnasium)]
    register()


if _GYMNASIUM in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _WaitForGymnasium())
