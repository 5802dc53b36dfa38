"""A bundle goes to the hub in one commit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..assets import knows_only_digits
from ..bench.results import saved
from ..bundle import Bundle
from ..bundle.hub import explained
from ..bundle.manifest import MANIFEST
from ..errors import UserError
from ..files import parse_json
from .card import card
from .files import MODULAR, repository

CARD = "README.md"
_ENGINE_FILES = "engines/"


@dataclass(frozen=True)
class Prepared:
    """What a push sends.

    Attributes:
        title: first line of the commit's message.
        files: name in the repository -> a file here, or what it holds.
        again: name there -> the name among `files` that it is another name of.
    """

    title: str
    files: Mapping[str, Path | bytes]
    again: Mapping[str, str]

    @property
    def card(self) -> str:
        held = self.files[CARD]
        assert isinstance(held, bytes)
        return held.decode()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted({*self.files, *self.again}))


@dataclass(frozen=True)
class Pushed:
    """What a push made.

    Attributes:
        repo: name of the repository.
        commit: the commit that holds the bundle.
        url: of that commit.
        files: names of what the repository holds of it.
    """

    repo: str
    commit: str
    url: str
    files: tuple[str, ...]


def prepared(
    bundle: str | Path | Bundle,
    repo: str,
    *,
    licence: str | None = None,
    base_model: str | None = None,
    bench: str | Path | None = None,
    engine_files: bool = False,
) -> Prepared:
    """What `push` would send, which takes no network. Every file is compared with its digest; arguments as there.

    Raises:
        UserError: for files that were changed, a licence that is missing, or a benchmark of another bundle.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    source = str(bundle.manifest.source["name"])
    licence = licence or ("apache-2.0" if knows_only_digits(source) else None)
    if not licence:
        fix = "--license openrail++, or whatever the page of the model says that the bundle was made from"
        raise UserError("a card needs a licence, and a bundle does not know its model's", fix)
    document = None if bench is None else saved.read(str(bench))
    if document is not None and document["bundle"]["digest"] != bundle.digest:
        raise UserError(f"{bench} measured another bundle", f"accel bench {bundle.name} --out bench.json")
    bundle.verify()
    found = repository(bundle, with_engine_files=engine_files)
    manifest = (json.dumps(found.manifest, indent=2, allow_nan=False) + "\n").encode()
    text = card(bundle, repo, licence, base_model, document)
    files = {**found.files, **MODULAR, MANIFEST: manifest, CARD: text.encode()}
    return Prepared(f"{source}, {bundle.manifest.precision}", files, found.again)


def push(
    bundle: str | Path | Bundle,
    repo: str,
    *,
    licence: str | None = None,
    base_model: str | None = None,
    bench: str | Path | None = None,
    private: bool | None = None,
    revision: str | None = None,
    engine_files: bool = False,
    message: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Put a bundle into a repository of the Hugging Face hub, in one commit; `accel.load(repo)` reads it there.

    Everything is compared with its digest first. The repository is made where there is none; what an earlier push left
    in it and this one does not have is removed, other files stay.

    Args:
        bundle: a bundle, or its folder.
        repo: `user/name`.
        licence: identifier of the licence as the hub spells it, such as `openrail++`: usually that of the model that
            the bundle was made from. Not needed for the digits that ship.
        base_model: hub id of that model, where the manifest does not say it.
        bench: a result of `accel bench`, .json or .html, whose table the card shows.
        private: whether a new repository is private; None for the account's own choice.
        revision: branch to commit to, made where there is none; None for main.
        engine_files: push TensorRT's engine files too.
        message: of the commit.
        token: of the account; None for that of `hf auth login` or HF_TOKEN.

    Raises:
        UserError: as `prepared`, and for what the hub refuses.
    """
    how = dict(licence=licence, base_model=base_model, bench=bench)
    made = prepared(bundle, repo, engine_files=engine_files, **how)
    return send(made, repo, private=private, revision=revision, message=message, token=token)


def send(
    made: Prepared,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> Pushed:
    """One commit of what was prepared; arguments as of `push`.

    Raises:
        UserError: for what the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, at = HfApi(token=token, library_name="accel"), revision or "main"
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if at != "main":
            api.create_branch(repo, branch=at, exist_ok=True)
        gone = _left_by_an_earlier_push(api, repo, at) - set(made.names)
        first = [CommitOperationAdd(name, held) for name, held in made.files.items()]
        # Before the second names: then the hub has these objects, and nothing is sent twice.
        api.preupload_lfs_files(repo, first, revision=at, free_memory=False)
        second = [CommitOperationAdd(name, made.files[of]) for name, of in made.again.items()]
        removed = [CommitOperationDelete(name) for name in sorted(gone)]
        done = api.create_commit(repo, [*first, *second, *removed], commit_message=message or made.title, revision=at)
    except UserError:
        raise
    except Exception as error:
        raise explained(error, repo, revision) from None
    return Pushed(repo, done.oid, done.commit_url, made.names)


def _left_by_an_earlier_push(api: Any, repo: str, revision: str) -> set[str]:
    """Files of the repository that are a bundle's: those that its manifest lists, second names, and engine files."""
    there = set(api.list_repo_files(repo, revision=revision))
    if MANIFEST not in there:
        return set()
    known = parse_json(Path(api.hf_hub_download(repo, MANIFEST, revision=revision)).read_bytes())
    listed = set(known.get("files", {})) if isinstance(known, dict) else set()
    folders = {name.rpartition("/")[0] for name in listed} - {""}
    graphs = (".onnx", ".onnx_data")
    return {
        name
        for name in there
        if name in listed
        or name.startswith(_ENGINE_FILES)
        or (name.rpartition("/")[0] in folders and name.endswith(graphs))
    }
