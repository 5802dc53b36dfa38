"""AOTInductor's packages compute what eager torch does, without the model's code, and are checked before they run."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

import accel
from accel.bundle import Bundle
from accel.cli import main
from accel.engines.aoti import engine as aoti
from accel.errors import UserError
from accel.export.graph.trace import example
from accel.parity import relative_l2
from accel.trt import engine_files
from accel.trt.preflight import NoEngineFile


@pytest.fixture
def copy(aoti_bundle, tmp_path):
    """A bundle that a test may break."""
    return Bundle.open(shutil.copytree(aoti_bundle, tmp_path / "bundle"))


def feeds_of(engine, seed: int = 0, **sizes: int) -> dict[str, torch.Tensor]:
    sizes = {dim: sizes.get(dim, limits.min) for dim, limits in engine.component.dims.items()}
    return example(engine.component.inputs, sizes, seed=seed)


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_every_batch_and_size_of_the_profile_equals_eager(component, aoti_bundle):
    ours = accel.load_engine(aoti_bundle, component, "aoti", device="cpu")
    theirs = accel.load_engine(aoti_bundle, component, "eager", device="cpu")
    for seed, batch, latent in ((0, 1, 8), (1, 3, 16), (2, 4, 12)):
        dims = {"images": batch, "batch": 2 * batch, "latent_height": latent, "latent_width": 8}
        dims |= {"height": 4 * latent, "width": 32}
        feeds = feeds_of(ours, seed, **dims)
        held = {name: value.clone() for name, value in feeds.items()}
        found, wanted = ours(**feeds), theirs(**feeds)
        assert list(found) == list(wanted)
        for name in wanted:
            assert found[name].dtype == wanted[name].dtype
            assert relative_l2(found[name].numpy(), wanted[name].numpy()) < 1e-4
        assert all(torch.equal(value, held[name]) for name, value in feeds.items())


def test_outputs_are_fresh_memory_and_any_array_goes_in(aoti_bundle):
    unet = accel.load_engine(aoti_bundle, "unet", "aoti", device="cpu")
    feeds = feeds_of(unet)
    first = unet(**feeds)["out_sample"]
    kept = first.clone()
    second = unet(**feeds | {"sample": feeds["sample"] * 2})["out_sample"]
    assert torch.equal(first, kept) and not torch.equal(second, kept)
    assert first.data_ptr() not in {value.data_ptr() for value in (*feeds.values(), second)}
    arrays = {name: value.numpy() for name, value in feeds.items()}
    arrays["encoder_hidden_states"] = np.ascontiguousarray(arrays["encoder_hidden_states"][:, ::-1])[:, ::-1]
    assert torch.equal(unet(**arrays)["out_sample"], kept)
    with pytest.raises(UserError, match="latent height 9999 is outside profile"):
        unet(**feeds | {"sample": torch.zeros(1, 4, 9999, 8)})


def test_threads_get_the_outputs_of_their_own_inputs(aoti_bundle):
    unet = accel.load_engine(aoti_bundle, "unet", "aoti", device="cpu")
    feeds = [feeds_of(unet, seed, batch=1 + seed % 3) for seed in range(6)]
    wanted = [unet(**own)["out_sample"] for own in feeds]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda own: unet(**own)["out_sample"], feeds))
    assert all(map(torch.equal, found, wanted))


def test_the_whole_image_is_eagers_and_no_code_of_the_model_is_imported(aoti_bundle):
    """In a process of its own: the image of the compiled networks, then the modules that are loaded."""
    program = (
        "import sys, json, accel, numpy as np\n"
        f"pipe = accel.load({str(aoti_bundle)!r}, 'aoti', device='cpu')\n"
        "made = pipe('the cat', seed=3, width=32, height=32, steps=2, output_type='np').images\n"
        "heavy = {m.partition('.')[0] for m in sys.modules} & {'diffusers', 'transformers', 'accelerate', 'onnx'}\n"
        "print(json.dumps([np.asarray(made).tolist(), sorted(heavy)]))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made, heavy = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    eager = accel.load(aoti_bundle, "eager", device="cpu")
    wanted = eager("the cat", seed=3, width=32, height=32, steps=2, output_type="np").images
    assert np.abs(np.asarray(made) - np.asarray(wanted)).max() <= 1 / 255


def test_other_weights_go_in_and_the_bundles_own_come_back(aoti_bundle):
    from safetensors.numpy import load_file

    bundle = Bundle.open(aoti_bundle)
    name = "conv_out.weight"
    other = {name: 2 * load_file(bundle.file(bundle.component("unet").weights))[name]}
    ours, theirs = (accel.load_engine(aoti_bundle, "unet", engine, device="cpu") for engine in ("aoti", "eager"))
    feeds = feeds_of(ours)
    own = ours(**feeds)["out_sample"]
    for engine in (ours, theirs):
        engine.set_weights(other)
    assert relative_l2(ours(**feeds)["out_sample"].numpy(), theirs(**feeds)["out_sample"].numpy()) < 1e-4
    assert not torch.allclose(ours(**feeds)["out_sample"], own)
    ours.set_weights({})
    assert torch.equal(ours(**feeds)["out_sample"], own)
    with pytest.raises(UserError, match="has no weight no.such"):
        ours.set_weights({"no.such": np.zeros(1, np.float32)})


def test_a_network_without_an_engine_file_names_the_command_that_builds_one(copy, capsys):
    with pytest.raises(NoEngineFile, match="has no AOTInductor engine file of vae_encoder") as caught:
        accel.load_engine(copy, "vae_encoder", "aoti", device="cpu")
    words = shlex.split(caught.value.fix)
    assert words == ["accel", "build", str(copy.path), *"--components vae_encoder --engine aoti --device cpu".split()]
    assert main(words[1:]) == 0
    assert "vae_encoder" in capsys.readouterr().out
    ours, theirs = (accel.load_engine(copy, "vae_encoder", engine, device="cpu") for engine in ("aoti", "eager"))
    feeds = feeds_of(ours, height=48, width=64)
    assert relative_l2(*(engine(**feeds)["latent_parameters"].numpy() for engine in (ours, theirs))) < 1e-4


def test_a_package_that_nobody_signed_or_that_was_changed_is_never_loaded(copy, monkeypatch, capsys):
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *_, **__: pytest.fail("it was loaded"))
    (file,) = engine_files.find(copy, "text_encoder")
    signature = file.path.with_suffix(".sig").read_bytes()
    file.path.with_suffix(".sig").unlink()
    with pytest.raises(NoEngineFile, match="does not carry your signature"):
        accel.load_engine(copy, "text_encoder", "aoti", device="cpu")
    assert main(["trust", str(copy.path)]) == 0 and "torch " in capsys.readouterr().out
    file.path.with_suffix(".sig").write_bytes(signature)
    data = bytearray(file.path.read_bytes())
    data[len(data) // 2] ^= 1
    file.path.write_bytes(data)
    with pytest.raises(NoEngineFile, match="was changed after it was built"):
        accel.load_engine(copy, "text_encoder", "aoti", device="cpu")
    file.path.chmod(0o666)
    with pytest.raises(NoEngineFile, match="others can write it"):
        accel.load_engine(copy, "text_encoder", "aoti", device="cpu")


def test_quantized_networks_are_refused_with_what_computes_them():
    with pytest.raises(UserError, match="AOTInductor runs float networks alone, and unet is int8\n") as caught:
        accel.load_engine("digits/tiny-1step-int8", "unet", "aoti", device="cpu")
    assert "onnxruntime, openvino" in caught.value.fix
    unet = Bundle.open("digits/tiny-1step-int8").component("unet")
    for form, able in (
        ("int4-weight-only", "onnxruntime, openvino, tensorrt-rtx, tensorrt"),
        ("fp8", "tensorrt-rtx, tensorrt"),
    ):
        with pytest.raises(UserError, match=f"and unet is {form}\n") as caught:
            aoti.refuse_quantized(replace(unet, int8={**unet.int8, "config": {"format": form}}))
        assert f"what runs it: {able}; or accel export" in caught.value.fix


def test_auto_leaves_it_to_tune_and_devices_that_are_none_are_refused(aoti_bundle, tmp_path):
    from accel.bench import tune
    from accel.engines import choose

    bundle = Bundle.open(aoti_bundle)
    assert choose("auto", bundle.component("unet"), bundle) != "aoti"
    assert "aoti" in {choice.engine for choice in tune.candidates(bundle, "unet")}
    assert "aoti" not in {choice.engine for choice in tune.candidates(bundle, "vae_encoder")}
    with pytest.raises(UserError, match="aoti does not run on 'gpu'"):
        aoti.AOTInductor(bundle, bundle.component("unet"), device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="'cuda' is not usable: torch sees no CUDA device"):
            accel.load_engine(aoti_bundle, "unet", "aoti", device="cuda")


def test_inspect_list_and_bench_know_it(aoti_bundle, capsys, monkeypatch):
    assert main(["inspect", str(aoti_bundle), "--no-verify", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["engines"]["aoti"]["ok"] and len(shown["engine_files"]) == 3
    if not torch.cuda.is_available():
        assert all(entry["ok"] for entry in shown["engine_files"])
    assert main(["list", "engines"]) == 0 and "aoti " in capsys.readouterr().out
    monkeypatch.setattr("accel.bench.facts._PEAK_SECONDS", 0.01)
    words = ["--engines", "aoti:cpu", "--steps", "1", "--rounds", "1", "--no-memory", "--json", "-"]
    assert main(["bench", str(aoti_bundle), *words, "--width", "32", "--height", "32"]) == 0
    rows = {row["variant"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["aoti:cpu"]["status"] == "measured" and rows["aoti:cpu"]["parity"]["unet"]["relative_l2"] < 1e-4
