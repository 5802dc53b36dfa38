"""Pipelines from the Hugging Face hub: the snapshot that is in the cache, or is fetched into it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..assets import hub_id
from ..bundle.hub import explained
from ..errors import UserError

_FOLDERS = ("unet", "vae", "text_encoder*", "tokenizer*", "scheduler")


def download(repo: str, variant: str | None, *, configs_only: bool = False, safety_checker: bool = False) -> Path:
    """The cached snapshot of a hub repository: one kind of its weight files, as `weights.chosen_files` prefers them.

    Files that lie in the cache already, from other variants or from diffusers, do not count.

    Args:
        repo: its name, with `@` and a branch, tag or commit behind it for another one than main.
        safety_checker: whether its weights are fetched too: 1.2 GB of SD1.5's.
    """
    folders = (*_FOLDERS, "safety_checker") if safety_checker else _FOLDERS
    path = _snapshot(repo, folders, (), ())
    if configs_only or not (path / "unet/config.json").is_file():  # nothing for us: not worth gigabytes
        return path
    plain, half = (("safetensors", ("*.fp16*",)), ("bin", ("*.fp16*",))), (("fp16*.safetensors", ()),)
    choices = plain + half
    if variant is not None:
        choices = ((f"{variant}*.safetensors", ()), (f"{variant}*.bin", ()))
    for kind, ignored in choices:
        path = _snapshot(repo, folders, (kind,), ignored)
        if any(not any(file.match(pattern) for pattern in ignored) for file in path.glob(f"unet/*.{kind}")):
            break
    return path


def _snapshot(repo: str, folders: Sequence[str], kinds: Sequence[str], ignored: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    name, revision = hub_id(repo) or (repo, None)
    allowed = ["*.json", "*.txt", *(f"{folder}/*.{kind}" for folder in folders for kind in ("model", *kinds))]
    try:
        patterns = dict(allow_patterns=allowed, ignore_patterns=["*non_ema*", *ignored])
        return Path(snapshot_download(name, revision=revision, **patterns))
    except Exception as error:
        why = explained(error, name, revision)
        text = f"{repo} is neither a local folder nor to be had from the hub: {why.message}"
        raise UserError(text, f"{why.fix}; or give a folder") from None
