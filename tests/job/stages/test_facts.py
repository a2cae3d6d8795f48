"""What a card says of a base that stores fewer bits than its student."""

import json

import pytest
from pico import SIZES

from nemo_minitron.job.stages.facts import larger_files


@pytest.mark.parametrize(("scheme", "count"), [({"quant_method": "mxfp4"}, 1), (None, 0)])
def test_a_base_in_mxfp4(tmp_path, scheme, count):
    config = SIZES | {"architectures": ["GptOssForCausalLM"], "quantization_config": scheme}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sentences = larger_files(tmp_path)
    assert len(sentences) == count
    assert all("published in MXFP4; this model is stored in bf16" in sentence for sentence in sentences)


def test_a_base_that_is_no_folder_of_hugging_face(tmp_path):
    assert larger_files(tmp_path) == []
