"""Curves go on after a run that was cut off anywhere."""

import json

import pytest

from dflash_ray.training.curves import Curves


@pytest.mark.parametrize("cut", [1, 2, 12], ids=["newline", "inside, where the rest looks whole", "in a number"])
def test_a_last_line_that_was_cut_off_is_forgotten_and_no_other(cut, tmp_path):
    curves = Curves(tmp_path, 0)
    curves.add(1, "train", loss=2.0)
    curves.add(2, "followed", acceptance_length=1.5, by_category={"all": 1.5})
    curves.close()
    file = tmp_path / "curves.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    again = Curves(tmp_path, 2)
    again.close()
    assert [point["step"] for point in again.points] == ([1, 2] if cut == 1 else [1])
    assert [json.loads(line) for line in file.read_text().splitlines()] == again.points
