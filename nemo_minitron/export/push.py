"""Uploads a student's folder to the Hugging Face hub, with its card and figures."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from nemo_minitron.artifacts.temporary import apart
from nemo_minitron.errors import InputError, first_line
from nemo_minitron.export.folder import check_weights
from nemo_minitron.families import from_hf

CARD = "README.md"
LEFT_OUT = (".*", "*.work/*", "minitron_training.json", CARD)  # the card is uploaded with the repository's name in it
_LOADED = re.compile(r'from_pretrained\("[^"\n]*"')


def check_push(folder: str | Path, repo: str) -> Path:
    """The student's folder. Raises InputError, before anything is sent, for a folder that is no whole model or has no
    card, for a name that the hub does not take, and if the hub is switched off."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    folder = Path(folder)
    check_weights(folder, from_hf(folder))
    if not (folder / CARD).is_file():
        raise InputError(f"'{folder}' has no model card {CARD}; a job and `minitron distill` write one")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"'{repo}' is no name of a repository: {first_line(error)}") from None
    if repo.count("/") != 1:
        raise InputError(f"'{repo}' names no owner; write OWNER/NAME, for example me/{repo}")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise InputError("HF_HUB_OFFLINE switches the hub off; unset it to push")
    return folder


def push(folder: str | Path, repo: str, *, private: bool = True, message: str = "") -> str:
    """Makes the repository if it does not exist, and uploads the folder in one commit. Gives its address.

    Raises InputError as `check_push`, and RuntimeError with the hub's own words if it refuses or is not reached.
    """
    folder = check_push(folder, repo)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with apart() as scratch:
        card = scratch / CARD
        card.write_text(card_for((folder / CARD).read_text(encoding="utf-8"), repo), encoding="utf-8")
        files = {CARD: card} | {str(file.relative_to(folder)): file for file in _files(folder)}
        adds = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            done = api.create_commit(repo, adds, commit_message=message or f"Upload {folder.name}")
        except Exception as error:  # the hub's client raises errors of its own, of requests and of httpx
            raise RuntimeError(f"the hub did not take '{repo}': {first_line(error)}") from error
    return str(done.commit_url)


def card_for(text: str, repo: str) -> str:
    """A card whose example loads the repository."""
    return _LOADED.sub(lambda found: f"from_pretrained({json.dumps(repo)}", text)


def _files(folder: Path) -> list[Path]:
    """What is uploaded besides the card."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return [file for file in files if not any(file.relative_to(folder).match(pattern) for pattern in LEFT_OUT)]
