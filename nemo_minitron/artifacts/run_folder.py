"""The files of a run, by name: what `minitron compress` leaves, the candidates and rounds in it, and its trainings.

On an object a name is a path; on the class it is the name within the folder, as the manifest has it:
`RunFolder("runs/demo").plan` is runs/demo/plan.json, `RunFolder.plan` is "plan.json".
"""

from __future__ import annotations

from pathlib import Path
from typing import overload


class Name:
    """A file or a folder of a fixed name."""

    def __init__(self, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, folder: None, kind: type[Folder]) -> str: ...

    @overload
    def __get__(self, folder: Folder, kind: type[Folder]) -> Path: ...

    def __get__(self, folder: Folder | None, kind: type[Folder]) -> str | Path:
        return self.name if folder is None else folder.path / self.name


class Folder:
    """A folder whose files have fixed names."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


class CutFolder(Folder):
    """A plan and what belongs to it."""

    plan = Name("plan.json")
    compensation = Name("compensation.safetensors")
    composed = Name("lineage.json")  # in a chain, the same student's plan of the model that it learns from


class CandidateFolder(CutFolder):
    """A candidate of a search. `cut`: what `student` was made of."""

    numbers = Name("numbers.json")
    cut = Name("cut.json")
    student = Name("student")
    training = Name("distilled")
    curve = Name("curve.json")  # of the losses of its brief training


class RoundFolder(CutFolder):
    """A round after the first: the plan of the model that it starts from. The model exists only while it is scored."""

    scores = Name("scores.safetensors")
    model = Name("model")
    calibration = Name("calibration")


class TrainingFolder(Folder):
    """The files from which a training resumes. `last`: where its last checkpoint lies; `whole`: sizes and digests of
    its files; `settings`: a digest of what it was begun with; `host`: the name of what trains it; `teacher`: the
    training that corrects its teacher."""

    last = Name("last.json")
    whole = Name("whole.json")
    settings = Name("settings.json")
    host = Name("host.json")
    losses = Name("loss.csv")
    validation = Name("validation.csv")
    nemo = Name("nemo/checkpoints")  # where a host keeps its checkpoints
    bridge = Name("bridge/checkpoints")
    index = Name("index")
    teacher = Name("teacher")


class RunFolder(CutFolder):
    """The files that `minitron compress` leaves, and from which it resumes. A chain has `chain` and a folder for each
    step."""

    recipe = Name("recipe.json")  # every setting; the next two have those that are not at their defaults
    recipe_yaml = Name("recipe.yaml")
    recipe_python = Name("recipe.py")
    manifest = Name("manifest.json")
    log = Name("log.txt")
    data = Name("data")
    corpora = Name("data/corpora.json")  # split -> where its tokens lie
    generated = Name("data/generated")  # .jsonl: the text that the teacher wrote; .bin and .idx: its tokens
    generation = Name("data/generation")  # .json: what made that text; until it is complete, a folder of batches
    calibration = Name("calibration")
    scores = Name("scores.safetensors")
    rounds = Name("rounds")
    search = Name("search")
    marginals = Name("search/marginals.json")
    candidates = Name("search/candidates.json")
    measured = Name("search/measured.json")
    ranks = Name("search/ranks.json")
    teacher = Name("checkpoints/teacher")  # the folder that a checkpoint was converted to
    rotated = Name("checkpoints/rotated")  # the teacher in rotated coordinates, which is scored and cut in its place
    covariance = Name("checkpoints/covariance.npy")  # of the stream, until the rotated teacher is there
    pruned = Name("checkpoints/pruned")
    random = Name("checkpoints/random")
    sliced = Name("checkpoints/sliced")  # the plain cut, until it is measured
    gate = Name("checkpoints/gate")  # a model that a gate compares, until it has been
    gates = Name("gates.json")
    distilled = Name("checkpoints/distilled")
    along = Name("checkpoints/along")  # the student between two parts of its distillation, until it is measured
    texts = Name("data/texts")  # held-out texts that are measured along the distillation
    trajectory = Name("trajectory.json")
    numbers = Name("numbers.json")
    samples = Name("samples.json")
    windows = Name("windows.npz")  # what the teacher says of each held-out window
    speed = Name("speed.json")
    benchmarks = Name("benchmarks.json")
    student = Name("student")
    card = Name("student/README.md")
    report = Name("report.html")
    figures = Name("figures")
    chain = Name("chain.json")

    def candidate(self, name: str) -> CandidateFolder:
        return CandidateFolder(self.search / name)

    def round(self, number: int) -> RoundFolder:
        return RoundFolder(self.rounds / str(number))

    def step(self, name: str) -> RunFolder:
        """The run folder of a chain's step."""
        return RunFolder(self.path / name)
