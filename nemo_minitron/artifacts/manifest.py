"""The run's manifest: which stages are done, from which inputs, in how many seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.files import read_json, write_json
from nemo_minitron.artifacts.parse import grouped, listed, mapped, number, text

STAGE = grouped({"name": text(), "seconds": number(0), "digest": text()})
KIND = grouped({}, {"versions": mapped(text()), "digests": mapped(text()), "stages": listed(STAGE)})


@dataclasses.dataclass
class Manifest:
    """`manifest.json` of a run folder: versions, digests and the finished stages, in order.

    A stage: {"name", "seconds", "digest"}; the digest is that of its inputs, so a rerun knows what is done.
    """

    path: Path
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    stages: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @classmethod
    def open(cls, path: str | Path) -> Manifest:
        """One without stages where there is no file. Raises InputError for a damaged one."""
        path = Path(path)
        values = read_json(path, "the manifest", KIND) if path.exists() else {}
        return cls(path, values.get("versions", {}), values.get("digests", {}), values.get("stages", []))

    def done(self, name: str, digest: str) -> bool:
        return any(stage["name"] == name and stage["digest"] == digest for stage in self.stages)

    def finish(self, name: str, seconds: float, digest: str) -> None:
        """Writes the stage down; an older entry of that name goes."""
        self.stages = [stage for stage in self.stages if stage["name"] != name]
        self.stages.append({"name": name, "seconds": round(seconds, 2), "digest": digest})
        self.save()

    def save(self) -> None:
        write_json(self.path, {"versions": self.versions, "digests": self.digests, "stages": self.stages})
