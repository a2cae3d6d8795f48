"""The run's manifest: which stages are done, from which inputs, in how many seconds, and the files that they left."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts.files import read_json, write_json
from nemo_minitron.artifacts.parse import grouped, listed, mapped, number, text, whole
from nemo_minitron.artifacts.whole import damaged, sealed, take_away

STAGE = grouped({"name": text(), "seconds": number(0), "digest": text()})
FILE = grouped({"stage": text(), "bytes": whole(), "digest": text()})
KIND = grouped(
    {}, {"versions": mapped(text()), "digests": mapped(text()), "stages": listed(STAGE), "files": mapped(FILE)}
)


@dataclasses.dataclass
class Manifest:
    """`manifest.json` of a run folder: versions, digests and the finished stages, in order.

    A stage: {"name", "seconds", "digest"}; the digest is that of its inputs, so a rerun knows what is done. `files`:
    path in the folder -> {"stage", "bytes", "digest"}, as the last stage that wrote it left it.
    """

    path: Path
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    stages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> Manifest:
        """One without stages where there is no file. Raises InputError for a damaged one."""
        path = Path(path)
        values = read_json(path, "the manifest", KIND) if path.exists() else {}
        known = {name: values[name] for name in ("versions", "digests", "stages", "files") if name in values}
        return cls(path, **known)

    def done(self, name: str, digest: str) -> bool:
        return any(stage["name"] == name and stage["digest"] == digest for stage in self.stages)

    def knows(self, name: str, outputs: Collection[str]) -> bool:
        """Whether it says what a stage has left; earlier versions did not."""
        own = any(entry["stage"] == name for entry in self.files.values())
        return own or all(output in self.files for output in outputs)

    def damaged(self, name: str, outputs: Iterable[str] = ()) -> dict[str, str]:
        """What is wrong with each file that a stage has left, and with each of its `outputs`, whoever wrote it last."""
        folder, wanted = self.path.parent, set(outputs)
        own = {path: entry for path, entry in self.files.items() if entry["stage"] == name or path in wanted}
        gone = {path: "is gone" for path in sorted(wanted) if not (folder / path).exists()}
        return gone | damaged(folder, own)

    def finish(self, name: str, seconds: float, digest: str, paths: Iterable[str] = ()) -> None:
        """Writes the stage down, with what it left: files, or folders whole. They are on the disk before the manifest
        says so. An older entry of that name goes."""
        self.stages = [stage for stage in self.stages if stage["name"] != name]
        self.stages.append({"name": name, "seconds": round(seconds, 2), "digest": digest})
        self.seal(name, paths)
        self.save()

    def seal(self, name: str, paths: Iterable[str]) -> None:
        kept = {path: entry for path, entry in self.files.items() if entry["stage"] != name}
        found = sealed(self.path.parent, paths)
        self.files = kept | {path: {"stage": name, **entry} for path, entry in found.items()}

    def strike(self, names: Collection[str]) -> None:
        """Forgets stages that are done again; of their files those that are damaged go, which none of them trusts."""
        for name in names:
            take_away(self.path.parent, self.damaged(name))
        self.stages = [stage for stage in self.stages if stage["name"] not in names]
        self.files = {path: entry for path, entry in self.files.items() if entry["stage"] not in names}
        self.save()

    def save(self) -> None:
        values = {"versions": self.versions, "digests": self.digests, "stages": self.stages, "files": self.files}
        write_json(self.path, values)
