"""Published EDM weights: names and shapes written out, the network in plain equations, and what is read of files.

The layout is EDM's for its ADM networks. The equations are those of ADM (arXiv 2105.05233, section 3 and appendix A):
residual blocks with adaptive group norm, resampling inside residual blocks, attention in heads of 64 channels.
"""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from safetensors.torch import save_file

from accel.distill.edm import preconditioning
from accel.distill.edm import weights as edm_weights
from accel.errors import UserError

FULL = dict(size=64, width=192, multipliers=(1, 2, 3, 4), layers=3, attention=(32, 16, 8), classes=1000)
TWO = dict(size=8, width=128, multipliers=(1, 2), layers=2, attention=(4,), classes=10)
THREE = dict(size=8, width=128, multipliers=(1, 3, 1), layers=1, attention=(8, 2), classes=None)


# The published layout


def layout(size, width, multipliers, layers, attention, classes, channels=3) -> dict[str, tuple[int, ...]]:
    """Names, without `model.`, and shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    deep = 4 * width

    def conv(name, wide, out, kernel):
        shapes.update({f"{name}.weight": (out, wide, kernel, kernel), f"{name}.bias": (out,)})

    def linear(name, wide, out, bias=True):
        shapes.update({f"{name}.weight": (out, wide)} | ({f"{name}.bias": (out,)} if bias else {}))

    def norm(name, wide):
        shapes.update({f"{name}.weight": (wide,), f"{name}.bias": (wide,)})

    def block(name, wide, out, attends=False, resamples=False):
        norm(f"{name}.norm0", wide)
        conv(f"{name}.conv0", wide, out, 3)
        linear(f"{name}.affine", deep, 2 * out)
        norm(f"{name}.norm1", out)
        conv(f"{name}.conv1", out, out, 3)
        if resamples:
            shapes.update({f"{name}.{part}.resample_filter": (1, 1, 2, 2) for part in ("conv0", "skip")})
        if wide != out:
            conv(f"{name}.skip", wide, out, 1)
        if attends:
            norm(f"{name}.norm2", out)
            conv(f"{name}.qkv", out, 3 * out, 1)
            conv(f"{name}.proj", out, out, 1)

    linear("map_layer0", width, deep)
    linear("map_layer1", deep, deep)
    if classes:
        linear("map_label", classes, deep, bias=False)
    conv(f"enc.{size}x{size}_conv", channels, width, 3)
    skips, wide = [width], width
    for level, multiplier in enumerate(multipliers):
        at = f"{size >> level}x{size >> level}"
        if level:
            block(f"enc.{at}_down", wide, wide, resamples=True)
            skips.append(wide)
        for layer in range(layers):
            block(f"enc.{at}_block{layer}", wide, width * multiplier, size >> level in attention)
            wide = width * multiplier
            skips.append(wide)
    for level in reversed(range(len(multipliers))):
        at, out = f"{size >> level}x{size >> level}", width * multipliers[level]
        if level == len(multipliers) - 1:
            block(f"dec.{at}_in0", wide, wide, attends=True)
            block(f"dec.{at}_in1", wide, wide)
        else:
            block(f"dec.{at}_up", wide, wide, resamples=True)
        for layer in range(layers + 1):
            block(f"dec.{at}_block{layer}", wide + skips.pop(), out, size >> level in attention)
            wide = out
    norm("out_norm", wide)
    conv("out_conv", wide, channels, 3)
    return shapes


def published(case, prefix="model.", seed=0) -> dict[str, torch.Tensor]:
    """Random weights in that layout, none of them zero, so that every one counts."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in layout(**case).items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("resample_filter"):
            value = torch.full(shape, 0.25)
        elif name.endswith("weight") and "norm" in name:
            value = 1 + 0.2 * value
        elif name.endswith("weight") and "qkv" in name:
            value = value * 2 / shape[1] ** 0.5  # steep attention, so that heads and their order matter
        elif name.endswith("weight"):
            value = value / math.prod(shape[1:]) ** 0.5
        state[prefix + name] = value
    return state


# ADM in equations


def adm(state, case, x, embedding, one_hot=None):
    """F(x; c_noise) of the weights as they are published, in the dtype of x.

    Args:
        embedding: sinusoidal embedding of c_noise, [b, width].
    """
    w = {name.removeprefix("model."): value.to(x.dtype) for name, value in state.items()}
    size, levels, layers = case["size"], len(case["multipliers"]), case["layers"]

    def norm(name, h):
        return F.group_norm(h, min(32, h.shape[1] // 4), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def conv(name, h):
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], padding=w[f"{name}.weight"].shape[-1] // 2)

    def linear(name, h):
        return F.linear(h, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def attention(name, h):
        """softmax(q k^T / sqrt(64)) v; rows of qkv run over heads, then channels of a head, then q, k, v."""
        everything = conv(f"{name}.qkv", norm(f"{name}.norm2", h)).flatten(2)
        heads = []
        for head in everything.split(3 * 64, dim=1):
            q, k, v = head[:, 0::3], head[:, 1::3], head[:, 2::3]
            weight = (q.transpose(1, 2) @ k / 64**0.5).softmax(-1)
            heads.append(v @ weight.transpose(1, 2))
        return conv(f"{name}.proj", torch.cat(heads, 1).view_as(h))

    def block(name, h, resample=None):
        """AdaGN(h, y) = y_s GroupNorm(h) + y_b, with y_s = 1 + scale; the residual path is resampled too."""
        inner = F.silu(norm(f"{name}.norm0", h))
        if resample:
            inner, h = resample(inner), resample(h)
        inner = conv(f"{name}.conv0", inner)
        scale, shift = linear(f"{name}.affine", F.silu(y))[..., None, None].chunk(2, 1)
        inner = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", inner) * (1 + scale) + shift))
        h = (conv(f"{name}.skip", h) if f"{name}.skip.weight" in w else h) + inner
        return h + attention(name, h) if f"{name}.qkv.weight" in w else h

    def halved(h):
        return F.avg_pool2d(h, 2)

    def doubled(h):
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3)

    y = linear("map_layer1", F.silu(linear("map_layer0", embedding.to(x.dtype))))
    if one_hot is not None:
        y = y + linear("map_label", one_hot.to(x.dtype))
    h = conv(f"enc.{size}x{size}_conv", x)
    skips = [h]
    for level in range(levels):
        at = f"{size >> level}x{size >> level}"
        if level:
            h = block(f"enc.{at}_down", h, halved)
            skips.append(h)
        for layer in range(layers):
            h = block(f"enc.{at}_block{layer}", h)
            skips.append(h)
    for level in reversed(range(levels)):
        at = f"{size >> level}x{size >> level}"
        if level == levels - 1:
            h = block(f"dec.{at}_in1", block(f"dec.{at}_in0", h))
        else:
            h = block(f"dec.{at}_up", h, doubled)
        for layer in range(layers + 1):
            h = block(f"dec.{at}_block{layer}", torch.cat((h, skips.pop()), 1))
    return conv("out_conv", F.silu(norm("out_norm", h)))


def given(case, count=3):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 3, case["size"], case["size"], generator=generator, dtype=torch.float64)
    c_noise = torch.tensor([-1.5, 0.2, 1.09], dtype=torch.float64)[:count]
    return x, c_noise, torch.arange(count) if case["classes"] else None


def ours(state) -> UNet2DModel:
    unet = UNet2DModel(**edm_weights.config_of(state)).double().eval()
    unet.load_state_dict(edm_weights.convert(state))
    return unet


def difference(unet, state, case) -> float:
    """Largest difference, relative to the largest value, of the two networks on the same sinusoidal embedding."""
    x, c_noise, labels = given(case)
    one_hot = None if labels is None else F.one_hot(labels, case["classes"])
    with torch.no_grad():
        wanted = adm(state, case, x, unet.time_proj(c_noise), one_hot)
        got = unet(x, c_noise, class_labels=labels).sample
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("case", [TWO, THREE], ids=["classes", "no-classes"])
def test_network_of_diffusers_is_adms_graph_to_rounding(case):
    state = published(case)
    assert difference(ours(state), state, case) < 1e-12


def test_gradients_are_the_same_and_every_weight_has_one():
    """The gradient of each published weight, converted as if it were a weight, is that of what the weight became."""
    state = {name: value.double() for name, value in published(TWO).items()}
    unet = ours(state)
    x, c_noise, labels = given(TWO)
    learns = {name: value.requires_grad_(True) for name, value in state.items() if "resample_filter" not in name}
    adm(state, TWO, x, unet.time_proj(c_noise), F.one_hot(labels, 10)).square().mean().backward()
    unet(x, c_noise, class_labels=labels).sample.square().mean().backward()
    gradients = edm_weights.convert({name: value.grad for name, value in learns.items()})
    for name, parameter in unet.named_parameters():
        wanted = gradients[name]
        if name.endswith("to_k.bias"):  # moves all scores of a query alike, which softmax does not see
            assert wanted.abs().max() < 1e-12 and parameter.grad.abs().max() < 1e-12
            continue
        assert wanted.abs().max() > 1e-9, name
        assert (parameter.grad - wanted).abs().max() < 1e-9 * wanted.abs().max(), name


def test_order_of_the_heads_and_of_q_k_v_is_seen():
    state = published(TWO)
    name = "model.dec.4x4_in0.qkv.weight"
    rows = torch.arange(len(state[name]))
    head, channel, which = rows // 192, rows % 192 // 3, rows % 3
    by_thirds = which * 256 + head * 64 + channel  # q | k | v, as in ADM's newer order
    by_heads = head * 192 + which * 64 + channel  # heads of q | k | v, as in ADM's older order
    for order in (by_thirds, by_heads):
        wrong = ours(state | {name: state[name][order], name[:-6] + "bias": state[name[:-6] + "bias"][order]})
        assert difference(wrong, state, TWO) > 1e-3


def test_embedding_of_the_noise_level_is_cosines_then_sines_of_10000_to_the_minus_i():
    """diffusers computes it in float32, as EDM does; c_noise reaches from -1.55 to 1.1."""
    _, c_noise, _ = given(TWO)
    angle = c_noise[:, None] * 10_000.0 ** (-torch.arange(96, dtype=torch.float64) / 96)
    with torch.device("meta"):
        unet = UNet2DModel(**preconditioning.unet_config())
    assert torch.allclose(unet.time_proj(c_noise).double(), torch.cat((angle.cos(), angle.sin()), 1), atol=1e-6)


def test_groups_of_the_full_size_network_are_the_same_in_both():
    """EDM takes min(32, channels / 4) groups in each place, diffusers 32 in all."""
    with torch.device("meta"):
        unet = UNet2DModel(**preconditioning.unet_config())
    norms = [module for module in unet.modules() if isinstance(module, torch.nn.GroupNorm)]
    # Three for a block with attention (9 + 12 + 1), two for one without (8 residual, 6 resampling), and the last.
    assert len(norms) == 3 * (9 + 12 + 1) + 2 * (3 + 4 + 1 + 6) + 1
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(32, 1e-5)}
    assert all(min(32, norm.num_channels // 4) == 32 for norm in norms)


# Names


def test_every_weight_of_the_full_size_layout_is_used_once_and_fills_the_network():
    shapes = layout(**FULL)
    weights = {name: shape for name, shape in shapes.items() if not name.endswith("resample_filter")}
    assert len(shapes) - len(weights) == 12  # six resampling blocks, two boxes each
    state = {
        f"model.{name}": torch.empty(shape, device="meta") if name in weights else torch.full(shape, 0.25)
        for name, shape in shapes.items()
    }
    config = edm_weights.config_of(state)
    assert config == preconditioning.unet_config()
    names = edm_weights.key_map(config)
    assert set(names) == set(weights)
    targets = [target for parts in names.values() for target in parts]
    with torch.device("meta"):
        unet = UNet2DModel(**config)
    wanted = unet.state_dict()
    assert len(targets) == len(set(targets)) and set(targets) == set(wanted)
    made = edm_weights.convert(state)
    assert {name: value.shape for name, value in made.items()} == {name: value.shape for name, value in wanted.items()}
    assert sum(math.prod(shape) for shape in weights.values()) == preconditioning.IMAGENET64_PARAMETERS


@pytest.mark.parametrize("case", [TWO, THREE], ids=["classes", "no-classes"])
def test_config_is_read_off_the_names(case):
    assert edm_weights.config_of(published(case)) == preconditioning.unet_config(**case)


@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
def test_names_may_stand_behind_a_wrapper(prefix):
    made = edm_weights.convert(published(TWO, prefix))
    wanted = edm_weights.convert(published(TWO))
    assert made.keys() == wanted.keys() and all(torch.equal(made[name], wanted[name]) for name in made)


def test_conversion_leaves_its_input_alone():
    state = published(TWO)
    before = {name: value.clone() for name, value in state.items()}
    made = edm_weights.convert(state)
    assert all(value.is_contiguous() for value in made.values())
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in state)


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


def test_weights_that_are_not_edms_are_refused_by_name():
    state = published(TWO)
    cases = [
        (without(state, "model.out_norm.bias"), "1 weights are missing, first out_norm.bias"),
        (without(state, "model.map_layer0.weight"), "map_layer0.weight, is missing"),
        (without(state, "model.enc.8x8_conv.weight"), "such as enc.64x64_conv.weight, is missing"),
        (without(state, "model.enc.4x4_block1.conv0.weight"), "residual blocks"),
        (state | {"model.extra.weight": torch.zeros(1)}, "1 weights have no place, first extra.weight"),
        (state | {"head.weight": torch.zeros(1)}, "1 weights have no place, first head.weight"),
        (published(TWO, "real_unet.model.") | published(TWO, "fake_unet.model."), "holds 2 networks"),
        (state | {"model.enc.4x4_down.skip.resample_filter": torch.ones(1, 1, 4, 4) / 16}, "not the 2x2 box"),
        ({"conv_in.weight": torch.zeros(1)}, "not the weights of EDM"),
    ]
    for given_state, said in cases:
        with pytest.raises(UserError, match=said):
            edm_weights.convert(given_state)


def test_narrower_networks_than_diffusers_can_group_are_refused():
    with pytest.raises(UserError, match="64 channels wide; below 128"):
        edm_weights.convert(published(TWO | {"width": 64}))


def test_augmentation_is_left_out_as_nothing_reads_it():
    state = published(TWO)
    for shape in ((128, 9), (128, 0)):
        made = edm_weights.convert(state | {"model.map_augment.weight": torch.ones(shape)})
        assert made.keys() == edm_weights.convert(state).keys()


# Files


@pytest.mark.parametrize("name", ["pytorch_model.bin", "edm.pt", "edm.safetensors"])
def test_a_file_becomes_the_denoiser_of_its_weights(tmp_path, name):
    state = published(TWO)
    (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
    net = edm_weights.load(tmp_path / name)
    assert not net.training and all(parameter.requires_grad for parameter in net.parameters())
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    x, _, labels = given(TWO)
    sigma = torch.tensor([0.01, 1.0, 80.0], dtype=torch.float64)
    x = x * (1 + sigma.view(-1, 1, 1, 1))
    with torch.no_grad():
        got = net(x.float(), sigma.float(), labels)
        total = (sigma**2 + 0.25).view(-1, 1, 1, 1)
        angle = (sigma.log() / 4)[:, None] * 10_000.0 ** (-torch.arange(64, dtype=torch.float64) / 64)
        said = adm(state, TWO, x / total.sqrt(), torch.cat((angle.cos(), angle.sin()), 1), F.one_hot(labels, 10))
    wanted = 0.25 / total * x + 0.5 * sigma.view(-1, 1, 1, 1) / total.sqrt() * said
    assert (got - wanted).abs().max() < 2e-4 * wanted.abs().max()


def test_half_precision_files_become_float32(tmp_path):
    torch.save({name: value.half() for name, value in published(TWO).items()}, tmp_path / "half.pt")
    net = edm_weights.load(tmp_path / "half.pt")
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


class Bomb:
    """What runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "was-run"
    original = tmp_path / "edm-imagenet-64x64-cond-adm.pkl"
    original.write_bytes(pickle.dumps({"ema": Bomb(trap)}))
    renamed = tmp_path / "edm.bin"
    renamed.write_bytes(pickle.dumps({"ema": Bomb(trap)}, protocol=2))
    zipped = tmp_path / "edm.pt"
    torch.save({"ema": Bomb(trap)}, zipped)
    for path in (original, renamed, zipped):
        with pytest.raises(UserError, match="pickle with more in it than weights") as caught:
            edm_weights.load(path)
        assert "['ema'].state_dict()" in caught.value.fix and path.name in caught.value.fix
    assert not trap.exists()


def test_files_that_hold_no_network_are_refused(tmp_path):
    (tmp_path / "noise.bin").write_bytes(b"\x07" * 100)
    torch.save(published(TWO), tmp_path / "half.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "half.pt").read_bytes()[:100_000])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "noise.safetensors").write_bytes(b"\x07" * 100)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({"step": 3}, tmp_path / "numbers.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    whole = published(TWO)
    torch.save(whole | {"model.map_layer1.bias": torch.zeros(7)}, tmp_path / "shape.pt")
    cases = {
        "absent.bin": "no such file",
        "noise.bin": "it is not a file of torch",
        "empty.pt": "cannot be read",
        "noise.safetensors": "cannot be read",
        "half.pt": "cannot be read",
        "list.pt": "does not hold a dict of tensors",
        "numbers.pt": "does not hold a dict of tensors",
        "other.pt": "not the weights of EDM",
        "shape.pt": r"shape \[7\] where \[512\] belongs",
    }
    for name, said in cases.items():
        with pytest.raises(UserError, match=said):
            edm_weights.load(tmp_path / name)
