"""The AVX-512 kernels as compiled, on a PC emulator that decodes their instructions.

`test_kernels.py` proves their logic anywhere; here the machine code itself runs, on machines
without AVX-512 too. Bochs (Debian: bochs) starts `bare_pc/boot.S`, which loads the
fuzz targets with random inputs.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import kernel_harness as h
import pytest

HERE = Path(__file__).parent
BIOS = Path("/usr/share/bochs/BIOS-bochs-latest")
VGA_BIOS = Path("/usr/share/bochs/VGABIOS-lgpl-latest")
ROUNDS = 1500  # inputs
CHUNK = 64 * 512  # bytes that boot.S loads at once
CYLINDER = 16 * 63 * 512

BARE = (
    "-nostdlib -static -no-pie -fno-pie -fno-stack-protector -fcf-protection=none "
    "-fno-asynchronous-unwind-tables -Wl,--build-id=none -Wl,--no-warn-rwx-segments"
).split()

SETTINGS = """
megs: 128
romimage: file={bios}
vgaromimage: file={vga_bios}
cpu: model={cpu}, reset_on_triple_fault=0
ata0-master: type=disk, path="{disk}", mode=flat, cylinders={cylinders}, heads=16, spt=63
boot: disk
port_e9_hack: enabled=1
sound: driver=dummy
display_library: rfb, options="timeout=0"
plugin_ctrl: unmapped=1
log: "{log}"
panic: action=fatal
"""


def flat(sources: list[Path], target: Path, flags: list[str]) -> bytes:
    """A program as it lies in memory."""
    h.compile_c(sources, target, [*BARE, *flags])
    subprocess.run(["objcopy", "-O", "binary", target], check=True)
    return target.read_bytes()


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk that fuzzes the AVX-512 table."""
    absent = [str(p) for p in (BIOS, VGA_BIOS) if not p.exists()]
    if absent or not shutil.which("bochs") or not shutil.which("objcopy"):
        pytest.skip("needs the PC emulator Bochs with its BIOS (Debian: apt-get install bochs)")
    folder = tmp_path_factory.mktemp("bare_pc")
    table = h.TABLES["avx512"]
    sources = [HERE / "bare_pc" / "library.c", *h.FUZZ_ENTRY, h.FUZZ / "random_main.c"]
    sources += [h.CSRC / name for name in ("fl_kernels_plain.c", table.source, "fl_sample.c")]
    flags = [f'-DROUNDS="{ROUNDS}"', h.fuzz_tables([h.TABLES["plain"], table]), "-mno-red-zone"]
    flags += [f"-I{h.FUZZ}", "-DFUZZ_BARE"]
    flags += ["-fno-builtin-printf", f"-Wl,-T,{HERE / 'bare_pc' / 'program.ld'}"]
    program = flat(sources, folder / "program", [*table.flags, *flags])
    flags = [f"-DCHUNKS={-(-len(program) // CHUNK)}", "-Wl,-Ttext=0x7c00"]
    image = flat([HERE / "bare_pc" / "boot.S"], folder / "boot", flags) + program
    path = folder / "disk"
    path.write_bytes(image.ljust(-(-(len(image) + CHUNK) // CYLINDER) * CYLINDER, b"\0"))
    return path


def run(disk: Path, cpu: str) -> str:
    """What the program printed before the emulator ended, among the emulator's own lines."""
    settings, commands = disk.with_name(f"{cpu}.txt"), disk.with_name("commands")
    cylinders = disk.stat().st_size // CYLINDER
    settings.write_text(
        SETTINGS.format(
            bios=BIOS,
            vga_bios=VGA_BIOS,
            cpu=cpu,
            disk=disk,
            cylinders=cylinders,
            log=disk.with_name(f"{cpu}.log"),
        )
    )
    commands.write_text("continue\n")
    command = ["bochs", "-q", "-f", str(settings), "-rc", str(commands)]
    alone = ["unshare", "--map-root-user", "--net"]  # its screen would listen on a port
    if (
        shutil.which("unshare")
        and not subprocess.run([*alone, "true"], capture_output=True).returncode
    ):
        command = [*alone, *command]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=200,
        errors="replace",
        text=True,
    )
    return done.stdout


def test_compiled_kernels_equal_the_plain_ones(disk: Path) -> None:
    printed = run(disk, "corei7_icelake_u").splitlines()
    assert f"avx512: {ROUNDS} rounds" in printed
    assert "exit 0" in printed


def test_the_emulator_refuses_what_a_processor_lacks(disk: Path) -> None:
    """Skylake-X has AVX-512 without VNNI: what ran above were the real instructions."""
    printed = run(disk, "corei7_skylake_x")
    assert "exception with no resolution" in printed
    assert "exit 0" not in printed.splitlines()
