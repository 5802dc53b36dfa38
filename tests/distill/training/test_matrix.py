"""Every pair of two choices of training runs, or is refused with a reason before any work."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def test_choices_go_together_or_are_refused_with_a_reason(sd15, small, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("training_matrix", BENCHMARKS / "training_matrix.py")
    matrix = sys.modules["training_matrix"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matrix)
    torch.set_num_threads(1)
    models = {"sd15": sd15, "small": small, "edm": matrix.make_edm(tmp_path / "edm")}
    found = matrix.outcomes(models, tmp_path)
    # Of the pair of LoRAs every row of this sample has something else that is refused; other tests train it.
    run = {choice["method"] for choice, said in found if said == "runs"}
    assert run | {"dmd2, pair of LoRAs"} == set(matrix.METHODS)
    allowed = ("rounds within attention", "which is not installed", "has no effect on", "trains no UNet of its own")
    allowed += (
        "has no gradient checkpointing",
        "needs a CUDA device",
        "fp16 needs a GPU",
        "computes in half precision",
    )
    for choice, said in found:
        assert said == "runs" or any(reason in said for reason in allowed), (choice, said)


@pytest.mark.parametrize("axes", [dict(a=(1, 2), b=(1, 2, 3), c=(1, 2, 3, 4))])
def test_every_pair_is_in_a_row(axes, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import training_matrix

    rows = list(training_matrix.pairwise(axes))
    for first, second in (("a", "b"), ("a", "c"), ("b", "c")):
        assert len({(row[first], row[second]) for row in rows}) == len(axes[first]) * len(axes[second])
    assert len(rows) == 12
