from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashlite.artifact.format import (
    ALIGN,
    Artifact,
    check_name,
    check_provenance,
    check_tokens,
    layout,
)
from flashlite.artifact.read import load_weights, tensor
from flashlite.checkpoint.tokenizer import SpecialTokens
from flashlite.compress.plan import plan_preset
from flashlite.errors import ArtifactError
from flashlite.model.source import SourceModel

Odd = tuple[Artifact, dict[str, NDArray[Any]]]


def test_arrays_lie_one_after_the_other_on_64_bytes(odd_artifact: Odd) -> None:
    artifact, _ = odd_artifact
    arranged = layout(artifact.spec, artifact.plan)
    end = pads = 0
    for entry in arranged.entries:
        assert entry.offset == end
        assert entry.nbytes > 0
        end += entry.nbytes
        if entry.name.startswith("_pad."):
            pads += 1
        else:
            assert entry.offset % ALIGN == 0
    assert end == arranged.size
    assert end % ALIGN == 0
    assert pads > 10
    header = arranged.header()
    assert len(header) % ALIGN == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8


def test_odd_sizes_are_read_back(odd_artifact: Odd) -> None:
    artifact, arrays = odd_artifact
    weights = load_weights(artifact)
    assert set(arrays) == set(artifact.tensors)
    for name, entry in artifact.tensors.items():
        stored = weights[entry.offset : entry.offset + entry.nbytes]
        assert np.array_equal(stored, arrays[name].reshape(-1).view(np.uint8))
    for name, shape in artifact.spec.shapes():
        assert tensor(artifact, weights, name).shape == shape


def test_a_tied_table_is_stored_once_unless_it_is_half_precision(tiny_source: SourceModel) -> None:
    one = layout(tiny_source.spec, plan_preset("import", tiny_source)).tensors
    assert {n for n in one if n.startswith(("embed", "head"))} == {"embed.codes", "embed.scales"}
    two = layout(tiny_source.spec, plan_preset("hybrid", tiny_source)).tensors
    names = {n for n in two if n.startswith(("embed", "head"))}
    assert names == {"embed", "head.codes", "head.scales"}
    assert (two["embed"].dtype, two["embed"].shape) == ("F16", (512, 64))


@pytest.mark.parametrize("which", ["tiny", "odd"])
def test_the_safetensors_library_reads_the_weights(
    which: str, tiny_artifact: Artifact, odd_artifact: Odd
) -> None:
    artifact = tiny_artifact if which == "tiny" else odd_artifact[0]
    library = pytest.importorskip("safetensors.numpy")
    found = library.load_file(artifact.path / "weights.safetensors")
    weights = load_weights(artifact)
    assert {n for n in found if not n.startswith("_pad.")} == set(artifact.tensors)
    for name, entry in artifact.tensors.items():
        assert found[name].shape == entry.shape
        ours = weights[entry.offset : entry.offset + entry.nbytes]
        assert np.array_equal(found[name].reshape(-1).view(np.uint8), ours)


def test_the_card_tells_the_size(tiny_artifact: Artifact) -> None:
    card = json.loads((tiny_artifact.path / "card.json").read_text())
    assert card["preset"] == "import"
    assert card["weights_bytes"] == tiny_artifact.weights_size
    shapes = dict(tiny_artifact.spec.shapes())
    assert card["parameters"] == sum(int(np.prod(shape)) for shape in shapes.values())
    stored = sum(entry.nbytes for entry in tiny_artifact.tensors.values())
    assert sum(row["bytes"] for row in card["formats"].values()) == stored
    assert card["bits_per_weight"] == round(8 * stored / card["parameters"], 3)


@pytest.mark.parametrize("name", ["a", "smollm2-135m-instruct", "q.2_5", "0" * 64])
def test_plain_names_pass(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "A", "-a", "a" * 65, "a\n", "a b", "ñ", None, 3]
)
def test_other_names_are_refused(name: object) -> None:
    with pytest.raises(ArtifactError, match="is not allowed"):
        check_name(name)


@pytest.mark.parametrize(
    "data",
    [None, {}, {"source": "x"}, {"source": "x", "sha256": "", "licence": None}, "x"],
)
def test_provenance_is_three_texts(data: object) -> None:
    with pytest.raises(ArtifactError, match="provenance"):
        check_provenance(data)


@pytest.mark.parametrize(
    "tokens",
    [
        SpecialTokens(512, (2,), True, ()),
        SpecialTokens(None, (512,), False, ()),
        SpecialTokens(None, (), False, (0, 600)),
    ],
)
def test_special_tokens_lie_in_the_vocabulary(
    tokens: SpecialTokens, tiny_source: SourceModel
) -> None:
    with pytest.raises(ArtifactError, match="vocabulary of 512"):
        check_tokens(tokens, tiny_source.spec)
