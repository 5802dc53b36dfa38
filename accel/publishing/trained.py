"""What `accel distill` made goes to the hub: a pipeline, a LoRA or a VAE, with the card that lies beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..assets import knows_only_digits, public_name
from ..bundle.hub import explained
from ..errors import UserError
from ..files import parse_json, read_bytes
from .upload import CARD, Prepared, Pushed, send

RECORD = "training.json"
_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
_LARGEST = 1 << 24  # bytes of a record or a card
_NAMED = ("model", "teacher", "data_model", "data", "class_data", "pairs", "cache")  # fields that may name a path


def is_trained(folder: str | Path) -> bool:
    """Whether a folder is a result of `accel distill`."""
    return (Path(folder) / RECORD).is_file()


def licence_for(model: str, licence: str | None) -> str:
    """The licence that a card names.

    Raises:
        UserError: where none is given and the model is not one that ships.
    """
    licence = licence or ("apache-2.0" if knows_only_digits(model) else None)
    if not licence:
        fix = "--license openrail++, or whatever the page of the model says that it was trained from"
        raise UserError("a card needs a licence, and a trained model does not know its own", fix)
    return licence


def check_repository(repo: str, *, private: bool | None = None, token: str | None = None) -> None:
    """Make the repository where there is none: what the hub refuses after a training, it refuses now.

    Raises:
        UserError: for a name that is none, or for what the hub says.
    """
    if not _NAME.fullmatch(repo):
        raise UserError(f"{repo!r} is no repository of the hub", "--push USER/NAME")
    from huggingface_hub import HfApi

    try:
        HfApi(token=token, library_name="accel").create_repo(repo, private=private, exist_ok=True)
    except Exception as error:
        raise explained(error, repo) from None


def prepared_trained(folder: str | Path, *, licence: str | None = None, base_model: str | None = None) -> Prepared:
    """What `push_trained` would send, which takes no network.

    Paths of this machine in the record become names.

    Raises:
        UserError: for a folder without a card or a record, or without a licence.
    """
    folder = Path(folder)
    record = parse_json(read_bytes(folder / RECORD, "the training record", _LARGEST))
    recipe = record.get("recipe") if isinstance(record, dict) else None
    if not isinstance(recipe, dict) or not isinstance(recipe.get("model"), str):
        raise UserError(f"{folder / RECORD} is no record of a training", "push a folder that accel distill made")
    text = read_bytes(folder / CARD, "the card", _LARGEST).decode()
    found = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    if found is None:
        raise UserError(f"{folder / CARD} does not begin with its table of YAML", "accel distill writes one")
    named = {"license": licence_for(recipe["model"], licence)} | ({"base_model": base_model} if base_model else {})
    kept = [line for line in found[1].splitlines() if line.partition(":")[0] not in named]
    head = [*(f"{name}: {json.dumps(value)}" for name, value in named.items()), *kept]
    written = "\n".join(["---", *head, "---", text[found.end() :]])
    said = {**recipe, **{name: _public(recipe[name]) for name in _NAMED if isinstance(recipe.get(name), str)}}
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    files[CARD] = written.encode()
    files[RECORD] = (json.dumps(record | {"recipe": said}, indent=2) + "\n").encode()
    return Prepared(f"{public_name(recipe['model'])}, {record.get('method', 'trained')}", files, {})


def push_trained(
    folder: str | Path,
    repo: str,
    *,
    licence: str | None = None,
    base_model: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Put a result of `accel distill` into a repository of the hub, in one commit; arguments as `upload.push`."""
    made = prepared_trained(folder, licence=licence, base_model=base_model)
    return send(made, repo, private=private, revision=revision, message=message, token=token)


def _public(spec: str) -> str:
    """`--data` and its like, each path in it by its last part."""
    return " | ".join(public_name(part.strip()) for part in spec.split("|")) if spec else spec
