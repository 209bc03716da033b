"""A file is the old one or the new one, never a part of either."""

import errno

import pytest

from dflash_ray.core.files import DiskFullError, replacing, write_text


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "made" / "a.txt"
    write_text(path, "old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [file.name for file in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), PermissionError(errno.EACCES, "no")])
def test_a_block_that_fails_leaves_the_old_file(error, tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(type(error)), replacing(path) as partial:
        partial.write_text("ne")
        raise error
    assert path.read_text() == "old"


def test_a_block_that_wrote_nothing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old"


def test_a_full_disk_says_what_to_do_and_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    (tmp_path / "a.txt.partial").symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match=r"^no space left for .*a\.txt; what was written before is whole: free"):
        write_text(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.txt", "old")]
