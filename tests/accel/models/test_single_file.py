"""Files of the field, written in the layouts, names and dtypes in which they are published, read back exactly."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from accel.bundle import Bundle
from accel.cli import main
from accel.errors import UserError
from accel.models.source import open_source

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


# Writers: diffusers' names to the original code's


def ldm_unet(state, layers=2):
    inner = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    top = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    crossed = {key.split(".")[1] for key in state if re.match(r"up_blocks\.\d\.attentions", key)}

    def named(key):
        for old, new in top.items():
            if key.startswith(f"{old}."):
                return key.replace(old, new)
        match = re.match(r"(down|up|mid)_blocks?\.(?:(\d)\.)?(\w+)\.(\d)\.(.+)", key)
        side, block, kind, layer, rest = match.groups()
        layer, block = int(layer), int(block or 0)
        if kind == "resnets":
            part, _, end = rest.rpartition(".")
            rest = f"{inner[part]}.{end}"
        if side == "mid":
            return f"middle_block.{2 * layer if kind == 'resnets' else 1}.{rest}"
        if side == "down":
            i = 1 + block * (layers + 1)
            if kind == "downsamplers":
                return f"input_blocks.{i + layers}.0.op.{rest.removeprefix('conv.')}"
            return f"input_blocks.{i + layer}.{int(kind == 'attentions')}.{rest}"
        i = block * (layers + 1)
        if kind == "upsamplers":
            return f"output_blocks.{i + layers}.{2 if str(block) in crossed else 1}.{rest}"
        return f"output_blocks.{i + layer}.{int(kind == 'attentions')}.{rest}"

    return {f"model.diffusion_model.{named(key)}": value for key, value in state.items()}


def ldm_vae(state, blocks=3):
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

    def named(key):
        key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        for old, new in attention.items():
            key = key.replace(f"mid_block.attentions.0.{old}.", f"mid.attn_1.{new}.")
        key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
        key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", key)
        return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)

    made = {}
    for key, value in state.items():
        name = named(key)
        convolution = ".attn_1." in name and value.dim() == 2
        made[f"first_stage_model.{name}"] = value[:, :, None, None] if convolution else value
    return made


def clip_names(state, prefix):
    return {f"{prefix}transformer.text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}


def open_clip_names(state, prefix):
    made, projections = {}, {}
    names = {
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    for key, value in state.items():
        key = key.removeprefix("text_model.")
        if key == "text_projection.weight":
            made[f"{prefix}text_projection"] = value.T.contiguous()
        elif key in names:
            made[prefix + names[key]] = value
        elif match := re.match(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", key):
            projections.setdefault((match[1], match[3]), {})[match[2]] = value
        else:
            key = key.replace("encoder.layers.", "transformer.resblocks.").replace("self_attn.", "attn.")
            key = key.replace("layer_norm", "ln_").replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
            made[prefix + key] = value
    for (layer, end), parts in projections.items():
        name = f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{end}"
        made[name] = torch.cat([parts[letter] for letter in "qkv"])
    return made


def states(source, dtype=torch.float16):
    opened = open_source(source)
    return {
        name: {key: value.to(dtype) for key, value in opened.load(name).state_dict().items() if "_ids" not in key}
        for name in NETWORKS
        if opened.has(name)
    }


def single_file(source: Path, out: Path, dtype=torch.float16) -> Path:
    """A pipeline as one file, with what else lies in published ones."""
    made = states(source, dtype)
    config = open_source(source).config("unet")
    state = ldm_unet(made["unet"], config["layers_per_block"]) | ldm_vae(made["vae"])
    if "text_encoder_2" in made:
        state |= clip_names(made["text_encoder"], "conditioner.embedders.0.")
        state |= open_clip_names(made["text_encoder_2"], "conditioner.embedders.1.model.")
        state["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6, dtype=dtype)
    elif config.get("use_linear_projection"):
        state |= open_clip_names(made["text_encoder"], "cond_stage_model.model.")
    else:
        state |= clip_names(made["text_encoder"], "cond_stage_model.")
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["alphas_cumprod"] = torch.linspace(1, 0, 1000)
    if out.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, out, metadata={"format": "pt"})
    else:
        torch.save({"state_dict": state, "global_step": 470000}, out)
    return out


@pytest.fixture(scope="module")
def sd2(sd15, tmp_path_factory):
    """The narrowed SD1.5 with SD2's linear projections, which is how the families differ in a file."""
    from diffusers import UNet2DConditionModel

    folder = Path(shutil.copytree(sd15, tmp_path_factory.mktemp("sd2") / "tiny-sd2"))
    torch.manual_seed(3)
    config = UNet2DConditionModel.load_config(sd15 / "unet") | {"use_linear_projection": True}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def ssd_1b(sdxl_maker, tmp_path_factory):
    return sdxl_maker(tmp_path_factory.mktemp("ssd") / "tiny-ssd-1b", "ssd-1b")


def assert_exactly(opened, base: Path, dtype=torch.float16):
    for name, wanted in states(base, dtype).items():
        found = opened.load(name)
        assert not found.training
        state = found.state_dict()
        for key, value in wanted.items():
            assert state[key].dtype == torch.float32 and torch.equal(state[key], value.float()), (name, key)


@pytest.mark.parametrize(
    ("model", "family", "suffix"),
    [
        ("sd15", "sd1", ".safetensors"),
        ("sd15", "sd1", ".ckpt"),
        ("sd2", "sd2", ".safetensors"),
        ("sdxl", "sdxl", ".safetensors"),
        ("ssd_1b", "sdxl", ".safetensors"),
    ],
)
def test_a_single_file_holds_the_networks_of_its_pipeline(model, family, suffix, request, tmp_path):
    base = request.getfixturevalue(model)
    file = single_file(base, tmp_path / f"model{suffix}")
    opened = open_source(file, base=base)
    assert opened.family == family and opened.name == "model"
    assert_exactly(opened, base)


def test_a_single_file_is_exported_and_says_what_it_was_made_of(sd15, tmp_path, capsys):
    file = single_file(sd15, tmp_path / "photo-v3.safetensors")
    out = tmp_path / "bundle"
    assert main(["export", str(file), str(out), "--base", str(sd15), "--components", "vae_decoder"]) == 0
    manifest = Bundle.open(out).manifest
    assert manifest.source["name"] == "photo-v3"
    part = manifest.source["parts"]["vae"]
    assert part["name"] == "photo-v3.safetensors" and "sha256" in part
    stored = load_file(out / "vae_decoder/model.safetensors")
    vae = states(sd15)["vae"]
    assert torch.equal(stored["decoder.conv_out.weight"], vae["decoder.conv_out.weight"].float())


def test_a_single_file_has_no_safety_checker_as_in_diffusers(sd15, tmp_path):
    """`from_single_file` leaves out the checker of the folder that the configs come from."""
    base = Path(shutil.copytree(sd15, tmp_path / "base"))
    index = json.loads((base / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (base / "model_index.json").write_text(json.dumps(index))
    assert open_source(base).has("safety_checker")
    file = single_file(sd15, tmp_path / "one.safetensors")
    assert not open_source(file, base=base).has("safety_checker")


def test_a_student_is_recognised_on_the_base_of_its_teacher(tmp_path):
    """SSD-1B as a single file comes without a config; the one of its family that fits is taken."""
    from diffusers import UNet2DConditionModel

    from accel.models import single_file as checkpoint
    from accel.models.topology import topology

    with torch.device("meta"):
        state = UNet2DConditionModel.from_config(dict(topology("ssd-1b").config)).state_dict()
    found = checkpoint.unet_config(state, dict(topology("sdxl").config), "ssd-1b")
    assert found["mid_block_type"] == "UNetMidBlock2D"
    with torch.device("meta"):
        config = dict(topology("sd15-tiny").config)
        state = UNet2DConditionModel.from_config(config | {"in_channels": 9}).state_dict()
    found = checkpoint.unet_config(state, dict(topology("sd15").config), "inpainting")
    assert found["in_channels"] == 9 and found["layers_per_block"] == 1


def test_without_a_base_a_single_file_says_what_it_lacks(sd15, tmp_path):
    file = single_file(sd15, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="tokenizer") as error:
        open_source(file)
    assert "--base" in error.value.fix


def test_a_base_of_another_family_is_refused(sd15, sdxl, tmp_path):
    file = single_file(sd15, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="family sd1.*sdxl"):
        open_source(file, base=sdxl)
    with pytest.raises(UserError, match="belongs to a single file"):
        open_source(sd15, base=sd15)


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("conditioner.embedders.0.model.ln_final.weight", "refiner"),
    ],
)
@pytest.mark.parametrize("where", ["model", "unet"])
def test_models_that_others_do_are_refused_with_the_tool_that_does_them(sd15, tmp_path, key, model, where):
    file = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(4, 4)}, file)
    with pytest.raises(UserError, match=model) as error:
        open_source(file) if where == "model" else open_source(sd15, unet=file)
    assert error.value.fix
    if model in ("Flux", "Stable Diffusion 3"):
        assert "optimum" in error.value.fix


def test_a_folder_of_stable_diffusion_3_names_the_tool(tmp_path):
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="StableDiffusion3Pipeline") as error:
        open_source(tmp_path)
    assert "optimum" in error.value.fix


def test_a_file_without_a_pipeline_in_it_is_refused(tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(4, 4)}, file)
    with pytest.raises(UserError, match="no Stable Diffusion pipeline"):
        open_source(file)


# Damaged and hostile files


@pytest.mark.parametrize("cut", [4, 100, 0.5, 0.99])
def test_a_truncated_file_is_named_before_anything_is_loaded(sd15, tmp_path, cut):
    file = single_file(sd15, tmp_path / "model.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[: int(cut if cut > 1 else cut * len(content))])
    with pytest.raises(UserError, match="model.safetensors") as error:
        open_source(file, base=sd15)
    assert "again" in error.value.fix


@pytest.mark.parametrize("header", [b"[]", b"{}{", b'{"a": 1}', b'{"a": {"data_offsets": []}}', b'{"a": {}}'])
def test_a_header_that_makes_no_sense_is_no_safetensors_file(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match="not a safetensors file"):
        open_source(file)


def test_a_truncated_file_in_a_folder_is_named(sd15, tmp_path):
    copy = Path(shutil.copytree(sd15, tmp_path / "copy"))
    (file,) = (copy / "unet").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"truncated: it has [\d,]+ bytes"):
        open_source(copy).load("unet")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["model", "unet"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(sd15, tmp_path, where):
    proof, file = tmp_path / "proof", tmp_path / "model.ckpt"
    torch.save({"state_dict": {"model.diffusion_model.x": torch.zeros(1)}, "callback": Payload(proof)}, file)
    with pytest.raises(UserError, match="refused") as error:
        open_source(file, base=sd15) if where == "model" else open_source(sd15, unet=file)
    assert "safetensors" in error.value.fix and not proof.exists()


# Variants and shards


@pytest.fixture
def with_variant(sd15, tmp_path):
    """A pipeline in fp16 files only, its UNet in shards, as the hub has them."""
    from diffusers import StableDiffusionPipeline

    folder = tmp_path / "variant"
    pipe = StableDiffusionPipeline.from_pretrained(sd15, torch_dtype=torch.float16)
    pipe.save_pretrained(folder, variant="fp16")
    shutil.rmtree(folder / "unet")
    pipe.unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size="60KB")
    return folder


def test_variants_and_shards_are_read_without_being_asked_for(with_variant, sd15):
    assert len(list((with_variant / "unet").glob("*fp16*.safetensors"))) > 1
    opened = open_source(with_variant)
    assert_exactly(opened, sd15)
    assert len(opened.weight_files("unet")) > 1
    assert open_source(with_variant, variant="fp16").digest(["unet"]) == opened.digest(["unet"])


def test_plain_files_go_before_variants_and_a_missing_variant_is_named(with_variant, sd15):
    shutil.copytree(sd15 / "vae", with_variant / "vae", dirs_exist_ok=True)
    (plain,) = open_source(with_variant).weight_files("vae")
    assert plain.name == "diffusion_pytorch_model.safetensors"
    (half,) = open_source(with_variant, variant="fp16").weight_files("vae")
    assert "fp16" in half.name
    with pytest.raises(UserError, match="no variant 'bf16'") as error:
        open_source(with_variant, variant="bf16").load("vae")
    assert "fp16" in error.value.fix


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub(folder): a hub whose one repository, `org/name`, holds the files of a folder."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    def make(folder: Path) -> Path:
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

        def snapshot_download(repo, *, allow_patterns, ignore_patterns, revision=None):
            assert repo == "org/name"
            for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
                (tmp_path / "snapshot" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / name, tmp_path / "snapshot" / name)
            return str(tmp_path / "snapshot")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return tmp_path / "snapshot"

    return make


def fetched(snapshot: Path) -> list[str]:
    return sorted(p.name for p in snapshot.rglob("*") if p.suffix in (".safetensors", ".bin") and "vae" in p.parts)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_hub_repository_with_halves_alone_gives_them(with_variant, sd15, hub, variant):
    snapshot = hub(with_variant)
    assert_exactly(open_source("org/name", variant=variant), sd15)
    assert fetched(snapshot) == ["diffusion_pytorch_model.fp16.safetensors"]


def test_of_a_hub_repository_with_everything_plain_safetensors_are_fetched(sd15, hub, tmp_path):
    folder = Path(shutil.copytree(sd15, tmp_path / "all"))
    for name in ("unet", "vae"):
        for other in ("fp16.safetensors", "bin", "non_ema.safetensors"):
            (folder / name / f"diffusion_pytorch_model.{other}").write_bytes(b"not to be fetched")
    snapshot = hub(folder)
    assert open_source("org/name").name == "org/name"
    assert fetched(snapshot) == ["diffusion_pytorch_model.safetensors"]


def test_a_hub_repository_of_pickles_gives_them(sd15, hub, tmp_path):
    from diffusers import StableDiffusionPipeline

    folder = tmp_path / "pickles"
    StableDiffusionPipeline.from_pretrained(sd15).save_pretrained(folder, safe_serialization=False)
    snapshot = hub(folder)
    assert_exactly(open_source("org/name"), sd15, torch.float32)
    assert fetched(snapshot) == ["diffusion_pytorch_model.bin"]


def test_what_the_hubs_cache_holds_already_is_not_taken_for_what_is_asked(sd15, hub, tmp_path):
    """A repository of plain safetensors and half pickles: the plain ones lie there when the halves are asked for."""
    folder = Path(shutil.copytree(sd15, tmp_path / "both"))
    for path in sorted(folder.rglob("*.safetensors")):
        state = {name: tensor.half() for name, tensor in load_file(path).items()}
        torch.save(state, path.with_name(("pytorch_model" if "text" in str(path.parent) else path.stem) + ".fp16.bin"))
    snapshot = hub(folder)
    open_source("org/name")
    assert fetched(snapshot) == ["diffusion_pytorch_model.safetensors"]
    assert_exactly(open_source("org/name", variant="fp16"), sd15)
    assert "diffusion_pytorch_model.fp16.bin" in fetched(snapshot)


def test_of_plain_pickles_and_half_safetensors_the_plain_ones_are_taken_as_from_a_folder(sd15, hub, tmp_path):
    from diffusers import StableDiffusionPipeline

    folder = tmp_path / "mixed"
    pipeline = StableDiffusionPipeline.from_pretrained(sd15)
    pipeline.save_pretrained(folder, safe_serialization=False)
    pipeline.to(torch.float16).save_pretrained(folder, variant="fp16")
    snapshot = hub(folder)
    assert_exactly(open_source("org/name"), sd15, torch.float32)
    assert fetched(snapshot) == ["diffusion_pytorch_model.bin"]


def test_of_a_repository_without_a_unet_no_weights_are_fetched(sd15, hub, tmp_path):
    folder = Path(shutil.copytree(sd15, tmp_path / "other"))
    (folder / "unet").rename(folder / "transformer")
    snapshot = hub(folder)
    with pytest.raises(UserError):
        open_source("org/name").config("unet")
    assert fetched(snapshot) == []


def test_a_shard_that_is_missing_is_an_error(with_variant):
    next(iter(sorted((with_variant / "unet").glob("*00002*.safetensors")))).unlink()
    with pytest.raises(UserError):
        open_source(with_variant).load("unet")


# DMD2 as published


@pytest.fixture(scope="module")
def dmd2_unet(sdxl):
    """Weights of a student: the teacher's, moved a little, float16, as a plain table."""
    torch.manual_seed(11)
    state = open_source(sdxl).load("unet").state_dict()
    return {key: (value + 0.01 * torch.randn_like(value)).half() for key, value in state.items()}


@pytest.mark.parametrize(
    ("name", "timesteps"),
    [("dmd2_sdxl_4step_unet_fp16.bin", [999, 749, 499, 249]), ("dmd2_sdxl_1step_unet_fp16.bin", [399])],
)
def test_a_dmd2_unet_brings_its_weights_and_its_sampling_constants(sdxl, dmd2_unet, tmp_path, name, timesteps):
    """tests/accel/test_control.py exports one and makes its image; here the decoder stands for the bundle."""
    torch.save(dmd2_unet, tmp_path / name)
    out = tmp_path / "bundle"
    command = ["export", str(sdxl), str(out), "--unet", str(tmp_path / name), "--steps", str(len(timesteps))]
    assert main([*command, "--components", "vae_decoder", "--profile", "static"]) == 0
    manifest = Bundle.open(out).manifest
    assert dict(manifest.sampler) == {"name": "dmd2", "timesteps": timesteps, "guidance": 0.0}
    assert manifest.source["parts"]["unet"]["name"] == name
    opened = open_source(sdxl, unet=tmp_path / name)
    loaded = opened.load("unet").state_dict()
    assert all(torch.equal(loaded[key], value.float()) for key, value in dmd2_unet.items())
    assert dict(opened.sampler()) == dict(manifest.sampler)


@pytest.mark.parametrize("scale", [1.0, 0.75])
def test_a_dmd2_lora_is_fused_at_a_scale_and_brings_its_constants(sdxl, tmp_path, scale):
    """kohya's names, float16, alpha an eighth of the rank, over linear layers, convolutions and time projections."""
    torch.manual_seed(12)
    unet = open_source(sdxl).load("unet")
    ends = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "proj_in",
        "proj_out",
        "ff.net.0.proj",
        "ff.net.2",
        "conv1",
        "conv2",
        "conv_shortcut",
        "downsamplers.0.conv",
        "upsamplers.0.conv",
        "time_emb_proj",
    )
    rank, state, changes = 8, {}, {}
    for name, module in unet.named_modules():
        if not name.endswith(ends):
            continue
        out_size, in_size, *kernel = module.weight.shape
        down, up = torch.randn(rank, in_size, *kernel).half(), torch.randn(out_size, rank, *[1] * len(kernel)).half()
        key = f"lora_unet_{name.replace('.', '_')}"
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        state[f"{key}.alpha"] = torch.tensor(rank / 8).half()
        delta = (up.float().flatten(1) @ down.float().flatten(1)).reshape(module.weight.shape)
        changes[f"{name}.weight"] = module.weight.detach() + scale / 8 * delta
    assert {len(value.shape) for value in changes.values()} == {2, 4}
    file = tmp_path / "dmd2_sdxl_4step_lora_fp16.safetensors"
    save_file(state, file)
    opened = open_source(sdxl, [f"{file}={scale}"])
    fused = opened.load("unet").state_dict()
    for key, value in fused.items():
        torch.testing.assert_close(value, changes.get(key, unet.state_dict()[key]), rtol=1e-5, atol=1e-5)
    assert opened.sampler() == {"name": "dmd2", "timesteps": [999, 749, 499, 249], "guidance": 0.0}


def test_a_unet_of_another_model_is_refused_with_keys(sdxl, sd15, tmp_path):
    state = open_source(sd15).load("unet").state_dict()
    torch.save(state, tmp_path / "unet.bin")
    with pytest.raises(UserError, match=r"does not fit.*add_embedding\.linear_1\.bias"):
        open_source(sdxl, unet=tmp_path / "unet.bin")


def test_another_vae_may_be_a_folder_or_a_file(sd15, tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(9)
    other = AutoencoderKL.from_config(AutoencoderKL.load_config(sd15 / "vae"))
    other.save_pretrained(tmp_path / "other")
    wanted = other.state_dict()
    renamed = {key.removeprefix("first_stage_model."): value.contiguous() for key, value in ldm_vae(wanted).items()}
    save_file(renamed, tmp_path / "vae-ft-mse.safetensors")
    for vae in (tmp_path / "other", tmp_path / "vae-ft-mse.safetensors"):
        found = open_source(sd15, vae=vae).load("vae").state_dict()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert np.isfinite(float(next(iter(wanted.values())).sum()))
    with pytest.raises(UserError, match="UNet2DConditionModel"):
        open_source(sd15, vae=sd15 / "unet")
