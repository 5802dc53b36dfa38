"""Textual inversion: the image that diffusers makes, at run time and from an export, and back again to the bit."""

from __future__ import annotations

import json
import shlex

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import accel
from accel.cli import main
from accel.errors import Notice, UserError
from accel.export.pipeline import export_pipeline
from accel.models.config_files import clip_tokenizer
from accel.models.source import open_source
from accel.text.tokenizer import ClipTokenizer

CALL = dict(num_inference_steps=4, guidance_scale=5.0, height=32, width=32, output_type="np")
LATENTS = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
PROMPT = "a <toy> cat, <dot>"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A token of three vectors as diffusers writes it, and one of a single vector as A1111 does."""
    folder = tmp_path_factory.mktemp("embeddings")
    torch.manual_seed(3)
    save_file({"<toy>": torch.randn(3, 32)}, folder / "toy.safetensors")
    torch.save({"string_to_param": {"*": torch.randn(1, 32)}, "name": "<dot>"}, folder / "dot.pt")
    return [folder / "toy.safetensors", folder / "dot.pt"]


@pytest.fixture(scope="module")
def lora(smallest, tmp_path_factory):
    """A LoRA of UNet and text encoder, as diffusers writes it."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe, out = diffusers.StableDiffusionPipeline.from_pretrained(smallest), tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    for name, layers in (("unet", ["to_q", "to_k"]), ("text_encoder", ["q_proj", "fc1"])):
        getattr(pipe, name).add_adapter(LoraConfig(r=4, target_modules=layers, init_lora_weights=False))
    parts = {f"{n}_lora_layers": get_peft_model_state_dict(getattr(pipe, n)) for n in ("unet", "text_encoder")}
    pipe.save_lora_weights(out, **parts)
    return out


@pytest.fixture(scope="module")
def theirs(smallest):
    """diffusers' image, of a pipeline that has loaded some files."""

    def draw(files=(), lora=None, prompt=PROMPT, tokens=None):
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(smallest)
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        for i, file in enumerate(files):
            pipe.load_textual_inversion(str(file), token=tokens and tokens[i])
        if lora:
            pipe.load_lora_weights(str(lora))
        pipe.set_progress_bar_config(disable=True)
        return pipe(prompt, latents=torch.as_tensor(LATENTS), **CALL).images

    return draw


def draw(pipe, prompt=PROMPT, **more):
    return pipe(prompt, latents=LATENTS, **CALL | more).images


def apart(a, b):
    return np.abs(a - b).max() * 255


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
def test_a_to_b_to_a_is_the_image_of_diffusers_and_the_same_bits(engine, smallest_bundle, files, lora, theirs):
    if engine == "openvino":
        pytest.importorskip(engine)
    toy, dot = files
    with accel.load(smallest_bundle, engine) as pipe:
        own = draw(pipe)
        pipe.set_embeddings(toy)
        first = draw(pipe)
        assert "<toy> (toy.safetensors, 3 vectors)" in repr(pipe)
        pipe.set_embeddings([f"{dot}=<sky>", (toy, "<dot>")])
        other = draw(pipe, "a <dot> cat, <sky>")
        pipe.set_embeddings([toy, dot])
        both = draw(pipe)
        pipe.set_loras(lora)
        with_lora = draw(pipe)
        pipe.set_embeddings([])
        lora_alone = draw(pipe)
        pipe.set_embeddings([toy, dot])
        assert np.array_equal(draw(pipe), with_lora)
        pipe.set_loras([])
        assert np.array_equal(draw(pipe), both)
        pipe.set_embeddings(toy)
        assert np.array_equal(draw(pipe), first)
        pipe.set_embeddings([])
        assert np.array_equal(draw(pipe), own) and "toy" not in repr(pipe)
    drawn = [own, first, both, with_lora, lora_alone]
    assert min(apart(a, b) for i, a in enumerate(drawn) for b in drawn[:i]) > 1
    assert apart(own, theirs()) < 1 and apart(first, theirs([toy])) < 1 and apart(both, theirs(files)) < 1
    assert apart(with_lora, theirs(files, lora)) < 1 and apart(lora_alone, theirs(lora=lora)) < 1
    renamed = theirs([dot, toy], tokens=["<sky>", "<dot>"], prompt="a <dot> cat, <sky>")
    assert apart(other, renamed) < 1
    with accel.load(smallest_bundle, engine, embeddings=files, loras=lora, low_memory=engine != "eager") as pipe:
        assert np.array_equal(draw(pipe), with_lora) and [one.token for one in pipe.embeddings] == ["<toy>", "<dot>"]


@pytest.fixture(scope="module")
def exported(smallest, files, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "bundle"
    sampler = {"name": "dpmpp_2m", "steps": 4, "guidance": 5}
    options = dict(profile="batch=1-4,size=32-64", components=("text_encoder", "unet", "vae_decoder"))
    export_pipeline(smallest, out, sampler=sampler, embeddings=files, **options)
    return out


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
def test_an_export_with_them_draws_the_image_of_diffusers(engine, exported, files, theirs, smallest_bundle):
    with accel.load(exported, engine) as pipe:
        drawn = draw(pipe)
        assert apart(drawn, theirs(files)) < 1
        assert [one["token"] for one in pipe.bundle.manifest.source["embeddings"]] == ["<toy>", "<dot>"]
        with pytest.raises(UserError, match="has a token '<toy>' already"):
            pipe.set_embeddings(files[0])
        pipe.set_embeddings([(files[0], "<new>")])  # more of them, at run time
        assert np.array_equal(draw(pipe, "a <new> cat, <dot>"), drawn)


def test_the_exported_tokenizer_is_one_for_transformers_too(exported, smallest, files):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(smallest)
    for file in files:
        pipe.load_textual_inversion(str(file))
    theirs = clip_tokenizer(exported / "tokenizer")
    for prompt in ("a <toy> cat", "<dot><toy>_2 <TOY>", "plain"):
        ids = theirs(pipe.maybe_convert_prompt(prompt, theirs)).input_ids
        assert ids == pipe.tokenizer(pipe.maybe_convert_prompt(prompt, pipe.tokenizer)).input_ids
    table = load_file(exported / "text_encoder/model.safetensors")
    own = pipe.text_encoder.get_input_embeddings().weight
    assert any(torch.equal(value, own) for name, value in table.items() if name.endswith("token_embedding.weight"))
    config = json.loads((exported / "text_encoder/config.json").read_text())
    assert config["vocab_size"] == len(own)


@settings(max_examples=150, deadline=None)
@given(words=st.lists(st.sampled_from([*"<toy> <toy>_1 <toy>_2 <TOY> <dot> style Style cat a,b".split(), " ", "x"])))
def test_every_prompt_is_read_as_the_exported_tokenizer_reads_it(exported, words):
    """The same tokens; only the rows are others."""
    prompt = "".join(words)
    full = ClipTokenizer.from_folder(exported / "tokenizer")
    base = ClipTokenizer.from_folder(SMALLEST["tokenizer"])
    tokens = ["<toy>", "<toy>_1", "<toy>_2", "<dot>"]
    rows = {token: 1000 + i for i, token in enumerate(tokens)}
    renamed = {full.backend.token_to_id(token): row for token, row in rows.items()}
    expected = [(renamed.get(i, i), place) for i, place in full.pieces(prompt)]
    assert base.with_tokens(rows).pieces(prompt) == expected
    assert base.with_tokens({}) is base


SMALLEST = {}


@pytest.fixture(autouse=True, scope="module")
def _smallest(smallest):
    SMALLEST["tokenizer"] = smallest / "tokenizer"


def test_long_prompts_and_weights(smallest_bundle, exported, files):
    for prompt in ("a dog " + "cat " * 70 + "<toy> <toy>", "(<toy>:1.4) and a (cat:0.5) <dot>"):
        made = []
        for folder, more in ((smallest_bundle, files), (exported, None)):
            with accel.load(folder, "onnxruntime", embeddings=more) as pipe:
                made.append(draw(pipe, prompt, prompt_weights=True))
        assert apart(*made) < 0.1


def test_a_pipeline_folder_takes_them_too(smallest, smallest_bundle, files):
    with accel.load(smallest, "eager", embeddings=files) as pipe:
        drawn = draw(pipe, sampler="ddim")
    with accel.load(smallest_bundle, "eager", embeddings=files) as pipe:
        assert apart(draw(pipe, sampler="ddim"), drawn) < 0.1


def test_they_are_checked_before_a_pipeline_is_compiled(smallest, tmp_path, monkeypatch):
    save_file({"<wide>": torch.ones(1, 48)}, tmp_path / "wide.safetensors")
    monkeypatch.setattr("accel.loading.loader.compiled", lambda *_: pytest.fail("compiled"))
    with pytest.raises(UserError, match="vectors of 48 numbers"):
        accel.load(smallest, "onnxruntime", embeddings=tmp_path / "wide.safetensors")


def test_more_vectors_than_rows_are_refused_with_an_export_that_works(
    smallest, smallest_bundle, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    specs = []
    for i in range(2):
        save_file({f"<big{i}>": torch.randn(40, 32)}, tmp_path / f"big {i}.safetensors")
        specs.append(tmp_path / f"big {i}.safetensors")
    monkeypatch.setattr("accel.pipeline.opening.load_engine", lambda *_, **__: pytest.fail("an engine was loaded"))
    with pytest.raises(UserError, match="have 80 vectors.*has 78 rows that no text reaches"):
        accel.load(smallest_bundle, embeddings=specs)
    with pytest.raises(UserError) as error:
        accel.load(smallest, "eager", embeddings=specs)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    command = shlex.split(error.value.fix)
    assert command[:2] == ["accel", "export"]
    short = ["--components", "text_encoder", "--profile", "batch=1,size=32"]
    assert main([*command[1:], *short]) == 0, capsys.readouterr().err
    bundle = accel.Bundle.open("BUNDLE")
    assert [one["vectors"] for one in bundle.manifest.source["embeddings"]] == [40, 40]
    engine = accel.load_engine(bundle, "text_encoder", "onnxruntime")
    ids, dropped = ClipTokenizer.from_folder("BUNDLE/tokenizer").encode("<big0> a <big1>")
    assert np.isfinite(engine(input_ids=ids[None])["last_hidden_state"]).all() and "<big1>" in dropped


def test_a_file_that_does_not_fit_changes_nothing(smallest_bundle, files, tmp_path):
    save_file({"<wide>": torch.ones(1, 768)}, tmp_path / "wide.safetensors")
    save_file({"cat</w>": torch.ones(1, 32)}, tmp_path / "cat.safetensors")
    save_file({"clip_l": torch.ones(1, 32), "clip_g": torch.ones(1, 32)}, tmp_path / "xl.safetensors")
    with accel.load(smallest_bundle, "onnxruntime", embeddings=files[0]) as pipe:
        before = draw(pipe)
        for wrong, text in (("wide", "SD1.x"), ("cat", "already"), ("xl", "made for SDXL"), ("none", "no such")):
            with pytest.raises(UserError, match=text):
                pipe.set_embeddings([files[1], tmp_path / f"{wrong}.safetensors"])
        assert np.array_equal(draw(pipe), before) and [one.token for one in pipe.embeddings] == ["<toy>"]


def test_an_engine_that_cannot_leaves_all_as_it_was(smallest_bundle, files, monkeypatch):
    from accel.engines import Engine
    from accel.engines.onnxruntime import OnnxRuntime

    with accel.load(smallest_bundle, "onnxruntime") as pipe:
        before = draw(pipe)
        monkeypatch.setattr(OnnxRuntime, "set_weights", Engine.set_weights)
        with pytest.raises(UserError, match="cannot take other weights") as error:
            pipe.set_embeddings(files)
        assert "--embedding" in error.value.fix
        monkeypatch.undo()
        assert np.array_equal(draw(pipe), before) and pipe.embeddings == ()


def test_half_precision_refuses_what_it_cannot_hold(smallest, tmp_path):
    half = ("text_encoder",)
    bundle = export_pipeline(smallest, tmp_path / "half", precision="fp16", profile="batch=1,size=32", components=half)
    from accel.models.embeddings.for_bundle import placed

    tokenizers = {"text_encoder": ClipTokenizer.from_folder(tmp_path / "half/tokenizer")}
    for value, fits in ((1e5, False), (1e4, True)):
        save_file({"<big>": torch.full((1, 32), value)}, tmp_path / "big.safetensors")
        found = placed(bundle, tmp_path / "big.safetensors", tokenizers)
        if fits:
            (table,) = found.tensors(bundle, {})["text_encoder"].values()
            assert table.dtype == np.float16 and (table[found.rows["text_encoder"]["<big>"]] == 1e4).all()
        else:
            with pytest.raises(UserError, match="does not fit float16"):
                found.tensors(bundle, {})


def test_int8_follows_and_comes_back(tmp_path):
    """A token with the vectors of a word is that word, also where the text encoder is int8."""
    bundle = accel.Bundle.open("digits/4step-int8")
    assert bundle.component("text_encoder").int8
    tensors = load_file(bundle.file(bundle.component("text_encoder").weights))
    table = next(value for name, value in tensors.items() if name.endswith("token_embedding.weight"))
    tokenizer = ClipTokenizer.from_folder(bundle.path / "tokenizer")
    ids = [i for i, _ in tokenizer.pieces("seven")]
    save_file({"<n>": table[ids].float()}, tmp_path / "n.safetensors")
    with accel.load(bundle, "onnxruntime") as pipe:
        image = lambda word: pipe(f"a handwritten {word}", seed=1, output_type="np").images  # noqa: E731
        seven, three = image("seven"), image("three")
        pipe.set_embeddings(tmp_path / "n.safetensors")
        assert np.array_equal(image("<n>"), seven) and np.array_equal(image("three"), three)
        pipe.set_embeddings([])
        assert np.array_equal(image("seven"), seven) and not np.array_equal(image("<n>"), seven)


# --------------------------------------------------------------------------------------------------------------- SDXL


@pytest.fixture(scope="module")
def of_sdxl(sdxl, tmp_path_factory):
    """A file for SDXL, and diffusers' text embeddings and image with it."""
    path = tmp_path_factory.mktemp("sdxl") / "style.safetensors"
    torch.manual_seed(4)
    state = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 32)}
    save_file(state, path)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl)
    for key, more in (("clip_l", ""), ("clip_g", "_2")):
        parts = {f"{part}": getattr(pipe, f"{part}{more}") for part in ("tokenizer", "text_encoder")}
        pipe.load_textual_inversion({"<style>": state[key]}, token="<style>", **parts)
    pipe.set_progress_bar_config(disable=True)
    return f"{path}=<style>", pipe


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
def test_sdxl_takes_them_in_both_text_encoders(engine, sdxl_bundle, of_sdxl):
    spec, theirs = of_sdxl
    latents = np.random.default_rng(1).standard_normal((1, 4, 16, 16)).astype(np.float32)
    call = dict(num_inference_steps=3, guidance_scale=5.0, height=64, width=64, output_type="np")
    expected = theirs("the cat, <style>", latents=torch.as_tensor(latents), **call).images
    with accel.load(sdxl_bundle, engine, embeddings=spec) as pipe:
        assert apart(pipe("the cat, <style>", latents=latents, **call).images, expected) < 1
        pipe.set_embeddings([])
        assert apart(pipe("the cat, <style>", latents=latents, **call).images, expected) > 1


def test_an_export_of_sdxl_has_them_in_both_text_encoders(sdxl, of_sdxl, tmp_path):
    from accel.pipeline.conditioning import encode

    spec, theirs = of_sdxl
    bundle = export_pipeline(
        open_source(sdxl, embeddings=[spec]),
        tmp_path / "bundle",
        profile="batch=1,height=64,width=64",
        components=("text_encoder",),
    )
    encoders = {}
    for name, folder in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        tokenizer = ClipTokenizer.from_folder(bundle.path / folder)
        encoders[name] = (tokenizer, accel.load_engine(bundle, name, "onnxruntime"))
    made = encode(encoders, ["a <style> cat"])
    with torch.no_grad():
        hidden, _, pooled, _ = theirs.encode_prompt("a <style> cat", do_classifier_free_guidance=False)
    assert np.abs(made["encoder_hidden_states"] - hidden.numpy()).max() < 1e-4
    assert np.abs(made["text_embeds"] - pooled.numpy()).max() < 1e-4


def test_a_file_for_one_text_encoder_does_not_fit_sdxl(sdxl, sdxl_bundle, files):
    for go in (lambda: accel.load(sdxl_bundle, embeddings=files[0]), lambda: open_source(sdxl, embeddings=files[:1])):
        with pytest.raises(UserError, match="for one text encoder"):
            go()


def test_where_the_pooled_text_differs_from_diffusers_it_is_said(sdxl, tmp_path, of_sdxl):
    """transformers finds the end of a prompt by the highest id where a config has the old eos_token_id."""
    import shutil

    folder = shutil.copytree(sdxl, tmp_path / "old")
    path = folder / "text_encoder_2/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))
    with pytest.warns(Notice, match="read at the end of the prompt"):
        accel.load(folder, "eager", embeddings=of_sdxl[0], low_memory=True)


# -------------------------------------------------------------------------------------------------- sources, commands


def test_a_source_says_what_was_added_and_writes_it(smallest, files, tmp_path):
    plain, source = open_source(smallest), open_source(smallest, embeddings=files)
    assert plain.record() == {} and [one["vectors"] for one in source.record()["embeddings"]] == [3, 1]
    assert plain.digest(["unet"]) != source.digest(["unet"])
    for part in ("text_encoder", "tokenizer", "unet"):
        source.copy(part, tmp_path / part)
    assert clip_tokenizer(tmp_path / "tokenizer").added_tokens_encoder.keys() >= {"<toy>", "<toy>_2", "<dot>"}
    rows = len(source.load("text_encoder").get_input_embeddings().weight)
    assert rows == len(plain.load("text_encoder").get_input_embeddings().weight) + 4


def test_an_opened_source_is_not_changed_in_silence(smallest, files, tmp_path):
    from accel.models.pipeline_bundle import open_pipeline

    with pytest.raises(UserError, match="takes no more LoRA files and embeddings"):
        export_pipeline(open_source(smallest), tmp_path / "b", embeddings=files)
    with pytest.raises(UserError, match="a source with embeddings is for an export"):
        open_pipeline(open_source(smallest, embeddings=files))


def test_tokens_that_the_model_has_are_refused_before_the_export(smallest, files):
    with pytest.raises(UserError, match="has a token 'cat</w>' already"):
        open_source(smallest, embeddings=[(files[0], "cat</w>")])


def test_the_command_line(smallest, smallest_bundle, files, tmp_path, capsys):
    out = tmp_path / "toy.png"
    command = ["run", str(smallest_bundle), "--prompt", PROMPT, "--engine", "onnxruntime", "--json", "--out", str(out)]
    drawn = []
    for more in ([], ["--embedding", str(files[0]), "--embedding", f"{files[1]}=<sky>"]):
        assert main([*command, *more, "--overwrite"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said.get("embeddings", []) == (["<toy>", "<sky>"] if more else [])
        drawn.append(out.read_bytes())
    assert drawn[0] != drawn[1]
    assert main([*command, "--embedding", "none.pt", "--overwrite"]) == 1
    assert "no such embedding file" in capsys.readouterr().err
    made = ["export", str(smallest_bundle), str(tmp_path / "x"), "--precision", "int8", "--embedding", str(files[0])]
    assert main(made) == 1
    assert "--embedding cannot be changed any more" in capsys.readouterr().err
