import json
import multiprocessing
import os
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from guided_dropout import artefacts
from guided_dropout.errors import ArtefactError
from guided_dropout.fisher.profile import FisherProfile


def profile(**tensors):
    tensors = tensors or {"a.weight": torch.rand(3, 2), "a.bias": torch.rand(2)}
    return FisherProfile(
        diagonal=tensors,
        tensor_means={n: t.double().mean().item() for n, t in tensors.items()},
        num_samples=7,
        num_skipped=1,
        objective="mlm",
        reduction="mean",
        model={"architecture": "Toy", "num_parameters": 8},
    )


def _write_half(staged, file_in, error):
    with staged as tmp:
        file_in(tmp).write_text("half")
        raise error


def test_a_failed_write_leaves_what_was_there(tmp_path):
    file = tmp_path / "x.json"
    artefacts.write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        artefacts.write_json(file, {"a": float("nan")})
    with pytest.raises(RuntimeError, match="killed"):
        _write_half(artefacts.staged_file(file), lambda tmp: tmp, RuntimeError("killed"))
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('{"kind": "fisher-profile"}', "fisher-profile"),
        ('{"kind": ["x"]}', "other data"),
        ('{"a": 1}\n{"a": 2}\n', "other data"),
        ("[" * 9, "other data"),
        ('{"a":' * 99_999, "other data"),
        ("text,label\na,0\n", "other data"),
        ("\x00\x01", "other data"),
    ],
)
def test_an_output_file_takes_the_place_of_its_like_alone(tmp_path, content, found):
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(ArtefactError, match=f"holds {found}; expected a new file, or a dropout-schedule to replace"):
        artefacts.check_output_file(file, kind="dropout-schedule")
    for own in ('{"kind": "dropout-schedule", "schema": 1}', "", "{}"):
        file.write_text(own)
        assert artefacts.check_output_file(file, kind="dropout-schedule") == file


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "p"
    profile().save_pretrained(folder)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        _write_half(artefacts.staged_folder(folder, own=()), lambda tmp: tmp / "profile.json", KeyboardInterrupt())
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    profile(other=torch.ones(2)).save_pretrained(folder)
    assert list(FisherProfile.from_pretrained(folder).diagonal) == ["other"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_is_there_again_where_its_replacement_was_interrupted(tmp_path, monkeypatch):
    folder = profile().save_pretrained(tmp_path / "p")
    moves, replace_file = [], os.replace

    def interrupted(source, target):
        moves.append(target)
        if Path(target) == folder and len(moves) > 1:
            monkeypatch.undo()
            raise KeyboardInterrupt
        replace_file(source, target)

    def anew():
        with artefacts.staged_folder(folder, own=("*",)) as tmp:
            (tmp / "x").write_text("new")
            monkeypatch.setattr(os, "replace", interrupted)

    with pytest.raises(KeyboardInterrupt):
        anew()
    assert FisherProfile.from_pretrained(folder).num_samples == 7
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("then", ["looked at", "written"])
def test_a_folder_is_there_again_where_its_replacement_was_killed(tmp_path, monkeypatch, then):
    """At the one moment at which there is none of its name."""
    folder = profile().save_pretrained(tmp_path / "p [1]")
    (folder / "mine.txt").write_text("mine")
    other = tmp_path / ".p [1].v2.abcdefgh.old"  # of another folder
    other.mkdir()
    replace_file = os.replace

    def killed(source, target):
        if Path(target) == folder:
            os.kill(os.getpid(), signal.SIGKILL)
        replace_file(source, target)

    def anew():
        monkeypatch.setattr(os, "replace", killed)
        replace(profile(), num_samples=8).save_pretrained(folder)

    process = multiprocessing.get_context("fork").Process(target=anew)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not folder.exists()
    with pytest.raises(ArtefactError, match=r"no folder .*p \[1\]: .* killed .* \(the one before\) .*: rename it, or"):
        FisherProfile.from_pretrained(folder)
    expected = 8
    if then == "looked at":
        artefacts.check_output_folder(folder, marker="profile.json")
    else:
        expected = 9
        replace(profile(), num_samples=9).save_pretrained(folder)
    assert FisherProfile.from_pretrained(folder).num_samples == expected
    assert (folder / "mine.txt").read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [other, folder]


@pytest.mark.parametrize("links", [True, False])
def test_a_files_bytes_are_on_disk_before_it_has_its_name(tmp_path, monkeypatch, links):
    """Or a machine that loses its power may leave an empty file of that name."""
    on_disk, renamed = {}, []
    fsync, replace_file = os.fsync, os.replace

    def synced(handle):
        fsync(handle)
        state = os.fstat(handle)
        on_disk[state.st_ino] = state.st_size

    def named(source, target):
        if Path(target).parent == tmp_path and not str(target).endswith(".old"):
            files = [Path(source), *Path(source).rglob("*")]
            renamed.extend(on_disk.get(f.stat().st_ino) == f.stat().st_size for f in files if f.is_file())
        replace_file(source, target)

    def no_links(*_, **__):
        raise OSError("this disk has none")

    folder = profile().save_pretrained(tmp_path / "p")
    (folder / "mine.txt").write_text("mine")
    with open(folder / "mine.txt", "rb") as file:
        fsync(file)
    on_disk[(folder / "mine.txt").stat().st_ino] = 4
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    artefacts.write_json(tmp_path / "x.json", {"a": 1})
    assert renamed == [True]
    profile().save_pretrained(folder)
    assert len(renamed) >= 4
    assert all(renamed)


def test_what_others_put_into_a_folder_outlives_its_replacement(tmp_path):
    folder = tmp_path / "p"
    profile().save_pretrained(folder)
    (folder / "schedule.json").write_text("mine")
    (folder / "plots").mkdir()
    (folder / "plots" / "a.png").write_text("mine too")
    (folder / "latest").symlink_to("nowhere")
    replace(profile(), diagonal={}).save_pretrained(folder)
    assert sorted(f.name for f in folder.iterdir()) == ["README.md", "latest", "plots", "profile.json", "schedule.json"]
    assert (folder / "schedule.json").read_text() + (folder / "plots" / "a.png").read_text() == "minemine too"
    assert (folder / "latest").is_symlink()


def test_links_stay_and_lead_to_what_was_written(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("x.json", "profile"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    for _ in range(2):  # first to a place where nothing is yet
        artefacts.write_json(tmp_path / "x.json", {"a": 1})
        profile().save_pretrained(tmp_path / "profile")
    with pytest.raises(ArtefactError, match="cannot write"):
        artefacts.write_json(tmp_path / "data", {"a": 1})
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_symlink()) == ["data", "profile", "x.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "disk", "profile", "x.json"]
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["profile", "x.json"]
    assert FisherProfile.from_pretrained(tmp_path / "profile").num_samples == 7


@pytest.mark.parametrize("mounted", [True, False])
def test_a_folder_that_cannot_be_renamed_is_written_into(tmp_path, monkeypatch, mounted):
    """Where a disk is mounted, as a container's output often is, and where the process stands."""
    folder = tmp_path / "here"
    folder.mkdir()
    inode = folder.stat().st_ino
    if mounted:
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    else:
        monkeypatch.chdir(folder)
    for tensors in ({"a": torch.ones(2)}, {"b": torch.ones(3)}):
        profile(**tensors).save_pretrained(folder if mounted else ".")
        (folder / "others").mkdir(exist_ok=True)
        (folder / "others" / "mine.txt").write_text("mine")
        assert list(FisherProfile.from_pretrained(folder).diagonal) == [*tensors]
    replace(profile(), diagonal={}).save_pretrained(folder if mounted else ".")
    assert {f.name for f in folder.iterdir()} == {"profile.json", "README.md", "others"}
    assert (folder / "others" / "mine.txt").read_text() == "mine"
    assert folder.stat().st_ino == inode
    assert list(tmp_path.iterdir()) == [folder]


def test_beside_a_path_without_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert artefacts.beside(Path("a/b.json"), ".x") == Path("a/b.json.x")
    Path("link").symlink_to("elsewhere")
    assert artefacts.beside(Path("link"), ".x") == Path("link.x")
    assert artefacts.beside(Path(), ".x") == tmp_path.with_name(f"{tmp_path.name}.x")


def test_an_output_folder_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ArtefactError, match=r"holds other files and no profile\.json"):
        profile().save_pretrained(tmp_path)
    with pytest.raises(ArtefactError, match="is a file; expected a folder"):
        profile().save_pretrained(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_place_that_cannot_be_written_is_named_before_the_work():
    with pytest.raises(ArtefactError, match=r"cannot write .*; choose an output that you may write to"):
        artefacts.check_output_folder(Path("/proc/nothing/here"), marker="profile.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "profile.json").unlink(), "cannot read .*profile.json: No such file"),
        (lambda d: (d / "profile.json").write_text("{"), "is not valid JSON"),
        (lambda d: (d / "profile.json").write_text('{"kind": "run-result"}'), "holds 'run-result'; expected"),
        (lambda d: (d / "profile.json").write_text('{"kind": "fisher-profile", "schema": 99}'), "schema version 99"),
        (lambda d: (d / "fisher.safetensors").unlink(), "cannot read .*fisher.safetensors"),
        (lambda d: (d / "fisher.safetensors").write_bytes(b"\x08"), "not a whole safetensors file"),
        (
            lambda d: artefacts.write_tensors(d / "fisher.safetensors", {"a.weight": torch.ones(3, 2)}),
            "a.bias is missing, expected \\[2\\]",
        ),
    ],
)
def test_a_damaged_profile_says_what_is_wrong(tmp_path, damage, message):
    folder = profile().save_pretrained(tmp_path / "p")
    damage(folder)
    with pytest.raises(ArtefactError, match=message):
        FisherProfile.from_pretrained(folder)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("NaN", "NaN is no number in JSON"),
        ("-Infinity", "-Infinity is no number in JSON"),
        ("1e999", "the number 1e999 is too large"),
        ("-" + "9" * 400, "the number -9{19} is too large"),
        ('{"a": 1, "b": 2, "a": 3}', "an object gives a twice"),
        ("[" * 100_000, "it is nested too deep"),
    ],
    ids=["nan", "infinity", "float", "int", "twice", "deep"],
)
def test_json_is_taken_by_its_word(tmp_path, value, message):
    file = tmp_path / "x.json"
    file.write_text(f'{{"kind": "x", "schema": 1, "value": {value}}}')
    with pytest.raises(ArtefactError, match=rf"x.json is not valid JSON \({message}\); expected a x file: make it"):
        artefacts.read_json(file, kind="x", schema=1)


def test_what_a_killed_process_left_half_written_is_nobodys(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".result.json.x1y2").write_text("{")
    artefacts.check_output_folder(tmp_path / "run", marker="result.json")
    with pytest.raises(ArtefactError, match=r"holds other files and no profile\.json"):
        artefacts.check_output_folder(tmp_path / "run", marker="profile.json")


@pytest.mark.parametrize("nameless", [True, False])
def test_an_output_folder_may_be_looked_at_by_several_at_once(tmp_path, monkeypatch, nameless):
    """What one tries to write is no other files to the others, nor is what a killed one left of it."""
    (tmp_path / ".probe").write_bytes(b"")  # as versions before did

    def look(_):
        for _ in range(300):
            artefacts.check_output_folder(tmp_path, marker="profile.json")

    if not nameless:  # as on disks that have no files without a name
        monkeypatch.setattr(tempfile, "_O_TMPFILE_WORKS", False)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(look, range(8)))
    assert [entry.name for entry in tmp_path.iterdir()] == [".probe"]


def test_a_profile_that_is_not_there_says_how_to_make_one(tmp_path):
    with pytest.raises(ArtefactError, match="guided-dropout fisher"):
        FisherProfile.from_pretrained(tmp_path / "none")


def test_a_header_is_read_without_tensors_and_says_what_is_wrong_with_the_file(tmp_path):
    file, what = tmp_path / "x.safetensors", {"kind": "sums", "schema": 2, "key": "facts", "advice": "start afresh"}
    header = {"kind": "sums", "schema": "2", "facts": '{"done": [1, null]}'}
    artefacts.write_tensors(file, {"a": torch.ones(300)}, header)
    assert artefacts.read_header(file, **what) == {"done": [1, None]}
    with pytest.raises(ArtefactError, match=r"holds 'sums', version 2; .* reads 'sums', version 3: start afresh$"):
        artefacts.read_header(file, **{**what, "schema": 3})
    artefacts.write_tensors(file, {"a": torch.ones(300)})
    with pytest.raises(ArtefactError, match=r"holds None, version None; .* reads 'sums', version 2: start afresh$"):
        artefacts.read_header(file, **what)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtefactError, match=r"is not a whole sums file \(.*\); start afresh$"):
        artefacts.read_header(file, **what)
    file.unlink()
    with pytest.raises(ArtefactError, match=r"cannot read .*x.safetensors: .*; expected a sums file: start afresh$"):
        artefacts.read_header(file, **what)
