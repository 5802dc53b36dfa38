"""Hundreds of damaged and forged bundles: each is refused in a sentence, or is what its digests say.

`make test` tries a few; `make test-attack` thousands (`ACCEL_ATTACK_MUTATIONS`, `ACCEL_ATTACK_FIRST` say which).
"""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("mutations.py")


def _module():
    spec = importlib.util.spec_from_file_location("mutations", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tried(work: Path, first: int, count: int, engines: str) -> tuple[dict[str, dict], list[dict]]:
    """Engine -> what the honest bundle does on it, and a record of every mutated one."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(work), str(first), str(count), engines]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["honest"]: line for line in lines if "honest" in line}, [line for line in lines if "seed" in line]


def faults(honest: dict[str, dict], records: list[dict]) -> list[dict]:
    """Those of the records that are not allowed."""
    limit = _module().MORE_MEMORY

    def fault(record: dict) -> bool:
        own = honest[record["engine"]]
        # A manifest that was forged, or whose digests match again, says itself what it is; its image may be another.
        trusted = record["sealed"] or record["manifest"]
        other = record["is"] == "image" and not trusted and record["image"] != own["image"]
        return other or record["is"] not in ("image", "refused") or record["memory"] > own["memory"] + limit

    return [record for record in records if fault(record)]


def check(tmp_path: Path, first: int, count: int, engines: str) -> None:
    honest, records = tried(tmp_path, first, count, engines)
    assert all(entry["is"] == "image" for entry in honest.values()), honest
    assert len(records) == count
    same = sum(record.get("image") == honest[record["engine"]]["image"] for record in records)
    kinds = collections.Counter(record["is"] for record in records)
    wrong = faults(honest, records)
    figures = dict(cases=count, refused=kinds["refused"], identical=same, faults=len(wrong))
    if path := os.environ.get("ACCEL_ATTACK_COUNTS"):
        with open(path, "a") as file:
            file.write(json.dumps({"mutations": figures}) + "\n")
    print(figures)
    assert not wrong, "\n".join(json.dumps(record) for record in wrong[:20])
    assert kinds["refused"] > count // 3  # the mutations are seen at all


def test_a_few_mutated_bundles(tmp_path):
    check(tmp_path, 0, 12, "onnxruntime")


@pytest.mark.attack
@pytest.mark.timeout(0)
@pytest.mark.parametrize("engines, share", [("onnxruntime,openvino,eager", 1), ("source", 5)])
def test_thousands_of_mutated_bundles_and_folders(tmp_path, engines, share):
    count, first = (int(os.environ.get(f"ACCEL_ATTACK_{name}", n)) for name, n in (("MUTATIONS", 3000), ("FIRST", 0)))
    check(tmp_path, first, max(1, count // share), engines)


def test_every_kind_of_fault_would_be_seen():
    honest = {"eager": {"image": "a", "memory": 100}}
    record = dict(engine="eager", sealed=False, manifest=False, memory=100)
    fine = [record | {"is": "refused"}, record | {"is": "image", "image": "a"}]
    fine.append(record | {"is": "image", "image": "b", "sealed": True})
    wrong = [record | {"is": kind} for kind in ("crash", "hang", "traceback")]
    wrong += [record | {"is": "image", "image": "b"}, record | {"is": "refused", "memory": 2 << 30}]
    assert faults(honest, [*fine, *wrong]) == wrong
