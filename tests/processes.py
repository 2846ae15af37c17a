"""How the tests start Python processes: in the same way on Linux, macOS and Windows."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def environment(**settings):
    """For a process that finds the project, speaks UTF-8, takes one core, and sees no GPU.

    Two processes that train on one GPU are refused, so those of the tests train on the CPU everywhere.
    """
    settings = {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "CUDA_VISIBLE_DEVICES": "",
                "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])} | of_gloo() | settings
    return {name: value for name, value in (os.environ | settings).items() if value is not None}


def of_gloo():
    """What lets processes of one machine find each other: the interface that leads back to it."""
    if os.name == "nt":
        return {"USE_LIBUV": "0"}                                # PyTorch for Windows is built without it
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]  # lo, or lo0 on macOS
    return {"GLOO_SOCKET_IFNAME": names[0]} if names else {}


def run_python(*arguments, folder, timeout=300, **settings):
    """Run Python in a folder; return what `subprocess.run` returns, with the output as text."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=environment(**settings),
                          capture_output=True, encoding="utf-8", timeout=timeout)


def run_torchrun(*arguments, folder):
    """Run a file in two processes of `torchrun`."""
    return run_python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                      f"--log-dir={folder / 'logs'}", *arguments, folder=folder)
