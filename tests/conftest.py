"""Small pipelines with random weights: real diffusers folders, real loading code, seconds instead of minutes."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without it MKL rounds by how an array lies in memory, on processors of AMD, and equal inputs give unequal bits.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Tests never touch the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["ACCEL_CACHE"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def _nothing_is_tuned(_own_cache):
    """No test leaves what `accel tune` found: `auto` would follow it in later tests, to bfloat16 where that is fast."""
    yield
    assert not (_own_cache / "tuned").exists(), "a test that tunes needs an ACCEL_CACHE of its own"


@pytest.fixture(scope="module", autouse=True)
def _nothing_old_is_collected():
    """What is alive before a file's tests is no garbage: collections, which every export asks for, look at the rest."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem) -> bool | None:
    """Tests marked `own_process` run in one: they fork, and threads of engines loaded before would not survive."""
    if pyfuncitem.get_closest_marker("own_process") is None or "ACCEL_OWN_PROCESS" in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    environment = os.environ | {"ACCEL_OWN_PROCESS": "1"}
    done = subprocess.run(command, cwd=pyfuncitem.config.rootpath, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return True


def make_images(folder: Path, count: int, size: tuple[int, int] = (64, 64)) -> Path:
    """Images of noise, (height, width) = size, with captions about cats and dogs."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"the {'cat' if number % 2 else 'dog'}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def twelve_images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("twelve"), 12, (70, 80))


@pytest.fixture(scope="session")
def six_images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("six"), 6)


def make_tokenizer(folder: Path, pad: str = "<|endoftext|>"):
    """A CLIPTokenizer over bytes with a few merges, so that words are one or several tokens."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("t", "h"), ("th", "e</w>")]
    words = [*alphabet, *(f"{c}</w>" for c in alphabet), *(a + b for a, b in merges)]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_text_encoder(vocab: int, width: int, *, projection: int | None = None, seed: int = 0):
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=projection or width,
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 1,
        pad_token_id=vocab - 1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def make_vae(seed: int = 0):
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.7,
    ).eval()


SD15_SCHEDULER = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    set_alpha_to_one=False,
    skip_prk_steps=True,
)


def make_sd15(folder: Path, topology: str = "sd15") -> Path:
    """An SD1.5-topology pipeline, narrowed: 64 px images, 16x16 latents."""
    from accel.models.topology import narrowed

    channels = (8, 16, 16, 16)[: 3 if "tiny" in topology else 4]
    return make_sd1(folder, **narrowed(topology, channels, sample_size=16))


def make_smallest(folder: Path) -> Path:
    """A pipeline of SD1's family with every kind of layer in two stages of one: 32 px images, 8x8 latents."""
    return make_sd1(
        folder,
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        mid_block_type=None,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def make_small(folder: Path) -> Path:
    """A pipeline of SD1's family in two stages of one layer around a middle block: 64 px images, 16x16 latents."""
    return make_sd1(
        folder,
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def make_sd1(folder: Path, **config) -> Path:
    """A pipeline of SD1's family around a UNet of this config."""
    import torch
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = make_tokenizer(folder / "tokenizer-made")
    torch.manual_seed(1)
    unet = UNet2DConditionModel(**config | dict(cross_attention_dim=32, norm_num_groups=4, attention_head_dim=4)).eval()
    pipe = StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(len(tokenizer), 32),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(**SD15_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def make_sdxl(folder: Path, topology: str = "sdxl", **overrides) -> Path:
    """A pipeline of SDXL's family, narrowed: two text encoders, time ids, 64 px images."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    from accel.models.topology import narrowed

    one, two = make_tokenizer(folder / "one"), make_tokenizer(folder / "two", pad="!")
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        **narrowed(
            topology,
            (8, 16, 16),
            sample_size=16,
            cross_attention_dim=64,
            norm_num_groups=4,
            attention_head_dim=(2, 4, 4),
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
            **({"transformer_layers_per_block": (1, 1, 2)} if topology == "sdxl" else {}),
            **overrides,
        )
    ).eval()
    pipe = StableDiffusionXLPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(len(one), 32),
        tokenizer=one,
        text_encoder_2=make_text_encoder(len(two), 32, projection=32, seed=5),
        tokenizer_2=two,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def completed(bundle, base):
    """A bundle with those components of the base that it lacks: what exporting them again would give, at no cost.

    Both are `accel.bundle.Bundle`s of the same text encoders and VAE.
    """
    from dataclasses import replace

    from accel.bundle import Bundle, finalize

    own, others = bundle.manifest.components, base.manifest.components
    lacking = {name: record for name, record in others.items() if name not in own}
    for record in lacking.values():
        shutil.copytree(base.path / record.folder, bundle.path / record.folder)
    finalize(bundle.path, replace(bundle.manifest, components={**lacking, **own}))
    return Bundle.open(bundle.path)


@pytest.fixture(scope="session", name="completed")
def _completed():
    return completed


@pytest.fixture(scope="session")
def stored_graphs():
    """Exports trace each network once, in whichever worker and run."""
    from accel.export.graph import trace

    once = _fake("made_once")
    real = trace.export_graph
    trace.export_graph = _fake("stored_graphs").remembering(real, partial(once.made_once, once.store()))
    yield
    trace.export_graph = real


@pytest.fixture(scope="session")
def sd15(stored_graphs, tmp_path_factory) -> Path:
    return make_sd15(tmp_path_factory.mktemp("sd15") / "tiny-sd15")


@pytest.fixture(scope="session")
def sd15_tiny(stored_graphs, tmp_path_factory) -> Path:
    return make_sd15(tmp_path_factory.mktemp("sd15tiny") / "tiny-sd15-tiny", "sd15-tiny")


@pytest.fixture(scope="session")
def smallest(stored_graphs, tmp_path_factory) -> Path:
    return make_smallest(tmp_path_factory.mktemp("smallest") / "smallest")


@pytest.fixture(scope="session")
def small(stored_graphs, tmp_path_factory) -> Path:
    return make_small(tmp_path_factory.mktemp("small") / "small")


@pytest.fixture(scope="session")
def sdxl(stored_graphs, tmp_path_factory) -> Path:
    return make_sdxl(tmp_path_factory.mktemp("sdxl") / "tiny-sdxl")


@pytest.fixture(scope="session")
def sdxl_maker():
    """(folder, topology="sdxl", **overrides of the UNet's config) -> folder."""
    return make_sdxl


def exported(source: Path, out: Path, **options) -> Path:
    """A pipeline of this file as a bundle, a copy of the one that was made once for these options."""
    from accel.export.pipeline import export_pipeline

    once = _fake("made_once")

    def make(folder: Path) -> None:
        export_pipeline(source, folder / "bundle", **options)

    made = once.made_once(once.store(), once.digest(source.name, sorted(options.items())), make)
    return Path(shutil.copytree(made / "bundle", out))


@pytest.fixture(scope="session")
def sd15_bundle(sd15, tmp_path_factory) -> Path:
    """The narrowed SD1.5 pipeline as an fp32 bundle: batch 1-4, 64 to 128 px."""
    sampler = {"name": "dpmpp_2m", "steps": 4, "guidance": 5}
    out = tmp_path_factory.mktemp("bundle") / "sd15"
    return exported(sd15, out, profile="batch=1-4,size=64-128", sampler=sampler)


@pytest.fixture(scope="session")
def sdxl_bundle(sdxl, tmp_path_factory) -> Path:
    """The narrowed SDXL pipeline as an fp32 bundle without VAE encoder: batch 1-2, 64 px high, 64 to 96 px wide."""
    return exported(
        sdxl,
        tmp_path_factory.mktemp("bundle") / "sdxl",
        profile="batch=1-2,height=64,width=64-96",
        components=("text_encoder", "unet", "vae_decoder"),
        sampler={"name": "euler", "steps": 3, "guidance": 5.0},
    )


def make_edm(folder: Path, **config) -> Path:
    """An EDM model of 16 px, grey, ten classes, 0.8 M random weights; `config` is of `preconditioning.unet_config`."""
    import torch
    from diffusers import UNet2DModel

    from accel.distill.edm import preconditioning
    from accel.distill.edm.source import save_edm

    small = dict(size=16, channels=1, width=32, multipliers=(1, 2), layers=1, attention=(8,), head_width=32, classes=10)
    torch.manual_seed(0)
    unet = UNet2DModel(**preconditioning.unet_config(**small | config))
    for parameter in unet.parameters():  # an untrained network says 0 in many places
        torch.nn.init.normal_(parameter, std=0.05)
    folder.mkdir()
    save_edm(folder, preconditioning.Preconditioned(unet))
    return folder


@pytest.fixture(scope="session")
def edm_maker():
    """(folder, **config) -> folder."""
    return make_edm


@pytest.fixture(scope="session")
def edm(tmp_path_factory) -> Path:
    return make_edm(tmp_path_factory.mktemp("edm") / "tiny-edm")


@pytest.fixture(scope="session")
def edm_bundle(edm, stored_graphs, tmp_path_factory) -> Path:
    """The EDM model as an fp32 bundle: batch 1-4, Heun in 40 steps."""
    return exported(edm, tmp_path_factory.mktemp("bundle") / "edm")


@pytest.fixture(autouse=True)
def _as_loud_as_before(monkeypatch):
    """What a `--quiet` of another test told the process and its children."""
    monkeypatch.delenv("ACCEL_QUIET", raising=False)


@pytest.fixture(scope="session")
def smallest_bundle(smallest, tmp_path_factory) -> Path:
    """The smallest pipeline as an fp32 bundle: batch 1-4, 32 to 64 px."""
    sampler = {"name": "dpmpp_2m", "steps": 4, "guidance": 5}
    out = tmp_path_factory.mktemp("bundle") / "smallest"
    return exported(smallest, out, profile="batch=1-4,size=32-64", sampler=sampler)


@pytest.fixture(scope="session")
def aoti_bundle(smallest_bundle, tmp_path_factory) -> Path:
    """The smallest bundle with engine files of AOTInductor for the CPU, of every network that an image needs."""
    from accel.bundle import Bundle
    from accel.export.aoti.build import build
    from accel.trt import engine_files

    once = _fake("made_once")

    def make(folder: Path) -> None:
        copy = Bundle.open(shutil.copytree(smallest_bundle, folder / "bundle"))
        build(copy, ("text_encoder", "unet", "vae_decoder"), device="cpu")

    made = once.made_once(once.store(), once.digest("aoti", smallest_bundle.name), make)
    out = Path(shutil.copytree(made / "bundle", tmp_path_factory.mktemp("bundle") / "aoti"))
    for file in engine_files.find(Bundle.open(out)):  # the user of this session has another key
        engine_files.sign(file.path, file.text)
    return out


@pytest.fixture
def bundle_copy(sd15_bundle, tmp_path) -> Path:
    """A bundle that a test may break."""
    return Path(shutil.copytree(sd15_bundle, tmp_path / "bundle"))


@pytest.fixture
def edit_manifest():
    """Change a bundle's manifest in place: edit_manifest(bundle, lambda data: ...)."""

    def edit(bundle: Path, change) -> None:
        path = bundle / "accel.json"
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return edit


def _fake(name: str):
    """`fakes/NAME.py` as a module."""
    full = f"fake_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).parent / "fakes" / f"{name}.py")
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


@pytest.fixture(scope="session")
def fakes():
    """fakes(name): a module of `tests/fakes`."""
    return _fake


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, empty, with an account whose token this process has; its cache is empty too."""
    from huggingface_hub import constants, hf_api

    from accel.bundle.hub import origin

    made = _fake("hub").Hub()
    settings = {
        "ENDPOINT": made.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{made.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    }
    settings |= {"HF_HUB_CACHE": str(tmp_path / "hub-cache"), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", made.url)
    monkeypatch.setenv("HF_TOKEN", _fake("hub").TOKEN)
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "accel-cache"))
    monkeypatch.setattr(origin, "_answers", {})
    yield made
    made.close()


@pytest.fixture(scope="session")
def vae_maker():
    return make_vae


def _install_fake_tensorrt(version: str, monkeypatch, cache: Path):
    """A fake TensorRT of a version in the place of the real one, and a fake GPU. Builds happen in this process."""
    from accel.trt import cuda, library

    fake_cuda = _fake("cuda")
    module = _fake("tensorrt").make(version)
    module._world.cuda = fake_cuda.Cuda
    engine = module.__name__.replace("_", "-")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    installed = library.installed
    monkeypatch.setattr(
        library, "installed", lambda name="tensorrt": module.__version__ if name == engine else installed(name)
    )
    compiler = import_module("accel.export.tensorrt.compiler")
    engines = [import_module(f"accel.engines.{name}") for name in ("tensorrt", "tensorrt_rtx")]
    for place in (cuda, compiler, import_module("accel.export.tensorrt.build"), *engines):
        monkeypatch.setattr(place, "Cuda", fake_cuda.Cuda)

    def compile_here(job, progress):
        done = compiler.compile_graph(job, progress)
        return replace(done, data=bytes(done.data))

    for place in ("build", "inspection"):
        monkeypatch.setattr(f"accel.export.tensorrt.{place}.compile_apart", compile_here)
    monkeypatch.setenv("ACCEL_CACHE", str(cache))
    return module


@pytest.fixture(params=["10.16", "11.4"])
def tensorrt(request, monkeypatch, tmp_path):
    """A fake `tensorrt` module (test double) of two versions, and a fake GPU; `tensorrt._world` arranges failures."""
    return _install_fake_tensorrt(request.param, monkeypatch, tmp_path / "cache")


@pytest.fixture
def tensorrt_rtx(monkeypatch, tmp_path):
    """A fake `tensorrt_rtx` module (test double), a fake RTX card, and a driver."""
    from accel.trt import library

    module = _install_fake_tensorrt("rtx-1.7", monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(library, "has_driver", lambda: True)
    monkeypatch.setattr(_fake("cuda").Cuda, "capability", "8.9")
    return module


@pytest.fixture
def with_engine_file_of_unet(tensorrt, tmp_path):
    """bundle -> its pipeline on ONNX Runtime, and the same with a UNet on TensorRT that may capture the whole loop."""

    def make(folder: Path):
        import accel
        from accel.bundle import Bundle
        from accel.export.tensorrt.build import build
        from accel.pipeline import Pipeline

        bundle = Bundle.open(shutil.copytree(folder, tmp_path / "with-engine-file"))
        build(bundle, ("unet",))
        plain = accel.load(bundle, "onnxruntime", threads=1)
        unet = accel.load_engine(bundle, "unet", "tensorrt", cuda_graph="loop")
        return plain, Pipeline(bundle, {**plain.engines, "unet": unet})

    return make


@pytest.fixture(scope="session")
def images_of():
    """(folder to make, count=3, size=(32, 32)) -> the folder with images of noise and captions."""

    def make(folder: Path, count: int = 3, size: tuple[int, int] = (32, 32)) -> Path:
        folder.mkdir()
        return make_images(folder, count, size)

    return make


@pytest.fixture
def bundle_of(tmp_path):
    """bundle_of(folder): a copy of a bundle that a test may change."""

    def bundle_of(folder: Path):
        from accel.bundle import Bundle

        return Bundle.open(shutil.copytree(folder, tmp_path / "bundle-copy"))

    return bundle_of
