"""Building the C kernel ``squares.c`` on first use, for this very machine, into the user's cache."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from guided_dropout.artefacts import staged_file
from guided_dropout.errors import GuidedDropoutError

_FILES = ("squares.c", "norms.h", "softmax.h", "attention.h", "amx.h", "products_amx.h", "squares_amx.h")
_SOURCE, *_INCLUDED = (Path(__file__).with_name(name) for name in _FILES)
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
_TUNING = (("-march=native",), ("-march=native", "-DWITHOUT_AMX"), ("-mcpu=native",), ())  # the first that builds
# What can be wrong with a compiler, a cache folder or a library: then there is no kernel, and torch does its work.
_FAILURES = (OSError, ValueError, AttributeError, subprocess.SubprocessError, GuidedDropoutError)


def load(declare: Callable[[ctypes.CDLL], None]) -> ctypes.CDLL | None:
    """The library, built unless it was before; None where it cannot be built, or where others could have put it.

    Args:
        declare: tells the types of its functions; raises AttributeError where one is missing.
    """
    if sys.platform == "win32":
        return None
    with contextlib.suppress(*_FAILURES):
        folder, compiler = _own_folder(), shlex.split(os.environ.get("CC", "")) or ["cc"]
        found = shutil.which(compiler[0])
        if folder is None or found is None:
            return None
        about = (found, _first_line([found, "--version"]), platform.libc_ver(), _machine())
        for tuning in _TUNING:
            with contextlib.suppress(*_FAILURES):
                return _built([*compiler, *_FLAGS, *tuning], about, folder, declare)
    return None


def cache_folder() -> Path:
    """Where built kernels are kept: ``$XDG_CACHE_HOME/guided-dropout``, by default below ``~/.cache``.

    Raises:
        OSError: nobody knows where this user's home is.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "guided-dropout"
    except RuntimeError as e:
        raise OSError(str(e)) from e


def _own_folder() -> Path | None:
    """The cache folder, made if need be, once nobody else can write to it; None where it is another user's."""
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        return None
    if _others_may_write(folder):
        folder.chmod(0o700)
    return folder


def _others_may_write(path: Path) -> bool:
    return bool(path.stat().st_mode & 0o022)


def _built(
    command: list[str], about: tuple[object, ...], folder: Path, declare: Callable[[ctypes.CDLL], None]
) -> ctypes.CDLL:
    code = b"".join(path.read_bytes() for path in (_SOURCE, *_INCLUDED))
    key = hashlib.sha256(code + repr((command, about)).encode()).hexdigest()[:16]
    library = folder / f"squares-{key}.so"
    if library.exists() and library.stat().st_uid == os.geteuid() and not _others_may_write(library):
        with contextlib.suppress(OSError, AttributeError):  # damaged: built again
            return _opened(library, declare)
    with staged_file(library) as tmp:
        subprocess.run([*command, "-o", str(tmp), str(_SOURCE)], check=True, capture_output=True, timeout=120)
        opened = _opened(tmp, declare)  # under the final name the loader would give the damaged one again
    library.chmod(0o700)
    return opened


def _opened(library: Path, declare: Callable[[ctypes.CDLL], None]) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(library))
    declare(opened)
    return opened


def _machine() -> str:
    """What the code is tuned to: a home folder may be shared by machines with other processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "") + platform.machine()


def _first_line(command: list[str]) -> str:
    """Of what a command prints: of a compiler, its version."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.partition("\n")[0]
