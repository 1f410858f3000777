"What all tests share."

import functools
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# Two workers on few cores: threads of their own would only slow each other down. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A model that is in no folder is not looked for on the network, which takes half a minute where there is none.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# PyTorch keeps what it compiled by source, not by the instructions that ATEN_CPU_CAPABILITY allows: kernels for one
# processor then fail, or give inf, on the other that the variable imitates.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    cache = f"torchinductor-{os.getuid() if hasattr(os, 'getuid') else 'user'}-{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), cache))

import hypothesis
import pytest

# No deadline: a busy machine is not a failure. Derandomised: the same examples for everyone.
hypothesis.settings.register_profile("here", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("here")


def pytest_collection_finish() -> None:
    "What is imported by now stays: no collection of garbage looks at it again."
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data() -> Path:
    "The folder with the real MNIST and CIFAR-10."
    if "GUIDANCE_NB_DATA" not in os.environ:
        pytest.skip("set GUIDANCE_NB_DATA to the folder with MNIST/ and cifar-10-batches-py/ to run this")
    return Path(os.environ["GUIDANCE_NB_DATA"])


@pytest.fixture(scope="session", autouse=True)
def published_files_are_hashed_once():
    "The real MNIST and CIFAR-10, which are checked twice whenever they are loaded: each file once, unless it changes."
    if "guidance_nb.images._data" not in sys.modules:  # these tests load none
        yield
        return
    from torchvision.datasets import cifar

    from guidance_nb.images import _data as data

    check, check_again = data._missing_files, cifar.check_integrity

    def stamp(path: Path) -> tuple[Path, int, int]:
        return (path, path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else (path, 0, 0)

    @functools.cache
    def remember(call: Callable, arguments: tuple, *stamps: object) -> object:
        return call(*arguments)

    def missing(source: str, root: Path, advice: str) -> list[Path]:
        files = data.FILES[source]
        stamps = (stamp(root / name) for name in files)
        return list(remember(check, (source, root, advice), *files.items(), *stamps))

    def whole(path: str, md5: str) -> bool:
        return remember(check_again, (path, md5), stamp(Path(path)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_missing_files", missing)
        patch.setattr(cifar, "check_integrity", whole)
        yield


@pytest.fixture(scope="module")
def chromium():
    "A browser without a window."
    names = ("chromium", "google-chrome", "chromium-browser")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no chromium or google-chrome on this machine, so no interactive page was opened")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed, so no page was opened")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        yield running
        running.close()
