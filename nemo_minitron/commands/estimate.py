"""A model and a corpus -> Scores, resumed from what an interrupted run of the same settings has left."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemo_minitron.artifacts import Scores
from nemo_minitron.artifacts.blocks import NOTHING, size_of
from nemo_minitron.artifacts.files import digest_of, read_json, write_json
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.records import MARKS
from nemo_minitron.commands.corpus import begin, say, tokenise
from nemo_minitron.commands.passes import fit_pass
from nemo_minitron.commands.place import check_file, working
from nemo_minitron.errors import InputError
from nemo_minitron.hosts import check_model, chosen, host_of
from nemo_minitron.launch.torchrun import launch
from nemo_minitron.search.depth import HIGHER_IS_BETTER
from nemo_minitron.settings.calibration import BY_CRITERION, REMOVAL, SCANNED, STATISTICS, Calibration
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.orders import EstimateOrder
from nemo_minitron.sources.tensors import ModelSource

if TYPE_CHECKING:
    from nemo_minitron.data import Tokens


def run_estimate(
    model: str, data: str, out: Path, calibration: Calibration, layout: Layout, merge: Path | None = None,
    skip_bad_lines: bool = False, overwrite: bool = False,
) -> Scores:  # fmt: skip
    """`minitron estimate`: writes the Scores of a model to `out`, merged with the scores in the file `merge`, which
    may be `out` itself. Another file that exists is replaced only under `overwrite`.

    What is gathered stays in a hidden folder beside `out`, from which the same command resumes, until the scores are
    there. Raises InputError for what cannot run, before a model is loaded, and RuntimeError if a process fails.
    """
    from nemo_minitron.sources.open import open_source

    check_file(out, overwrite or (merge is not None and merge.resolve() == out.resolve()))
    source = open_source(model)
    if calibration.runs:
        check_model(source.config, "estimate")
    fit = fit_pass(source, calibration, layout, calibration.batch_size)
    calibration = fit.settings
    calibration.check(source.architecture, layout)
    other = Scores.load(merge) if merge else None
    begin(f"scoring {model} on {data}")
    with working(out) as work:
        tokens = tokenise(data, source.folder, work / "calibration", source.architecture.vocab_size, skip_bad_lines)
        if other is not None:
            check_overlap(other, calibration, data_digest(tokens))
        fit.text(tokens)
        say(fit.remark)
        calibration = fit.settings
        scores = calibrate(source, tokens, work, calibration, layout, work / "log.txt")
        scores = merged(other, scores) if other is not None else scores
        scores.save(out)
    return scores


def calibrate(
    model: ModelSource, tokens: Tokens, work: Path, calibration: Calibration, layout: Layout, log: Path | None = None
) -> Scores:
    """Scores of a model on the rows of a corpus, gathered in the processes of the layout. `work`: the folder from which
    an interrupted run resumes. The sizes of `calibration` fit the corpus.

    The scores note the model's Hugging Face config, against which plans are checked. Raises RuntimeError if a process
    fails.
    """
    digest = data_digest(tokens)
    runs_in = digest_of([dataclasses.asdict(layout), chosen()[0]])
    _forget_others(work, calibration.marks(*model.identity, digest, runs_in))
    if not calibration.runs:
        _without_running(model, calibration).save(work / STATISTICS)
    if not _complete(work, calibration):
        launch(EstimateOrder(model.path, tokens.prefix, work, calibration, layout), host_of().worker, log)
    scores, scanned = Scores.load(work / STATISTICS), _scanned(work)
    scores.data_digest = digest
    scores.depth = {name: scanned.depth[name] for name in calibration.depth if scanned}
    names = ("samples", "sequence_length", "seed", "precision")
    run = {"data": digest} | {name: getattr(calibration, name) for name in names}
    scores.notes = {"runs": [run], "config": dict(model.config)} | (scanned.notes if scanned else {})
    return _examined(scores if calibration.experts == BY_CRITERION else scores.by_experts(calibration.experts))


def _without_running(model: ModelSource, calibration: Calibration) -> Scores:
    """Scores by the magnitude of the weights, or random ones. The model does not run."""
    from nemo_minitron.importance.alternatives import magnitude, random_scores

    if calibration.method == "magnitude":
        scores = magnitude(model)
    else:
        scores = random_scores(model.architecture, calibration.seed)
    scores.model_digest = model.digest
    return scores


def _forget_others(work: Path, marks: dict[str, str]) -> None:
    """Removes what other settings, another model or another text have left, and notes the marks of this run."""
    file = work / "marks.json"
    before = _marks(file)
    for name in (STATISTICS, SCANNED):
        _drop_damaged(work / name)
    if before.get(STATISTICS) != marks[STATISTICS]:
        (work / STATISTICS).unlink(missing_ok=True)
    scanned = _scanned(work)
    if scanned:
        same = {name for name in scanned.depth if before.get(name) == (before | marks).get(name)}
        kept = {name: losses for name, losses in scanned.depth.items() if name in same}
        dataclasses.replace(scanned, depth=kept).save(work / SCANNED)
    write_json(file, before | marks)


def _marks(file: Path) -> dict[str, str]:
    """What the files beside `file` were made with. Empty if it cannot be read; then they are made again."""
    try:
        return read_json(file, "the marks", MARKS) if file.exists() else {}
    except InputError:
        return {}


def _drop_damaged(file: Path) -> None:
    """Removes a file of scores that cannot be read, so that it is made again."""
    try:
        if file.exists():
            Scores.load(file)
    except InputError as error:
        print(f"    {error}; it is made again", flush=True)
        file.unlink()


def _scanned(work: Path) -> Scores | None:
    """The depth criteria that were gathered so far."""
    return Scores.load(work / SCANNED) if (work / SCANNED).exists() else None


def _complete(work: Path, calibration: Calibration) -> bool:
    """Whether everything that the calibration asks for was gathered."""
    scanned = _scanned(work)
    return (
        (work / STATISTICS).exists()
        and (not calibration.runs or Scores.load(work / STATISTICS).samples == calibration.samples)
        and all(scanned is not None and name in scanned.depth for name in calibration.depth)
    )


def data_digest(tokens: Tokens) -> str:
    """Digest of the documents if the tokens have a sidecar; else of their numbers and of 64 pieces of the stream."""
    if tokens.corpus:
        return tokens.corpus.content
    starts = np.linspace(0, max(0, tokens.tokens - 256), 64).astype(int)
    return digest_of([len(tokens), tokens.tokens, [tokens.stream(int(start), 256).tolist() for start in starts]])


# -- two runs ------------------------------------------------------------------------------------------
def check_overlap(other: Scores, calibration: Calibration, digest: str) -> None:
    """Raises InputError if the other run has seen the same rows, or has gathered other criteria."""
    for run in _runs(other):
        if run.get("data") == digest and run.get("seed") == calibration.seed:
            raise InputError(
                f"the scores to merge have seen the same rows: the same text with seed {calibration.seed}; give "
                f"another --seed, for example {1 + max(r.get('seed', 0) for r in _runs(other))}, or other text"
            )
    if other.criteria and set(other.criteria) != set(calibration.criteria):
        raise InputError(
            f"the scores to merge were gathered under {'; '.join(other.criteria)}, not {calibration.criterion}; give "
            f"--criterion '{';'.join(other.criteria)}'"
        )


def merged(other: Scores, scores: Scores) -> Scores:
    """The scores of both runs' samples, by this run's criterion. Depth criteria cannot be merged; this run's replace
    the other's of the same name.

    Raises InputError for scores of another model or of other statistics.
    """
    result = other.merge(scores)
    result.notes = {}  # those of both runs follow
    result = result.under(scores.criterion, scores.norms)
    runs = [*_runs(other), *_runs(scores)]
    seen = [run.get("data") for run in _runs(other)]
    notes = {name: note for name, note in other.notes.items() if name != "experts"} | scores.notes | {"runs": runs}
    if scores.data_digest in seen:
        notes["overlap"] = "both runs drew rows of the same text with other seeds: some may count twice"
    result = dataclasses.replace(result, depth=other.depth | scores.depth, notes=notes)
    return _examined(result.by_experts(notes["experts"]) if "experts" in scores.notes else result)


def _runs(scores: Scores) -> list[JsonObject]:
    return scores.notes.get("runs", [{"data": scores.data_digest, "seed": scores.notes.get("seed", 0)}])


# -- what scores say about themselves ------------------------------------------------------------------
def _examined(scores: Scores) -> Scores:
    """The scores with diagnostics in their notes."""
    from nemo_minitron.families import remarks as config_remarks
    from nemo_minitron.importance.diagnostics import remarks, split_half

    overlap = [scores.notes["overlap"]] if "overlap" in scores.notes else []
    of_config = config_remarks(scores.notes["config"]) if "config" in scores.notes else []
    diagnostics = {"split_half": split_half(scores), "remarks": [*overlap, *of_config, *remarks(scores)]}
    return dataclasses.replace(scores, notes=scores.notes | diagnostics)


def describe_scores(scores: Scores) -> list[str]:
    """Lines that describe scores: their stability, their depth criteria, their remarks."""
    halves = ", ".join(f"{name} {value:.3f}" for name, value in scores.notes["split_half"].items())
    lines = [f"rank correlation of two halves of the samples: {halves}"] if halves else []
    lines += [line for name in scores.depth for line in _depth_lines(scores, name)]
    return [*lines, *scores.notes["remarks"]]


def _depth_lines(scores: Scores, name: str) -> list[str]:
    blocks = scores.depth[name]
    if name == REMOVAL:
        return [f"removal: layers are removed in the order {', '.join(str(first) for first, _ in blocks)}"]
    sign, lines = -1 if name in HIGHER_IS_BETTER else 1, []
    for size in sorted({size_of(block) for block in blocks} - {0}):
        of_this_size = (block for block in blocks if size_of(block) == size)
        block = min(of_this_size, key=lambda b: (sign * blocks[b], -b[0]))  # plans break ties this way, too
        layers = f"layer {block[0]}" if size == 1 else f"layers {block[0]} to {block[1]}"
        among = "" if size == 1 else f" among blocks of {size}"
        lines.append(
            f"{name}: {blocks[NOTHING]:.4f}, and {blocks[block]:.4f} without {layers}, the least missed{among}"
        )
    return lines
