"""Build the kernels of the digits page from guidance_nb/explorer/kernels.c: `python tools/kernels.py`.

Needs clang with its WebAssembly target and wasm-ld (Debian: clang and lld). The results are committed, so nobody who
does not change the source needs them.
"""

import subprocess
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "guidance_nb" / "explorer"
BUILDS = {"kernels.wasm": ["-msimd128"], "kernels_plain.wasm": []}
NAMES = ("convolve", "normalise", "differentiate", "enlarge", "join")
OPTIONS = "--target=wasm32 -O3 -nostdlib -Wl,--no-entry -Wl,--strip-all -Wl,--export=__heap_base"


def build(folder: Path = FOLDER) -> None:
    "Write both files into a folder."
    exports = [f"-Wl,--export={name}" for name in NAMES]
    for name, flags in BUILDS.items():
        command = ["clang", *OPTIONS.split(), *exports, *flags, "-o", str(folder / name), str(FOLDER / "kernels.c")]
        subprocess.run(command, check=True)
        (folder / name).chmod(0o644)


if __name__ == "__main__":
    build()
