"""The kernel is built once, for this user alone; what cannot be used is built again, or there is none."""

import ctypes
import os
import shutil
from pathlib import Path

import pytest

from guided_dropout.fisher import build

pytestmark = pytest.mark.skipif(os.name != "posix", reason="on Windows there is no kernel, nor owners of files")
# The package goes without a compiler, and so do its tests; CI asks for one.
builds = pytest.mark.skipif(shutil.which("cc") is None, reason="without a C compiler nothing is built")
FUNCTIONS = ("square_accumulate", "gram_sums", "has_amx")


def declare(library):
    for name in FUNCTIONS:
        assert isinstance(library[name], ctypes._CFuncPtr)


def compiler(folder, version="1"):
    """The machine's compiler, quick, under a version of its own; it counts what it builds in `folder`/built."""
    script = folder / "compiler"
    script.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo version {version}; exit; fi\n'
        f'echo once >> "{folder}/built"\nexec cc "$@" -O0\n'
    )
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    monkeypatch.setenv("CC", f'"{compiler(tmp_path)}"')
    return tmp_path / "a cache" / "guided-dropout"


def times_built(cache):
    return len((cache.parents[1] / "built").read_text().split())


def the_library(cache):
    (library,) = cache.glob("squares-*.so")
    return library


@builds
def test_it_is_built_once_and_belongs_to_its_user_alone(cache):
    before = os.umask(0)
    try:
        assert build.load(declare)
    finally:
        os.umask(before)
    assert build.load(declare)
    assert times_built(cache) == 1
    assert [cache.stat().st_mode & 0o777, the_library(cache).stat().st_mode & 0o777] == [0o700, 0o700]


@builds
@pytest.mark.parametrize("damage", ["empty", "without a function", "others may write"])
def test_what_cannot_be_used_is_built_again(cache, tmp_path, monkeypatch, damage):
    assert build.load(declare)
    moved = tmp_path / "elsewhere"  # where this process has loaded nothing from
    cache.parent.rename(moved)
    monkeypatch.setenv("XDG_CACHE_HOME", str(moved))
    library, other = the_library(moved / cache.name), tmp_path / "other"
    good = library.read_bytes()
    if damage == "empty":
        other.touch(0o700)
    elif damage == "others may write":
        shutil.copy(library, other)
        other.chmod(0o720)
    else:
        library.with_suffix(".c").write_text("int has_amx(void) { return 0; }")
        os.system(f'cc -shared -fPIC "{library.with_suffix(".c")}" -o "{other}"')
        other.chmod(0o700)
    other.replace(library)
    assert build.load(declare)
    assert (library.read_bytes() == good, times_built(cache)) == (True, 2)


@builds
def test_another_version_of_the_compiler_builds_its_own(cache):
    assert build.load(declare)
    compiler(cache.parents[1], version="2")
    assert build.load(declare)
    assert len(list(cache.glob("squares-*.so"))) == 2


@builds
def test_a_folder_that_others_may_write_to_is_closed_first(cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert build.load(declare)
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_another_user_is_not_used(cache, monkeypatch):
    cache.mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)
    assert build.load(declare) is None
    assert list(cache.iterdir()) == []


def no_home(path):
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("wrong", ["no home", "no such compiler", "an open quotation", "it builds nothing"])
def test_where_it_cannot_be_built_there_is_none(cache, tmp_path, monkeypatch, wrong):
    if wrong == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "expanduser", no_home)
    else:
        commands = {"no such compiler": "/nowhere/cc", "an open quotation": 'cc "', "it builds nothing": "true"}
        monkeypatch.setenv("CC", commands[wrong])
    assert build.load(declare) is None
    assert not (tmp_path / "built").exists()
