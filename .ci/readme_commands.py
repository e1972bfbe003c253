"""Run every command of a README's ```sh blocks, in order, as a reader would; stop at the first that fails.

`make test` is left to the caller, which has run it. A folder `glue/`, where the README says that GLUE's files lie, is
linked to the real ones if they are beside the clone; without them the commands that need it are named and left out.
`train.csv` and `dev.csv`, the reader's own files, are made up where they are not there, and removed at the end.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

SHARED_GLUE = Path("../shared/data/glue")
OWN_FILES = {"train.csv": 32, "dev.csv": 8}


def commands(readme: str) -> list[str]:
    """The commands of the sh blocks; a line that ends in a backslash goes on."""
    blocks = re.findall(r"^```sh\n(.*?)^```", readme, flags=re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def own_files(folder: Path) -> list[Path]:
    """Write the files that the README's reader has: two texts and one of two classes a line. Returns those it wrote."""
    written = []
    for name, number in OWN_FILES.items():
        file = folder / name
        if not file.exists():
            rows = [f'"A cat sleeps, number {k}.",{("A cat", "No cat")[k % 2]} sleeps.,{k % 2}' for k in range(number)]
            file.write_text("\n".join(["premise,hypothesis,gold", *rows]) + "\n", encoding="utf-8")
            written.append(file)
    return written


def main() -> None:
    """Run them."""
    found = commands(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if not found:
        sys.exit("no commands found in the README")
    have_glue = SHARED_GLUE.is_dir()
    if have_glue and not Path("glue").exists():
        Path("glue").symlink_to(SHARED_GLUE.resolve())
    made = own_files(Path())
    try:
        run(found, have_glue)
    finally:
        for file in made:
            file.unlink()


def run(found: list[str], have_glue: bool) -> None:
    """Run `found`, in order."""
    env = {**os.environ, "PATH": f"{Path('.venv/bin').resolve()}:{os.environ['PATH']}"}
    for command in found:
        if command == "make test" or command.startswith(("git clone", "cd ")):
            continue
        if " glue" in command and not have_glue:
            print(f"README: not run, no GLUE files here: {command}", flush=True)
            continue
        start = time.perf_counter()
        print(f"README: {command}", flush=True)
        if code := subprocess.run(command, shell=True, env=env, check=False).returncode:
            sys.exit(f"README: exit code {code} of: {command}")
        print(f"README: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
