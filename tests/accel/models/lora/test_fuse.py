import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from accel.errors import UserError
from accel.files import sha256
from accel.models.lora import LoraFile, fuse, lora_file, made_for, read
from accel.models.source import open_source

pytest.importorskip("peft")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
PARTS = ("lora_down", "lora_up")
NAMES = ("unet", "text_encoder", "text_encoder_2")


def pipeline(folder: Path):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, local_files_only=True)


def parts(pipe) -> dict[str, torch.nn.Module]:
    return {name: pipe.components[name] for name in NAMES if pipe.components.get(name) is not None}


def make_lora(
    model: Path, out: Path, *, targets=ATTENTION, text=TEXT, rank=4, alpha=4, seed=0, with_alpha=True
) -> Path:
    """A LoRA with random weights, written by diffusers itself."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = pipeline(model)
    torch.manual_seed(seed)
    layers, adapted = {}, {}
    for name, network in parts(pipe).items():
        wanted = targets if name == "unet" else text
        if wanted:
            network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=wanted, init_lora_weights=False))
            layers[f"{name}_lora_layers"] = get_peft_model_state_dict(network)
            adapted[name] = network
    pipe.save_lora_weights(out, **layers, **(_collate_lora_metadata(adapted) if with_alpha else {}))
    return out / "pytorch_lora_weights.safetensors"


def as_kohya(file: Path, out: Path, alpha: float, sdxl: bool = False) -> Path:
    """The same LoRA with kohya's names and an alpha of its own."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    state = {}
    for key, value in load_file(file).items():
        if key.startswith("text_encoder") and "text_model." not in key:
            key = key.replace(".encoder.", ".text_model.encoder.", 1)
        state[key] = value
    state = convert_state_dict_to_kohya(state)
    if not sdxl:
        state = {key.replace("lora_te1_", "lora_te_"): value for key, value in state.items()}
    state = {key: torch.tensor(alpha) if key.endswith(".alpha") else value.contiguous() for key, value in state.items()}
    save_file(state, out)
    return out


def by_diffusers(model: Path, files: list[LoraFile]) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of all networks after diffusers loaded and fused the files."""
    pipe = pipeline(model)
    names = [f"lora{index}" for index in range(len(files))]
    for name, file in zip(names, files, strict=True):
        pipe.load_lora_weights(str(file.path.parent), weight_name=file.path.name, adapter_name=name)
    pipe.set_adapters(names, [file.scale for file in files])
    pipe.fuse_lora(components=list(parts(pipe)), adapter_names=names)
    pipe.unload_lora_weights()
    return {name: dict(network.state_dict()) for name, network in parts(pipe).items()}


def assert_same_weights(model: Path, files: list[LoraFile]) -> None:
    source, base = open_source(model, files), open_source(model)
    for name, wanted in by_diffusers(model, files).items():
        state, before = source.load(name).state_dict(), base.load(name).state_dict()
        assert state.keys() == wanted.keys()
        changed = 0
        for key, value in state.items():
            torch.testing.assert_close(value, wanted[key], rtol=0, atol=1e-5 * max(1.0, float(wanted[key].abs().max())))
            changed += not torch.equal(value, before[key])
        assert changed, name


@pytest.fixture(scope="module")
def lora15(sd15, tmp_path_factory) -> Path:
    return make_lora(sd15, tmp_path_factory.mktemp("lora15"), rank=4, alpha=6)


@pytest.fixture(scope="module")
def lora_xl(sdxl, tmp_path_factory) -> Path:
    return make_lora(sdxl, tmp_path_factory.mktemp("loraxl"), rank=4, alpha=6)


# ------------------------------------------------------------------------------------------------- equal to diffusers


@pytest.mark.parametrize("model, file", [("sd15", "lora15"), ("sdxl", "lora_xl")])
def test_fused_weights_are_those_of_diffusers(model, file, request):
    """Alpha is not the rank here, and the file says so in its metadata only."""
    model, file = (request.getfixturevalue(name) for name in (model, file))
    assert_same_weights(model, [LoraFile(file, 0.7)])


def test_without_metadata_alpha_is_the_rank(sd15, tmp_path):
    assert_same_weights(sd15, [LoraFile(make_lora(sd15, tmp_path, alpha=32, with_alpha=False))])


def test_convolutions_and_feed_forward_layers(sd15, tmp_path):
    wide = ["to_q", "ff.net.2", "conv1", "conv_in", "time_emb_proj", "proj_in", "conv_shortcut"]
    assert_same_weights(sd15, [LoraFile(make_lora(sd15, tmp_path, targets=wide, text=["fc1", "q_proj"], alpha=2))])


@pytest.mark.parametrize("model, file", [("sd15", "lora15"), ("sdxl", "lora_xl")])
def test_several_files_add_up(model, file, request, tmp_path):
    """One counts backwards; SDXL's are for both text encoders, SD1.5's second one for the UNet alone."""
    model, file = (request.getfixturevalue(name) for name in (model, file))
    text = ["k_proj", "fc1"] if model.name.endswith("sdxl") else None
    other = make_lora(model, tmp_path, targets=["to_k", "to_v"], text=text, rank=2, alpha=8, seed=3)
    assert_same_weights(model, [LoraFile(file, 0.5), LoraFile(other, -1.25)])


@pytest.mark.parametrize("model, file", [("sd15", "lora15"), ("sdxl", "lora_xl")])
def test_kohya_files(model, file, request, tmp_path):
    model, file = (request.getfixturevalue(name) for name in (model, file))
    kohya = as_kohya(file, tmp_path / "kohya.safetensors", alpha=2.0, sdxl=model.name.endswith("sdxl"))
    assert {key.split("_")[1] for key in load_file(kohya)} >= {"unet", "te1" if "sdxl" in model.name else "te"}
    assert_same_weights(model, [LoraFile(kohya)])


def test_every_kohya_module_has_an_alpha_of_its_own(sd15, lora15, tmp_path):
    """kohya: factor alpha / rank, per module; 1 where there is none."""
    file = as_kohya(lora15, tmp_path / "one.safetensors", alpha=4.0)
    tensors = load_file(file)
    names = sorted(key for key in tensors if key.endswith(".alpha"))
    for index, key in enumerate(names):
        tensors[key] = torch.tensor(float(index % 5 + 1))
    del tensors[names[0]]
    save_file(tensors, file)
    plain, found = read(LoraFile(lora15)), read(LoraFile(file))
    lookup = {f"lora_unet_{name.replace('.', '_')}": name for name in plain["unet"]}
    assert {f"lora_unet_{name}" for name in found["unet"]} == set(lookup)
    for index, key in enumerate(names):
        if key.startswith("lora_unet_"):
            name = lookup[key.removesuffix(".alpha")]
            factor = 1.0 if index == 0 else (index % 5 + 1) / 4
            update = found["unet"][name.replace(".", "_")]
            assert update.factor == factor
            np.testing.assert_array_equal(update.tensors["up"], plain["unet"][name].tensors["up"])


def test_block_numbers_of_the_original_sdxl_code(sdxl, tmp_path):
    """kohya trains SDXL on the original UNet, whose blocks are numbered through."""
    unet = open_source(sdxl).load("unet")
    one, two = "transformer_blocks_0", "transformer_blocks.0"
    places = {
        f"input_blocks_4_1_{one}_attn1_to_q": f"down_blocks.1.attentions.0.{two}.attn1.to_q",
        "input_blocks_8_1_transformer_blocks_1_attn2_to_k": (
            "down_blocks.2.attentions.1.transformer_blocks.1.attn2.to_k"
        ),
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        f"output_blocks_0_1_{one}_ff_net_0_proj": f"up_blocks.0.attentions.0.{two}.ff.net.0.proj",
        f"output_blocks_5_1_{one}_attn1_to_out_0": f"up_blocks.1.attentions.2.{two}.attn1.to_out.0",
    }
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for kohya, name in places.items():
        out, inside = unet.get_submodule(name).weight.shape
        tensors[f"lora_unet_{kohya}.lora_down.weight"] = torch.randn(2, inside, generator=generator)
        tensors[f"lora_unet_{kohya}.lora_up.weight"] = torch.randn(out, 2, generator=generator)
        tensors[f"lora_unet_{kohya}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "sgm.safetensors")
    file = LoraFile(tmp_path / "sgm.safetensors")
    fused = fuse(open_source(sdxl).load("unet"), "unet", [file]).state_dict()
    wanted = by_diffusers(sdxl, [file])["unet"]
    for name in unet.state_dict():
        torch.testing.assert_close(fused[name], wanted[name], rtol=1e-5, atol=1e-5)
        kept = name.removesuffix(".weight") not in places.values()
        assert torch.equal(fused[name], unet.state_dict()[name]) == kept


def test_a_half_precision_file_and_a_pickle(sd15, lora15, tmp_path):
    half = {key: value.half() for key, value in load_file(lora15).items()}
    save_file(half, tmp_path / "half.safetensors")
    torch.save(half, tmp_path / "half.bin")
    one, two = (open_source(sd15, [tmp_path / f"half.{kind}"]).load("unet") for kind in ("safetensors", "bin"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert next(one.parameters()).dtype == torch.float32


def test_dora_of_diffusers(sd15, tmp_path):
    """Layers of other ranks, and norms that have been learnt."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = pipeline(sd15)
    torch.manual_seed(4)
    wanted = [*ATTENTION, "conv1"]
    pattern = {"to_k": 2}
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=wanted, init_lora_weights=False, use_dora=True, rank_pattern=pattern
    )
    pipe.unet.add_adapter(config)
    for name, weight in pipe.unet.named_parameters():
        if "magnitude" in name:
            weight.data.mul_(1 + 0.3 * torch.rand_like(weight))
    layers = get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers, **_collate_lora_metadata({"unet": pipe.unet}))
    file = LoraFile(tmp_path / "pytorch_lora_weights.safetensors", 0.7)
    fused, theirs = open_source(sd15, [file]).load("unet").state_dict(), by_diffusers(sd15, [file])["unet"]
    base = open_source(sd15).load("unet").state_dict()
    for key, value in fused.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-5)
    assert sum(not torch.equal(value, base[key]) for key, value in fused.items()) > 10


def test_both_text_encoders_of_sdxl_where_only_some_layers_are_trained(sdxl, tmp_path):
    """diffusers 0.42 loses the q_proj of such a file."""
    generator, tensors, wanted = torch.Generator().manual_seed(0), {}, {}
    pipe = pipeline(sdxl)
    for prefix, name in (("lora_te1_", "text_encoder"), ("lora_te2_", "text_encoder_2")):
        for layer, module in getattr(pipe, name).named_modules():
            if layer.endswith(("q_proj", "fc1")):
                text = layer if layer.startswith("text_model") else f"text_model.{layer}"
                key = prefix + text.replace(".", "_")
                out, into = module.weight.shape
                down, up = torch.randn(4, into, generator=generator), torch.randn(out, 4, generator=generator)
                tensors |= {
                    f"{key}.lora_down.weight": down,
                    f"{key}.lora_up.weight": up,
                    f"{key}.alpha": torch.tensor(3.0),
                }
                wanted[name, layer] = module.weight.detach() + 0.6 * 3 / 4 * up @ down
    save_file(tensors, tmp_path / "l.safetensors")
    source = open_source(sdxl, [f"{tmp_path / 'l.safetensors'}=0.6"])
    made = {name: dict(source.load(name).named_modules()) for name in ("text_encoder", "text_encoder_2")}
    assert wanted
    for (name, layer), weight in wanted.items():
        torch.testing.assert_close(made[name][layer].weight, weight, rtol=1e-5, atol=1e-6)


def test_scales_by_block_are_those_of_set_adapters(sd15, lora15):
    scales = {"text_encoder": 0.3, "unet": {"down": 0.9, "mid": 0.0, "up": {"block_1": 0.6, "block_2": 0.25}}}
    pipe = pipeline(sd15)
    pipe.load_lora_weights(str(lora15.parent), adapter_name="it")
    ups = [i for i, block in enumerate(pipe.unet.up_blocks) if hasattr(block, "attentions")]
    scales["unet"]["up"] = {f"block_{i}": 0.5 / (i + 1) for i in ups}
    pipe.set_adapters(["it"], [scales])
    pipe.fuse_lora(components=list(parts(pipe)), adapter_names=["it"])
    pipe.unload_lora_weights()
    source = open_source(sd15, [lora_file({"path": lora15, "scale": scales})])
    for name, network in parts(pipe).items():
        own = source.load(name).state_dict()
        for key, value in network.state_dict().items():
            torch.testing.assert_close(own[key], value, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="no layer in unet.down_blocks.9") as caught:
        open_source(sd15, [lora_file({"path": lora15, "blocks": {"down_blocks.9": 1}})]).load("unet")
    assert "unet.down_blocks" in caught.value.fix


# ------------------------------------------------------------------------------------------------------- scale, digest


def test_scale_zero_is_the_base(sd15, lora15):
    base, zero = open_source(sd15), open_source(sd15, [f"{lora15}=0"])
    for name in ("unet", "text_encoder"):
        wanted = base.load(name).state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in zero.load(name).state_dict().items())


def test_the_digest_covers_files_and_scales(sd15, lora15, tmp_path):
    other = make_lora(sd15, tmp_path, seed=9)
    sources = [open_source(sd15, loras) for loras in ([], [lora15], [f"{lora15}=0.5"], [other], [lora15, other])]
    assert len({source.digest(["unet"]) for source in sources}) == len(sources)
    assert open_source(sd15).digest(["unet"]) == sources[0].digest(["unet"])


def test_a_file_is_given_as_file_folder_or_with_a_scale(lora15, tmp_path):
    assert lora_file(lora15) == lora_file(lora15.parent) == LoraFile(lora15, 1.0)
    assert lora_file(f"{lora15}=0.8") == lora_file(f"{lora15.parent}=0.8") == LoraFile(lora15, 0.8)
    odd = Path(shutil.copy(lora15, tmp_path / "a=b.safetensors"))
    assert lora_file(odd) == LoraFile(odd, 1.0) and lora_file(f"{odd}=-2") == LoraFile(odd, -2.0)


@pytest.mark.parametrize("number", ["much", "nan", "inf", ""])
def test_a_scale_that_is_none(lora15, number):
    with pytest.raises(UserError, match="invalid LoRA scale"):
        lora_file(f"{lora15}={number}")


# -------------------------------------------------------------------------------------------------- what does not fit


def refusal(model: Path, file: Path) -> str:
    """Nothing is changed by a file that is refused."""
    with pytest.raises(UserError) as caught:
        source = open_source(model, [file])
        [source.load(name) for name in ("text_encoder", "unet")]
    assert caught.value.fix
    return caught.value.message


def test_a_lora_for_sdxl_on_sd15(sd15, lora_xl):
    message = refusal(sd15, lora_xl)
    assert "no text_encoder_2" in message and "made for SDXL" in message
    assert "text_encoder_2.encoder" in message.replace("text_model.", "")


def test_a_lora_of_a_teacher_on_its_pruned_student(sd15, sd15_tiny, tmp_path):
    file = make_lora(sd15, tmp_path, text=None)
    message = refusal(sd15_tiny, file)
    assert "unet.down_blocks.0.attentions.1" in message and "no such layer" in message and "more" in message


def test_nothing_is_changed_when_a_part_does_not_fit(sd15, lora15, tmp_path):
    tensors = load_file(lora15)
    key = [key for key in tensors if key.startswith("unet.") and "down_blocks" in key and "lora_A" in key][-1]
    tensors[key] = torch.zeros(4, 999)
    save_file(tensors, tmp_path / "wide.safetensors")
    unet = open_source(sd15).load("unet")
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with pytest.raises(UserError, match=r"1 of its \d+ modules .*999"):
        fuse(unet, "unet", [LoraFile(tmp_path / "wide.safetensors")])
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


@pytest.mark.parametrize(
    "key, text",
    [
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight", "Diffusion 2.x"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", "Diffusion 2.x"),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight", "Diffusion 2.x"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "diffusion transformer"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "diffusion transformer"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "SDXL"),
        ("unet.conv_in.lora_A.weight", "do not show"),
    ],
)
def test_what_a_file_is_made_for(key, text):
    assert text in made_for({key: torch.zeros(4, 1024)})


@pytest.mark.parametrize(
    "tensors, text",
    [
        ({"lora_unet_a.hada_w1_a": torch.zeros(2, 2)}, "incomplete"),
        ({"lora_unet_a.dora_scale": torch.zeros(2)}, "incomplete"),
        ({"lora_unet_a.oft_blocks": torch.zeros(2, 2)}, "OFT"),
        ({"bundle_emb.word.string_to_param.*": torch.zeros(2, 2)}, "textual inversions"),
        ({"lora_unet_a.alpha": torch.tensor(1.0)}, "incomplete"),
        ({"lora_unet_a.lora_down.weight": torch.zeros(2, 2)}, "incomplete"),
        ({"unet.conv_in.lora_A.weight": torch.zeros(2, 2)}, "incomplete"),
        ({"unet.conv_in.weight": torch.zeros(2, 2)}, "not a LoRA weight"),
        ({"base_model.model.conv_in.lora_A.weight": torch.zeros(2, 2)}, "peft's own format"),
        (
            {f"lora_unet_{name}.{part}.weight": torch.zeros(2, 2) for name in ("a_b", "a.b") for part in PARTS},
            "no place",
        ),
        (
            {"transformer.x.lora_A.weight": torch.zeros(2, 2), "transformer.x.lora_B.weight": torch.zeros(2, 2)},
            "diffusion transformer",
        ),
    ],
)
def test_files_that_are_no_lora_of_ours(sd15, tmp_path, tensors, text):
    save_file(tensors, tmp_path / "odd.safetensors")
    message = refusal(sd15, tmp_path / "odd.safetensors")
    assert text in message and "odd.safetensors" in message


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_damaged_file_and_a_missing_one(sd15, lora15, tmp_path):
    for size in (4, 1000, lora15.stat().st_size - 100):
        (tmp_path / "cut.safetensors").write_bytes(lora15.read_bytes()[:size])
        assert re.search(
            "cut.safetensors is (truncated|not a safetensors file)", refusal(sd15, tmp_path / "cut.safetensors")
        )
    assert "no such LoRA file" in refusal(sd15, tmp_path / "nothing.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    assert "holds no weights" in refusal(sd15, tmp_path / "empty.safetensors")


def test_a_pickle_with_code_in_it_is_refused_and_not_run(sd15, tmp_path):
    torch.save({"x.lora_A.weight": torch.zeros(1), "callback": Payload(tmp_path / "proof")}, tmp_path / "evil.bin")
    assert "refused" in refusal(sd15, tmp_path / "evil.bin") and not (tmp_path / "proof").exists()


def test_weights_that_are_not_finite(sd15, lora15, tmp_path):
    tensors = load_file(lora15)
    key = next(key for key in tensors if key.startswith("unet."))
    save_file(tensors | {key: torch.full_like(tensors[key], torch.nan)}, tmp_path / "nan.safetensors")
    assert "not finite" in refusal(sd15, tmp_path / "nan.safetensors")


# -------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("model, file", [("sd15", "lora15"), pytest.param("sdxl", "lora_xl", marks=pytest.mark.slow)])
def test_the_exported_unet_is_the_one_diffusers_fused(model, file, request, tmp_path):
    import accel
    from accel.cli import main
    from accel.parity import relative_l2

    model, file = (request.getfixturevalue(name) for name in (model, file))
    out = tmp_path / "bundle"
    profile = ("--profile", "batch=1-4,size=64-128")  # as `sd15_bundle`, so that the graph is there
    assert main(["export", str(model), str(out), "--lora", f"{file}=0.7", *profile, "--components", "unet"]) == 0
    manifest = json.loads((out / "accel.json").read_text())
    assert manifest["source"]["loras"] == [{"name": file.name, "sha256": sha256(file), "scale": 0.7}]

    pipe = pipeline(model)
    pipe.load_lora_weights(str(file.parent), adapter_name="it")
    pipe.set_adapters(["it"], [0.7])
    pipe.fuse_lora(components=list(parts(pipe)), adapter_names=["it"])
    engine = accel.load_engine(out, "unet", engine="onnxruntime")
    generator = np.random.default_rng(0)
    width = pipe.unet.config.cross_attention_dim
    feeds = {"sample": (2, 4, 16, 16), "encoder_hidden_states": (2, 77, width)}
    if "text_encoder_2" in parts(pipe):
        feeds |= {"text_embeds": (2, 32), "time_ids": (2, 6)}
    feeds = {name: generator.normal(size=shape).astype(np.float32) for name, shape in feeds.items()}
    ours = engine(**feeds, timestep=np.array(500, np.float32))["out_sample"]
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    added = {name: tensors[name] for name in ("text_embeds", "time_ids") if name in tensors} or None
    call = dict(added_cond_kwargs=added, return_dict=False)
    with torch.no_grad():
        theirs = pipe.unet(tensors["sample"], 500, tensors["encoder_hidden_states"], **call)[0].numpy()
        base = pipeline(model).unet(tensors["sample"], 500, tensors["encoder_hidden_states"], **call)[0].numpy()
    assert relative_l2(ours, theirs) < 1e-4
    assert relative_l2(base, theirs) > 1e-2


def test_a_lora_that_does_not_fit_leaves_no_bundle(sd15, lora_xl, tmp_path, capsys):
    from accel.cli import main

    assert main(["export", str(sd15), str(tmp_path / "out"), "--lora", str(lora_xl)]) == 1
    assert "made for SDXL" in capsys.readouterr().err and not list(tmp_path.iterdir())
