"""A signal to one of several processes ends all of them after the same step."""

ASKED = """
import os, signal, sys
from pathlib import Path
import torch
from accel.distill import recipes, run, settings
from accel.distill.methods.kd import Denoising

torch.set_num_threads(1)
real = Denoising.loss

def loss(self, phase, batch, step):
    if step == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return real(self, phase, batch, step)

Denoising.loss = loss
recipe = recipes.changed(
    settings.FinetuneRecipe(), model=sys.argv[1], data="digits", resolution=64, random_flip=False, cache="none",
    batch=1, steps=9, checkpoint_every=99, sample_every=0, log="none",
)
outcome = run.execute(recipe, Path(sys.argv[2]))
assert outcome.stopped and outcome.steps == 3, outcome
"""


def test_all_processes_stop_after_the_step_in_which_one_was_asked(small, tmp_path, torchrun):
    said = torchrun(ASKED, small, tmp_path / "out")
    assert "stopped after step 3 of 9" in said
    assert (tmp_path / "out-run" / "checkpoints" / "step-000003" / "state.json").is_file()
