"""What a server would do under a load: measured step times in, throughput and latencies out.

    python -m accel.serving.simulate benchmarks/serve-load.json --rate 5 --machines 4

The simulator makes the same decisions as the server (`batch.next_call`), on a clock of its own. A machine makes one
call at a time; a new image goes to the machine with the fewest steps left.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .batch import POLICIES, Candidate, next_call


@dataclass(frozen=True)
class Times:
    """What was measured on one machine, in seconds.

    Attributes:
        step: rows of a UNet call -> its time.
        image: of everything else that an image takes in the thread of its model: text and decoder.
    """

    step: Mapping[int, float]
    image: float = 0.0

    def of(self, rows: int) -> float:
        """Of a call, interpolated between the sizes that were measured, and beyond them in proportion."""
        sizes = sorted(self.step)
        if rows > sizes[-1]:
            return self.step[sizes[-1]] * rows / sizes[-1]
        return float(np.interp(rows, sizes, [self.step[size] for size in sizes]))


@dataclass(frozen=True)
class Load:
    """Images that arrive.

    Attributes:
        arrived: seconds.
        steps, rows: of each of them.
    """

    arrived: Sequence[float]
    steps: Sequence[int]
    rows: Sequence[int]

    @classmethod
    def poisson(cls, rate: float, count: int, mix: Mapping[tuple[int, int], float], seed: int = 0) -> Load:
        """Arrivals at random, so many a second on average.

        Args:
            mix: (steps, rows) -> share of the images.
        """
        rng = np.random.default_rng(seed)
        kinds = list(mix)
        shares = np.array([mix[kind] for kind in kinds], float)
        drawn = rng.choice(len(kinds), count, p=shares / shares.sum())
        arrived = np.cumsum(rng.exponential(1 / rate, count))
        return cls(arrived.tolist(), [kinds[i][0] for i in drawn], [kinds[i][1] for i in drawn])


@dataclass(frozen=True)
class Prediction:
    """What came of it.

    Attributes:
        seconds: from the first arrival to the last image.
        rate: images a second.
        p50, p99: of the time from arrival to image, in seconds.
        batch: rows of a call on average.
        busy: share of the time in which a machine computes.
    """

    seconds: float
    rate: float
    p50: float
    p99: float
    batch: float
    busy: float


def simulate(
    load: Load, times: Times, *, rows: int = 8, policy: str = "fifo", machines: int = 1, share: bool = True
) -> Prediction:
    """Run a load through servers.

    Args:
        rows: of the largest call.
        share: whether images share calls; without it each is made by itself, in order of arrival.
    """
    clocks, calls, used, computing = [0.0] * machines, 0, 0, 0.0
    active: list[list[Candidate]] = [[] for _ in range(machines)]
    latencies: list[float] = []
    order = np.argsort(load.arrived, kind="stable").tolist()
    first, coming = load.arrived[order[0]], 0
    while coming < len(order) or any(active):
        working = [m for m in range(machines) if active[m]]
        machine = min(working, key=clocks.__getitem__) if working else None
        if coming < len(order) and (machine is None or load.arrived[order[coming]] <= clocks[machine]):
            i = order[coming]
            to = min(range(machines), key=lambda m: sum(one.left * one.rows for one in active[m]))
            if not active[to]:
                clocks[to] = max(clocks[to], load.arrived[i])
            active[to].append(Candidate(i, load.arrived[i], load.steps[i], load.rows[i]))
            coming += 1
            continue
        assert machine is not None
        chosen = next_call(active[machine], rows, policy, clocks[machine])
        chosen = chosen if share else chosen[:1]
        size = sum(one.rows for one in chosen)
        spent = times.of(size)
        further = [replace(one, left=one.left - 1) for one in chosen]
        ids = {one.id for one in chosen}
        rest = [one for one in active[machine] if one.id not in ids]
        active[machine] = rest + [one for one in further if one.left]
        for one in further:
            if not one.left:
                spent += times.image
                latencies.append(clocks[machine] + spent - one.arrived)
        clocks[machine] += spent
        calls, used, computing = calls + 1, used + size, computing + spent
    seconds = max(clocks) - first
    p50, p99 = np.percentile(latencies, [50, 99])
    busy = computing / (seconds * machines)
    return Prediction(seconds, len(latencies) / seconds, float(p50), float(p99), used / calls, busy)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="a result of benchmarks/serve_load.py")
    parser.add_argument("--rate", type=float, required=True, help="images that arrive in a second")
    parser.add_argument("--images", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument("--machines", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="rows of the largest call (default: 8)")
    parser.add_argument("--policy", choices=sorted(POLICIES), default="fifo")
    args = parser.parse_args(argv)
    if args.rate <= 0 or args.images < 1 or args.machines < 1 or args.batch < 1:
        parser.error("rate, images, machines and batch are above 0")
    found = json.loads(args.measured.read_text())
    times = Times({int(rows): spent for rows, spent in found["step_seconds"].items()}, found["image_seconds"])
    mix = {(entry["steps"], entry["rows"]): entry["share"] for entry in found["mix"]}
    if args.batch < max(rows for _, rows in mix):
        parser.error(f"--batch {args.batch} is less than an image with guidance takes")
    load = Load.poisson(args.rate, args.images, mix)
    for name, share in (("step batching", True), ("one by one", False)):
        made = simulate(load, times, rows=args.batch, policy=args.policy, machines=args.machines, share=share)
        text = f"{made.rate:.2f} images/s, p50 {made.p50:.3f} s, p99 {made.p99:.3f} s"
        print(f"{name:<14} {text}, {made.batch:.1f} rows in a call, busy {made.busy:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
