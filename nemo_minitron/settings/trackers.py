"""`--log`: the trackers that get the numbers of a training, as loss.csv does. Workers read their names in variables."""

from __future__ import annotations

import importlib.util
import netrc
import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlparse

from nemo_minitron.errors import InputError, nearest

NAMES = ("tensorboard", "wandb", "mlflow")
LOG = "MINITRON_LOG"  # names, separated by commas
FOLDER = "MINITRON_LOG_FOLDER"  # where those trackers write that have no server
ENDING = "-logs"  # of that folder's name, behind the result's
WANDB = "https://api.wandb.ai"


def track(log: str, out: Path) -> None:
    """Hands the trackers of `--log` on to the workers; those without a server write beside the result `out`.

    Raises InputError as `names_of`, and for a tracker that is not installed or has no login.
    """
    names, folder = names_of(log), out.absolute().with_name(out.name + ENDING)
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--log {name}: {name} is not installed; run: pip install {name}")
    if "wandb" in names and not _logged_in():
        raise InputError(
            "--log wandb: there is no login; run: wandb login, or set WANDB_MODE=offline, which keeps the numbers in "
            f"'{folder}'"
        )
    os.environ[LOG], os.environ[FOLDER] = ",".join(names), str(folder)


def names_of(log: str) -> list[str]:
    """The trackers of `--log wandb,tensorboard`. Raises InputError for an unknown one."""
    names = list(dict.fromkeys(name.strip() for name in log.split(",") if name.strip()))
    for name in names:
        if name not in NAMES:
            raise InputError(f"--log has no tracker '{name}'; {nearest(name, NAMES)}")
    return names


def _logged_in() -> bool:
    """Whether wandb would start without a question."""
    if os.environ.get("WANDB_MODE", "online") != "online" or os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", WANDB)).hostname or ""
    return any(_names_host(Path(os.environ.get("NETRC", file)).expanduser(), host) for file in ("~/.netrc", "~/_netrc"))


def _names_host(file: Path, host: str) -> bool:
    try:
        return bool(netrc.netrc(str(file)).authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False


def wanted() -> tuple[Iterable[str], Path]:
    """(names of the trackers, their folder) that this process was told; no names if it was told nothing."""
    return names_of(os.environ.get(LOG, "")), Path(os.environ.get(FOLDER, "."))
