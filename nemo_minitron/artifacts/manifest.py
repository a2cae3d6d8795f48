"""The manifest of a run: the finished stages, the digests of their inputs, their seconds, and the files they wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path

from nemo_minitron.artifacts.files import read_json, write_json
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.parse import grouped, listed, mapped, number, text, whole
from nemo_minitron.artifacts.seals import damaged, sealed, take_away

STAGE = grouped({"name": text(), "seconds": number(0), "digest": text()})
FILE = grouped({"stage": text(), "bytes": whole(), "digest": text()})
KIND = grouped(
    {}, {"versions": mapped(text()), "digests": mapped(text()), "stages": listed(STAGE), "files": mapped(FILE)}
)


@dataclasses.dataclass
class Manifest:
    """`manifest.json` of a run folder: versions, digests and the finished stages, in order.

    A stage is {"name", "seconds", "digest"}; the digest is that of its inputs, so that a rerun knows what is done.
    `files`: path in the folder -> {"stage", "bytes", "digest"}, set by the last stage that wrote the file.
    """

    path: Path
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    stages: list[JsonObject] = dataclasses.field(default_factory=list)
    files: dict[str, JsonObject] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> Manifest:
        """Reads the manifest; without a file it has no stages. Raises InputError for a damaged file."""
        path = Path(path)
        values = read_json(path, "the manifest", KIND) if path.exists() else {}
        known = {name: values[name] for name in ("versions", "digests", "stages", "files") if name in values}
        return cls(path, **known)

    def done(self, name: str, digest: str) -> bool:
        return any(stage["name"] == name and stage["digest"] == digest for stage in self.stages)

    def knows(self, name: str, outputs: Collection[str]) -> bool:
        """Whether the manifest records the files of a stage; earlier versions did not write them down."""
        recorded = any(entry["stage"] == name for entry in self.files.values())
        return recorded or all(output in self.files for output in outputs)

    def damaged(self, name: str, outputs: Iterable[str] = ()) -> dict[str, str]:
        """Path -> what is wrong with it, for the damaged files of a stage and of `outputs`, whichever stage wrote
        them."""
        folder, wanted = self.path.parent, set(outputs)
        entries = {path: entry for path, entry in self.files.items() if entry["stage"] == name or path in wanted}
        absent = {path: "is gone" for path in sorted(wanted) if not (folder / path).exists()}
        return absent | damaged(folder, entries)

    def finish(self, name: str, seconds: float, digest: str, paths: Iterable[str] = ()) -> None:
        """Records a finished stage and its files; of a folder in `paths`, all files. They are synced to the disk before
        the manifest is written. An older entry of the same name is replaced."""
        self.stages = [stage for stage in self.stages if stage["name"] != name]
        self.stages.append({"name": name, "seconds": round(seconds, 2), "digest": digest})
        self.seal(name, paths)
        self.save()

    def seal(self, name: str, paths: Iterable[str]) -> None:
        """Replaces the records of a stage's files; syncs the files, but does not save the manifest."""
        others = {path: entry for path, entry in self.files.items() if entry["stage"] != name}
        seals = sealed(self.path.parent, paths)
        self.files = others | {path: {"stage": name, **entry} for path, entry in seals.items()}

    def strike(self, names: Collection[str]) -> None:
        """Forgets stages that must run again, and removes their damaged files, so that no stage goes on from them."""
        for name in names:
            take_away(self.path.parent, self.damaged(name))
        self.stages = [stage for stage in self.stages if stage["name"] not in names]
        self.files = {path: entry for path, entry in self.files.items() if entry["stage"] not in names}
        self.save()

    def save(self) -> None:
        values = {"versions": self.versions, "digests": self.digests, "stages": self.stages, "files": self.files}
        write_json(self.path, values)
