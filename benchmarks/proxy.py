"""How well cheap guesses order shapes by the loss of their cuts, on SmolLM2: `python benchmarks/proxy.py`.

It cuts the demo's model to shapes of a budget (84M within 5 %), measures each student's loss on held-out text before
any training, and compares two guesses by Spearman's rank correlation: `kept`, the share of scores that a shape keeps
(`search/proxy.py`), and `marginal`, the sum of the rises in loss that its sizes cause alone, each measured. Cuts are
slices with folded norms. Results are written as they come; a second start goes on with the same file.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
from search import spearman

BUDGET = {"params": "84M", "tolerance": "5%"}


class Cuts:
    """Cuts of the demo's model and their losses, in a file that grows."""

    def __init__(self, scores: Path, out: Path, tokens: int) -> None:
        from nemo_minitron.artifacts import Scores
        from nemo_minitron.commands.corpus import tokenise
        from nemo_minitron.sources.open import open_source

        self.out, self.scores, self.source = out, Scores.load(scores), open_source(common.MODEL)
        self.result = json.loads(out.read_text()) if out.exists() else common.heading(["torch", "transformers"])
        self.losses: dict[str, float] = self.result.setdefault("losses", {})
        self.folder, self.measured = Path(tempfile.mkdtemp()), tokens
        text = str(common.TEXT / "test.jsonl")
        self.tokens = tokenise(text, common.MODEL, self.folder / "test", self.source.architecture.vocab_size)

    def loss(self, keep: Mapping[str, int]) -> float:
        """The loss of the cut to these sizes, in nats a token."""
        name = "-".join(f"{axis}{size}" for axis, size in sorted(keep.items())) or "teacher"
        if name not in self.losses:
            self.losses[name] = self._measured(keep)
            common.write(self.result, self.out)
            print(f"{name:40}{self.losses[name]:9.4f}", flush=True)
        return self.losses[name]

    def _measured(self, keep: Mapping[str, int]) -> float:
        from nemo_minitron.commands.evaluate import measure
        from nemo_minitron.commands.prune import Extras, compensation_of
        from nemo_minitron.pruning import prune
        from nemo_minitron.search import plan
        from nemo_minitron.settings.precision import best_precision
        from nemo_minitron.settings.recipe import Evaluation

        student, settings = (
            common.MODEL,
            Evaluation(tokens=self.measured, sequence_length=1024, batch_size=2, precision=best_precision()),
        )
        if keep:
            made = plan(self.scores, dict(keep))
            extras = Extras(fold_norms="hidden" in keep)
            student = self.folder / "student"
            prune(self.source, made, student, compensation=compensation_of(self.source, made, extras), overwrite=True)
        return measure(student, self.tokens, settings)["loss"]


def shapes(cuts: Cuts, count: int) -> list[tuple[dict[str, int], float]]:
    """Shapes of the budget and the share of scores that each keeps."""
    from nemo_minitron.families import multiples_of
    from nemo_minitron.search.candidates import cut_of
    from nemo_minitron.settings.search import Search

    source = cuts.scores.architecture
    search = Search(**BUDGET, candidates=count, distil=1)
    found = search.run(source, {}, cuts.scores, loads=multiples_of(cuts.source.config))
    return [(cut_of(shape, source), float(shape.kept or 0)) for shape in found.candidates]


def guesses(cuts: Cuts, found: list[tuple[dict[str, int], float]]) -> list[dict[str, Any]]:
    """Each shape's loss beside both guesses, best loss first."""
    base = cuts.loss({})
    rows = []
    for keep, kept in found:
        alone = sum(cuts.loss({axis: size}) - base for axis, size in keep.items())
        rows.append({"shape": keep, "kept": kept, "marginal": base + alone, "loss": cuts.loss(keep)})
    return sorted(rows, key=lambda row: row["loss"])


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("scores", type=Path, help="of `minitron estimate` on the demo's model and text, all axes")
    parser.add_argument("--shapes", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=8192, help="of the held-out text, for each shape")
    parser.add_argument("--out", type=Path, default=common.dated("proxy"))
    given = parser.parse_args()
    cuts = Cuts(given.scores, given.out, given.tokens)
    try:
        rows = guesses(cuts, shapes(cuts, given.shapes))
    finally:
        shutil.rmtree(cuts.folder)
    losses = [-row["loss"] for row in rows]
    found = {
        name: spearman([sign * row[name] for row in rows], losses) for name, sign in (("kept", 1), ("marginal", -1))
    }
    cuts.result |= {"shapes": rows, "Spearman of the loss": {name: round(value, 3) for name, value in found.items()}}
    common.write(cuts.result, given.out)
    for row in rows:
        print(f"{row['shape']!s:60}{row['kept']:8.3f}{row['marginal']:9.3f}{row['loss']:9.3f}")
    print(f"Spearman of the loss over {len(rows)} shapes: {cuts.result['Spearman of the loss']}")


if __name__ == "__main__":
    main()
