"""Which images make the next call of the UNet: pure functions of what is known of each of them.

A call takes images that are alike in what the network's shapes depend on (their `key`); how old they are, what they
show, how they are guided and at which step they are does not matter. An image joins at any step and leaves when done.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..bundle.shape_profiles import Range
from ..errors import UserError, unknown


@dataclass(frozen=True)
class Candidate:
    """What a policy knows of an image that waits or is in the making.

    Attributes:
        id: whose it is.
        arrived: seconds on any clock.
        left: steps that are left.
        rows: of the UNet's batch that a step takes: 2 with guidance.
        key: images with equal keys can share a call.
    """

    id: Any
    arrived: float
    left: int
    rows: int = 1
    key: Hashable = None


Policy = Callable[[Candidate, float], Any]
PATIENCE = 30.0  # seconds after which `shortest` takes an image in order of arrival


def _fifo(one: Candidate, now: float) -> Any:
    return one.arrived


def _shortest(one: Candidate, now: float) -> Any:
    if now - one.arrived > PATIENCE:
        return (0, one.arrived, 0.0)
    return (1, one.left * one.rows, one.arrived)


# (candidate, now) -> sort key: the smallest goes first.
POLICIES: Mapping[str, Policy] = {"fifo": _fifo, "shortest": _shortest}


def next_call(candidates: Sequence[Candidate], rows: int, policy: str = "fifo", now: float = 0.0) -> list[Candidate]:
    """The images of the next call: the first by the policy, and those with its key that fit beside it.

    Args:
        rows: the most rows that a call may have.
        policy: a key of `POLICIES`.
        now: seconds, on the candidates' clock.
    """
    order = POLICIES[policy]
    sorted_ones = sorted(candidates, key=lambda one: order(one, now))
    chosen: list[Candidate] = []
    for one in sorted_ones:
        if (not chosen or one.key == chosen[0].key) and one.rows <= rows:
            chosen.append(one)
            rows -= one.rows
    return chosen


@dataclass(frozen=True)
class Shapes:
    """The batches that the UNet is called with.

    Attributes:
        most: rows of the largest.
        least: rows of the smallest.
        fixed: fill every call up to the largest, so that all calls have one shape: an image then has the same bits
            whatever else is being made.
    """

    most: int
    least: int = 1
    fixed: bool = False

    def padded(self, rows: int) -> int:
        """The rows of a call that needs so many."""
        return self.most if self.fixed else max(rows, self.least)

    @classmethod
    def of(cls, batch: Range, most: int | None, fixed: bool = False, *, int8: bool = False) -> Shapes:
        """Within what a UNet takes.

        Args:
            most: as asked for; None for 8, or what the UNet takes where that is less.
            int8: never call it with a single row where it takes more. Products with one row are summed in another
                order than those with several; a float image changes by less than 1/255, but a value that int8 rounds
                the other way is seen.

        Raises:
            UserError: for more rows than the UNet takes, or fewer.
        """
        if most is not None and not batch.admits(most):
            raise UserError(
                f"invalid batch: {most} rows (this UNet takes {batch})",
                f"--batch {batch.max}, or export with a larger batch: --profile batch=1-{max(most, 1)},...",
            )
        most = most or min(batch.max, max(8, batch.min))
        return cls(most, max(batch.min, min(2, most) if int8 else 1), fixed or batch.fixed)


def check_policy(name: str) -> None:
    if name not in POLICIES:
        raise unknown("policy", name, POLICIES)
