"""Fetch the files of a model from the Hugging Face hub, and publish them, through the hub's own client."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from vbp.errors import InputError, OutputError, one_line

# A `Path` of `hf://USER/REPO` has one slash less.
_REFERENCE = re.compile(r"hf://?(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?")

# The first base is what all errors of the client's own HTTP library are; which one that is depends on its version.
_CLIENT_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])
_NETWORK_ERRORS = (_CLIENT_ERROR, HFValidationError, LocalEntryNotFoundError, OSError, ValueError)
_LOG_IN = "run `hf auth login` with a token that can write, or set HF_TOKEN"


def is_reference(path: Path | str) -> bool:
    """Return whether this means a repository of the hub: `hf://USER/REPO`."""
    return str(path).startswith("hf:/")


def fetch(reference: str, files: Sequence[str]) -> Path:
    """Return the local folder with these files of `hf://USER/REPO[@REVISION]`, all of one commit.

    Files that are in the client's cache are not fetched again; without network the cache alone is used.

    Raises:
        InputError: The reference is none, or the repository, the revision or a file cannot be had.
    """
    parsed = _REFERENCE.fullmatch(reference)
    if parsed is None:
        raise InputError(f"a model on the hub must be hf://USER/REPO or hf://USER/REPO@REVISION, got {reference}")
    repository, revision = parsed.groups()
    try:
        folder = Path(HfApi().snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except GatedRepoError as error:
        raise InputError(f"{reference} needs its owner's consent; ask for access on its page, then log in") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is no {repository} on the hub, or it is private; check the name, or log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repository} has no revision {revision}; give a branch, a tag or a commit") from error
    except _NETWORK_ERRORS as error:
        raise InputError(
            f"{reference} could not be fetched ({one_line(error)}); check the connection, or fetch its files by "
            "other means and give the folder"
        ) from error
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{reference} is no pruned model: it has no {', '.join(missing)}; check the name")
    return folder


def check_repository(repository: str) -> None:
    """Raise InputError for a text that cannot be the name of a repository."""
    try:
        validate_repo_id(repository)
        fault = None if repository.count("/") == 1 else "it has no owner"
    except HFValidationError as error:
        fault = one_line(error)
    if fault is not None:
        raise InputError(f"a repository of the hub must be OWNER/NAME, got {repository!r}: {fault}")


def check_login(repository: str) -> None:
    """Raise InputError if nobody is logged in who may write to a repository; nothing is written."""
    try:
        known = HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise InputError(f"nobody is logged in who could write to {repository}; {_LOG_IN}") from error
    except _NETWORK_ERRORS as error:
        if _status(error) == 401:
            raise InputError(
                f"the hub does not know the token that is to write to {repository}; {_LOG_IN}"
            ) from error
        raise InputError(
            f"the hub cannot be reached, so {repository} could not be written ({one_line(error)}); check the "
            "connection, or upload later"
        ) from error
    owner, role = repository.partition("/")[0], ((known.get("auth") or {}).get("accessToken") or {}).get("role")
    owners = [known.get("name", ""), *(entry.get("name", "") for entry in known.get("orgs") or ())]
    if role == "read":
        raise InputError(f"the token of {owners[0]} can read alone, and {repository} is to be written; {_LOG_IN}")
    # What a fine-grained token may do, and where, is for the upload to find out.
    if role == "write" and owner.casefold() not in map(str.casefold, owners):
        raise InputError(
            f"{owners[0]} is logged in and may write to {', '.join(owners)}, got {repository}; give another "
            f"owner, or {_LOG_IN}"
        )


def publish(
    files: Mapping[str, Path | bytes], repository: str, *, private: bool, revision: str | None, message: str
) -> str:
    """Upload files in one commit, and return its address. The repository is made if it is not there.

    Raises:
        InputError: The name is none, or nobody is logged in who may write there.
        OutputError: The hub cannot be reached or refuses; then nothing has changed there.
    """
    if not re.fullmatch(r"(?:\w[\w.-]*/)?\w[\w.-]*", repository):
        raise InputError(f"a repository of the hub must be USER/REPO, got {repository!r}")
    client = HfApi()
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]
    try:
        repository = client.create_repo(repository, private=private, exist_ok=True).repo_id
        commit = client.create_commit(repository, additions, commit_message=message, revision=revision)
    except (RevisionNotFoundError, EntryNotFoundError) as error:
        raise InputError(f"{repository} has no branch {revision}; make it, or leave the revision out") from error
    except _NETWORK_ERRORS as error:
        if _status(error) in (401, 403, 404):
            raise InputError(
                f"nobody who may write to {repository} is logged in ({one_line(error)}); {_LOG_IN}"
            ) from error
        raise OutputError(
            f"{repository} could not be written ({one_line(error)}); check the connection and try again"
        ) from error
    return str(commit.commit_url)


def _status(error: Exception) -> object:
    return getattr(getattr(error, "response", None), "status_code", None)
