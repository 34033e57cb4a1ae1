"""What a campaign needs of a deployment: hold one point after another, and tell what happened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rlgov.characterize.measure import Evidence, Place
    from rlgov.characterize.plan import Task
    from rlgov.records import Limits, Window


class Hold(Protocol):
    """One point while it is held, under its load."""

    def advance(self) -> Window:
        """The next window; the first one has requests in it already.

        Raises:
            RlgovError: The point cannot be held: no load comes, or another configuration is in force.
        """
        ...

    def evidence(self, begin_s: float, end_s: float) -> Evidence:
        """End the load and tell everything about the span from ``begin_s`` to ``end_s``."""
        ...

    def close(self) -> None:
        """End the load; safe to call twice."""
        ...


class Bench(Protocol):
    """A deployment that is characterised."""

    @property
    def limits(self) -> Limits:
        """What may be asked for."""
        ...

    @property
    def clocks_present(self) -> bool:
        """Whether the SM clock can be set, or is simulated."""
        ...

    @property
    def place(self) -> Place:
        """What goes into every row."""
        ...

    @property
    def identity(self) -> dict[str, object]:
        """What makes two deployments the same one to a campaign: ``limits``, model, engine or physics."""
        ...

    @property
    def versions(self) -> dict[str, str]:
        """Of the programs that serve, besides our own."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the results should know."""
        ...

    def most_tokens(self, tp_degree: int) -> int | None:
        """Prompt and output tokens that a request may have together; None if that is not known."""
        ...

    def hold(self, task: Task, longest_s: float) -> Hold:
        """Bring the deployment to a point and put its load on, for at most ``longest_s``."""
        ...

    def rest(self, duration_s: float) -> None:
        """Let it idle between two points."""
        ...

    def close(self) -> None:
        """Give everything back as it was found; safe to call twice."""
        ...
