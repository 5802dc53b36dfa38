"""Write a bundle as a folder for OpenVINO GenAI and optimum-intel.

OUT/model_index.json  scheduler/             as the bundle has them
OUT/<network>/openvino_model.xml  .bin  config.json
OUT/tokenizer/  tokenizer_2/                 with openvino_tokenizer.xml and openvino_detokenizer.xml
OUT/openvino_genai.json  README.md           steps, guidance, distances from the bundle's networks, digests
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from accel.bundle import Bundle, Component
from accel.engines import load_engine
from accel.errors import MissingPackage, Notice, UserError
from accel.files import OPENVINO_GENAI, new_folder, require_space, sha256, write_json
from accel.parity import relative_l2
from accel.safety import COMPONENT as SAFETY_CHECKER

from . import networks, refusals

Progress = Callable[[str, float], None]
_NETWORKS = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder")
_LIMIT = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
_TIMESTEP = 437  # where a UNet is compared


def write(bundle: Bundle, out: str | Path, *, overwrite: bool = False, progress: Progress = lambda *_: None) -> dict:
    """Write the folder; it appears only when it is whole, and each network computes what the bundle's own does.

    An int8 bundle keeps its scales: they are those of its calibration, in the IR too.

    Returns:
        What `openvino_genai.json` says.

    Raises:
        UserError: for a bundle that GenAI does not run, changed files, or a network that comes out different.
    """
    config = refusals.check(bundle)
    _converter()
    bundle.verify()
    manifest = bundle.manifest
    if SAFETY_CHECKER in manifest.components:
        warnings.warn("the safety checker is left out: GenAI has none", Notice, stacklevel=2)
    names = [name for name in _NETWORKS if name in manifest.components]
    weights = sum(bundle.file(manifest.components[name].weights).stat().st_size for name in names)
    require_space(Path(out).absolute().parent, weights)
    to_noise = config["_class_name"] == "LCMScheduler" and config.get("prediction_type") == "v_prediction"
    alphas = np.asarray(bundle.noise_schedule().alphas_cumprod, np.float64) if to_noise else None
    parity = {}
    with new_folder(Path(out), overwrite=overwrite) as folder:
        for i, name in enumerate(names):
            progress(name, i / (len(names) + 1))
            record = manifest.components[name]
            (folder / name).mkdir()
            model = networks.converted(bundle, record, alphas)
            networks.save(model, folder / name)
            (folder / name / "config.json").write_bytes(bundle.file(f"{record.folder}/config.json").read_bytes())
            parity[name] = _compared(bundle, record, folder / name, alphas)
        progress("tokenizers", len(names) / (len(names) + 1))
        for name in ("tokenizer", "tokenizer_2"):
            bundle.copy(folder, name)
            if (folder / name).is_dir():
                _convert_tokenizer(folder / name)
        bundle.copy(folder, "scheduler")
        if to_noise:
            write_json(folder / "scheduler/scheduler_config.json", config | {"prediction_type": "epsilon"})
        (folder / "model_index.json").write_bytes(bundle.file("model_index.json").read_bytes())
        record = _record(bundle, folder, parity, to_noise)
        (folder / "README.md").write_text(_readme(record), encoding="utf-8")
        write_json(folder / OPENVINO_GENAI, record)
    progress("done", 1.0)
    return record


def describe(out: Path, record: dict[str, Any]) -> str:
    """What was written, in two lines."""
    worst = max(record["parity"].values())
    call = f"num_inference_steps={record['num_inference_steps']}, guidance_scale={record['guidance_scale']:g}"
    return (
        f"{out} is ready for openvino_genai.Text2ImagePipeline and optimum-intel; each network is within {worst:.1e} "
        f"of the bundle's\nGenAI has to be told: {call}"
    )


def _compared(bundle: Bundle, record: Component, folder: Path, alphas: np.ndarray | None) -> float:
    """Relative L2 distance of the saved network from the bundle's own on OpenVINO, on one random input.

    Raises:
        UserError: where it is larger than rounding.
    """
    rng = np.random.default_rng(0)
    sizes = {name: limits.min for name, limits in record.dims.items()}
    feeds: dict[str, np.ndarray] = {}
    for spec in record.inputs:
        shape = spec.concrete(sizes)
        if spec.dtype == "int64":
            feeds[spec.name] = rng.integers(1, 400, shape)
        else:
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    if "timestep" in feeds:
        feeds["timestep"] = np.asarray(_TIMESTEP, feeds["timestep"].dtype)
    with load_engine(bundle, record.name, "openvino", folds=False, verify=False) as engine:
        wanted = [np.asarray(value, np.float32) for value in engine(**feeds).values()]
    if record.name == "text_encoder_2":
        wanted[:2] = wanted[1::-1]
    if record.name == "unet":
        if alphas is not None:
            share = np.sqrt(alphas[_TIMESTEP])
            wanted[0] = share * wanted[0] + np.sqrt(1 - alphas[_TIMESTEP]) * np.asarray(feeds["sample"], np.float32)
        feeds["timestep"] = np.asarray([_TIMESTEP], np.int64)
    given = {name: value if value.dtype.kind == "i" else value.astype(np.float32) for name, value in feeds.items()}
    model = networks.openvino().Core().read_model(folder / "openvino_model.xml")
    found = networks.run(model, given)
    error = max(float(relative_l2(a, b)) for a, b in zip(found, wanted, strict=True))
    if not error <= (limit := _LIMIT[record.dtype] * (100 if record.int8 else 1)):
        why = f"the {record.name} differs from the bundle's by {error:.1e} as OpenVINO IR (limit {limit:.0e})"
        raise UserError(why, "accel export --target bundle, and run it with accel; please report this")
    return error


def _converter() -> Any:
    try:
        from openvino_tokenizers import convert_tokenizer
    except ImportError:
        raise MissingPackage("openvino-tokenizers", "a folder for OpenVINO GenAI", "genai") from None
    return convert_tokenizer


def _convert_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    made = _converter()(AutoTokenizer.from_pretrained(folder, local_files_only=True), with_detokenizer=True)
    for model, name in zip(made, ("openvino_tokenizer", "openvino_detokenizer"), strict=True):
        networks.openvino().save_model(model, folder / f"{name}.xml")


def _record(bundle: Bundle, folder: Path, parity: dict[str, float], to_noise: bool) -> dict[str, Any]:
    manifest, versions = bundle.manifest, {"openvino": networks.openvino().__version__}
    sampler = manifest.sampler
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "source": manifest.source["name"],
        "bundle": bundle.digest,
        "precision": manifest.precision,
        "num_inference_steps": len(sampler.get("timesteps") or ()) or sampler.get("steps"),
        "guidance_scale": float(sampler["guidance"]),
        "unet_predicts": "noise, from v" if to_noise else "as trained",
        "parity": parity,
        "versions": versions,
        "files": {
            path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
            for path in files
        },
    }


def _readme(record: dict[str, Any]) -> str:
    steps, guidance = record["num_inference_steps"], f"{record['guidance_scale']:g}"
    return f"""# {json.dumps(record["source"])[1:-1]} for OpenVINO

```python
import openvino_genai

pipe = openvino_genai.Text2ImagePipeline(".", "CPU")
image = pipe.generate("a prompt", num_inference_steps={steps}, guidance_scale={guidance}).data[0]
```

optimum-intel reads the folder too: `OVDiffusionPipeline.from_pretrained(".")`, called with the same steps and guidance.
"""
