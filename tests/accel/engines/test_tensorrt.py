"""Running engine files, on fakes of TensorRT and CUDA: they compute with ONNX Runtime on the given addresses."""

from __future__ import annotations

import gc
import threading

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

import accel
from accel import engines
from accel.bundle import Bundle
from accel.cli import main
from accel.engines.fixed_loop import FixedLoop
from accel.engines.refit import Refit
from accel.errors import Notice, UserError
from accel.export.tensorrt.build import BuildOptions, build
from accel.models.lora.for_bundle import fused
from accel.trt import engine_files
from accel.trt.workspace import workspace


@pytest.fixture
def bundle(bundle_copy):
    return Bundle.open(bundle_copy)


# For what calls nothing of TensorRT that the other tests do not call: one version shows it.
NEWEST = pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)
VAE, UNET = "vae_decoder", "unet"


def inputs(batch=2, height=16, width=16, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"latent_sample": rng.standard_normal((batch, 4, height, width), dtype=np.float32)}


def unet_inputs(batch=2, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((batch, 4, 16, 16), dtype=np.float32),
        "timestep": np.array(500, np.float32),
        "encoder_hidden_states": rng.standard_normal((batch, 77, 32), dtype=np.float32),
    }


@pytest.fixture(scope="module")
def expected(sd15_bundle):
    """What the graphs compute on ONNX Runtime itself, as they are written; sessions take seconds to make."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    sessions = {}

    def run(feeds):
        name = UNET if "timestep" in feeds else VAE
        if name not in sessions:
            sessions[name] = onnxruntime.InferenceSession(str(sd15_bundle / name / "model.onnx"), options)
        return sessions[name].run(None, feeds)[0]

    return run


@pytest.fixture(scope="module")
def on_onnxruntime(sd15_bundle):
    return accel.load(sd15_bundle, "onnxruntime", threads=1)


def test_an_engine_computes_what_the_graph_computes(bundle, tensorrt, expected):
    build(bundle, (VAE,))
    vae = accel.load_engine(bundle, VAE, "tensorrt")
    for feeds in (inputs(), inputs(3, 16, 32), inputs(4, 32, 24)):
        out = vae(**feeds)["sample"]
        assert torch.is_tensor(out) and np.array_equal(out.numpy(), expected(feeds))
    assert tensorrt.__version__ in vae.description and "Fake GPU" in vae.description
    vae.close()


@pytest.mark.parametrize(
    "tensorrt, graph", [("10.16", "off"), ("11.4", "step"), ("11.4", "loop")], indirect=["tensorrt"]
)
def test_the_image_is_the_one_of_onnx_runtime(bundle, tensorrt, graph, on_onnxruntime):
    build(bundle, ("text_encoder", UNET, VAE))
    ours = accel.load(bundle, "tensorrt", cuda_graph=graph)
    for options in (
        {"seed": 3},
        {"seed": 4, "height": 128},
        {"seed": 5},
        {"sampler": "dmd2", "seed": 1},
        {"sampler": "dmd2", "seed": 2, "guidance_scale": 0},
    ):
        a, b = (pipe("the cat", output_type="np", steps=2, **options) for pipe in (ours, on_onnxruntime))
        assert np.abs(a.images - b.images).max() < 1e-5, options


@NEWEST
def test_auto_takes_tensorrt_where_an_engine_file_fits(bundle, tensorrt):
    assert accel.load_engine(bundle, "text_encoder").name == "openvino"
    build(bundle, ("text_encoder",))
    assert accel.load_engine(bundle, "text_encoder").name == "tensorrt"
    assert accel.load_engine(bundle, VAE).name == "openvino"


@NEWEST
def test_auto_goes_by_the_device_that_is_asked_for(bundle, tensorrt, fakes, monkeypatch):
    monkeypatch.setattr(fakes("cuda").Cuda, "names", ("Fake GPU", "Other GPU", "Fake GPU"))
    (file,) = build(bundle, ("text_encoder",))
    fitting = lambda device: engines.fitting_engine_file(bundle, "text_encoder", device)  # noqa: E731
    assert fitting("cuda") == fitting("cuda:0") == fitting("cuda:2") == file
    assert fitting("cpu") is fitting("cuda:1") is None
    assert accel.load_engine(bundle, "text_encoder", device="cpu").name == "openvino"
    assert accel.load_engine(bundle, "text_encoder", device="cuda:2").cuda.index == 2
    with pytest.raises(UserError, match="built for Fake GPU .*here is Other GPU") as caught:
        accel.load_engine(bundle, "text_encoder", "tensorrt", device="cuda:1")
    assert caught.value.fix == f"accel build {bundle.path} --components text_encoder --device cuda:1"


@NEWEST
def test_auto_falls_back_from_an_engine_file_that_was_changed(bundle, tensorrt):
    (file,) = build(bundle, ("text_encoder",))
    file.path.write_bytes(file.path.read_bytes()[:-1] + b"x")
    with pytest.warns(Notice, match="changed after it was built.*; openvino runs it instead"):
        assert accel.load_engine(bundle, "text_encoder").name == "openvino"
    with pytest.raises(UserError, match="changed after it was built"):
        accel.load_engine(bundle, "text_encoder", engine_file=file.key)


@NEWEST
def test_arrays_are_used_where_they_are_and_strided_ones_copied(bundle, tensorrt, expected, monkeypatch):
    build(bundle, (UNET,))
    unet = accel.load_engine(bundle, UNET, "tensorrt")
    feeds = unet_inputs()
    wanted = expected(feeds)
    strided = torch.tensor(feeds["sample"].transpose(0, 1, 3, 2).copy()).transpose(2, 3)
    assert not strided.is_contiguous()

    class Foreign:
        """Another library's array."""

        def __init__(self, tensor):
            self.tensor, self.dtype, self.shape = tensor, tensor.dtype, tensor.shape

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    given = feeds | {"sample": strided, "encoder_hidden_states": Foreign(torch.tensor(feeds["encoder_hidden_states"]))}
    seen, prepare = {}, unet.prepare
    monkeypatch.setattr(unet, "prepare", lambda c, p, held, *rest: seen.update(held) or prepare(c, p, held, *rest))
    assert np.array_equal(unet(**given)["out_sample"].numpy(), wanted)
    text = given["encoder_hidden_states"].tensor
    assert seen["encoder_hidden_states"].data_ptr() == text.data_ptr()
    sample = torch.tensor(feeds["sample"])
    assert np.array_equal(unet(**given | {"sample": sample})["out_sample"].numpy(), wanted)
    assert seen["sample"].data_ptr() == sample.data_ptr()


# Profiles


def test_the_closest_profile_runs_and_a_misfit_says_why(bundle, tensorrt, expected):
    names = ["batch=1,size=64", "batch=1-4,size=64-96", "batch=1-2,height=64-128,width=128"]
    build(bundle, (VAE,), profiles=names)
    vae = accel.load_engine(bundle, VAE, "tensorrt")
    pick = lambda *shape: vae.nearest({"latent_sample": shape})  # noqa: E731
    assert [pick(1, 4, 16, 16), pick(2, 4, 16, 16), pick(4, 4, 24, 24), pick(2, 4, 32, 32)] == [0, 1, 1, 2]
    for feeds in (inputs(1), inputs(4, 24, 24), inputs(2, 32, 32), inputs(1)):
        assert np.array_equal(vae(**feeds)["sample"].numpy(), expected(feeds))
    with pytest.raises(
        UserError, match="no optimization profile of the engine takes these shapes; the closest is 'batch=1-4"
    ) as caught:
        vae(**inputs(4, 32, 32))
    assert "[4, 4, 32, 32] is not within" in caught.value.message
    with pytest.raises(UserError, match="images 9 is outside profile"):
        vae(**inputs(9))


@NEWEST
def test_an_engine_for_less_than_the_bundle_splits_the_work(bundle, tensorrt):
    build(bundle, ("text_encoder", UNET, VAE), profiles=["batch=1-2,size=128"])
    pipe = accel.load(bundle, "tensorrt")
    assert pipe.engines[UNET].component.dims["batch"].max == 4
    made = pipe("the cat", num_images_per_prompt=3, output_type="np", steps=1)  # two and one
    assert made.images.shape == (3, 128, 128, 3)
    with pytest.raises(UserError, match="height 64 is outside"):
        pipe("the cat", height=64)


# Scratch memory, threads, graphs


@NEWEST
def test_one_scratch_memory_serves_all_engines_of_a_thread(bundle, tensorrt):
    gc.collect()  # engines of tests before, whose workspace would be found
    names = ("text_encoder", UNET, VAE)
    build(bundle, names)
    pipe = accel.load(bundle, "tensorrt")
    pipe("the cat", steps=1)
    tensorrt._world.executed.clear()
    pipe("the cat", steps=1)
    assert len({memory for memory, _ in tensorrt._world.executed}) == 1
    work = workspace(pipe.engines[UNET].cuda)
    assert work.memory.numel() == max(pipe.engines[name].engine.device_memory_size_v2 for name in names)


@NEWEST
def test_threads_have_contexts_streams_and_scratch_of_their_own(bundle, tensorrt, expected):
    build(bundle, (VAE,))
    for graph in ("off", "step"):
        vae = accel.load_engine(bundle, VAE, "tensorrt", cuda_graph=graph)
        cases = [inputs(seed=i) for i in range(4)]
        wanted, found, errors = [expected(feeds) for feeds in cases], [None] * 4, []
        together = threading.Barrier(4)  # a thread that has ended gives its memory to the next one

        def run(i, vae=vae, found=found, errors=errors, cases=cases, together=together):
            try:
                for _ in range(3):
                    together.wait(60)
                    found[i] = vae(**cases[i])["sample"].numpy()
            except BaseException as error:
                errors.append(error)

        tensorrt._world.executed.clear()
        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == [] and all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert len({memory for memory, _ in tensorrt._world.executed}) == 4


def count_captures(engine, monkeypatch) -> list:
    captured, capture = [], engine.cuda.capture
    monkeypatch.setattr(engine.cuda, "capture", lambda *a: captured.append(1) or capture(*a))
    return captured


def move_scratch(engine) -> None:
    """As when another engine of the thread needs more."""
    old = workspace(engine.cuda).memory  # held, so that the new one lies elsewhere
    workspace(engine.cuda).scratch(old.numel() + (10 << 20))
    assert workspace(engine.cuda).memory.data_ptr() != old.data_ptr()


@NEWEST
def test_a_graph_is_captured_once_per_shape_and_again_when_memory_moves(bundle, tensorrt, monkeypatch, expected):
    build(bundle, (VAE,))
    vae = accel.load_engine(bundle, VAE, "tensorrt", cuda_graph="step")
    captured = count_captures(vae, monkeypatch)

    def check(feeds, captures):
        assert np.array_equal(vae(**feeds)["sample"].numpy(), expected(feeds))
        assert len(captured) == captures

    check(inputs(seed=1), 1)
    check(inputs(seed=2), 1)
    check(inputs(4, seed=3), 2)
    check(inputs(2, 32, 32, seed=3), 3)
    check(inputs(seed=4), 3)
    move_scratch(vae)
    check(inputs(seed=5), 4)
    check(inputs(seed=6), 4)
    for batch, width in ((1, 16), (3, 16), (1, 32), (3, 32)):
        vae(**inputs(batch, 16, width))
    check(inputs(4, seed=3), 9)  # only so many shapes are held


@NEWEST
def test_outputs_of_a_graph_are_not_overwritten_by_the_next_call(bundle, tensorrt):
    build(bundle, (VAE,))
    vae = accel.load_engine(bundle, VAE, "tensorrt", cuda_graph="step")
    first = vae(**inputs(seed=1))["sample"]
    copy = first.clone()
    vae(**inputs(seed=2))
    assert torch.equal(first, copy)


@NEWEST
def test_a_loop_is_one_graph_and_makes_the_same_latents(bundle, tensorrt, expected, monkeypatch):
    from accel.sampling import samplers
    from accel.sampling.noise_schedule import NoiseSchedule

    build(bundle, (UNET,))
    unet = accel.load_engine(bundle, UNET, "tensorrt", cuda_graph="loop")
    captured = count_captures(unet, monkeypatch)
    schedule = NoiseSchedule.from_folder(bundle.path / "scheduler")
    for name, steps, captures in (("dmd2", 3, 2), ("dpmpp_2m", 3, 4), ("euler", 2, 6)):
        timesteps = samplers.grid(name, schedule, steps)
        loop = FixedLoop(unet, name, schedule, timesteps)
        draws = steps - 1 if samplers.needs_noise(name) else 0
        for seed, batch in ((0, 1), (1, 1), (2, 2), (3, 1)):
            rng = np.random.default_rng(seed)
            x, *noise = (torch.tensor(rng.standard_normal((batch, 4, 16, 16), np.float32)) for _ in range(1 + draws))
            text = torch.tensor(rng.standard_normal((batch, 77, 32), np.float32))
            found = loop(x, {"encoder_hidden_states": text}, noise)

            def model(x, t, text=text):
                feeds = unet_inputs() | {"sample": x.numpy(), "timestep": np.array(t, np.float32)}
                return torch.tensor(expected(feeds | {"encoder_hidden_states": text.numpy()}))

            wanted = samplers.sample(name, model, x, schedule, timesteps=timesteps, noise=noise.__getitem__)
            assert torch.allclose(found, wanted, atol=1e-5)
        assert len(captured) == captures  # one per batch
    move_scratch(unet)
    loop(x, {"encoder_hidden_states": text}, noise)
    assert len(captured) == 7


# LoRA by refit


def make_lora(folder, modules, seed, rank=2, scale=0.5):
    """A LoRA in diffusers' format on linear layers of the UNet, with random weights."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, (out, into) in modules.items():
        state[f"unet.{name}.lora_A.weight"] = scale * torch.randn(rank, into, generator=generator)
        state[f"unet.{name}.lora_B.weight"] = scale * torch.randn(out, rank, generator=generator)
    folder.mkdir()
    save_file(state, folder / "pytorch_lora_weights.safetensors")
    return folder


@pytest.fixture
def loras(bundle, tmp_path):
    """Two LoRA files: one on self-attention, one on cross-attention and one of the former's layers."""
    weights = load_file(bundle.path / "unet" / "model.safetensors")
    shapes = {key.removesuffix(".weight"): tuple(value.shape) for key, value in weights.items()}
    first = {key: shape for key, shape in shapes.items() if key.endswith(("attn1.to_q", "attn1.to_v"))}
    second = {key: shape for key, shape in shapes.items() if key.endswith("attn2.to_k")} | dict([min(first.items())])
    assert len(first) > 4 and len(second) > 4
    return make_lora(tmp_path / "a", first, 1), make_lora(tmp_path / "b", second, 2)


@pytest.mark.parametrize(
    "tensorrt, graph", [("10.16", "off"), ("11.4", "off"), ("11.4", "step")], indirect=["tensorrt"]
)
def test_a_to_b_to_a_leaves_no_residue(bundle, tensorrt, loras, graph, expected):
    a, b = loras
    build(bundle, ("unet",), options=BuildOptions(refittable=True))
    unet = accel.load_engine(bundle, "unet", "tensorrt", cuda_graph=graph)
    out = lambda: unet(**unet_inputs())["out_sample"].clone()  # noqa: E731
    refit, base = Refit(unet), out()
    assert np.array_equal(base.numpy(), expected(unet_inputs()))
    own = refit.digest
    digest_a, out_a = refit.loras([a]), out()
    digest_b, out_b = refit.loras([b]), out()
    assert len({own, digest_a, digest_b}) == 3
    assert not torch.equal(out_a, base) and not torch.equal(out_a, out_b) and not torch.equal(out_b, base)
    assert refit.loras([a]) == digest_a and torch.equal(out(), out_a)
    unet.set_weights(fused(bundle, [b]).tensors["unet"])  # as `Pipeline.set_loras` does it
    assert torch.equal(out(), out_b)
    unet.set_weights({})
    assert torch.equal(out(), base) and refit.loras([a]) == digest_a
    both = refit.loras([f"{a}=0.5", b])
    assert both not in (digest_a, digest_b, own)
    assert refit.loras([]) == own and torch.equal(out(), base) and refit.changed == frozenset()


@NEWEST
def test_refit_equals_fusing_before_export(bundle, tensorrt, loras):
    from accel.models import networks
    from accel.models.lora import fuse, lora_file

    build(bundle, ("unet",), options=BuildOptions(refittable=True))
    unet = accel.load_engine(bundle, "unet", "tensorrt")
    Refit(unet).loras([loras[0]])
    record = bundle.component("unet")
    module = networks.rebuild(
        "unet", bundle.path / "unet/config.json", bundle.path / "unet/model.safetensors", record.inputs, record.outputs
    )
    fuse(module.model, "unet", [lora_file(loras[0])])
    with torch.no_grad():
        (wanted,) = module(**{name: torch.tensor(value) for name, value in unet_inputs().items()})
    assert torch.allclose(unet(**unet_inputs())["out_sample"], wanted, atol=1e-4)


@NEWEST
def test_what_cannot_be_refitted_is_refused_and_changes_nothing(bundle, tensorrt, loras, monkeypatch, tmp_path):
    build(bundle, ("unet",))
    plain = accel.load_engine(bundle, "unet", "tensorrt")
    with pytest.raises(UserError, match="is not refittable") as caught:
        Refit(plain)
    assert caught.value.fix.endswith("--refittable")
    build(bundle, ("unet",), options=BuildOptions(refittable=True))
    unet = accel.load_engine(bundle, "unet", "tensorrt")
    before, refit = unet(**unet_inputs())["out_sample"], Refit(unet)
    own = refit.digest
    with pytest.raises(UserError, match="does not fit this model"):
        refit.loras([make_lora(tmp_path / "c", {"down_blocks.0.nothing": (4, 4)}, 3)])
    tensorrt._world.fail.add("refit")
    with pytest.raises(UserError, match="cannot refit unet: .*missing weights"):
        refit.loras([loras[0]])
    assert refit.digest == own and torch.equal(unet(**unet_inputs())["out_sample"], before)
    monkeypatch.setattr(tensorrt, "__version__", "11.3.0.99")
    with pytest.raises(UserError, match="drop the bias"):
        Refit(unet)


@NEWEST
def test_an_embedding_is_refitted_into_the_token_table(bundle, tensorrt, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file({"<toy>": torch.randn(2, 32)}, tmp_path / "toy.safetensors")
    others = dict.fromkeys((UNET, VAE), "onnxruntime")
    build(bundle, ("text_encoder",))
    with pytest.raises(UserError, match="is not refittable") as caught:
        accel.load(bundle, {"text_encoder": "tensorrt", **others}, embeddings=tmp_path / "toy.safetensors")
    assert caught.value.fix.endswith("--refittable")
    build(bundle, ("text_encoder",), options=BuildOptions(refittable=True))
    made = {}
    for engine in ("tensorrt", "onnxruntime"):
        with accel.load(bundle, {"text_encoder": engine, **others}) as pipe:
            encoder, outputs = pipe.engines["text_encoder"], []
            for embeddings in ([], [tmp_path / "toy.safetensors"], []):
                pipe.set_embeddings(embeddings)
                ids = pipe.tokenizers["text_encoder"]("a <toy> cat")
                outputs.append(np.array(encoder(input_ids=ids)["last_hidden_state"]))
            made[engine] = outputs
    for one, other in zip(*made.values(), strict=True):
        assert np.allclose(one, other, atol=1e-4)
    own, learned, back = made["tensorrt"]
    assert np.array_equal(own, back) and np.abs(own - learned).max() > 0.01


# What goes wrong, goes wrong with a reason


@NEWEST
def test_no_engine_file_no_gpu_no_tensorrt(bundle, tensorrt, monkeypatch):
    with pytest.raises(UserError, match="has no TensorRT engine file of vae_decoder") as caught:
        accel.load_engine(bundle, VAE, "tensorrt")
    assert caught.value.fix == f"accel build {bundle.path} --components vae_decoder"
    for device, message in (("cuda:7", "GPU 7 is not usable"), ("cpu", "does not run on 'cpu'")):
        with pytest.raises(UserError, match=message):
            accel.load_engine(bundle, VAE, "tensorrt", device=device)
    with pytest.raises(UserError, match="cuda_graph"):
        build(bundle, (VAE,))
        accel.load_engine(bundle, VAE, "tensorrt", cuda_graph="yes")
    monkeypatch.setattr("accel.trt.library.installed", lambda: None)
    with pytest.raises(UserError, match="tensorrt is not installed"):
        accel.load_engine(bundle, VAE, "tensorrt")


@NEWEST
def test_the_engine_file_that_fits_is_found_among_those_that_do_not(bundle, tensorrt):
    (good,) = build(bundle, (VAE,))
    (newer,) = build(bundle, (VAE,), options=BuildOptions(optimization_level=5))
    assert accel.load_engine(bundle, VAE, "tensorrt").engine_file.key == newer.key
    assert accel.load_engine(bundle, VAE, "tensorrt", engine_file=good.key).engine_file.key == good.key
    with pytest.warns(Notice, match="plan= is now engine_file="):
        assert accel.load_engine(bundle, VAE, plan=good.key).engine_file.key == good.key
    newer.path.write_bytes(b"broken")
    assert accel.load_engine(bundle, VAE, "tensorrt").engine_file.key == good.key
    with pytest.raises(UserError, match="it has 6 bytes"):
        accel.load_engine(bundle, VAE, "tensorrt", engine_file=newer.key)
    good.path.write_bytes(b"broken")
    with pytest.raises(UserError, match="and 1 more that do not fit"):
        accel.load_engine(bundle, VAE, "tensorrt")


@pytest.mark.parametrize(
    "fail, message",
    [
        ("deserialize", r"TensorRT \S+ cannot deserialize the engine file of vae_decoder: .*magic tag"),
        ("context", "no execution context of vae_decoder: .*OutOfMemory"),
        ("execute", "could not run vae_decoder: .*illegal memory access"),
    ],
)
def test_tensorrts_own_failures_carry_its_words(bundle, tensorrt, fail, message):
    build(bundle, (VAE,))
    tensorrt._world.fail.add(fail)
    with pytest.raises(UserError, match=message):
        accel.load_engine(bundle, VAE, "tensorrt")(**inputs())


@NEWEST
def test_tensorrt_never_sees_an_engine_file_that_fails_the_preflight(bundle, tensorrt):
    (file,) = build(bundle, (VAE,))
    data = bytearray(file.path.read_bytes())
    data[-5] ^= 1
    file.path.write_bytes(data)
    tensorrt._world.calls.clear()
    with pytest.raises(UserError, match="changed after it was built"):
        accel.load_engine(bundle, VAE, "tensorrt")
    assert tensorrt._world.calls == []


def test_host_code_is_not_run_unasked(bundle, tensorrt, expected):
    build(bundle, (VAE,), options=BuildOptions(version_compatible=True))
    with pytest.raises(UserError, match="carries a runtime of its own") as caught:
        accel.load_engine(bundle, VAE, "tensorrt")
    assert "--allow-host-code" in caught.value.fix
    vae = accel.load_engine(bundle, VAE, "tensorrt", allow_host_code=True)
    assert np.array_equal(vae(**inputs())["sample"].numpy(), expected(inputs()))


def test_a_stripped_plan_gets_its_weights_from_the_bundle(bundle, tensorrt, expected):
    (whole,) = build(bundle, (VAE,))
    (file,) = build(bundle, (VAE,), options=BuildOptions(strip_plan=True))
    vae = accel.load_engine(bundle, VAE, "tensorrt", engine_file=file.key)
    assert np.array_equal(vae(**inputs())["sample"].numpy(), expected(inputs()))


def test_weight_streaming_sets_the_budget_before_contexts_are_made(bundle, tensorrt, expected):
    build(bundle, (VAE,), options=BuildOptions(weight_streaming=True))
    vae = accel.load_engine(bundle, VAE, "tensorrt")
    own = vae.engine.get_weight_streaming_automatic_budget()
    assert vae.engine.weight_streaming_budget_v2 == own > 0
    vae = accel.load_engine(bundle, VAE, "tensorrt", streaming_budget=4096)
    assert vae.engine.weight_streaming_budget_v2 == 4096 != own
    assert np.array_equal(vae(**inputs())["sample"].numpy(), expected(inputs()))


@NEWEST
def test_an_engine_with_other_tensors_is_refused(bundle, tensorrt, monkeypatch):
    build(bundle, (VAE,))
    monkeypatch.setattr(tensorrt.ICudaEngine, "get_tensor_dtype", lambda *_: tensorrt.DataType.HALF)
    with pytest.raises(UserError, match="differ in latent_sample, sample"):
        accel.load_engine(bundle, VAE, "tensorrt")


@NEWEST
def test_the_benchmark_has_variants_of_it(bundle, tensorrt):
    from accel.bench import variants

    build(bundle, ("text_encoder", UNET, VAE))
    chosen = variants.chosen("tensorrt,tensorrt:step,tensorrt:loop")
    assert [v.name for v in chosen] == ["tensorrt", "tensorrt:step", "tensorrt:loop"]
    assert engines.select.facts("tensorrt").libraries
    pipe = variants.load(bundle, chosen[2])
    assert pipe.engines["unet"].cuda_graph == "loop" and pipe("the cat").images[0].size == (64, 64)


@NEWEST
def test_attach_takes_engine_files_where_they_fit(bundle, sd15, tensorrt):
    from diffusers import DiffusionPipeline

    build(bundle, (UNET,))
    pipe = DiffusionPipeline.from_pretrained(sd15, local_files_only=True)
    with accel.attach(pipe, bundle) as attached:
        assert attached.engines["unet"].name == "tensorrt" and attached.engines["vae_decoder"].name == "openvino"


@NEWEST
def test_the_command_line(bundle, tensorrt, tmp_path, capsys):
    build(bundle, ("text_encoder", UNET, VAE))
    out = tmp_path / "cat.png"
    command = ["run", str(bundle.path), "--prompt", "the cat", "--engine", "tensorrt", "--cuda-graph", "loop"]
    assert main([*command, "--out", str(out)]) == 0 and out.is_file()
    file = engine_files.find(bundle, "unet")[0]
    file.path.write_text("hello")
    assert main([*command, "--out", str(out), "--overwrite"]) == 1
    told = capsys.readouterr().err
    assert "it has 5 bytes" in told and f"accel build {bundle.path} --components unet" in told
