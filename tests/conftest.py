import os

# Two threads make tiny models several times slower where other processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs only where there is a CUDA device")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def cifar_root():
    """Folder with the original CIFAR-10 and CIFAR-100, named by the environment variable CIFAR_ROOT."""
    if not os.environ.get("CIFAR_ROOT"):
        pytest.skip("CIFAR_ROOT names no folder with real CIFAR")
    return os.environ["CIFAR_ROOT"]
