"""EDM folders: recognised by what they say they are, and refused where a part is missing."""

import shutil

import pytest

from accel.errors import UserError
from accel.models.edm.folder import is_edm
from accel.models.edm.network import constants, sampler
from accel.models.edm.source import open_edm
from accel.models.source import open_source


def test_a_folder_is_recognised_by_its_index(edm, sd15, tmp_path):
    assert is_edm(edm) and is_edm(str(edm))
    assert not any(map(is_edm, (sd15, tmp_path, None, 3)))
    with pytest.raises(UserError, match="images of classes") as error:
        open_source(edm)
    assert "accel run" in error.value.fix and "--class 0" in error.value.fix
    with pytest.raises(UserError, match="not a folder of an EDM model"):
        open_edm(sd15)


def test_published_weights_of_a_student_are_said_to_be_one(edm):
    source = open_edm(edm)
    values = constants(source)
    assert sampler(source, values)["name"] == "heun"
    assert sampler(source, values, "dmd2")["sigmas"] == [80.0]
    with pytest.raises(UserError, match="lcm does not sample"):
        sampler(source, values, "lcm")


def test_a_missing_part_is_named(edm, tmp_path):
    folder = shutil.copytree(edm, tmp_path / "copy")
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(UserError, match="without scheduler"):
        open_edm(folder)
