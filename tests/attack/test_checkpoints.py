"""A checkpoint is proven before it is gone on from: a changed file is one sentence with a way out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from accel.distill.training import checkpoints
from accel.distill.training.method import TrainedNetwork
from accel.errors import UserError


def state(seed: int = 0) -> dict:
    """What a run hands to `checkpoints`, of a network of two layers that has learned for one step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = SimpleNamespace(state_dict=lambda: {"scale": 65536.0}, load_state_dict=lambda state: None)
    return {
        "networks": {"unet": TrainedNetwork(model, model)},
        "averages": {"unet": [parameter.detach().clone() for parameter in model.parameters()]},
        "optimizers": {"unet": optimizer},
        "schedulers": {"unet": schedule},
        "kept": {"settings": {"method": "kd", "cached": False}, "phases": {"unet": ["unet"]}, "accel": "1"},
        "accelerator": SimpleNamespace(
            is_main_process=True, wait_for_everyone=lambda: None, process_index=0, scaler=scaler
        ),
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        checkpoints.write(run, step, keep=2, **state(step))
    return run


@pytest.fixture
def run(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(bytes(data))


def resealed(folder: Path) -> None:
    """The digests of a checkpoint as its files are now: what is tested then is what comes after them."""
    path = folder / "state.json"
    data = json.loads(path.read_text())
    data["files"] = {
        file.relative_to(folder).as_posix(): {"sha256": checkpoints.sha256(file), "bytes": file.stat().st_size}
        for file in folder.rglob("*")
        if file.is_file() and file != path
    }
    path.write_text(json.dumps(data | {"digest": checkpoints._digest(data)}))


def change_weights(change):
    def attack(folder: Path) -> None:
        path = folder / "unet" / checkpoints.WEIGHTS
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        resealed(folder)

    return attack


def change_pickle(name: str, change):
    def attack(folder: Path) -> None:
        value = torch.load(folder / name, weights_only=True)
        torch.save(change(value), folder / name)
        resealed(folder)

    return attack


def with_state(**fields):
    return lambda folder: (folder / "state.json").write_text(
        json.dumps(json.loads((folder / "state.json").read_text()) | fields)
    )


def nan(value):
    next(iter(value["state"].values()))["exp_avg"][0] = float("nan")
    return value


ATTACKS = {
    "a flipped bit in the weights": lambda folder: flip(folder / "unet" / checkpoints.WEIGHTS),
    "a flipped bit in the average": lambda folder: flip(folder / "unet_ema" / checkpoints.WEIGHTS),
    "a flipped bit in the moments": lambda folder: flip(folder / "optimizer-unet.pt"),
    "a flipped bit in the schedule": lambda folder: flip(folder / "scheduler-unet.pt"),
    "a flipped bit in the random numbers": lambda folder: flip(folder / "rng-0.pt"),
    "no random numbers": lambda folder: (folder / "rng-0.pt").unlink(),
    "no average": lambda folder: shutil.rmtree(folder / "unet_ema"),
    "another step": with_state(step=7),
    "a step that is text": with_state(step="2"),
    "settings that are a list": with_state(settings=[1]),
    "files that are a list": with_state(files=[]),
    "a file outside": with_state(files={"../../x": {"sha256": "0", "bytes": 1}}),
    "a state that is a list": lambda folder: (folder / "state.json").write_text("[]"),
    "a missing tensor": change_weights(lambda tensors: tensors.pop("0.weight")),
    "one tensor more": change_weights(lambda tensors: tensors.update(more=torch.ones(1))),
    "a tensor of another shape": change_weights(lambda tensors: tensors.update({"0.bias": torch.ones(3)})),
    "weights that are not finite": change_weights(lambda tensors: tensors["1.weight"].fill_(float("nan"))),
    "moments that are not finite": change_pickle("optimizer-unet.pt", nan),
    "moments that are a list": change_pickle("optimizer-unet.pt", lambda value: [1, 2]),
    "moments of nothing": change_pickle("optimizer-unet.pt", lambda value: {"state": {}, "param_groups": [7]}),
    "a schedule that is a number": change_pickle("scheduler-unet.pt", lambda value: 3),
    "a schedule that is not finite": change_pickle("scheduler-unet.pt", lambda v: v | {"_last_lr": [float("inf")]}),
    "random numbers that are a table": change_pickle("rng-0.pt", lambda value: {"numpy": {}}),
    "a pickle with code": lambda folder: (folder / "rng-0.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR."),
}


def test_what_was_written_comes_back_bit_for_bit(run):
    fresh, wanted = state(9), state(2)
    assert checkpoints.read(checkpoints.all_of(run)[-1], **fresh) == 2
    for own, theirs in zip(*(s["networks"]["unet"].model.parameters() for s in (fresh, wanted)), strict=True):
        assert torch.equal(own, theirs)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_checkpoint_that_was_changed_is_refused_and_the_one_before_is_offered(run, attack):
    first, last = checkpoints.all_of(run)
    ATTACKS[attack](last)
    with pytest.raises(UserError, match="cannot be read") as caught:
        checkpoints.read(last, **state())
    assert str(first) in caught.value.fix and caught.value.message.count("\n") == 0
    shutil.rmtree(last)  # as the fix says
    assert checkpoints.read(checkpoints.all_of(run)[-1], **state()) == 1


def test_where_there_is_none_before_it_the_way_out_says_so(run):
    first, last = checkpoints.all_of(run)
    shutil.rmtree(first)
    ATTACKS["a missing tensor"](last)
    with pytest.raises(UserError) as caught:
        checkpoints.read(last, **state())
    assert "starts anew" in caught.value.fix


def test_a_checkpoint_without_digests_is_of_an_earlier_version_and_is_read(run):
    last = checkpoints.all_of(run)[-1]
    data = json.loads((last / "state.json").read_text())
    (last / "state.json").write_text(json.dumps({key: data[key] for key in data if key not in ("files", "digest")}))
    assert checkpoints.read(last, **state()) == 2
