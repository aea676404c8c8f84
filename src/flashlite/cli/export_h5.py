"""`flashlite export-h5`: a model's weights in FP32 into an HDF5 file."""

from __future__ import annotations

from pathlib import Path

import click

from flashlite.cli import options, output
from flashlite.errors import UsageError
from flashlite.runtime.memory import format_size

__all__ = ["command"]


@click.command("export-h5")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    "target",
    type=click.Path(path_type=Path),
    help="FILE.h5  [default: NAME_fp32.h5]",
)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@click.option("--offline", is_flag=True, help="Use only what is on this machine.")
@click.option("--accept-license", is_flag=True, help="For models whose licence asks for it.")
@options.like_option
@output.json_option
def command(
    model: str,
    target: Path | None,
    force: bool,
    offline: bool,
    accept_license: bool,
    like: str | None,
    as_json: bool,
) -> None:
    """Write MODEL in FP32 into an HDF5 file that any other verb reads.

    MODEL is a known name, hf:ORG/NAME, or the path of a GGUF file, a safetensors folder or an HDF5
    file. The file holds every weight as a dataset under its canonical name (`layers/0/q`), the
    tokenizer, the chat template, and the model's description in the attribute `model_config`.

    \b
    Examples:
      flashlite export-h5 smollm2-135m-instruct -o base_fp32.h5
      flashlite quantize base_fp32.h5 --preset q8 -o base.fl
    """
    from flashlite.checkpoint.convert_tokenizer import build_tokenizer_checked
    from flashlite.checkpoint.hdf5_write import write_hdf5
    from flashlite.checkpoint.open import open_checkpoint
    from flashlite.checkpoint.pull import pull
    from flashlite.model.families import describe_any

    with options.stages() as progress:
        pulled = pull(
            model,
            accept_license=accept_license,
            offline=offline,
            progress=lambda done, total: progress("pull", done, total),
        )
        path = target or Path(f"{pulled.name}_fp32.h5")
        if path.is_dir() or (path.exists() and not force):
            raise UsageError(f"{path} is there already; give --force to replace it, or another -o")
        checkpoint = open_checkpoint(pulled.path, like=like)
        source = describe_any(checkpoint)
        size = write_hdf5(
            path,
            source.spec.shapes(),
            source.tensor,
            architecture=source.spec.family,
            spec=source.spec.to_json(),
            tokenizer=build_tokenizer_checked(checkpoint),
            licence=pulled.licence or str(checkpoint.metadata.get("general.license") or ""),
            progress=lambda done, total: progress("export-h5", done, total),
        )
    if as_json:
        output.emit(
            {
                "file": str(path),
                "bytes": size,
                "tensors": len(source.sources),
                "architecture": source.spec.family,
                "peak_memory_bytes": options.peak_memory(),
            }
        )
    else:
        click.echo(f"{path}: {format_size(size)}, {len(source.sources)} tensors in FP32")
