"""What every verb has in common: usage, help, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from accel.cli import VERBS, _messages
from accel.errors import Notice


@pytest.mark.parametrize(
    "args",
    [
        ["explode"],
        ["expotr", "a", "b"],
        ["--frobnicate"],
        ["run"],
        ["run", "bundle"],
        ["export"],
        ["export", "model"],
        ["run", "bundle", "--prompt"],
        ["run", "bundle", "--prompt", "x", "--steps", "many"],
        ["run", "bundle", "--prompt", "x", "--frobnicate"],
        ["inspect", "a", "b"],
        ["doctor", "me"],
        ["export", "a", "b", "--opset", "new"],
    ],
)
def test_wrong_use_ends_with_2_in_two_lines(accel, args):
    code, out, err = accel(*args)
    problem, fix = err.splitlines()
    assert code == 2
    assert problem.startswith("error: ") and fix.startswith("  fix: ")
    assert out == ""


@pytest.mark.parametrize(
    ("args", "nearest"),
    [
        (["exprot"], "export"),
        (["run", "x", "--promt", "y"], "--prompt"),
        (["run", "x", "-p", "y", "--engine", "openvio"], "openvino"),
        (["run", "x", "-p", "y", "--engine", "eager:bf61"], "eager:bf16"),
        (["run", "x", "-p", "y", "--sampler", "eulr"], "euler"),
        (["run", "x", "-p", "y", "--precision", "fp61"], "fp16"),
        (["export", "x", "y", "--precision", "int9"], "int8"),
        (["export", "x", "y", "--components", "unet,vae_decode"], "vae_decoder"),
        (["export", "x", "y", "--int8-level", "atention"], "attention"),
        (["evaluate", "x", "-o", "y", "--protocol", "digit"], "digits"),
        (["distill", "tiny", "-o", "y", "--recipe", "sd15_tny"], "sd15_tiny"),
        (["distill", "tny"], "tiny"),
        (["distill", "tiny", "--modle", "x"], "--model"),
        (["list", "recipe"], "recipes"),
        (["completion", "bsh"], "bash"),
    ],
)
def test_a_misspelt_name_gets_the_nearest_one(accel, args, nearest):
    code, _, err = accel(*args)
    assert code == 2
    assert f"did you mean {nearest}?" in err


# What every verb that has the meaning calls it. A verb with another option for the same thing fails here.
ONE_NAME = {
    "engine": "--engine",
    "precision": "--precision",
    "device": "--device",
    "seed": "--seed",
    "steps": "--steps",
    "sampler": "--sampler",
    "guidance": "--guidance",
    "output": "--out",
    "replace": "--overwrite",
    "json": "--json",
    "threads": "--threads",
    "prompt": "--prompt",
    "prompt file": "--prompt-file",
}
HAVE = {
    "demo": "output replace json",
    "export": "engine precision device steps sampler guidance output replace json threads",
    "build": "engine precision device replace json",
    "run": "engine precision device seed steps sampler guidance output replace json threads prompt|prompt file",
    "bench": "engine seed steps sampler guidance output replace json threads prompt|prompt file",
    "evaluate": "engine precision device steps sampler guidance output replace json threads",
    "inspect": "engine json",
    "doctor": "json",
    "trust": "json",
    "list": "json",
}
OLD_NAMES = {
    "run": "--dtype --plan --negative-prompt --num-images",
    "bench": "--engines --html",
    "build": "--force --gpu",
    "export": "--gpu --kind --collector",
    "evaluate": "--limit --dtype --plan",
    "inspect": "--for",
}


@pytest.mark.parametrize("name", HAVE)
def test_one_name_for_one_thing(name):
    from accel.cli import verb

    _, parser = verb(name)
    meanings = {
        part for words in HAVE[name].split("|") for part in (words.split() if words != "prompt file" else [words])
    }
    shown = {flag for action in parser._actions if action.help != "==SUPPRESS==" for flag in action.option_strings}
    assert {ONE_NAME[meaning] for meaning in meanings} == shown & set(ONE_NAME.values())
    known, old = set(parser._option_string_actions), set(OLD_NAMES.get(name, "").split())
    assert old <= known and not old & shown
    assert (
        {"-v", "-q"} <= shown and ("--out" not in shown or "-o" in shown) and ("--prompt" not in shown or "-p" in shown)
    )


def test_distill_has_the_same_names_and_takes_the_old_ones(accel):
    code, out, _ = accel("distill", "dmd2", "--help")
    assert code == 0
    assert all(
        f" {flag} " in out for flag in ("--out", "--overwrite", "--json", "--threads", "--seed", "--train-steps")
    )
    assert " --steps " not in out and " --plan " not in out
    _, _, err = accel(*"distill dmd2 --model digits --data digits --steps 3 --plan --processes 0".split())
    assert "note: --steps is now --train-steps" in err and "note: --plan is now --memory-estimate" in err
    assert "invalid processes: 0" in err


@pytest.mark.parametrize("what", [[], ["models"], ["recipes", "samplers"]])
def test_list_names_what_the_other_verbs_take(accel, what):
    from accel.assets import resolve
    from accel.distill.registry import recipe
    from accel.sampling.samplers import SAMPLERS

    code, out, _ = accel("list", *what, "--json")
    found = json.loads(out)
    assert code == 0 and list(found) == (what or list(found)) and all(found.values())
    assert all((Path(resolve(name)) / "model_index.json").is_file() for name in found.get("models", ()))
    assert all(recipe(name) for name in found.get("recipes", ()))
    assert set(found.get("samplers", SAMPLERS)) == set(SAMPLERS)
    shown = accel("list", *what)[1]
    assert all(name in shown for entries in found.values() for name in entries)


def test_the_completion_script_completes_verbs_options_and_names(accel, tmp_path):
    code, out, _ = accel("completion", "bash")
    script = tmp_path / "accel.bash"
    script.write_text(out)
    assert code == 0

    def complete(*words: str) -> list[str]:
        line = " ".join(words)
        program = (
            f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'; "
            "$(complete -p accel | sed 's/.*-F \\([^ ]*\\) .*/\\1/'); printf '%s\n' \"${COMPREPLY[@]}\""
        )
        return subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout.split()

    assert complete("accel", "ex") == ["export"]
    assert set(complete("accel", "run", "--prom")) == {"--prompt", "--prompt-file", "--prompt-weights"}
    found = {"int8-fp16", "int8-weight-only", "int8-weight-only-fp16"}
    assert set(complete("accel", "export", "--precision", "int8-")) == found
    assert complete("accel", "distill", "tiny", "--recipe", "digits") == ["digits_tiny"]


def test_quiet_shows_neither_notes_nor_progress_and_verbose_the_traceback(accel, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCEL_QUIET", "")
    words = ["evaluate", "digits", "--limit", "0", "-o", tmp_path / "e"]
    assert "note: --limit is now --images" in accel(*words)[2]
    assert "note:" not in accel(*words, "-q")[2]
    monkeypatch.delenv("ACCEL_QUIET")
    done = subprocess.run([sys.executable, "-m", "accel", *map(str, words), "-v"], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "  fix: " in done.stderr


def test_an_unknown_verb_lists_the_known_ones(accel):
    _, _, err = accel("explode")
    assert "explode" in err and all(verb in err for verb in VERBS)


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb(accel, args):
    code, out, _ = accel(*args)
    assert code == 0
    assert all(f"  {verb} " in out for verb in VERBS)


def test_the_version_is_printed(accel):
    from accel._version import __version__ as version

    assert accel("--version")[:2] == (0, f"accel {version}\n")


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_help_with_an_example(accel, verb):
    code, out, _ = accel(verb, "--help")
    assert code == 0
    assert f"example: accel {verb}" in out


def test_a_reader_that_goes_away_is_no_error_message(smallest_bundle):
    command = f"{sys.executable} -m accel inspect {smallest_bundle} --json | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_note_that_several_networks_have_is_said_once(capsys):
    with warnings.catch_warnings():
        _messages(verbose=False, quiet=False)
        for text in ("the same", "another", "the same"):
            warnings.warn(text, Notice, stacklevel=1)
    assert capsys.readouterr().err == "note: the same\nnote: another\n"
