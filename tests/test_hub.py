"""Profiles go to the hub and come back, against a stand-in for the one and the client's own cache for the other."""

import shutil
from dataclasses import replace
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import torch
from toy_profile import assert_same, profile

from guided_dropout import FisherProfile
from guided_dropout.errors import ArtefactError
from guided_dropout.fisher import hub

COMMIT = "c0ffee" + 34 * "0"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub client's cache, and no way out."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """What is uploaded is copied to this folder, by a client that takes the real one's arguments only."""
    folder, api = tmp_path / "remote", create_autospec(huggingface_hub.HfApi, instance=True)
    folder.mkdir()

    def upload(*, folder_path, delete_patterns, **_):
        for name in delete_patterns:
            (folder / name).unlink(missing_ok=True)
        shutil.copytree(folder_path, folder, dirs_exist_ok=True)
        return huggingface_hub.CommitInfo(
            commit_url="https://huggingface.co/me/fisher/commit/1", commit_message="", commit_description="", oid="1"
        )

    api.upload_folder.side_effect = upload
    api.list_repo_files.side_effect = lambda *_, **__: [f.name for f in folder.iterdir()]
    monkeypatch.setattr(hub, "HfApi", create_autospec(huggingface_hub.HfApi, return_value=api))
    return folder


def test_goes_up_as_json_safetensors_and_card(remote):
    (remote / "README.md").write_text("made on the website")
    p = profile()
    assert p.push_to_hub("me/fisher", private=True, dtype="bfloat16") == "https://huggingface.co/me/fisher/commit/1"
    assert sorted(f.name for f in remote.iterdir()) == ["README.md", "fisher.safetensors", "profile.json"]
    assert FisherProfile.from_pretrained(remote).diagonal["a.bias"].dtype == torch.bfloat16
    replace(p, diagonal={}).push_to_hub("me/fisher", revision="means")
    assert sorted(f.name for f in remote.iterdir()) == ["README.md", "profile.json"]


def test_does_not_go_into_a_repository_with_other_things(remote):
    (remote / "model.safetensors").write_text("precious")
    with pytest.raises(ArtefactError, match=r"cannot upload to me/toy: it holds model\.safetensors and no profile"):
        profile().push_to_hub("me/toy")
    assert [f.name for f in remote.iterdir()] == ["model.safetensors"]


def test_refusals_and_lost_connections_are_one_line(remote):
    (hub.HfApi.return_value).create_repo.side_effect = ConnectionError("Connection refused\nby someone")
    with pytest.raises(ArtefactError, match=r"cannot upload to me/toy: Connection refused; expected .* of its own"):
        profile().push_to_hub("me/toy")


def test_comes_down_from_the_cache(cache):
    p = profile()
    repo = cache / "models--me--fisher"
    p.save_pretrained(repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    assert_same(FisherProfile.from_pretrained("me/fisher"), p)
    assert_same(FisherProfile.from_pretrained("me/fisher", revision=COMMIT), p)
    with pytest.raises(ArtefactError, match=r"no folder me/fisher, and the hub says: .*; expected"):
        FisherProfile.from_pretrained("me/fisher", revision="other")


@pytest.mark.parametrize("name", ["./me/fisher", "fisher", "/me/fisher", "a/b/c"])
def test_other_names_are_folders(cache, name):
    with pytest.raises(ArtefactError, match=r"^no folder .*guided-dropout fisher"):
        FisherProfile.from_pretrained(name)


def test_a_file_in_a_profiles_place_is_told_without_asking_the_hub(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "schedule.json").write_text("{}")
    with pytest.raises(ArtefactError, match=r"^build/schedule\.json is a file; expected the folder of a profile"):
        FisherProfile.from_pretrained("build/schedule.json")


def test_a_folder_goes_before_the_hub(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    profile().save_pretrained("me/fisher")
    assert FisherProfile.from_pretrained("me/fisher").num_samples == 7


def test_the_card_tells_the_hub_what_it_is(tmp_path, monkeypatch):
    data = huggingface_hub.ModelCard(profile().card()).data
    assert (data.library_name, data.base_model) == ("guided-dropout", "someone/toy")
    assert set(data.tags) == {"fisher-information", "guided-dropout", "mlm"}
    for name in ("demo", None, str(tmp_path)):
        assert huggingface_hub.ModelCard(profile(model={"name_or_path": name}).card()).data.base_model is None
    (tmp_path / "someone" / "toy").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert huggingface_hub.ModelCard(profile().card()).data.base_model is None
