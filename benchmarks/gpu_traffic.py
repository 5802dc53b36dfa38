"""Where the values of a step of training lie, followed on a CPU: what goes up to a GPU, and what is read back from it.

A tensor belongs to the host where Python made it (from numbers, from numpy, by a loader) and to the device once it was
sent there. The loader's are pinned, as they are on a GPU: copies of them that need not be waited for are `ahead`, all
others are `uploads`. A value that is read at once is a wait; a copy to the host that is read later is none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__", "__index__", "nonzero")
_DISPATCHED_WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
COUNTED = ("launches", "uploads", "ahead", "waits", "drawn")


class Traffic(TorchFunctionMode):
    """Counts while it is active and not paused."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = dict.fromkeys(COUNTED, 0)
        self.paused = False
        self._launches = _Launches(self)

    def __enter__(self) -> Traffic:
        self._launches.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._launches.__exit__(*error)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        places = [place(one) for one in given]
        host = bool(places) and all(places)
        if name in _READS:
            self.counts["waits"] += not host
            with self.pause():
                return marked(func(*args, **kwargs), "pageable")
        if name == "to" and (target := _target(args[1:], kwargs)) is not None:
            return self._moved(func, args, kwargs, target, places[0])
        if name in ("tensor", "as_tensor") and not given and kwargs.get("device") is not None:
            self.counts["uploads"] += 1
            return func(*args, **kwargs)
        if name in ("__getitem__", "__setitem__") and not place(args[0]):
            self._indexed(args[1] if isinstance(args[1], tuple) else (args[1],))
        out = func(*args, **kwargs)
        made_here = not given and kwargs.get("device") is None
        if host or made_here:
            marked(out, "pageable" if made_here or "pageable" in places else "pinned")
        return out

    def _moved(self, func: Any, args: Any, kwargs: Any, target: Any, where: str) -> Any:
        later = bool(kwargs.get("non_blocking"))
        if where:
            self.counts["ahead" if later and where == "pinned" else "uploads"] += 1
            return func(*args, **kwargs).view_as(args[0])  # the one that was sent stays the host's
        if target == "cpu":
            self.counts["waits"] += not later
            return marked(func(*args, **kwargs).view_as(args[0]), "pinned")
        return func(*args, **kwargs)

    def _indexed(self, by: tuple[Any, ...]) -> None:
        for one in by:
            if isinstance(one, torch.Tensor):
                self.counts["uploads"] += place(one) == "pageable" and one.dim() > 0
                self.counts["waits"] += one.dtype == torch.bool
            else:
                self.counts["uploads"] += isinstance(one, list)


class _Launches(TorchDispatchMode):
    """Operations that compute or copy; views are none."""

    def __init__(self, traffic: Traffic):
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.traffic.paused:
            name = func.name().partition(".")[0]
            aliases = [one.alias_info for one in func._schema.returns]
            view = any(one is not None and not one.is_write for one in aliases)
            given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
            on_host = bool(given) and all(place(one) for one in given)
            waits = name in _DISPATCHED_WAITS
            self.traffic.counts["waits"] += waits
            none = view or waits or on_host or "empty" in name or name == "aten::lift_fresh"
            self.traffic.counts["launches"] += not none
        return func(*args, **(kwargs or {}))


def place(tensor: torch.Tensor) -> str:
    """ "pinned" or "pageable" memory of the host; "" for the device."""
    return getattr(tensor, "_of_host", "")


def marked(out: Any, where: str) -> Any:
    for one in tree_leaves(out):
        if isinstance(one, torch.Tensor):
            one._of_host = where
    return out


def _target(args: Any, kwargs: Any) -> Any:
    """The device that a call of `Tensor.to` names, or None. Downloads say "cpu" in words: all else is the device."""
    found = kwargs.get("device") or next((one for one in args if isinstance(one, (str, torch.device))), None)
    if found is None and (other := next((one for one in args if isinstance(one, torch.Tensor)), None)) is not None:
        return other.device
    return found


def a_step(recipe: Any, folder: Any, steps: int) -> dict[str, float]:
    """The counts of a step of training, its data, logs and turns included, between the second step and the last.

    An optimizer's own kernels are not counted: on a GPU they are one for all weights.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    from accel.distill.data import batches, rng
    from accel.distill.run import execute
    from accel.distill.training.loop import Loop

    traffic, marks, stack = Traffic(), [], contextlib.ExitStack()
    run_all, one_step, loader, from_numpy = Loop.run_all, Loop.one_step, batches.loader, torch.from_numpy
    draws = {name: getattr(rng, name) for name in ("normal", "integers")}

    def whole(self: Any, *given: Any) -> Any:
        self.ahead = True  # as on a GPU: the next step is queued before the figures of this one are read
        with traffic:
            return run_all(self, *given)

    def step(self: Any, *given: Any) -> Any:
        marks.append(dict(traffic.counts))
        return one_step(self, *given)

    def pinned(*given: Any, **options: Any) -> Iterator[dict[str, Any]]:
        with contextlib.closing(loader(*given, **options)) as stream:
            while True:
                with traffic.pause():
                    made = next(stream)
                yield {key: marked(value, "pinned") for key, value in made.items()}

    def counted(name: str) -> Any:
        def draw(*given: Any, **options: Any) -> torch.Tensor:
            traffic.counts["drawn"] += not traffic.paused
            return marked(draws[name](*given, **options), "pageable")

        return draw

    hooks = [
        register_optimizer_step_pre_hook(lambda *_: stack.enter_context(traffic.pause())),
        register_optimizer_step_post_hook(lambda *_: stack.close()),
    ]
    replaced = [(Loop, "run_all", whole), (Loop, "one_step", step), (batches, "loader", pinned)]
    replaced += [(torch, "from_numpy", lambda array: marked(from_numpy(array), "pageable"))]
    replaced += [(rng, name, counted(name)) for name in draws]
    before = [(place_, name, getattr(place_, name)) for place_, name, _ in replaced]
    try:
        for place_, name, value in replaced:
            setattr(place_, name, value)
        execute(recipe, folder)
    finally:
        for place_, name, value in before:
            setattr(place_, name, value)
        for hook in hooks:
            hook.remove()
    assert len(marks) == steps
    return {name: (marks[-1][name] - marks[1][name]) / (steps - 2) for name in COUNTED}
