"""The public names are there before they are imported, and `help` teaches."""

from __future__ import annotations

import ast
import pydoc
import re
import subprocess
import sys
import textwrap

import pytest

import accel
from accel.errors import UserError

PUBLIC = {
    "accel": {"load", "load_engine", "attach", "Bundle", "Pipeline", "Output", "UserError", "Notice"},
    "accel.export": {"export_pipeline", "Int8Settings"},
    "accel.distill": {"execute", "recipe", "changed", "Recipe"},
}


@pytest.mark.parametrize("package", PUBLIC)
def test_dir_lists_what_is_not_imported_yet(package):
    code = f"import sys, {package} as p; print(*dir(p)); print(*p.__all__); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed, public, torch = done.stdout.splitlines()
    assert PUBLIC[package] <= set(listed.split()) and PUBLIC[package] <= set(public.split())
    assert torch == "False"


@pytest.mark.parametrize("package", PUBLIC)
def test_every_listed_name_resolves_and_others_do_not(package):
    module = sys.modules.get(package) or __import__(package, fromlist=["x"])
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing_like_it'"):
        module.nothing_like_it  # noqa: B018


def test_help_teaches_the_three_uses_with_code_that_is_python():
    text = pydoc.plain(pydoc.render_doc(accel))
    for use in ("Compile a model", "Embed its networks", "Compare engines"):
        assert use in text
    for line in ('pipe("a handwritten seven"', "accel.load_engine(", "with accel.attach(", 'engine="onnxruntime"'):
        assert line in text
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", accel.__doc__, flags=re.MULTILINE)
    assert len(blocks) >= 3
    for block in blocks:
        ast.parse(textwrap.dedent(block))


def test_the_recipe_of_the_docstring_exists():
    from accel.distill import Recipe, changed, recipe

    made = changed(recipe("digits_tiny"), model="digits", data="digits")
    assert isinstance(made, Recipe) and made.model == "digits"
    with pytest.raises(UserError, match="unknown field 'modle'"):
        changed(made, modle="digits")
