"""The host's C functions are compiled once, and done without where there is no compiler."""

import logging

import numpy as np
import pytest

from dflash_ray.core import host_code, libraries


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(libraries.CACHE_ENV, str(tmp_path))
    host_code.library.cache_clear()
    yield tmp_path
    host_code.library.cache_clear()


def test_the_library_is_compiled_once_and_then_only_loaded(empty_cache, monkeypatch):
    path = host_code.build()
    assert path.parent == empty_cache and {each.suffix for each in empty_cache.iterdir()} == {".so", ".lock"}
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert host_code.build() == path and host_code.library() is not None


def test_without_a_compiler_one_warning_says_that_numpy_does_the_work(empty_cache, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert host_code.library() is None and host_code.library() is None
    assert [record.getMessage() for record in caplog.records] == [
        "the host's loops run in numpy, which is slower: they could not be compiled (no C++ compiler: install g++ or "
        "set CXX)"
    ]


def test_what_the_compiler_says_is_told(empty_cache, monkeypatch, tmp_path):
    source = tmp_path / "host.c"
    source.write_text("this is no C;")
    monkeypatch.setattr(host_code, "SOURCE", source)
    with pytest.raises(RuntimeError, match=r"host\.c could not be compiled: .*this"):
        host_code.build()


def test_an_array_with_gaps_has_no_address_for_a_function():
    array = np.zeros((4, 4))
    assert host_code.at(array[2:]) == host_code.at(array) + 64 and host_code.at(array[:0]) > 0
    with pytest.raises(TypeError, match="contiguous"):
        host_code.at(array[:, :2])
