"""Sources as PyTorch reads them: what our reader of such folders made of them, undone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import sources
from flashlite.checkpoint.open import open_checkpoint
from flashlite.model.families import describe

FAMILIES = Path(__file__).parents[1] / "fixtures/families"


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_names_and_values_are_those_of_the_folder(family: str) -> None:
    checkpoint = open_checkpoint(FAMILIES / family)
    found = sources.hf_tensors(describe(checkpoint))
    for name, values in found.items():
        assert np.abs(values - checkpoint.tensor(name)).max() <= 1e-6
    unused = [name for name in checkpoint.tensors if name not in found]
    assert all(name.endswith(".bias") for name in unused)  # of zeros


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_description_is_read_back_to_the_same_model(family: str, tmp_path: Path) -> None:
    source = describe(open_checkpoint(FAMILIES / family))
    for path in (FAMILIES / family).glob("*.safetensors*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = sources.hf_config(source.spec)
    if source.spec.sliding_layers:
        config |= {"use_sliding_window": True, "sliding_window": source.spec.sliding_window}
        kinds = ("full_attention", "sliding_attention")
        n = source.spec.n_layers
        config["layer_types"] = [kinds[source.spec.slides(i)] for i in range(n)]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert describe(open_checkpoint(tmp_path)).spec == source.spec


def test_a_gemma_keeps_its_layers_and_its_angles(tmp_path: Path) -> None:
    source = describe(open_checkpoint(FAMILIES / "gemma3"))
    config = sources.hf_config(source.spec)
    assert config["layer_types"].count("sliding_attention") == sum(source.spec.sliding_layers)
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 50.0
    assert config["query_pre_attn_scalar"] == 9
