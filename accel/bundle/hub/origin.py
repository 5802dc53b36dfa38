"""Where a bundle of the hub comes from: its repository and commit, and the folder here that its files are put into."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...assets import hub_id
from ...errors import UserError
from ...files import cache_dir, inside, read_json, write_json
from .errors import explained

MANIFEST, RECORD = "accel.json", "hub.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FRESH = 60.0  # seconds for which an answer of the hub is believed
_answers: dict[tuple[str, str, str], tuple[float, Origin | UserError | None]] = {}


@dataclass(frozen=True)
class Origin:
    """A commit of a repository of the hub.

    Attributes:
        repo: its name, `user/name`.
        commit: 40 hexadecimal digits, whatever branch or tag was asked for.
    """

    repo: str
    commit: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.commit[:12]}"

    @property
    def folder(self) -> Path:
        """Where its files lie in accel's cache."""
        return _root() / self.repo.replace("/", "--") / self.commit

    def fetch(self, entries: Iterable[str]) -> None:
        """Put files into the folder, from the hub's own cache or from the hub; those that are there stay.

        Each lies on the disk once: the folder has second names (hard links) for what the hub's cache holds, where both
        are on one file system.

        Raises:
            UserError: for a file that cannot be had, with the reason.
        """
        wanted = [entry for entry in dict.fromkeys(entries) if not inside(self.folder, entry, "the entry").exists()]
        if not wanted:
            return
        from huggingface_hub import hf_hub_download, snapshot_download

        at: dict[str, Any] = {"repo_id": self.repo, "revision": self.commit}
        try:
            found = Path(snapshot_download(**at, allow_patterns=[glob.escape(entry) for entry in wanted]))
            for entry in wanted:
                if not (found / entry).is_file():  # without a network it gives what there is, and says nothing
                    hf_hub_download(**at, filename=entry)
        except Exception as error:
            raise explained(error, self.repo, self.commit) from None
        for entry in wanted:
            _link((found / entry).resolve(), self.folder / entry)

    def forget(self, entry: str) -> None:
        """Remove a file that is not what it should be, here and from the hub's cache: the next `fetch` gets it anew."""
        (self.folder / entry).unlink(missing_ok=True)
        with contextlib.suppress(Exception):
            from huggingface_hub import try_to_load_from_cache

            kept = try_to_load_from_cache(self.repo, entry, revision=self.commit)
            if isinstance(kept, str):
                Path(kept).resolve().unlink(missing_ok=True)
                Path(kept).unlink(missing_ok=True)


def find(model: str | Path) -> Origin | None:
    """The commit that a name of the hub means now, where a bundle lies there; or that of a folder which `fetch` filled.

    Without a network it is the one that was loaded last.

    Returns:
        None for anything else, such as a diffusers pipeline of the hub.

    Raises:
        UserError: for a repository or revision that cannot be read, with the reason.
    """
    if (known := hub_id(model)) is None:
        return _of_folder(Path(model))
    from huggingface_hub import constants

    repo, revision = known
    key = repo, revision or "", constants.ENDPOINT
    asked, answer = _answers.get(key, (0.0, None))
    if not asked or time.monotonic() - asked > _FRESH:
        try:
            answer = _ask(repo, revision)
        except UserError as error:
            answer = error
        _answers[key] = time.monotonic(), answer
    if isinstance(answer, UserError):
        raise answer
    return answer


def _ask(repo: str, revision: str | None) -> Origin | None:
    """The answer of the hub, which is asked once; of the cache, where it cannot be reached."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(repo, MANIFEST, revision=revision))
        reached, why = True, None
    except EntryNotFoundError:
        return None
    except RevisionNotFoundError as error:
        raise explained(error, repo, revision) from None
    except Exception as error:
        reached, why = False, error
    try:
        manifest = Path(hf_hub_download(repo, MANIFEST, revision=revision, local_files_only=not reached))
    except Exception as error:
        raise explained(why or error, repo, revision) from None
    found = Origin(repo, manifest.parent.name)
    write_json(found.folder / RECORD, vars(found))
    _link(manifest.resolve(), found.folder / MANIFEST)
    return found


def _of_folder(folder: Path) -> Origin | None:
    """The origin of a folder in our own cache: no other folder says where its files are fetched from."""
    try:
        folder = folder.absolute()
        if folder.parent.parent != _root().absolute() or not (folder / RECORD).is_file():
            return None
        record = read_json(folder / RECORD, "the record of its origin")
        found = Origin(record["repo"], record["commit"])
        return found if _COMMIT.fullmatch(found.commit) and found.folder.absolute() == folder else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _root() -> Path:
    return cache_dir() / "hub"


def _link(source: Path, to: Path) -> None:
    """A second name for a file, at once; a copy where the two are on different disks."""
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = to.with_name(f".{to.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, to)
