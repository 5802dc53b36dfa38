"""Files of IP-Adapters: what is read as diffusers reads it, and what is refused before an export."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from accel.errors import Notice, UserError
from accel.export.int8.settings import Int8Settings
from accel.export.pipeline import export_pipeline
from accel.models import networks
from accel.models.ip_adapter import files
from accel.models.ip_adapter import unet as ip_adapter
from accel.models.source import open_source
from accel.models.source_networks import unet_inputs


@pytest.fixture
def adapter(smallest, ip_adapter_maker, tmp_path):
    """A plain adapter for the smallest pipeline, with its image encoder beside it."""
    return ip_adapter_maker(smallest, tmp_path)


def opened(source, file):
    return open_source(source, ip_adapter=file, image_encoder=file.parent / "image_encoder")


def refusal(source, file, out) -> str:
    with pytest.raises(UserError) as error:
        export_pipeline(opened(source, file), out, profile="batch=1,size=32", components=("unet",))
    assert error.value.fix and not out.exists()
    return error.value.message


@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
def test_safetensors_and_a_pickle_in_groups_give_what_diffusers_makes(smallest, ip_adapter_weights, tmp_path, kind):
    state = ip_adapter_weights(smallest, kind)
    flat = {f"{group}.{name}": tensor for group, tensors in state.items() for name, tensor in tensors.items()}
    save_file({name: tensor.half() for name, tensor in flat.items()}, tmp_path / "a.safetensors")
    torch.save({g: {n: t.half() for n, t in tensors.items()} for g, tensors in state.items()}, tmp_path / "a.bin")
    theirs = UNet2DConditionModel.from_pretrained(smallest / "unet")
    theirs._load_ip_adapter_weights([{g: {n: t.half() for n, t in ts.items()} for g, ts in state.items()}])
    for name in ("a.safetensors", "a.bin"):
        own = UNet2DConditionModel.from_pretrained(smallest / "unet")
        ip_adapter.add(own, files.read(tmp_path / name), name)
        found, expected = own.state_dict(), theirs.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in found)
        assert {value.dtype for value in found.values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
def test_a_config_and_weights_make_the_same_network_again(smallest, ip_adapter_weights, tmp_path, kind):
    model = UNet2DConditionModel.from_pretrained(smallest / "unet")
    ip_adapter.add(model, ip_adapter_weights(smallest, kind), "file")
    network = networks.unet(model.eval(), image_tokens=5)
    networks.save_config(network, tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = networks.rebuild(
        "unet", tmp_path / "config.json", tmp_path / "model.safetensors", network.inputs, network.outputs
    )
    width = network.inputs[-2].shape[-1]
    shown = (2, 3, 24) if kind == "plain" else (2, 3, 5, width)
    feeds = dict(sample=torch.randn(2, 4, 8, 8), timestep=torch.tensor(500.0))
    feeds |= dict(encoder_hidden_states=torch.randn(2, 77, 32), image_embeds=torch.randn(shown))
    with torch.no_grad():
        for scale in (torch.zeros(2), torch.tensor([0.6, 1.0])):
            (expected,) = network.module(**feeds, ip_adapter_scale=scale)
            (found,) = again(**feeds, ip_adapter_scale=scale)
            assert torch.equal(found, expected)
    assert json.loads((tmp_path / "config.json").read_text())["ip_adapter"] == ip_adapter.described(again.model)


def change(key, value):
    def apply(record):
        record[key] = value

    return apply


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (change("projection", "Linear"), "names no image projection"),
        (change("projection", ["ImageProjection"]), "names no image projection"),
        (change("projection", "IPAdapterPlusImageProjection"), "has exactly"),
        (change("image_embed_dim", 0), "image_embed_dim is 0"),
        (change("image_embed_dim", 24.5), "image_embed_dim is 24.5"),
        (change("image_embed_dim", True), "image_embed_dim is True"),
        (change("num_image_text_embeds", 1 << 40), "num_image_text_embeds is 1099511627776"),
        (change("cross_attention_dim", 48), "does not fit"),
        (lambda record: record.pop("cross_attention_dim"), "has exactly"),
        (change("auto_map", "evil.py"), "does not fit|has exactly|would load code"),
    ],
)
def test_a_config_that_describes_no_adapter_is_refused(smallest, ip_adapter_weights, tmp_path, edit, words):
    model = UNet2DConditionModel.from_pretrained(smallest / "unet")
    ip_adapter.add(model, ip_adapter_weights(smallest), "file")
    network = networks.unet(model)
    networks.save_config(network, tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    edit(config["ip_adapter"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    build = (tmp_path / "config.json", tmp_path / "model.safetensors", network.inputs, network.outputs)
    if "auto_map" in config["ip_adapter"]:  # stripped, like everywhere
        with pytest.warns(Notice, match="would load code"):
            networks.rebuild("unet", *build)
        return
    with pytest.raises(UserError, match=words):
        networks.rebuild("unet", *build)


def test_an_adapter_of_another_family_is_refused_with_both_sides(smallest, sdxl, sd15, ip_adapter_maker, tmp_path):
    file = ip_adapter_maker(sdxl, tmp_path / "xl")
    message = refusal(smallest, file, tmp_path / "out")
    assert "context of width 64" in message and "context of width 32" in message
    fewer = ip_adapter_maker(sd15, tmp_path / "sd15")
    message = refusal(smallest, fewer, tmp_path / "out")
    assert "it has 16 cross-attentions" in message and "this UNet has 3 cross-attentions" in message


@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
def test_another_image_encoder_is_refused_with_both_widths(smallest, ip_adapter_maker, tmp_path, kind):
    file = ip_adapter_maker(smallest, tmp_path, kind)
    path = tmp_path / "image_encoder" / "config.json"
    config = json.loads(path.read_text()) | {"projection_dim": 40, "hidden_size": 48}
    path.write_text(json.dumps(config))
    theirs, own = (24, 40) if kind == "plain" else (32, 48)
    message = refusal(smallest, file, tmp_path / "out")
    assert f"of width {theirs}, and the image encoder gives {own}" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["image_proj"].update({"perceiver_resampler.proj_in.weight": torch.ones(2, 2)}), "Face ID"),
        (lambda s: s["ip_adapter"].update({"0.to_k_lora.down.weight": torch.ones(2, 2)}), "Face ID"),
        (lambda s: s.update(image_proj={"proj.0.weight": torch.ones(2, 2), "norm.weight": torch.ones(2)}), "Face ID"),
        (lambda s: s.update(image_proj={}), "no image_proj weights"),
        (lambda s: s.update(ip_adapter={}), "no ip_adapter weights"),
        (lambda s: s.update(image_proj={"x.weight": torch.ones(2)}), "of no known kind"),
        (lambda s: s["ip_adapter"].pop("3.to_v_ip.weight"), "is for another UNet"),
        (lambda s: s["ip_adapter"].update({"3.to_v_ip.weight": torch.ones(3)}), "is for another UNet"),
        (lambda s: s["ip_adapter"].update({"3.to_v_ip.bias": torch.ones(3)}), "that no IP-Adapter has"),
        (lambda s: s["image_proj"].pop("proj.bias"), "does not fit this UNet"),
        (lambda s: s["image_proj"].update({"proj.weight": torch.ones(128)}), "of width 128"),
        (lambda s: s["image_proj"].update({"norm.weight": torch.ones(31)}), "does not fit this UNet"),
        (lambda s: s["image_proj"].update({"more.weight": torch.ones(3)}), "does not fit this UNet"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_odd_files_are_refused_in_words(
    smallest, adapter, ip_adapter_weights, tmp_path, change, words, suffix, stored_graphs
):
    state = ip_adapter_weights(smallest)
    change(state)
    path = tmp_path / f"odd{suffix}"
    if suffix == ".bin":
        torch.save(state, path)
    else:
        save_file({f"{g}.{n}": t.contiguous() for g, ts in state.items() for n, t in ts.items()}, path)
    assert words in refusal(smallest, path, tmp_path / "out")


class Code:
    def __reduce__(self):
        return print, ("code of a file",)


def test_files_that_are_none_are_refused(smallest, adapter, tmp_path, capsys):
    (tmp_path / "code.bin").write_bytes(pickle.dumps({"image_proj": {"proj.weight": Code()}, "ip_adapter": {}}))
    (tmp_path / "cut.safetensors").write_bytes(adapter.read_bytes()[:-9])
    (tmp_path / "list.bin").write_bytes(b"[1, 2]")
    torch.save({"image_proj": 3, "ip_adapter": {"1": {"x": torch.ones(1)}}}, tmp_path / "deep.bin")
    for name, words in (
        ("code.bin", "could run code"),
        ("cut.safetensors", "truncated"),
        ("list.bin", "cannot be read"),
        ("deep.bin", "holds no weights"),
        ("none.safetensors", "no such file"),
        ("image_encoder", "is not a weight file"),
    ):
        with pytest.raises(UserError) as error:
            opened(smallest, tmp_path / name)
        assert any(part in error.value.message for part in (words, "could run code")) and error.value.fix, name
    assert "code of a file" not in capsys.readouterr().out


def test_an_adapter_and_an_image_encoder_need_each_other(smallest, adapter, tmp_path):
    with pytest.raises(UserError, match="has no image encoder") as error:
        open_source(smallest, ip_adapter=adapter)
    assert "--image-encoder FOLDER" in error.value.fix
    with pytest.raises(UserError, match="without an IP-Adapter"):
        open_source(smallest, image_encoder=tmp_path / "image_encoder")
    with pytest.raises(UserError, match="CLIPVisionModelWithProjection") as error:
        open_source(smallest, ip_adapter=adapter, image_encoder=smallest / "text_encoder")
    (tmp_path / "image_encoder" / "config.json").write_text(
        json.dumps({"architectures": ["CLIPVisionModelWithProjection"], "patch_size": 0})
    )
    with pytest.raises(UserError, match="does not describe a CLIPVisionModelWithProjection"):
        unet_inputs(opened(smallest, adapter), 77)


def test_a_pipeline_saved_by_diffusers_brings_its_image_encoder_and_no_adapter(smallest, adapter, tmp_path):
    """diffusers saves the encoder, and of the UNet what it does not load itself."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPVisionModelWithProjection

    pipe = StableDiffusionPipeline.from_pretrained(smallest)
    pipe.register_modules(image_encoder=CLIPVisionModelWithProjection.from_pretrained(adapter.parent / "image_encoder"))
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=adapter.name)
    pipe.save_pretrained(tmp_path / "saved")
    plain = open_source(tmp_path / "saved")
    assert not plain.has("image_encoder")
    with pytest.warns(Notice, match="holds weights of an IP-Adapter, which are left out"):
        plain.load("unet")
    both = open_source(tmp_path / "saved", ip_adapter=adapter)
    assert both.has("image_encoder") and unet_inputs(both, 77).image_tokens == 0
    assert both.digest(["unet"]) != plain.digest(["unet"])


def test_int8_is_refused_before_the_export(smallest, adapter, tmp_path):
    with pytest.raises(UserError, match="IP-Adapter cannot be quantized"):
        export_pipeline(opened(smallest, adapter), tmp_path / "out", precision="int8", profile="batch=1,size=32")
    assert Int8Settings().requires("unet") and not (tmp_path / "out").exists()
