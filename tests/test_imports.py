"""What starting costs: modules that take seconds to import come with what needs them."""

import subprocess
import sys

import pytest

import guided_dropout

HELP = (
    "import sys; from guided_dropout import cli; sys.argv[1:] = ['--help']\ntry: cli.main()\nexcept SystemExit: pass\n"
)


@pytest.mark.parametrize(
    ("start", "without"),
    [
        ("import guided_dropout\n", ["torch", "scipy", "transformers"]),
        (HELP, ["torch", "scipy", "transformers", "sklearn", "matplotlib"]),
    ],
    ids=["package", "help"],
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
