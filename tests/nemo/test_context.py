"""A checkpoint's context with other sizes: edited as data, loaded by NeMo."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
SIZES = {"num_layers": 5, "hidden_size": 40, "ffn_hidden_size": 48, "num_attention_heads": 6, "num_query_groups": 3}
SIZES |= {"kv_channels": 8}
SCRIPT = """
import json, sys
from pathlib import Path
def main():
    import nemo_minitron.backend as backend
    backend.setup()
    from nemo import lightning as nl
    from nemo.collections import llm
    from nemo.lightning.io.pl import TrainerContext
    from nemo_minitron.nemo.context import read_context, resize_context
    folder, sizes = Path(sys.argv[1]), json.loads(sys.argv[2])
    model = llm.LlamaModel(llm.Llama2Config7B(hidden_size=64, num_attention_heads=8))
    trainer = nl.Trainer(devices=1, accelerator="cpu", strategy=nl.MegatronStrategy())
    TrainerContext(model=model, trainer=trainer, extra={}).io_dump(folder / "before", yaml_attrs=["model"])
    resize_context(folder / "before", folder / "after", sizes)
    loaded = nl.io.load_context(folder / "after", subpath="model")
    read = read_context(folder / "after")
    found = [{name: getattr(loaded.config, name) for name in sizes}, {name: read.config[name] for name in sizes}]
    print("RESULT" + json.dumps([type(loaded.config).__name__, read.config_class, loaded.config.seq_length, *found]))
if __name__ == "__main__":
    main()
"""


def test_nemo_loads_other_sizes_also_where_the_class_had_them_as_defaults(tmp_path):
    """Llama2Config7B was given two sizes; the other four are its defaults and stand in no file but model.yaml.

    Where `resize_context` sets only what is there already, num_layers comes back as 32.
    """
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", str(tmp_path), json.dumps(SIZES)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    assert json.loads(result.removeprefix("RESULT")) == ["Llama2Config7B", "Llama2Config7B", 4096, SIZES, SIZES]
