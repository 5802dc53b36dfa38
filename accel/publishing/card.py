"""The README.md of a repository: what the model is, how it is run, and what was measured, out of its manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..assets import hub_id, knows_only_digits
from ..bench import report
from ..bench.results import verdict
from ..bundle import Bundle, Component
from ..bundle.manifest import Manifest
from ..errors import markdown, printable
from ..int8 import summary

Document = Mapping[str, Any]


def card(bundle: Bundle, repo: str, licence: str, base_model: str | None = None, bench: Document | None = None) -> str:
    """The card of a bundle.

    Args:
        repo: the repository that it lies in.
        licence: identifier of the licence, as the hub spells it: `openrail++`, `apache-2.0`, `other`.
        base_model: hub id of the model that it was made from; by default the source's name, where that is one.
        bench: a result of `accel bench` on this bundle.
    """
    manifest = bundle.manifest
    source = str(manifest.source["name"])
    base = base_model or (None if (named := hub_id(source)) is None else named[0])
    sections = [_head(manifest, licence, base), f"# {markdown(repo)}", _about(bundle, base), _use(manifest, repo)]
    sections += ["## What is inside", _table(*_inside(bundle)), _how(manifest)]
    if lines := [line for record in manifest.components.values() for line in _int8(record)]:
        sections += ["## Int8", "\n".join(lines)]
    sections += _speed(bench) if bench else []
    if command := manifest.source.get("command"):
        sections += ["## Made with", f"```\n{printable(str(command))}\n```", _versions(manifest)]
    return "\n\n".join(sections) + "\n"


def _head(manifest: Manifest, licence: str, base: str | None) -> str:
    """YAML as the hub reads it; strings are written as JSON's, which are YAML's too."""
    tags = ["accel", "onnx", "openvino", "stable-diffusion", manifest.family, manifest.precision]
    fields: dict[str, Any] = {"license": licence, "library_name": "accel"}
    fields |= {"pipeline_tag": "image-to-image" if manifest.edits else "text-to-image"}
    if base:
        fields |= {"base_model": base}
        fields |= {"base_model_relation": "quantized"} if manifest.precision != "fp32" else {}
    fields["tags"] = list(dict.fromkeys([*tags, str(manifest.sampler["name"])]))
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---"])


def _about(bundle: Bundle, base: str | None) -> str:
    linked = f"[{base}](https://huggingface.co/{base})" if base and hub_id(base) else None
    made = linked or markdown(str(bundle.manifest.source["name"]))
    return (
        f"{made}, compiled by accel: one folder of checked ONNX graphs, the weights once, and every constant that "
        f"sampling takes. {markdown(bundle.title)}."
    )


def _use(manifest: Manifest, repo: str) -> str:
    prompt = "a handwritten seven" if knows_only_digits(str(manifest.source["name"])) else "a fox in the snow"
    kind = "StableDiffusionXL" if manifest.family == "sdxl" else "StableDiffusion"
    steps = len(manifest.sampler.get("timesteps") or ()) or manifest.sampler.get("steps")
    guidance = f"{manifest.sampler['guidance']:g}"
    return f"""## Use it

```
pip install "accel-diffusion[cpu]"
accel run {repo} --prompt "{prompt}" --seed 7 --out image.png
```

```python
import accel

image = accel.load("{repo}")("{prompt}", seed=7).images[0]
```

With optimum, which has to be told the steps and the guidance:

```python
from optimum.onnxruntime import ORT{kind}Pipeline

pipe = ORT{kind}Pipeline.from_pretrained("{repo}")
image = pipe("{prompt}", num_inference_steps={steps}, guidance_scale={guidance}).images[0]
```"""


def _inside(bundle: Bundle) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Each network, and how far its graph is from what it was made of, as the export measured it."""
    files, rows = bundle.manifest.files, []
    for record in bundle.manifest.components.values():
        error, limit = record.parity.get("relative_l2"), record.parity.get("limit")
        known = isinstance(error, float) and isinstance(limit, float)
        than = "float32" if record.int8 else "torch"
        parity = f"{error:.1e} from {than} (limit {limit:.1e})" if known else "not measured"
        size = report.size(files[record.weights]["bytes"])
        rows.append([record.name, f"{record.parameters / 1e6:,.1f} M", record.precision, size, parity])
    return ("network", "parameters", "precision", "weights", "relative L2 distance"), rows


def _how(manifest: Manifest) -> str:
    profile, sampler = manifest.profile, manifest.sampler
    steps = f"timesteps {sampler['timesteps']}" if sampler.get("timesteps") else f"{sampler.get('steps')} steps"
    options = "".join(f", {name.replace('_', ' ')} {value}" for name, value in sampler.get("options", {}).items())
    lines = [
        f"* Sampler: {sampler['name']}, {steps}, guidance {sampler['guidance']:g}{options}.",
        f"* Accepts: batch {profile.batch}, height {profile.height}, width {profile.width}, {profile.tokens} tokens.",
        f"* Weights of the source: sha256 `{manifest.source.get('weights_sha256', 'unknown')}`.",
    ]
    parts = [f"{one['name']} at {one.get('scale', 1)}" for one in manifest.source.get("loras", ())]
    parts += [str(one["name"]) for one in dict(manifest.source.get("parts", {})).values()]
    return "\n".join(lines + ([f"* Other parts in it: {markdown(', '.join(parts))}."] if parts else []))


def _int8(record: Component) -> Iterator[str]:
    if record.int8:
        yield f"* {record.name}: {markdown('; '.join(summary.lines(record)))}"


def _speed(bench: Document) -> Iterator[str]:
    yield "## Speed"
    yield markdown(verdict.sentence(bench))
    title, columns, rows = report.summary(bench)
    yield _table(columns, rows)
    yield "\n".join(f"* {markdown(line)}" for line in report.headline(bench))


def _versions(manifest: Manifest) -> str:
    return ", ".join(f"{name} {value}" for name, value in manifest.exporter.items() if name != "method") + "."


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[markdown(str(cell)) for cell in line] for line in (columns, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], ["---"] * len(columns), *cells[1:]))
