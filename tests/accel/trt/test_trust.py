"""Signatures, and the verb that gives one to an engine file from elsewhere."""

from __future__ import annotations

import json

import pytest

from accel.cli import main
from accel.errors import UserError
from accel.trt import engine_files, preflight, trust


def test_the_key_is_private_and_made_once(bundle):
    first = trust.sign(b"a")
    assert trust.key_file().stat().st_mode & 0o777 == 0o600 and trust.sign(b"a") == first
    assert trust.signed(b"a", first) and not trust.signed(b"b", first) and not trust.signed(b"a", "")
    trust.key_file().chmod(0o644)
    with pytest.raises(UserError, match="read or written by others"):
        trust.sign(b"a")


def test_an_engine_file_from_elsewhere_runs_only_after_trust(bundle, save, fit, capsys):
    file = save()
    trust.key_file().unlink()  # as if another user had built it
    assert "not built by you" in fit(bundle).reason
    trust.sign(b"anything")  # makes a key of our own
    assert "not built by you" in fit(bundle).reason and "accel trust" in fit(bundle).fix
    assert main(["trust", str(bundle.path)]) == 0
    shown = capsys.readouterr().out
    assert file.record["plan"]["sha256"] in shown and "--yes" in shown and not fit(bundle).ok
    assert main(["trust", str(bundle.path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["engine_files"][0]["key"] == file.key and shown["plans"] == shown["engine_files"]
    assert main(["trust", str(bundle.path), "--yes"]) == 0
    assert fit(bundle).ok
    assert "signed by you already" in (main(["trust", str(bundle.path)]), capsys.readouterr().out)[1]


def test_trust_signs_the_text_that_it_shows(bundle, save, capsys, monkeypatch):
    """Somebody who may write the bundle exchanges the record while it is looked at."""
    file = save()
    trust.key_file().unlink()
    path, changed = file.path.with_suffix(".json"), preflight.changed
    whole = path.read_bytes()

    def meanwhile(found, data=None):
        path.write_bytes(whole.replace(b'"Fake GPU"', b'"Other GPU"'))
        return changed(found, data)

    monkeypatch.setattr(preflight, "changed", meanwhile)
    assert main(["trust", str(bundle.path), "--yes"]) == 0
    assert "Fake GPU" in capsys.readouterr().out and not preflight.trusted(engine_files.find(bundle)[0])
    path.write_bytes(whole)
    assert preflight.trusted(engine_files.find(bundle)[0])


def test_trust_does_not_sign_what_is_damaged(bundle, save):
    file = save()
    trust.key_file().unlink()
    file.path.write_bytes(file.path.read_bytes()[:-1] + b"x")
    assert main(["trust", str(bundle.path), "--yes"]) == 1
    assert not preflight.trusted(engine_files.find(bundle)[0])
