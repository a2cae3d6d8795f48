"""Least squares after a cut, on the teacher's inputs or on the student's own, layer after layer. An experiment, in
plain PyTorch: SmolLM2-135M, ffn 1536 -> 1024 and heads 9 -> 6, as cut: `python benchmarks/own_inputs.py --novels
r-cran-janeaustenr_1.0.0-1_all.deb`.

`parallel` is what `minitron compensate` solves: each matrix reads what the teacher's reads, and aims at what the
teacher's writes. The other arms go through the layers in order, as SparseGPT's calibration does: each matrix reads what
it has behind the layers that are solved already. `own inputs` aims at what the teacher's matrix writes in the teacher;
`own inputs, correcting` at what brings the student's residual stream back to the teacher's. The ridge pulls to the
teacher's matrix in all of them.

The selection (neurons: mean |activation|; heads: mean norm, within their query group) comes from the first 8,192
calibration tokens. `errors`: of the stream behind each layer against the teacher's, squared, as a share of its
square, on the calibration's last `ASIDE` rows, which no fit reads. Losses: nats a token on held-out texts; a standard
error is that of the difference from `parallel`, over the rows. A cut unit is a column of zeros here, so the model keeps
its size. Each finished layer is written to `--work`; a second start goes on from there. fp32, one thread; solved in
float64. It was not run at full size yet: there is no result file.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import common
import texts
import torch
from compensation_curve import compared
from sub_blocks import LENGTH, RIDGE, SEED, SELECT, Layers
from torch import Tensor, nn
from torch.nn import functional as F

PARALLEL, OWN, CORRECTING = "parallel", "own inputs", "own inputs, correcting"
KEEP = {"ffn": 1024, "heads": 6}
ASIDE, PART = 4, 8  # rows that no fit reads; rows that pass a layer at a time


@dataclasses.dataclass
class Arm:
    """A student: its residual stream [R, S, H] on the rows that matter, and the matrix of each layer that is solved,
    [O, K], in the columns of the units that stay."""

    cut: str
    name: str
    stream: Tensor
    matrices: list[Tensor]
    errors: list[float]
    seconds: float = 0.0

    @property
    def solves(self) -> str:
        return "attention" if self.cut == "heads" else "mlp"


class Blocks(Layers):
    """Each sub-block of a layer up to its last matrix: what that matrix reads, of a stream [R, S, H]."""

    def read_by(self, layer: Any, block: str, stream: Tensor) -> Tensor:
        if block == "mlp":
            x, mlp = layer.post_attention_layernorm(stream), layer.mlp
            return mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        matrix, layer.self_attn.o_proj = layer.self_attn.o_proj, nn.Identity()
        x = layer.input_layernorm(stream)
        read = layer.self_attn(x, position_embeddings=self.rotary, attention_mask=None)[0]
        layer.self_attn.o_proj = matrix
        return read


def last(layer: Any, block: str) -> nn.Linear:
    return layer.mlp.down_proj if block == "mlp" else layer.self_attn.o_proj


class Normal:
    """The sums of a least-squares problem over tokens: a change of `start` [O, K] that writes what is missing."""

    def __init__(self, start_OK: Tensor) -> None:
        self.start, (rows, columns) = start_OK, start_OK.shape
        self.gram_KK = torch.zeros(columns, columns, dtype=torch.float64)
        self.cross_KO = torch.zeros(columns, rows, dtype=torch.float64)

    def add(self, read: Tensor, aim: Tensor) -> None:
        x_NK, y_NO = read.flatten(0, -2), aim.flatten(0, -2)
        self.gram_KK += (x_NK.T @ x_NK).double()
        self.cross_KO += (x_NK.T @ (y_NO - x_NK @ self.start.T)).double()

    def solve(self) -> Tensor:
        self.gram_KK.diagonal().add_(RIDGE * self.gram_KK.diagonal().mean())
        return self.start + torch.linalg.solve(self.gram_KK, self.cross_KO).T.float()


class Experiment:
    """All arms, through the layers side by side with the teacher."""

    def __init__(self, teacher: Any, rows: Tensor, work: Path) -> None:
        self.teacher, self.blocks, self.file = teacher, Blocks(teacher), work / f"own inputs of {len(rows)} rows.pt"
        self.stream, self.learn = teacher.model.embed_tokens(rows), len(rows) - ASIDE
        self.arms = [Arm(cut, n, self.stream, [], []) for cut in KEEP for n in (PARALLEL, OWN, CORRECTING)]
        for arm in self.arms:
            if arm.name == PARALLEL:  # its fits read the teacher's
                arm.stream = self.stream[-ASIDE:]
        self.kept: dict[str, list[Tensor]] = {cut: [] for cut in KEEP}
        self.clock = time.process_time()

    def load(self) -> int:
        """Layers that are done."""
        if not self.file.exists():
            return 0
        state = torch.load(self.file, weights_only=True)
        self.stream, self.kept = state["stream"], state["kept"]
        self.arms = [Arm(**fields) for fields in state["arms"]]
        return len(self.kept["ffn"])

    def save(self) -> None:
        state = {"stream": self.stream, "kept": self.kept, "arms": [vars(arm) for arm in self.arms]}
        torch.save(state, self.file.with_suffix(".new"))
        self.file.with_suffix(".new").replace(self.file)

    @torch.inference_mode()
    def run(self) -> None:
        done = self.load()
        for number, layer in enumerate(self.teacher.model.layers[done:], done):
            for block in ("attention", "mlp"):
                self.pass_block(layer, block)
            for arm in self.arms:
                own, whole = arm.stream[-ASIDE:], self.stream[-ASIDE:]
                missed, whole = (own - whole).square().sum(), whole.square().sum()
                arm.errors.append(round(float(missed / whole), 5))
            self.save()
            print(number, {f"{arm.cut} {arm.name}": arm.errors[-1] for arm in self.arms}, flush=True)

    def pass_block(self, layer: Any, block: str) -> None:
        """The teacher's stream and those of all arms, behind this sub-block."""
        matrix, before = last(layer, block).weight, self.stream
        reads = self.reads(layer, block, before)
        aims = reads @ matrix.T
        self.stream = before + aims
        cut = "ffn" if block == "mlp" else "heads"
        self.kept[cut].append(kept := self.select(layer, cut, reads[:SELECT]))
        self.clock = time.process_time()
        for arm in self.arms:
            own = self.reads(layer, block, arm.stream)
            if arm.cut == cut:
                wanted = self.stream - arm.stream if arm.name == CORRECTING else aims
                arm.matrices.append(self.solve(matrix, kept, reads if arm.name == PARALLEL else own, wanted))
                own = own[..., kept]
            arm.stream = arm.stream + own @ (arm.matrices[-1] if arm.cut == cut else matrix).T
            arm.seconds, self.clock = arm.seconds + time.process_time() - self.clock, time.process_time()

    def reads(self, layer: Any, block: str, stream: Tensor) -> Tensor:
        return torch.cat([self.blocks.read_by(layer, block, part) for part in stream.split(PART)])

    def solve(self, matrix: Tensor, kept: Tensor, reads: Tensor, aims: Tensor) -> Tensor:
        problem = Normal(matrix[:, kept])
        for read, aim in zip(reads[: self.learn].split(PART), aims[: self.learn].split(PART), strict=True):
            problem.add(read[..., kept], aim)
        return problem.solve()

    def select(self, layer: Any, cut: str, reads: Tensor) -> Tensor:
        """The columns of the last matrix that stay."""
        if cut == "ffn":
            return reads.abs().mean((0, 1)).topk(KEEP[cut]).indices.sort().values
        config = self.teacher.config
        size, groups = config.head_dim, config.num_key_value_heads
        norms_GA = reads.unflatten(-1, (-1, size)).norm(dim=-1).mean((0, 1)).view(groups, -1)
        best = norms_GA.topk(KEEP[cut] // groups, dim=-1).indices.sort(dim=-1).values
        heads = (best + torch.arange(groups)[:, None] * norms_GA.shape[1]).flatten()
        return (heads[:, None] * size + torch.arange(size)).flatten()

    def student(self, arm: Arm) -> Any:
        student = copy.deepcopy(self.teacher)
        for layer, matrix, kept in zip(student.model.layers, arm.matrices, self.kept[arm.cut], strict=True):
            weight = last(layer, arm.solves).weight
            weight.zero_()
            weight[:, kept] = matrix
        return student


class Texts:
    """Held-out rows of each text."""

    def __init__(self, options: Any, tokenizer: Any) -> None:
        from nemo_minitron.data import build

        files = texts.write_texts(options.work, options.novels)
        built = {name: build(str(files[name]), tokenizer, options.work / f"{name} tokens") for name in options.texts}
        self.rows = {name: text.windows(LENGTH + 1, options.held_out // LENGTH) for name, text in built.items()}
        self.train = build(str(texts.TRAIN), tokenizer, options.work / "train tokens")

    @torch.inference_mode()
    def losses(self, model: Any) -> dict[str, list[float]]:
        """Text -> the mean loss of each row."""
        return {
            name: [round(float(F.cross_entropy(model(row[None, :-1]).logits[0], row[1:])), 5) for row in rows]
            for name, rows in self.rows.items()
        }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--model", default=str(common.MODEL))
    parser.add_argument("--work", type=Path, default=common.ROOT / "runs/sub_blocks")
    parser.add_argument("--novels", type=Path, help="the .deb of r-cran-janeaustenr; needed once")
    parser.add_argument("--tokens", type=int, default=32768, help="of the calibration")
    parser.add_argument("--texts", nargs="+", default=["wikipedia", "manual"], choices=texts.TEXTS)
    parser.add_argument("--held-out", type=int, default=4096, help="tokens of each held-out text")
    parser.add_argument("--out", type=Path, default=common.dated("own_inputs"))
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM

    from nemo_minitron.data import load_tokenizer

    torch.set_num_threads(1)
    names = ("tokens", "texts", "held_out")
    settings = {name: getattr(options, name) for name in names} | {"keep": KEEP, "seed": SEED, "ridge": RIDGE}
    result = common.heading(("torch", "transformers")) | {"settings": settings, "rows": []}
    teacher = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval().requires_grad_(False)
    held = Texts(options, load_tokenizer(options.model))
    rows = held.train.windows(LENGTH, options.tokens // LENGTH + ASIDE, SEED)
    experiment, base = Experiment(teacher, rows, options.work), {}
    experiment.run()
    for arm in experiment.arms:
        losses = held.losses(experiment.student(arm))
        row: dict[str, Any] = {"cut": arm.cut, "arm": arm.name, "CPU s": round(arm.seconds), "errors": arm.errors}
        row |= {name: round(statistics.fmean(each), 4) for name, each in losses.items()}
        row["difference"] = {n: compared(losses, base.setdefault(arm.cut, losses), n) for n in losses}
        result["rows"].append(row | {"loss of each row": losses})
        print(row, flush=True)
        common.write(result, options.out)


if __name__ == "__main__":
    main()
