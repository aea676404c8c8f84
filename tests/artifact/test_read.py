from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashlite.artifact.format import Artifact
from flashlite.artifact.read import load_texts, load_weights, open_artifact, packed, tensor
from flashlite.artifact.write import quantize
from flashlite.checkpoint.open import open_checkpoint
from flashlite.checkpoint.tokenizer import TokenizerFiles
from flashlite.compress.plan import PRESETS
from flashlite.errors import ArtifactError, IntegrityError
from flashlite.model.families import describe
from flashlite.model.source import SourceModel

Forge = Callable[[str, Callable[[dict[str, Any]], object]], Path]
PROVENANCE = {"source": "tiny.gguf", "sha256": "ab" * 32, "licence": "Apache-2.0"}


# ---- what is written is read ---------------------------------------------------------------------


def test_open_gives_back_what_was_written(
    tiny_artifact: Artifact, tiny_source: SourceModel, tiny_texts: TokenizerFiles
) -> None:
    again = open_artifact(tiny_artifact.path)
    assert again == tiny_artifact
    assert again.spec == tiny_source.spec
    assert again.provenance == PROVENANCE
    assert again.name == "tiny"
    assert load_texts(again) == tiny_texts
    assert len(again.digest) == 64


def test_a_base_model_has_no_template(
    tiny_source: SourceModel, tiny_texts: TokenizerFiles, tmp_path: Path
) -> None:
    texts = TokenizerFiles(tiny_texts.tokenizer_json, None, tiny_texts.tokens)
    made = quantize(tiny_source, texts, tmp_path / "b.fl", name="b", provenance=PROVENANCE)
    (made.path / "chat_template.jinja").write_text("not in the manifest")
    assert load_texts(open_artifact(made.path)).chat_template is None


def test_weights_are_aligned_private_and_read_only(tiny_artifact: Artifact) -> None:
    weights = load_weights(tiny_artifact)
    assert weights.shape == (tiny_artifact.weights_size,)
    assert weights.ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="read-only"):
        weights[0] = 1


def test_a_later_write_or_cut_does_not_reach_loaded_weights(copy: Path) -> None:
    artifact = open_artifact(copy)
    weights = load_weights(artifact)
    before = weights.copy()
    path = copy / "weights.safetensors"
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)
        file.truncate(8192)
    assert np.array_equal(weights, before)


def test_import_keeps_every_grid_of_the_checkpoint(
    tiny_artifact: Artifact, tiny_source: SourceModel
) -> None:
    weights = load_weights(tiny_artifact)
    kinds = set()
    for name, _ in tiny_source.spec.shapes():
        dtype = tiny_source.checkpoint.info(tiny_source.sources[name].name).dtype
        kinds.add(dtype)
        found, expected = tensor(tiny_artifact, weights, name), tiny_source.tensor(name)
        assert found.shape == expected.shape
        if dtype == "F16":  # becomes q8
            assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()
        else:
            assert np.array_equal(found, expected)
    assert kinds == {"Q4_0", "Q4_1", "Q8_0", "F16", "F32"}
    assert np.array_equal(tensor(tiny_artifact, weights, "head"), tiny_source.tensor("embed"))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_written_and_read(
    preset: str, tiny_source: SourceModel, tiny_texts: TokenizerFiles, tmp_path: Path
) -> None:
    made = quantize(
        tiny_source, tiny_texts, tmp_path / "x.fl", preset, name="x", provenance=PROVENANCE
    )
    weights = load_weights(made)
    for name in (*dict(tiny_source.spec.shapes()), "head"):
        expected = tiny_source.tensor("embed" if name == "head" else name)
        found = tensor(made, weights, name)
        worst = np.abs(found - expected).max() / np.abs(expected).max()
        assert worst < {"q4": 0.13, "q5": 0.08, "q6": 0.04}.get(preset, 0.01), name
    fmt = {"q4": "q4m", "q5": "q5", "q6": "q6"}.get(preset, "q8")
    assert packed(made, weights, "head").format == fmt
    if preset == "hybrid":
        half = tiny_source.tensor("embed").astype(np.float16).astype(np.float32)
        assert np.array_equal(tensor(made, weights, "embed"), half)


def test_smollm2_imports_bit_for_bit_and_loads_in_its_own_size(
    smollm2_gguf: Path, tiny_texts: TokenizerFiles, tmp_path: Path
) -> None:
    source = describe(open_checkpoint(smollm2_gguf))
    made = quantize(source, tiny_texts, tmp_path / "s.fl", name="smollm2", provenance=PROVENANCE)
    weights = load_weights(made)
    for name, _ in source.spec.shapes():
        assert np.array_equal(tensor(made, weights, name), source.tensor(name)), name
    # Loading must not hold the file twice. A fresh process, because a peak never falls.
    code = (
        "import sys; from pathlib import Path\n"
        "from flashlite.artifact.read import load_weights, open_artifact\n"
        "def peak():\n"
        "    text = Path('/proc/self/status').read_text()\n"
        "    return 1024 * int(text.split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "weights = load_weights(open_artifact(Path(sys.argv[1])))\n"
        "print((peak() - before) / weights.nbytes)\n"
    )
    if not Path("/proc/self/status").exists():
        return
    ran = subprocess.run(
        [sys.executable, "-c", code, str(made.path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert float(ran.stdout) < 1.1


# ---- every way an artifact can be wrong ----------------------------------------------------------


def refused(folder: Path, match: str, kind: type[ArtifactError] = ArtifactError) -> None:
    """Opening and loading fails with one line that says `match`."""
    with pytest.raises(kind, match=match) as caught:
        load_weights(open_artifact(folder))
    assert "\n" not in str(caught.value)


def edit_header(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the directory of the weights, keeping its length."""
    path = folder / "weights.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    edit(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    replace_header(folder, text)


def replace_header(folder: Path, text: bytes) -> None:
    path = folder / "weights.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


@pytest.fixture
def poke(copy: Path, resign: Callable[[str], None]) -> Callable[[str, int, bytes], Path]:
    """Overwrite bytes of one stored array and bring the manifest's file digest in line."""

    def change(stored: str, at: int, value: bytes) -> Path:
        path = copy / "weights.safetensors"
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little") + open_artifact(copy).tensors[stored].offset
        data[start + at : start + at + len(value)] = value
        path.write_bytes(data)
        resign("weights.safetensors")
        return copy

    return change


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none.fl", "no such artifact")


def test_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.fl").write_text("x")
    refused(tmp_path / "x.fl", "no such artifact")


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "config.json", "weights.safetensors", "tokenizer.json", "card.json"],
)
def test_a_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    refused(copy, f"{name}: there is no such file")


def test_a_missing_template_that_the_manifest_lists(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    refused(copy, "chat_template.jinja: there is no such file")


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors"])
def test_a_pipe_is_not_waited_for(copy: Path, name: str) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    refused(copy, "not a regular file")


def test_a_folder_in_place_of_a_file(copy: Path) -> None:
    (copy / "config.json").unlink()
    (copy / "config.json").mkdir()
    refused(copy, "cannot be read|not a regular file")


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": 1, "a": 2}', "'a' stands there twice"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_json_that_is_not_strict(
    copy: Path, resign: Callable[[str], None], name: str, text: bytes, match: str
) -> None:
    (copy / name).write_bytes(text)
    if name != "manifest.json":
        resign(name)
    refused(copy, match)


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
@pytest.mark.parametrize(
    ("version", "match"),
    [(4, "format 4 is newer than 3.*upgrade"), (0, "not a number from 1"), ("1", "'1'"),
     (True, "True"), (None, "None"), (1.0, "not a number from 1")],
)  # fmt: skip
def test_format_version(forge: Forge, name: str, version: object, match: str) -> None:
    refused(forge(name, lambda value: value.update(format_version=version)), match)


def test_a_newer_format_is_refused_before_its_unknown_content(forge: Forge) -> None:
    folder = forge("manifest.json", lambda v: v.update(format_version=7, files=0, new=1))
    refused(folder, "format 7 is newer")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda v: v.pop("files"), "not an object of"),
        (lambda v: v.update(extra=1), "not an object of"),
        (lambda v: v.update(tensors=[]), "not an object of"),
        (lambda v: v["files"].pop("weights.safetensors"), "does not list weights.safetensors"),
        (lambda v: v["files"].update({"../../etc/passwd": {}}), "not allowed"),
        (lambda v: v["files"].update({"/etc/passwd": {}}), "not allowed"),
        (lambda v: v["files"].update({"manifest.json": {}}), "not allowed"),
        (lambda v: v["files"].update({"lib/x.so": {"size": -1, "blake3": "0" * 64}}), "lib/x.so"),
        (lambda v: v["files"].update({"lib/x.so": {"size": 1, "blake3": "0"}}), "lib/x.so"),
        (lambda v: v["files"].update({"lib/x.so": 3}), "lib/x.so has no size"),
        (lambda v: v["tensors"].update(x=1), "'x' has no BLAKE3"),
        (lambda v: v["tensors"].update(x="0" * 64), "not this model's: 'x'"),
        (lambda v: v["tensors"].pop("embed.codes"), "not this model's: 'embed.codes'"),
    ],
)
def test_a_manifest_that_is_none(forge: Forge, edit: Any, match: str) -> None:
    refused(forge("manifest.json", edit), match)


def test_a_digest_of_another_file(forge: Forge) -> None:
    def edit(value: dict[str, Any]) -> None:
        value["files"]["config.json"]["blake3"] = "0" * 64

    refused(forge("manifest.json", edit), "config.json: the file differs", IntegrityError)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda v: v.pop("tokens"), "key 'tokens' is missing or unknown"),
        (lambda v: v.update(extra=1), "key 'extra' is missing or unknown"),
        (lambda v: v.update(name="../x"), "is not allowed"),
        (lambda v: v.update(name=None), "is not allowed"),
        (lambda v: v.update(model=[]), "model description is not an object"),
        (lambda v: v["model"].pop("d_model"), "d_model"),
        (lambda v: v["model"].update(evil=1), "evil"),
        (lambda v: v["model"].update(d_model=-1), "d_model is -1"),
        (lambda v: v["model"].update(d_model=2**63), "d_model is 9223372036854775808"),
        (lambda v: v["model"].update(d_model=64.5), "d_model is 64.5"),
        (lambda v: v["model"].update(d_model="64"), "d_model is '64'"),
        (lambda v: v["model"].update(norm_eps=0), "norm_eps"),
        (lambda v: v["model"].update(n_layers=2**31), "n_layers is 2147483648"),
        (lambda v: v["model"].update(n_layers=4), "which the model does not have"),
        (lambda v: v["model"].update(n_layers=6), "no format for"),
        (lambda v: v["model"].update(tied_head="no"), "tied_head is 'no'"),
        (lambda v: v["model"].update(qkv_bias=1), "qkv_bias is 1"),
        (lambda v: v["model"].update(family=3), "family is 3"),
        (lambda v: v["model"].update(rope_factors=["x"] * 4), "config.json"),
        (lambda v: v["model"].update(rope_factors=[0.0] * 4), "rope factor"),
        (lambda v: v["model"].update(rope_llama3={"factor": 1}), "config.json"),
        (lambda v: v["model"].update(sliding_layers=3), "config.json"),
        (lambda v: v.update(plan=None), "plan is not an object"),
        (lambda v: v["plan"]["formats"].update(embed="f32"), "stores embed as 'f32'"),
        (lambda v: v["plan"]["formats"].update({"layers.0.q": {}}), r"layers\.0\.q"),
        (lambda v: v["plan"]["formats"].pop("layers.0.q"), r"no format for 'layers\.0\.q'"),
        (lambda v: v.update(tokens={}), "config.json"),
        (lambda v: v["tokens"].update(eos=[512]), "special token 512"),
        (lambda v: v["tokens"].update(control=[-1]), "config.json"),
        (lambda v: v.update(provenance={}), "provenance"),
    ],
)
def test_a_config_that_is_none(forge: Forge, edit: Any, match: str) -> None:
    refused(forge("config.json", edit), match)


@pytest.mark.parametrize(
    ("field", "value"), [("d_model", 128), ("vocab_size", 513), ("d_ff", 256), ("n_kv_heads", 2)]
)
def test_a_model_of_another_shape_than_its_weights(forge: Forge, field: str, value: int) -> None:
    refused(forge("config.json", lambda v: v["model"].update({field: value})), "bytes, must be")


def test_a_plan_that_swaps_formats_of_one_size(forge: Forge) -> None:
    """q4m and q4 of two matrices of one shape: the sizes agree, the arrays do not."""

    def swap(value: dict[str, Any]) -> None:
        value["plan"]["formats"].update({"layers.0.k": "q4", "layers.0.v": "q4m"})

    refused(forge("config.json", swap), "not this model's: 'layers.0.k.mins'")


@pytest.mark.parametrize("fmt", ["q5", "q6"])
def test_a_plan_of_wider_codes_than_the_weights(forge: Forge, fmt: str) -> None:
    """The arrays have the same names, so that only their size tells."""

    def widen(value: dict[str, Any]) -> None:
        value["plan"]["formats"]["layers.0.v"] = fmt  # q4 in the file
        value["format_version"] = 3

    refused(forge("config.json", widen), "bytes, must be")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda h: h.pop("embed.codes"), r"embed\.codes is missing"),
        (lambda h: h.update({"../../x": h["embed.codes"]}), "'../../x' is not part"),
        (lambda h: h.update(__metadata__={"a": "b"}), "'__metadata__' is not part"),
        (lambda h: h["embed.codes"].update(dtype="U8"), r"embed\.codes is described as"),
        (lambda h: h["embed.codes"].update(shape=[32, 2, 511]), r"embed\.codes is described as"),
        (lambda h: h["embed.codes"].update(shape=[-32, -2, 512]), r"embed\.codes is described as"),
        (lambda h: h["embed.codes"].update(shape=[2**63, 2]), r"embed\.codes is described as"),
        (lambda h: h["embed.codes"].update(data_offsets=[0, 2**64]), "embed.codes is described"),
        (lambda h: h["embed.scales"].update(data_offsets=[0, 2048]), "embed.scales is described"),
        (lambda h: h["embed.codes"].update(extra=1), "embed.codes is described as"),
        (lambda h: h.update({"embed.codes": None}), "embed.codes is described as None"),
        (
            lambda h: h.update({"layers.0.q.codes": h["layers.1.q.codes"]}),
            r"layers\.0\.q\.codes is described as",
        ),
    ],
)
def test_a_directory_of_tensors_that_differs(
    copy: Path, resign: Callable[[str], None], edit: Any, match: str
) -> None:
    edit_header(copy, edit)
    resign("weights.safetensors")
    refused(copy, match)


def test_a_tensor_listed_twice(copy: Path, resign: Callable[[str], None]) -> None:
    data = (copy / "weights.safetensors").read_bytes()
    text = data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip()
    entry = text[1 : text.index(b"},") + 1]
    replace_header(copy, text[:-1] + b"," + entry + b"}")
    resign("weights.safetensors")
    refused(copy, r"'embed\.codes' stands there twice")


@pytest.mark.parametrize("length", [0, 1, 2**24 + 1, 2**31, 2**32, 2**63, 2**64 - 1])
def test_a_header_of_an_absurd_length(
    copy: Path, resign: Callable[[str], None], length: int
) -> None:
    path = copy / "weights.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    resign("weights.safetensors")
    refused(copy, "header of|bytes, must be")


def test_weights_cut_anywhere_are_refused(copy: Path) -> None:
    path = copy / "weights.safetensors"
    data = path.read_bytes()
    points = [*range(72), *range(72, len(data), len(data) // 60), len(data) - 1]
    for size in points:
        path.write_bytes(data[:size])
        refused(copy, "must be|shorter|header of")


def test_bytes_after_the_weights(copy: Path) -> None:
    with (copy / "weights.safetensors").open("ab") as file:
        file.write(b"\0")
    refused(copy, "bytes, must be")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", ["embed.scales", "layers.2.q.mins", "layers.1.attn_norm"])
def test_values_that_are_not_finite(
    poke: Callable[[str, int, bytes], Path], stored: str, value: float
) -> None:
    kind = np.float32 if stored.endswith("norm") else np.float16
    folder = poke(stored, 8, kind(value).tobytes())
    refused(folder, f"tensor {stored} holds a value that is not finite")


def test_a_file_beyond_its_limit_is_not_read(copy: Path) -> None:
    with (copy / "config.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    refused(copy, "1099511627776 bytes, at most")


def test_text_that_is_not_utf8(copy: Path, resign: Callable[[str], None]) -> None:
    (copy / "tokenizer.json").write_bytes(b"\xff")
    resign("tokenizer.json")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: not UTF-8"):
        load_texts(open_artifact(copy))


def test_refusals_are_quick_and_small(copy: Path) -> None:
    """A megabyte of the costliest JSON: two seconds and 200 MB are far away."""
    (copy / "manifest.json").write_bytes(b"[" + b"[]," * 333_000 + b"[]]")
    before = resource.getrusage(resource.RUSAGE_SELF)
    refused(copy, "not a JSON object")
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 2
    assert after.ru_maxrss - before.ru_maxrss < 200_000
