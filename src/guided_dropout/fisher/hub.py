"""A folder to the hub and back, through the hub's own client."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.utils import validate_repo_id

from guided_dropout.errors import ArtefactError

_ERRORS = (OSError, ValueError, HTTPError)
_OF_A_NEW_REPOSITORY = {".gitattributes", "README.md", "LICENSE"}


def is_repo_id(name: str) -> bool:
    """Whether `name` reads ``"user/name"``."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def download(repo_id: str, *, files: Sequence[str], revision: str | None, token: str | bool | None) -> Path:
    """Fetch `files` of a model repository into the client's cache, or find them there; return their folder.

    Raises:
        ArtefactError: no such repository or revision, no right to read it, or no connection.
    """
    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(files), revision=revision, token=token))
    except _ERRORS as e:
        raise ArtefactError(
            f"no folder {repo_id}, and the hub says: {_reason(e)}; expected a folder that `guided-dropout fisher` "
            "wrote or a repository with one: check the name, the token and the connection"
        ) from e


def upload(
    folder: Path,
    repo_id: str,
    *,
    files: Sequence[str],
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Put `folder` into a model repository, made if there is none; return the commit's address.

    Args:
        folder: what to upload.
        repo_id: ``"user/name"``.
        files: all files that a folder of this kind may have. Those in the repository that `folder` lacks are removed; a
            repository that holds other things and not the first of these files is somebody else's.
        private: whether to make a new repository private.
        token: the hub's token.
        revision: branch, made if there is none; the main one if None.
        commit_message: its title.

    Raises:
        ArtefactError: not a repository's name, no right to write to it, other things in it, or no connection.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(repo_id, revision=revision))
        if files[0] not in there and (others := sorted(there - _OF_A_NEW_REPOSITORY)):
            raise ArtefactError(f"it holds {others[0]} and no {files[0]}")
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=list(files),
        )
    except _ERRORS as e:
        raise ArtefactError(
            f"cannot upload to {repo_id}: {_reason(e)}; expected a repository user/name of its own that you may "
            "write to: check the name, the connection and `hf auth login`"
        ) from e
    return commit.commit_url


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".")
