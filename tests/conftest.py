"""No test reaches beyond this machine, and no figure opens a window."""

import os
import pickle
import socket
import sys
from pathlib import Path

import matplotlib
import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
matplotlib.use("Agg")
connect = socket.socket.connect


def connect_to_this_machine(self, address):
    """Refuse every connection that would leave the machine."""
    if self.family != getattr(socket, "AF_UNIX", None) and address[0] not in (
            "127.0.0.1", "::1", "localhost"):
        raise ConnectionRefusedError(f"the tests use no network, but {address} was asked for")
    return connect(self, address)


socket.socket.connect = connect_to_this_machine


@pytest.fixture(scope="session")
def digits():
    """The bundled digits."""
    from data import load_bundled_digits

    return load_bundled_digits()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Makes what takes long: `made_once(name, make)` returns what `make(folder)` returned.

    Where pytest-xdist runs the tests in several processes, the first that asks makes it for all.
    """
    def ask(name, make):
        if "PYTEST_XDIST_WORKER" not in os.environ:
            return make(tmp_path_factory.mktemp(name))
        folder = tmp_path_factory.getbasetemp().parent / name
        kept = folder.with_suffix(".pickle")
        with FileLock(folder.with_suffix(".lock")):
            if not kept.exists():
                folder.mkdir(exist_ok=True)
                kept.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(kept.read_bytes())

    return ask


@pytest.fixture(autouse=True)
def same_draws():
    """Every test starts from the same random state, whatever ran before it."""
    import torch

    torch.manual_seed(0)
