"""The uncompressed source of a model, in the form that PyTorch and llama.cpp read.

Known models come as quantized GGUF files. Decoded to floats they are what flashlite compresses, and
what its answers are compared with: a folder for transformers in FP32, and a GGUF file in F16 that
llama.cpp makes of the same file. Both are kept in the cache of peers.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

import common
from flashlite import paths
from flashlite.checkpoint.open import open_checkpoint
from flashlite.checkpoint.pull import pull
from flashlite.evaluate.peers import find_peers, peer_python
from flashlite.model.families import describe
from flashlite.model.gemma3 import GEMMA3
from flashlite.model.llama import LLAMA
from flashlite.model.qwen2 import QWEN2
from flashlite.model.reference import Reference
from flashlite.model.source import SourceModel
from flashlite.model.spec import ModelSpec

__all__ = ["TORCH_TYPES", "f16_gguf", "hf_config", "hf_tensors", "torch_folder"]

TORCH_TYPES = ("bfloat16", "float32")
_KINDS = {  # by family: its names, and what transformers calls it
    "llama": (LLAMA, "llama", "LlamaForCausalLM"),
    "qwen2": (QWEN2, "qwen2", "Qwen2ForCausalLM"),
    "gemma3": (GEMMA3, "gemma3_text", "Gemma3ForCausalLM"),
}
_QUANTIZE = """
import llama_cpp, sys
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.allow_requantize, params.nthread = 1, True, 2  # LLAMA_FTYPE_MOSTLY_F16
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""
_CLOSE = 2e-3  # of logits, beside their largest


def f16_gguf(model: str) -> Path:
    """The source as a GGUF file of half floats, made by llama.cpp from the file it comes in."""
    source = _pulled(model)
    target = _folder(model) / "f16.gguf"
    if not target.exists():
        common.note(f"{model}: decoding to F16 with llama.cpp, once")
        fresh = target.with_suffix(".partial")
        (peer,) = find_peers(["llama.cpp"])
        command = [
            str(peer_python(peer, common.note)),
            "-I",
            "-c",
            _QUANTIZE,
            str(source),
            str(fresh),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"llama.cpp could not decode {source}: {done.stderr[-500:]}")
        fresh.replace(target)
    return target


def torch_folder(model: str, dtype: str) -> Path:
    """The source as transformers reads it, to be opened with this type; checked once against our
    own forward in FP32.
    """
    folder = _folder(model) / "hf"
    if not (folder / "checked").exists():
        common.note(f"{model}: decoding to FP32 for PyTorch, once")
        _write(describe(open_checkpoint(_pulled(model))), folder)
    link = folder / dtype  # the peer takes its type from the name
    if not link.exists():
        link.symlink_to(".")
    return link


def hf_config(spec: ModelSpec) -> dict[str, Any]:
    """`config.json` of a model without frequency scaling.

    Raises:
        ValueError: the model is of a kind that is not exported.
    """
    if spec.family not in _KINDS or spec.rope_factors or spec.rope_llama3:
        raise ValueError(f"{spec.family} with scaled rotary angles is not exported")
    _, kind, architecture = _KINDS[spec.family]
    config = {
        "model_type": kind,
        "architectures": [architecture],
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "intermediate_size": spec.d_ff,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_context,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied_head,
        "torch_dtype": "float32",
    }
    rope = {"rope_type": "default", "rope_theta": spec.rope_theta}
    if spec.family != "gemma3":
        return {**config, "hidden_act": "silu", "rope_parameters": rope}
    kinds = ("full_attention", "sliding_attention")
    return {
        **config,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(spec.softmax_scale**-2),
        "sliding_window": spec.sliding_window,
        "layer_types": [kinds[spec.slides(i)] for i in range(spec.n_layers)],
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": spec.rope_theta_local},
        },
    }


def hf_tensors(source: SourceModel) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Every tensor in FP32 by the name that transformers gives it."""
    family = _KINDS[source.spec.family][0]
    found = {}
    for canonical, _ in source.spec.shapes():
        first, _, rest = canonical.partition(".")
        layer, _, kind = rest.partition(".")
        key = "layers.{i}." + kind if first == "layers" else canonical
        values = source.tensor(canonical)
        if kind.endswith("norm") or first.endswith("norm"):
            values = values - np.float32(family.hf_norm_offset)
        found[family.hf_names[key].replace("{i}", layer)] = np.ascontiguousarray(values)
    return found


def _write(source: SourceModel, folder: Path) -> None:
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    save_file(hf_tensors(source), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(source.spec)), encoding="utf-8")
    ids = np.random.default_rng(0).integers(0, source.spec.vocab_size, 24)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    ours = Reference(source.spec, source.tensor).logits(ids)
    worst = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    if worst > _CLOSE:
        raise RuntimeError(f"{folder}: logits of PyTorch differ from ours by {worst:.2%}")
    (folder / "checked").write_text(f"{worst}\n", encoding="utf-8")


def _pulled(model: str) -> Path:
    return pull(model, accept_license=model == common.GEMMA).path


def _folder(model: str) -> Path:
    folder = paths.cache_dir() / "peers" / f"source-{model}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
