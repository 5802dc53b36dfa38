"""Imports run one way, and loading a bundle needs only what it must."""

import ast
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import accel
from accel.cli import VERBS

ROOT = Path(__file__).parents[2]
FOLDERS = {"accel": "accel", "export": "accel.export", "distill": "accel.distill", "kernels/ops": "accel.kernels"}

# The floors of the house, lowest first: a module imports from its own room and from floors below, never from above.
# Rooms that share a floor do not know each other.
ACCEL = (
    ("disk",),
    ("ground",),
    ("assets", "attention"),
    ("sampling", "text"),
    ("bundle",),
    ("int8", "trt", "patching", "safety"),
    ("models", "providers"),
    ("engines",),
    ("pipeline",),
    ("attaching", "bench", "class_to_image"),
    ("export", "distill", "publishing"),
    ("loading",),
    ("studio",),
    ("serving",),
    ("command_line",),
    ("commands",),
    ("roof",),
)
EXPORT = (("ground",), ("graph", "tensorrt"), ("int8", "aoti"), ("roof", "single_graph", "openvino_genai", "triton"))
DISTILL = (
    ("settings", "sources"),
    ("data", "watching"),
    ("diffusion", "training", "evaluation", "from_nothing"),
    ("methods", "edm", "digits", "emoji"),
    ("few_step",),
    ("roof",),
)
# Modules that lie loose in a root, and the floor that they belong to.
LOOSE = {
    "accel": {"cli": "roof", "__main__": "roof", None: "ground"},
    "accel.export": {"pipeline": "roof", "class_to_image": "roof", None: "ground"},
    "accel.distill": {"run": "roof", None: "settings"},
}
# Kernels stand beside the house: they know nothing of it, and only what patches a model knows them.
KERNELS, PATCHING = "accel.kernels", "accel.patching"
FLOORS = {"accel": ACCEL, "accel.export": EXPORT, "accel.distill": DISTILL}
FOLDER_OF = {root: ROOT / folder for folder, root in FOLDERS.items()}


def modules() -> dict[str, Path]:
    """Our modules by import name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imports(name: str, path: Path) -> set[str]:
    """Everything a module imports, anywhere in it, as absolute names."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def root_of(name: str) -> str:
    return next(root for root in ("accel.export", "accel.distill", "accel.kernels", "accel") if within(name, root))


def room(name: str, root: str) -> str:
    """The folder below a root that a module lies in; for one that lies loose, the floor it belongs to."""
    first = name.removeprefix(root).lstrip(".").partition(".")[0]
    return first if first and (FOLDER_OF[root] / first).is_dir() else LOOSE[root].get(first, LOOSE[root][None])


def upward(name: str, target: str) -> bool:
    """Whether an import runs up, or sideways into another room of the same floor."""
    ours, theirs = root_of(name), root_of(target)
    if KERNELS in (ours, theirs):
        return ours != theirs and not within(name, PATCHING)
    root = ours if ours == theirs else "accel"
    rooms = [of.removeprefix("accel.") if of != root else room(n, root) for n, of in ((name, ours), (target, theirs))]
    here, there = (next(i for i, floor in enumerate(FLOORS[root]) if entry in floor) for entry in rooms)
    return rooms[0] != rooms[1] and there >= here


def test_there_is_something_to_check():
    names = modules()
    assert {"accel.engines.eager", "accel.export.pipeline", "accel.cli", "accel"} <= set(names)
    assert "accel.models.source" in imports("accel.export.pipeline", names["accel.export.pipeline"])
    assert upward("accel.bundle.manifest", "accel.pipeline.request") and not upward("accel.cli", "accel.errors")
    assert upward("accel.export.graph.trace", "accel.distill.run") and upward("accel.errors", "accel.bundle")
    assert upward("accel.export.graph.trace", "accel.export.int8.audit") and upward("accel.engines.eager", KERNELS)


def test_imports_run_one_way():
    names = modules()
    wrong = [
        f"{name} imports {target}"
        for name, path in names.items()
        if name not in ("accel", "accel.export", "accel.distill")  # their public names are looked up when they are used
        for target in imports(name, path)
        if target in names and upward(name, target)
    ]
    assert wrong == []


def test_no_two_modules_import_each_other():
    """Imports inside functions and for type checkers count."""
    names = modules()
    arrows = {name: {t for t in imports(name, path) if t in names and t != name} for name, path in names.items()}
    packages = {name for name, path in names.items() if path.name == "__init__.py"}
    left = {name: targets - packages for name, targets in arrows.items() if name not in packages}
    while leaves := [name for name, targets in left.items() if not targets & set(left)]:
        for name in leaves:
            del left[name]
    assert sorted(left) == []


def test_every_room_stands_on_a_floor_and_is_not_crowded():
    for root, floors in FLOORS.items():
        rooms = {path.name for path in FOLDER_OF[root].iterdir() if (path / "__init__.py").is_file()}
        assert rooms <= {entry for floor in floors for entry in floor}, root
    for folder in {path.parent for path in modules().values()}:
        assert len(list(folder.glob("*.py"))) <= 15, folder  # fourteen and __init__.py


def tracked() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_torchs_sister_packages_are_not_needed():
    for path in tracked():
        if path.suffix == ".py":
            roots = {target.partition(".")[0] for target in imports("x", path)}
            assert not roots & {"torchvision", "torchaudio"}, path


def test_no_file_knows_a_developers_machine():
    # The container has a user of that name; its home is nobody's machine.
    pattern = re.compile(r"(?<![\w.$}])/(?:work|root|home)" + "/(?!accel\\b)")
    wrong = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        wrong += [f"{path.relative_to(ROOT)}: {line}" for line in text.splitlines() if pattern.search(line)]
    assert wrong == []


def test_hugging_faces_kernels_package_is_not_shadowed():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "from importlib.util import find_spec as f; s = f('kernels'); print(s and (s.origin or 'NAMESPACE'))"
    found = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True).stdout
    assert found.strip() == "None" or "site-packages" in found


def python(code: str, *args: str) -> str:
    """Run a piece of Python in a process of its own, away from the checkout."""
    done = subprocess.run([sys.executable, "-c", code, *args], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "numpy",
    "PIL",
    "tokenizers",
    "safetensors",
    "rich",
    "sklearn",
    "scipy",
}


@pytest.mark.parametrize(
    "code",
    [
        "import accel",
        "import accel; accel.UserError, accel.__version__",
        "import accel.cli",
        "from accel.cli import main\ntry:\n  main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_importing_accel_and_asking_for_help_load_nothing_heavy(code):
    loaded = python(f"import sys\n{code}\nprint()\nprint(*{{n.partition('.')[0] for n in sys.modules}})")
    assert HEAVY & set(loaded.splitlines()[-1].split()) == set()


@pytest.mark.parametrize(
    "code",
    [
        "from accel.engines import ENGINES, facts\nassert all(facts(name).libraries for name in ENGINES)",
        *(f"from accel.cli import main\ntry:\n  main(['{v}', '--help'])\nexcept SystemExit: pass" for v in VERBS),
    ],
)
def test_engines_and_samplers_are_listed_without_their_libraries(code):
    loaded = python(f"import sys\n{code}\nprint()\nprint(*{{n.partition('.')[0] for n in sys.modules}})")
    assert (HEAVY - {"numpy"}) & set(loaded.splitlines()[-1].split()) == set()


def test_help_is_there_at_once():
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "accel", "--help"], cwd="/", stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.7


@pytest.mark.parametrize("name", ["load", "load_engine", "Bundle", "Pipeline"])
def test_the_public_names_resolve(name):
    assert getattr(accel, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_like_it"):
        accel.nothing_like_it  # noqa: B018


# ONNX Runtime without torch

BLOCKED = """
import importlib.util, sys

def absent(name):
    return name.partition(".")[0] in ("torch", "diffusers", "transformers", "accelerate")

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if absent(name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if absent(name) else find_spec(name, *rest)
"""


def test_the_block_works():
    with pytest.raises(AssertionError, match="No module named 'torch'"):
        python(BLOCKED + "import torch")


def test_a_bundle_makes_the_same_image_on_onnx_runtime_without_torch(sd15_bundle, tmp_path):
    code = (
        BLOCKED
        + """
import accel, numpy
out = accel.load(sys.argv[1], engine="onnxruntime", threads=1)("the cat", seed=3, output_type="np")
numpy.save(sys.argv[2], out.images)
assert not {"torch", "diffusers", "transformers", "accelerate"} & set(sys.modules)
"""
    )
    python(code, str(sd15_bundle), str(tmp_path / "image.npy"))
    ordinary = accel.load(sd15_bundle, engine="onnxruntime", threads=1)("the cat", seed=3, output_type="np").images
    assert np.array_equal(np.load(tmp_path / "image.npy"), ordinary)


def test_a_lora_is_fused_without_torch(sd15_bundle, tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    with safe_open(sd15_bundle / "unet/model.safetensors", "np") as file:
        out, into = file.get_tensor(f"{layer.removeprefix('unet.')}.weight").shape
    rng = np.random.default_rng(0)
    parts = {"lora_A": (4, into), "lora_B": (out, 4)}
    tensors = {f"{layer}.{part}.weight": rng.normal(size=shape).astype(np.float32) for part, shape in parts.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    code = (
        BLOCKED
        + """
import accel, numpy
pipe = accel.load(sys.argv[1], engine="onnxruntime", threads=1, loras=[sys.argv[3]])
numpy.save(sys.argv[2], pipe("the cat", seed=3, output_type="np").images)
assert not {"torch", "diffusers", "transformers", "accelerate"} & set(sys.modules)
"""
    )
    python(code, str(sd15_bundle), str(tmp_path / "image.npy"), str(tmp_path / "lora.safetensors"))
    pipe = accel.load(sd15_bundle, engine="onnxruntime", threads=1)
    plain = pipe("the cat", seed=3, output_type="np").images
    pipe.set_loras(tmp_path / "lora.safetensors")
    drawn = pipe("the cat", seed=3, output_type="np").images
    assert np.array_equal(np.load(tmp_path / "image.npy"), drawn) and np.abs(drawn - plain).max() > 1e-5


def test_an_embedding_is_read_without_torch(sd15_bundle, tmp_path):
    from safetensors.numpy import save_file

    file = tmp_path / "toy.safetensors"
    save_file({"<toy>": np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)}, file)
    code = (
        BLOCKED
        + """
import accel, numpy
pipe = accel.load(sys.argv[1], engine="onnxruntime", threads=1, embeddings=[sys.argv[3]])
numpy.save(sys.argv[2], pipe("the <toy> cat", seed=3, output_type="np").images)
assert not {"torch", "diffusers", "transformers", "accelerate"} & set(sys.modules)
"""
    )
    python(code, str(sd15_bundle), str(tmp_path / "image.npy"), str(file))
    pipe = accel.load(sd15_bundle, engine="onnxruntime", threads=1, embeddings=file)
    drawn = pipe("the <toy> cat", seed=3, output_type="np").images
    assert np.array_equal(np.load(tmp_path / "image.npy"), drawn)


@pytest.mark.parametrize("engine", ["onnxruntime", "auto"])
def test_one_component_runs_without_torch(sd15_bundle, tmp_path, engine):
    code = (
        BLOCKED
        + """
import accel, numpy
feeds = dict(numpy.load(sys.argv[2]))
engine = accel.load_engine(sys.argv[1], "unet", engine=sys.argv[4])
numpy.save(sys.argv[3], engine(**feeds)["out_sample"])
"""
    )
    generator = np.random.default_rng(0)
    feeds = {
        "sample": generator.normal(size=(2, 4, 16, 24)).astype(np.float32),
        "timestep": np.array(500, np.float32),
        "encoder_hidden_states": generator.normal(size=(2, 77, 32)).astype(np.float32),
    }
    np.savez(tmp_path / "feeds.npz", **feeds)
    python(code, str(sd15_bundle), str(tmp_path / "feeds.npz"), str(tmp_path / "out.npy"), engine)
    ordinary = accel.load_engine(sd15_bundle, "unet", engine="onnxruntime")(**feeds)["out_sample"]
    assert np.allclose(np.load(tmp_path / "out.npy"), ordinary, atol=1e-4)


def test_the_command_line_runs_a_bundle_without_torch_and_lists_what_is_missing(sd15_bundle, tmp_path):
    code = BLOCKED + "from accel.cli import main\nsys.exit(main(sys.argv[1:]))"
    report = python(
        code,
        "run",
        str(sd15_bundle),
        "--prompt",
        "the cat",
        "--engine",
        "onnxruntime",
        "--json",
        "--out",
        str(tmp_path / "cat.png"),
    )
    assert Path(json.loads(report)["images"][0]).is_file()
    engines = json.loads(python(code, "inspect", str(sd15_bundle), "--json"))["engines"]
    assert engines["onnxruntime"]["ok"] and not engines["eager"]["ok"]
    assert "torch" in engines["eager"]["detail"]
