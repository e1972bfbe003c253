"""What starting costs, and that the architecture's list of files is true: all are there, none imports one below it."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import guided_dropout

HELP = """
import sys
from guided_dropout.cli import app
sys.argv[1:] = ["--help"]
try: app.main()
except SystemExit: pass
"""


@pytest.mark.parametrize(
    ("start", "without"),
    [
        ("import guided_dropout\n", ["torch", "scipy", "transformers"]),
        ("import guided_dropout.plots\n", ["torch", "matplotlib", "plotly"]),
        (HELP, ["torch", "scipy", "transformers", "sklearn", "matplotlib"]),
    ],
    ids=["package", "plots", "help"],
)
def test_it_starts_without_what_it_does_not_need(start: str, without: list[str]) -> None:
    code = f"{start}import sys; print(sorted(set({without}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_all_public_names_are_there_and_no_others() -> None:
    assert all(
        getattr(guided_dropout, name).__module__.startswith("guided_dropout.") for name in guided_dropout.__all__
    )
    assert set(guided_dropout.__all__) <= set(dir(guided_dropout))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = guided_dropout.nothing


def test_what_the_readme_calls_public_is_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    sentence = readme.split("What is public is")[1].split("mistakes are")[0]
    packages, further = sentence.split("`__all__`")
    named = re.findall(r"`([\w.]+)`", packages)
    assert {"guided_dropout", "fisher", "landscape", "plots"} <= {*named}
    for name in named:
        package = importlib.import_module("guided_dropout" if name == "guided_dropout" else f"guided_dropout.{name}")
        assert package.__all__
        assert all(hasattr(package, public) for public in package.__all__), name
        with pytest.raises(AttributeError):
            _ = package.nothing
    homes = [name for name in re.findall(r"`([\w.]+)`", further) if name != "errors"]
    assert homes == ["finetune.finetune", "data.task_data.load_data"]
    for home in homes:
        module, _, name = home.rpartition(".")
        assert callable(getattr(importlib.import_module(f"guided_dropout.{module}"), name))


# The one file that imports what stands below it, when its method is called: `Landscape.plot` draws with the figures.
THE_EXCEPTION = (Path("landscape", "landscape.py"), "plots")

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src" / "guided_dropout"


def the_list() -> dict[str, str]:
    """Each entry of the list in docs/architecture.md, from the top down: a file's or a package's name, and its text."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = text.split("src/guided_dropout/\n")[1].split("\nbenchmarks/")[0]
    return dict(re.findall(r"^  (\w+)(?:\.py|/)((?: .*\n?(?:   .*\n?)*))", listed, re.MULTILINE))


def imports(file: Path) -> Iterator[str]:
    """What of the package's first level `file` imports when it runs, wherever in it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    unused = {inner for outer in for_types for inner in ast.walk(outer)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in unused and (node.module or "").startswith("guided_dropout"):
            first = node.module.split(".")[1:2]
            yield from first or [alias.name for alias in node.names]


def test_each_file_stands_in_the_architecture():
    listed = the_list()
    for file in SOURCES.rglob("*.py"):
        inner = file.relative_to(SOURCES)
        if inner.name == "__init__.py":
            continue
        if len(inner.parts) == 1:
            assert inner.stem in listed
        elif inner.parts[0] != "demo":
            assert re.search(rf"\b{file.stem}\.py\b", listed[inner.parts[0]]), f"{inner} is not in the list"


def test_no_file_imports_what_stands_below_it():
    order = list(the_list())
    for file in SOURCES.rglob("*.py"):
        inner = file.relative_to(SOURCES)
        if inner.name in ("__init__.py", "__main__.py") and len(inner.parts) == 1:
            continue
        own = order.index(inner.with_suffix("").parts[0])
        below = [name for name in imports(file) if name in order and order.index(name) > own]
        assert below == [name for path, name in [THE_EXCEPTION] if path == inner], f"{inner} imports {below}"
