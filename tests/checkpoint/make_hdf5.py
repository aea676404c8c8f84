"""HDF5 files for tests: a small model of ours, and weights as Keras and others lay them out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from flashlite.checkpoint import hdf5_child
from flashlite.checkpoint.hdf5_write import write_hdf5
from flashlite.checkpoint.tokenizer import SpecialTokens, TokenizerFiles
from flashlite.model.spec import ModelSpec

__all__ = [
    "SPEC",
    "compressed",
    "examine_here",
    "keras2",
    "keras3_gemma",
    "keras3_llama",
    "ours",
    "plain",
    "values",
]

Arrays = Mapping[str, NDArray[np.float32]]

SPEC = ModelSpec(
    family="llama", n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24,
    vocab_size=40, max_context=64, norm_eps=1e-5, activation="silu", tied_head=True,
    rope_theta=100.0,
)  # fmt: skip
NO_TEXT = TokenizerFiles(b"{}", None, SpecialTokens(None, (), False, ()))


def examine_here(path: Path) -> tuple[int, bytes]:
    """What the child process would answer, without the process and its limits."""
    reply = hdf5_child.examine(os.fsencode(path), h5py, lambda: None)
    return 0, json.dumps(reply).encode()


def values(spec: ModelSpec = SPEC) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(5)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in spec.shapes()}


def ours(path: Path, **changes: Any) -> Path:
    """What `export-h5` writes."""
    arrays = values()
    settings: dict[str, Any] = {
        "architecture": "llama", "spec": SPEC.to_json(), "tokenizer": NO_TEXT, "licence": "MIT",
    }  # fmt: skip
    write_hdf5(path, SPEC.shapes(), arrays.__getitem__, **settings | changes)
    return path


def plain(path: Path, arrays: Arrays, *, groups: bool) -> Path:
    """Names as they are, or dots as groups."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name.replace(".", "/") if groups else name, data=array)
    return path


def compressed(path: Path, libver: str | None = None) -> Path:
    """Every way to store that is allowed: types, byte orders, chunks, filters, a scalar."""
    rng = np.random.default_rng(1)
    a = rng.standard_normal((7, 11)).astype("f4")
    with h5py.File(path, "w", libver=libver) as file:
        file["f4"] = a
        file["f2"] = a.astype("f2")
        file["f8"] = a.astype("f8")
        file["big/f4"] = a.astype(">f4")
        file["big/f8"] = a.astype(">f8")
        file["big/f2"] = a.astype(">f2")
        file["scalar"] = np.float32(2.5)
        file["text"] = np.array([b"of no", b"concern"])
        chunked = file.create_group("chunked")
        ways: dict[str, dict[str, Any]] = {
            "plain": {},
            "gzip": {"compression": "gzip"},
            "shuffle": {"shuffle": True},
            "both": {"compression": "gzip", "shuffle": True},
        }
        for name, settings in ways.items():
            chunked.create_dataset(name, data=a, chunks=(3, 4), **settings)
        chunked.create_dataset(
            "growing", data=a, maxshape=(None, None), chunks=(16, 16), compression="gzip"
        )
    return path


def keras2(path: Path, arrays: Arrays) -> Path:
    """`save_weights` of a TensorFlow model of transformers: kernels inputs first."""
    with h5py.File(path, "w") as file:
        layer = file.create_group("model")
        names = []
        for name, array in arrays.items():
            words = re.sub(r"(layers?)\.(\d+)", r"\1_._\2", name).replace("_._", "@").split(".")
            words = [word.replace("@", "_._") for word in words]
            if array.ndim == 2 and "embed" not in words[-2]:
                words[-1], array = "kernel", array.T
            elif array.ndim == 2:
                words[-1] = "embeddings"
            elif words[-2] == "LayerNorm":
                words[-1] = {"weight": "gamma", "bias": "beta"}[words[-1]]
            full = "/".join(["tf_llama_for_causal_lm", *words]) + ":0"
            layer.create_dataset(full, data=array)
            names.append(full.encode())
        file.attrs["layer_names"] = [b"model"]
        file.attrs["backend"] = b"tensorflow"
        file.attrs["keras_version"] = b"2.15.0"
        layer.attrs["weight_names"] = names
        optimizer = file.create_group("optimizer_weights")
        optimizer["adam/iteration:0"] = np.int64(3)
        optimizer.create_dataset("adam/m/" + full, data=array)
    return path


def keras3_llama(path: Path, arrays: Arrays, spec: ModelSpec, *, classes: bool) -> Path:
    """A KerasHub Llama or Qwen backbone: layers by class, or by name; an axis per head."""
    d, hd = spec.d_model, spec.head_dim
    with h5py.File(path, "w") as file:

        def put(layer: str, *variables: NDArray[np.float32]) -> None:
            for number, array in enumerate(variables):
                file[f"layers/{layer}/vars/{number}"] = array

        table = [arrays["model.embed_tokens.weight"]]
        if "lm_head.weight" in arrays:
            table.append(arrays["lm_head.weight"].T)
        put("reversible_embedding" if classes else "token_embedding", *table)
        put("llama_layer_norm" if classes else "sequence_output_layernorm",
            arrays["model.norm.weight"])  # fmt: skip
        for i in range(spec.n_layers):
            p = f"model.layers.{i}."
            block = f"transformer_layer_{i}"
            if classes:
                block = "llama_transformer_decoder" + (f"_{i}" if i else "")
            put(f"{block}/_self_attention_layernorm", arrays[p + "input_layernorm.weight"])
            put(f"{block}/_feedforward_layernorm", arrays[p + "post_attention_layernorm.weight"])
            for keras, hf in (("query", "q"), ("key", "k"), ("value", "v")):
                kernel = arrays[f"{p}self_attn.{hf}_proj.weight"].T.reshape(d, -1, hd)
                bias = arrays.get(f"{p}self_attn.{hf}_proj.bias")
                biases = [] if bias is None else [bias.reshape(-1, hd)]
                put(f"{block}/_self_attention_layer/_{keras}_dense", kernel, *biases)
            o = arrays[p + "self_attn.o_proj.weight"].T.reshape(-1, hd, d)
            put(f"{block}/_self_attention_layer/_output_dense", o)
            for keras, hf in (("gate", "gate"), ("intermediate", "up"), ("output", "down")):
                put(f"{block}/_feedforward_{keras}_dense", arrays[f"{p}mlp.{hf}_proj.weight"].T)
            file[f"layers/{block}/dropout/seed_generator/vars/0"] = np.zeros(2, "u4")
    return path


def keras3_gemma(path: Path, arrays: Arrays, spec: ModelSpec) -> Path:
    """A KerasHub Gemma 3 backbone: heads first."""
    d, hd = spec.d_model, spec.head_dim

    def heads_first(w: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(w.reshape(-1, hd, d).transpose(0, 2, 1))

    with h5py.File(path, "w") as file:

        def put(layer: str, array: NDArray[np.float32]) -> None:
            file[f"layers/{layer}/vars/0"] = array

        put("token_embedding", arrays["model.embed_tokens.weight"])
        put("final_normalization", arrays["model.norm.weight"])
        for i in range(spec.n_layers):
            p, block = f"model.layers.{i}.", f"decoder_block_{i}"
            for keras, hf in (
                ("pre_attention_norm", "input_layernorm"),
                ("post_attention_norm", "post_attention_layernorm"),
                ("pre_ffw_norm", "pre_feedforward_layernorm"),
                ("post_ffw_norm", "post_feedforward_layernorm"),
                ("attention/query_norm", "self_attn.q_norm"),
                ("attention/key_norm", "self_attn.k_norm"),
            ):
                put(f"{block}/{keras}", arrays[f"{p}{hf}.weight"])
            for keras, hf in (("query", "q"), ("key", "k"), ("value", "v")):
                put(f"{block}/attention/{keras}_dense",
                    heads_first(arrays[f"{p}self_attn.{hf}_proj.weight"]))  # fmt: skip
            put(f"{block}/attention/output_dense",
                arrays[p + "self_attn.o_proj.weight"].T.reshape(-1, hd, d))  # fmt: skip
            for keras, hf in (
                ("gating_ffw", "gate"),
                ("gating_ffw_2", "up"),
                ("ffw_linear", "down"),
            ):
                put(f"{block}/{keras}", arrays[f"{p}mlp.{hf}_proj.weight"].T)
    return path
