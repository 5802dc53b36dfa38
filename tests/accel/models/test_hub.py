"""Pipelines of a hub, at a revision."""

from __future__ import annotations

import json

import pytest

from accel import UserError
from accel.models.source import open_source


@pytest.fixture
def published(hub, fakes, smallest):
    """A hub with the smallest pipeline at two commits: `v1`, and main with another latent scale."""
    kind = fakes("hub")
    paths = [path for path in smallest.rglob("*") if path.is_file()]
    names = {path.relative_to(smallest).as_posix(): path.read_bytes() for path in paths}
    files = {name: kind.File(data, name.endswith(".safetensors")) for name, data in names.items()}
    repo = hub.repos["someone/sd"] = kind.Repo()
    repo.commit(files, "v1")
    changed = json.loads(files["vae/config.json"].data) | {"scaling_factor": 0.5}
    repo.commit(
        files | {"vae/config.json": kind.File(json.dumps(changed).encode(), False), "x.json": kind.File(b"1", False)}
    )
    return hub


def test_a_revision_of_a_pipeline_is_opened(published):
    new, old = open_source("someone/sd"), open_source("someone/sd@v1")
    assert new.config("vae")["scaling_factor"] == 0.5 != old.config("vae").get("scaling_factor")
    assert (new.name, old.name) == ("someone/sd", "someone/sd@v1")


def test_what_the_hub_answers_is_said(published, monkeypatch):
    with pytest.raises(
        UserError, match="someone/sd@v9 is neither a local folder nor .*: someone/sd has no revision 'v9'"
    ):
        open_source("someone/sd@v9")
    published.repos["someone/sd"].private = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="or it is private and this machine has no token") as refused:
        open_source("someone/sd")
    assert "hf auth login" in refused.value.fix
