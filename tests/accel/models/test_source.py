import json
import os
import shutil
from pathlib import Path

import pytest

from accel.errors import UserError
from accel.export.pipeline import export_pipeline
from accel.models.constants import default_sampler, pipeline_constants
from accel.models.source import open_source


@pytest.fixture
def source_copy(sd15, tmp_path) -> Path:
    return Path(shutil.copytree(sd15, tmp_path / "source"))


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def refusal(source, tmp_path, components=("vae_decoder",)) -> UserError:
    """Export must refuse, and leave nothing behind."""
    out = tmp_path / "bundles" / "out"
    with pytest.raises(UserError) as caught:
        export_pipeline(source, out, profile="static", components=components)
    assert caught.value.fix
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
    return caught.value


def test_a_pipeline_knows_its_family_and_topology(sd15, sd15_tiny, sdxl):
    assert (open_source(sd15).family, open_source(sdxl).family) == ("sd1", "sdxl")
    assert open_source(sd15_tiny).topology == "custom"  # narrowed


def test_a_pipeline_in_the_current_folder_still_has_a_name(sd15, monkeypatch):
    monkeypatch.chdir(sd15)
    assert open_source(".").name == sd15.name


def test_a_path_that_does_not_exist_is_named(tmp_path):
    assert str(tmp_path / "nothing") in refusal(tmp_path / "nothing", tmp_path).message
    assert "nothing" in refusal("nothing", tmp_path).message


def test_a_hub_id_that_cannot_be_had_says_both_possibilities(tmp_path):
    error = refusal("nobody/nothing", tmp_path)
    assert "neither a local folder nor" in error.message and "nobody/nothing" in error.message


def test_a_folder_that_is_no_pipeline_says_what_is_missing(tmp_path):
    (tmp_path / "photos").mkdir()
    assert "model_index.json" in refusal(tmp_path / "photos", tmp_path).message


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert "model.safetensors is not a safetensors file" in refusal(tmp_path / "model.safetensors", tmp_path).message
    (tmp_path / "notes.txt").write_text("x")
    assert "notes.txt is not a weight file" in refusal(tmp_path / "notes.txt", tmp_path).message


def test_a_bundle_is_not_exported_again(sd15_bundle, tmp_path):
    assert "bundle already" in refusal(sd15_bundle, tmp_path).message


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"unet": []}', '{"unet": ["diffusers"]}', '{"unet": 7}'])
def test_a_broken_index_is_refused(source_copy, tmp_path, content):
    (source_copy / "model_index.json").write_text(content)
    refusal(source_copy, tmp_path)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_pipeline_without_a_part_is_refused_by_its_name(source_copy, tmp_path, name):
    edit(source_copy / "model_index.json", lambda index: index.update({name: [None, None]}))
    assert name in refusal(source_copy, tmp_path).message


@pytest.mark.parametrize(
    ("name", "components"),
    [
        ("unet", ("vae_decoder",)),
        ("vae", ("vae_decoder",)),
        ("text_encoder", ("text_encoder",)),
        ("tokenizer", ("vae_decoder",)),
        ("scheduler", ("vae_decoder",)),
    ],
)
def test_a_part_whose_folder_is_missing_is_named(source_copy, tmp_path, name, components):
    shutil.rmtree(source_copy / name)
    assert name in refusal(source_copy, tmp_path, components).message


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("unet/config.json", "block_out_channels"),
        ("unet/config.json", "sample_size"),
        ("vae/config.json", "latent_channels"),
    ],
)
@pytest.mark.parametrize("value", ["missing", None, "text", 7.5])
def test_a_config_that_makes_no_sense_is_refused(source_copy, tmp_path, file, key, value):
    edit(source_copy / file, lambda config: config.pop(key) if value == "missing" else config.update({key: value}))
    assert key in refusal(source_copy, tmp_path).message


@pytest.mark.parametrize("name", ["vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "missing"])
def test_weights_that_cannot_be_read_are_named(source_copy, tmp_path, name, damage):
    (path,) = (source_copy / name).glob("*.safetensors")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "garbage": b"\xff" * 999}[damage])
    error = refusal(source_copy, tmp_path, ("vae_decoder" if name == "vae" else name,))
    assert str(source_copy / name) in error.message


def test_weights_of_another_model_are_refused(source_copy, tmp_path):
    from safetensors.torch import load_file, save_file

    (path,) = (source_copy / "vae").glob("*.safetensors")
    save_file({f"other.{name}": tensor for name, tensor in load_file(path).items()}, path)
    refusal(source_copy, tmp_path)


@pytest.mark.parametrize("name", ["vae", "text_encoder"])
def test_a_single_weight_that_is_missing_is_refused(source_copy, tmp_path, name):
    from safetensors.torch import load_file, save_file

    (path,) = (source_copy / name).glob("*.safetensors")
    state = load_file(path)
    lost = next(n for n in reversed(list(state)) if n.endswith("weight") and ("decoder" in n or "mlp" in n))
    state.pop(lost)
    save_file(state, path, metadata={"format": "pt"})
    assert lost in refusal(source_copy, tmp_path, ("vae_decoder" if name == "vae" else name,)).message


class Payload:
    """What an attacker puts into a pickle."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    ("name", "file"), [("vae", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")]
)
def test_a_pickle_with_code_in_it_is_refused_and_not_run(source_copy, tmp_path, name, file):
    import torch

    proof = tmp_path / "proof"
    for path in (source_copy / name).glob("*.safetensors"):
        path.unlink()
    torch.save({"weight": Payload(proof)}, source_copy / name / file)
    error = refusal(source_copy, tmp_path, ("vae_decoder" if name == "vae" else name,))
    assert "pickle" in error.message and "refused" in error.message and "safetensors" in error.fix
    assert not proof.exists()
    # The payload is live: what would have happened otherwise.
    torch.load(source_copy / name / file, weights_only=False)
    assert proof.exists()


@pytest.mark.parametrize("library", ["os", "evil", "diffusers.pipelines"])
def test_a_class_from_another_package_is_never_imported(source_copy, tmp_path, library):
    edit(source_copy / "model_index.json", lambda index: index.update(vae=[library, "system"]))
    assert library in refusal(source_copy, tmp_path).message


def test_a_class_that_does_not_exist_is_named(source_copy, tmp_path):
    edit(source_copy / "model_index.json", lambda index: index.update(vae=["diffusers", "AutoencoderFuture"]))
    assert "AutoencoderFuture" in refusal(source_copy, tmp_path).message


def test_a_vae_config_from_before_the_scaling_factor_means_stable_diffusions(source_copy):
    """SD1.5's own vae/config.json lacks the field; diffusers then takes its default, and so must the bundle."""
    from diffusers import AutoencoderKL

    edit(source_copy / "vae/config.json", lambda config: [config.pop(k) for k in ("scaling_factor", "shift_factor")])
    source = open_source(source_copy)
    constants = pipeline_constants(source)
    truth = AutoencoderKL.from_pretrained(source_copy / "vae").config
    assert constants["scaling_factor"] == truth.scaling_factor
    assert constants["shift_factor"] == (truth.shift_factor or 0.0)


def test_an_lcm_scheduler_means_few_steps_without_guidance(source_copy):
    edit(source_copy / "model_index.json", lambda index: index.update(scheduler=["diffusers", "LCMScheduler"]))
    own = default_sampler(open_source(source_copy))
    assert own == {"name": "lcm", "steps": 4, "guidance": 0.0}
