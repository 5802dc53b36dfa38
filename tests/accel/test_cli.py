"""What a new user types, right and wrong: exit code, one clear message with a fix, and nothing broken."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest

from accel.cli import VERBS, main


@pytest.fixture
def accel(capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*args) -> tuple[int, str, str]:
        with warnings.catch_warnings():
            try:
                code = main([str(arg) for arg in args])
            except SystemExit as error:
                code = error.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err and "bug in accel" not in err, err
        return code, out, err

    shown = warnings.showwarning
    yield call
    warnings.showwarning = shown


@pytest.fixture
def bundle_copy(smallest_bundle, tmp_path) -> Path:
    """A bundle that a test may break."""
    return Path(shutil.copytree(smallest_bundle, tmp_path / "bundle"))


_LOADED = {}


@pytest.fixture
def loaded_once(monkeypatch):
    """Engines are loaded once for all requests that are refused after that."""
    from accel.pipeline import pipeline

    load = pipeline.load_engine

    def cached(bundle, name, engine="auto", **options):
        key = (bundle.path, name, engine, tuple(sorted(options.items())))
        if key not in _LOADED:
            _LOADED[key] = load(bundle, name, engine, **options)
        return _LOADED[key]

    monkeypatch.setattr(pipeline, "load_engine", cached)


@pytest.fixture
def refused(accel):
    """Run the command line, which must fail with one message that has a fix."""

    def call(*args) -> str:
        code, _, err = accel(*args)
        assert code == 1
        # transformers' bar is silenced by an environment variable that it reads when it is first imported.
        others = ("note:", "engine:", "Loading weights")
        lines = [line for line in err.splitlines() if line.strip() and not line.startswith(others)]
        assert lines[0].startswith("error: ") and lines[-1].startswith("  fix: "), err
        assert err.count("error:") == 1
        return err

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Wrong use


@pytest.mark.parametrize(
    "args",
    [
        ["explode"],
        ["expotr", "a", "b"],
        ["--frobnicate"],
        ["run"],
        ["run", "bundle"],
        ["export"],
        ["export", "model"],
        ["run", "bundle", "--prompt"],
        ["run", "bundle", "--prompt", "x", "--steps", "many"],
        ["run", "bundle", "--prompt", "x", "--frobnicate"],
        ["inspect", "a", "b"],
        ["doctor", "me"],
        ["export", "a", "b", "--opset", "new"],
    ],
)
def test_wrong_use_ends_with_2_and_the_usage(accel, args):
    code, out, err = accel(*args)
    assert code == 2
    assert err.startswith("usage: accel") and "error:" in err
    assert out == ""


def test_an_unknown_verb_lists_the_known_ones(accel):
    _, _, err = accel("explode")
    assert "explode" in err and all(verb in err for verb in VERBS)


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb(accel, args):
    code, out, _ = accel(*args)
    assert code == 0
    assert all(f"  {verb} " in out for verb in VERBS)


def test_the_version_is_printed(accel):
    from accel._version import __version__ as version

    assert accel("--version")[:2] == (0, f"accel {version}\n")


@pytest.mark.parametrize("verb", ["doctor", "export", "run", "inspect"])
def test_every_verb_has_help_with_an_example(accel, verb):
    code, out, _ = accel(verb, "--help")
    assert code == 0
    assert f"example: accel {verb}" in out


# Bundles that are not what they should be


@pytest.mark.parametrize("verb", [["inspect"], ["run", "--prompt", "x"]])
def test_a_path_that_does_not_exist_or_is_no_bundle(refused, tmp_path, smallest, verb):
    out = ["--out", tmp_path / "o.png"] if verb[0] == "run" else []
    verb, *rest = verb
    assert "no such folder" in refused(verb, tmp_path / "nothing", *rest, *out)
    (tmp_path / "photos").mkdir()
    assert "is no bundle" in refused(verb, tmp_path / "photos", *rest, *out)
    assert f"fix: accel export {smallest}" in refused(verb, smallest, *rest, *out)
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize("damage", ["truncated", "edited", "deleted", "newer"])
def test_a_damaged_bundle_is_not_run(accel, refused, bundle_copy, tmp_path, edit_manifest, damage):
    weights = bundle_copy / "unet/model.safetensors"
    if damage == "truncated":
        os.truncate(weights, 1000)
    elif damage == "edited":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "deleted":
        weights.unlink()
    else:
        edit_manifest(bundle_copy, lambda data: data.update(schema=99))
    before = contents(bundle_copy)
    err = refused("run", bundle_copy, "--prompt", "x", "--out", tmp_path / "o.png")
    assert ("schema 99" if damage == "newer" else "unet/model.safetensors") in err
    assert not (tmp_path / "o.png").exists()
    code, out, err = accel("inspect", bundle_copy)
    assert code == 1
    assert ("DAMAGED" in out) or damage == "newer"
    assert contents(bundle_copy) == before


# Requests that cannot be met


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--height", "256"], ["256", "32 to 64"]),
        (["--width", "65"], ["65", "32 to 64"]),
        (["--height", "0"], ["height 0", "32 to 64"]),
        (["--width", "-64"], ["-64"]),
        (["--steps", "0"], ["steps"]),
        (["--steps", "-3"], ["steps"]),
        (["--steps", "100000"], ["steps"]),
        (["--guidance", "nan"], ["guidance", "nan"]),
        (["--guidance", "inf"], ["guidance", "inf"]),
        (["--guidance", "-2"], ["guidance"]),
        (["--images", "0"], ["0"]),
        (["--images", "-1"], ["-1"]),
        (["--seed", "-1"], ["seed"]),
        (["--sampler", "ddpm"], ["ddpm", "dpmpp_2m"]),
        (["--engine", "cudnn"], ["cudnn", "onnxruntime"]),
        (["--engine", "eager", "--device", "cuda"], ["cuda"]),
        (["--engine", "eager", "--device", "toaster"], ["toaster"]),
        (["--engine", "eager", "--dtype", "fp8"], ["fp8"]),
        (["--engine", "onnxruntime", "--dtype", "fp16"], ["dtype"]),
        (["--engine", "onnxruntime", "--provider", "cuda"], ["cuda"]),
        (["--engine", "onnxruntime", "--threads", "-1"], ["threads"]),
        (["--engine", "openvino", "--device", "toaster"], ["toaster"]),
        (["--engine", "openvino", "--threads", "-1"], ["threads"]),
        (["--prompt", ""], ["prompt is empty"]),
        (["--prompt", "  \t"], ["prompt is empty"]),
        (["--out", "picture"], ["picture", "image file"]),
        (["--out", "picture.exe"], ["picture.exe"]),
    ],
)
def test_a_request_that_cannot_be_met_says_why(
    refused, loaded_once, smallest_bundle, tmp_path, monkeypatch, args, words
):
    monkeypatch.chdir(tmp_path)
    defaults = {"--engine": "onnxruntime", "--out": "o.png"}
    rest = [item for key, value in defaults.items() if key not in args for item in (key, value)]
    err = refused("run", smallest_bundle, "--prompt", "x", *args, *rest)
    assert all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_is_not_installed_says_how_to_install_it(refused, smallest_bundle, tmp_path, monkeypatch):
    from accel.engines import openvino

    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    err = refused("run", smallest_bundle, "--prompt", "x", "--engine", "openvino", "--out", tmp_path / "o.png")
    assert "openvino is not installed" in err and 'pip install "accel-diffusion[openvino]"' in err


def test_auto_goes_on_without_an_engine_that_is_not_installed(accel, smallest_bundle, tmp_path, monkeypatch):
    from accel.engines import openvino

    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    code, _, err = accel("run", smallest_bundle, "--prompt", "x", "--out", tmp_path / "o.png")
    assert code == 0
    assert "engine: onnxruntime" in err
    assert (tmp_path / "o.png").exists()


def test_a_prompt_that_is_too_long_is_cut_with_a_note_that_says_where(accel, smallest_bundle, tmp_path):
    prompt = "the cat " * 40 + "zebra"
    out = tmp_path / "o.png"
    code, _, err = accel("run", smallest_bundle, "--prompt", prompt, "--engine", "onnxruntime", "--out", out)
    assert code == 0
    assert err.count("note:") == 1 and "zebra" in err
    assert (tmp_path / "o.png").exists()


def test_several_prompts_and_images_are_numbered_and_reported_as_json(accel, smallest_bundle, tmp_path):
    code, out, _ = accel(
        "run",
        smallest_bundle,
        "--prompt",
        "the cat",
        "--prompt",
        "the dog",
        "--images",
        2,
        "--seed",
        5,
        "--width",
        64,
        "--engine",
        "onnxruntime",
        "--json",
        "--out",
        tmp_path / "new" / "o.png",
    )
    report = json.loads(out)
    assert code == 0
    assert report["seeds"] == [5, 6, 7, 8]
    assert sorted(map(str, (tmp_path / "new").iterdir())) == sorted(report["images"]) and len(report["images"]) == 4
    assert set(report["seconds"]) >= {"text_encoder", "unet", "vae_decoder", "total"}


def test_an_image_file_that_exists_survives_a_run_that_fails(refused, smallest_bundle, tmp_path):
    out = tmp_path / "o.png"
    out.write_bytes(b"precious")
    refused("run", smallest_bundle, "--prompt", "x", "--steps", 0, "--engine", "onnxruntime", "--out", out)
    assert out.read_bytes() == b"precious"


@pytest.fixture
def user_folder():
    """A folder of an ordinary user, whom we are for a while: root may write everywhere."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    root = os.geteuid() == 0
    yield folder
    if root:
        os.seteuid(0)
    shutil.rmtree(folder)


def drop_privileges() -> None:
    if os.geteuid() == 0:
        os.seteuid(65534)


def test_an_image_in_an_unwritable_place_is_refused_before_the_work(refused, smallest_bundle, user_folder, monkeypatch):
    bundle = shutil.copytree(smallest_bundle, user_folder / "bundle")
    locked = user_folder / "locked"
    locked.mkdir(mode=0o555)
    monkeypatch.setattr("accel.pipeline.Pipeline.__call__", lambda *_, **__: pytest.fail("the work was done first"))
    drop_privileges()
    for out in (locked / "o.png", locked / "deep" / "o.png"):
        assert str(locked) in refused("run", bundle, "--prompt", "x", "--engine", "onnxruntime", "--out", out)


def test_an_image_below_a_file_or_over_a_folder_is_refused(refused, smallest_bundle, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for out in (tmp_path / "file" / "o.png", tmp_path / "folder.png"):
        refused("run", smallest_bundle, "--prompt", "x", "--engine", "onnxruntime", "--out", out)


def test_a_bundle_that_may_not_be_read_is_named(refused, smallest_bundle, user_folder):
    bundle = Path(shutil.copytree(smallest_bundle, user_folder / "bundle"))
    (bundle / "unet/model.safetensors").chmod(0)
    drop_privileges()
    err = refused("run", bundle, "--prompt", "x", "--engine", "onnxruntime", "--out", user_folder / "o.png")
    assert "unet/model.safetensors" in err


# Exports


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--opset", "7"], "opset 7"),
        (["--precision", "fp8"], "fp8"),
        (["--profile", "huge"], "huge"),
        (["--profile", "size=100"], "multiple"),
        (["--components", "unet,brain"], "brain"),
        (["--steps", "0"], "steps"),
        (["--guidance", "nan"], "guidance"),
        (["--guidance", "-1"], "guidance"),
        (["--sampler", "ddpm"], "ddpm"),
        (["--sampler", "dmd2", "--steps", "0"], "steps"),
    ],
)
def test_an_export_with_wrong_options_says_so_and_leaves_nothing(refused, smallest, tmp_path, args, words):
    assert words in refused("export", smallest, tmp_path / "a" / "out", *args)
    assert not (tmp_path / "a").exists() or list((tmp_path / "a").iterdir()) == []


def test_an_export_of_nan_weights_names_the_weight_and_keeps_the_old_bundle(refused, smallest, bundle_copy, tmp_path):
    from safetensors.torch import load_file, save_file

    source = Path(shutil.copytree(smallest, tmp_path / "source"))
    (path,) = (source / "text_encoder").glob("*.safetensors")
    state = load_file(path)
    name = next(key for key in state if key.endswith("fc2.weight"))
    state[name][0, 0] = float("nan")
    save_file(state, path, metadata={"format": "pt"})
    before = contents(bundle_copy)
    err = refused("export", source, bundle_copy, "--components", "text_encoder", "--overwrite")
    assert name.removeprefix("text_model.") in err and "not finite" in err
    assert contents(bundle_copy) == before
    assert [p.name for p in bundle_copy.parent.iterdir() if p.name.startswith(".")] == []


def test_an_export_to_where_something_is_keeps_it(refused, smallest, bundle_copy, tmp_path):
    before = contents(bundle_copy)
    assert "--overwrite" in refused("export", smallest, bundle_copy)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "me.jpg").write_text("me")
    assert "not something accel wrote" in refused("export", smallest, photos, "--overwrite")
    assert "not something accel wrote" in refused("export", smallest, smallest, "--overwrite")
    assert contents(bundle_copy) == before and contents(photos) == {"me.jpg": b"me"}


def test_an_export_to_a_place_without_permission_is_refused_at_once(refused, smallest, user_folder):
    source = shutil.copytree(smallest, user_folder / "source")
    locked = user_folder / "locked"
    locked.mkdir(mode=0o555)
    drop_privileges()
    assert "no permission" in refused("export", source, locked / "out", "--components", "vae_decoder")


def test_an_export_prints_its_manifest_as_json(accel, smallest, tmp_path):
    code, out, _ = accel(
        "export",
        smallest,
        tmp_path / "out",
        "--components",
        " vae_decoder",
        "--profile",
        "static",
        "--json",
        "--sampler",
        "dmd2",
        "--steps",
        2,
    )
    assert code == 0
    manifest = json.loads(out)
    assert list(manifest["components"]) == ["vae_decoder"]
    assert len(manifest["sampler"]["timesteps"]) == 2 and manifest["sampler"]["guidance"] == 0
    code, out, _ = accel("inspect", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(out)["manifest"] == manifest | json.loads((tmp_path / "out" / "accel.json").read_text())


def running_export(source: Path, out: Path) -> subprocess.Popen:
    """An export in a process of its own, caught in the middle: its folder is there and not yet in place."""
    command = [sys.executable, "-m", "accel", "export", source, out]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A suite that was started in the background ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not list(out.parent.glob(f".{out.name}.partial-*/*/model.onnx")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    return process


def test_ctrl_c_in_the_middle_of_an_export_leaves_nothing(smallest, tmp_path):
    process = running_export(smallest, tmp_path / "out")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_is_never_taken_for_a_bundle_and_the_next_one_tidies_up(refused, accel, smallest, tmp_path):
    process = running_export(smallest, tmp_path / "out")
    process.kill()
    process.communicate()
    (partial,) = tmp_path.iterdir()
    refused("inspect", tmp_path / "out")
    refused("inspect", partial)
    code, _, _ = accel("export", smallest, tmp_path / "out", "--components", "text_encoder", "--profile", "static")
    assert code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_really_full_is_named(refused, smallest, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        # As if the estimate had been met when the work began: somebody else fills the disk meanwhile.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("accel.export.pipeline.require_space", lambda *_: None)
            err = refused("export", smallest, disk / "out", "--components", "text_encoder", "--profile", "static")
        assert "no space left" in err
        assert list(disk.iterdir()) == []
        assert "are needed" in refused("export", smallest, disk / "out", "--components", "text_encoder")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


# Reports


def test_inspect_and_doctor_print_json(accel, smallest_bundle):
    code, out, _ = accel("inspect", smallest_bundle, "--json")
    report = json.loads(out)
    assert code == 0 and report["intact"] is True and report["problem"] is None
    assert report["manifest"]["components"].keys() == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    code, out, _ = accel("doctor", "--json")
    assert code == 0
    assert json.loads(out)["engines"]["onnxruntime"]["ok"]


def test_inspect_for_people_names_every_component_and_engine(accel, smallest_bundle):
    code, out, _ = accel("inspect", smallest_bundle)
    assert code == 0
    for word in ("text_encoder", "unet", "vae_decoder", "onnxruntime", "eager", "files match", "latent_sample"):
        assert word in out


def test_a_reader_that_goes_away_is_no_error_message(smallest_bundle):
    command = f"{sys.executable} -m accel inspect {smallest_bundle} --json | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
