"""Downloads against servers on this machine, each broken in its own way."""

import hashlib
import http.server
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
from torchvision import datasets

import data
from data import __main__ as fetch_everything
from data import download, load_cifar10
from data.fetch import DiskError

PAYLOAD = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(PAYLOAD).hexdigest()
FAST = dict(time_limit=2.0, timeout=0.4, patience=0.2)


class Handler(http.server.BaseHTTPRequestHandler):
    """/good and its broken relatives; each request is noted as (path, Range)."""

    def do_GET(self):
        path, span = self.path.split("?")[0], self.headers["Range"]
        self.server.requests.append((path, span))
        payload = self.server.files.get(path.rpartition("/")[2], PAYLOAD)
        start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
        if path == "/403":
            return self.send_error(403)
        if path == "/silent":
            return time.sleep(0.8)
        if path == "/wrong":
            payload = payload[::-1]
        if path == "/ignores-range":
            start = 0
        if start >= len(payload):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            shift = 1 if path == "/other-range" else 0
            self.send_header("Content-Range", f"bytes {start + shift}-{len(payload) - 1}/{len(payload)}")
        if path != "/no-length":
            self.send_header("Content-Length", str(len(payload) - start))
        self.end_headers()
        rest = payload[start:]
        if path == "/half":
            rest = rest[:len(rest) // 2] if len(rest) > 1000 else b""
        if path == "/dies":
            rest = rest[:100_000] if not start else b""
        if path == "/slow":
            for i in range(0, 100):
                self.wfile.write(rest[i * 100:(i + 1) * 100])
                time.sleep(0.05)
        elif path == "/stalls":
            self.wfile.write(rest[:1000])
            self.wfile.flush()
            time.sleep(0.8)
        else:
            self.wfile.write(rest)

    def log_message(self, *_):
        """Print nothing."""


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.handle_error = lambda *_: None  # clients that leave early are expected
        server.requests, server.files = [], {}
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()


def fetch(server, paths, target, **settings):
    return download([f"{server.url}{path}" for path in paths], target, **{"sha256": SHA256, **FAST, **settings})


@pytest.mark.parametrize("hashes", [{"sha256": SHA256}, {"sha256": SHA256[:8]},
                                    {"sha256": None, "md5": hashlib.md5(PAYLOAD).hexdigest()}])
def test_a_good_file_arrives_alone_and_is_not_fetched_again(server, tmp_path, hashes):
    target = tmp_path / "below" / "file.bin"
    assert fetch(server, ["/good"], target, **hashes) == target
    assert target.read_bytes() == PAYLOAD and list(target.parent.iterdir()) == [target]
    fetch(server, ["/good"], target, **hashes)
    assert len(server.requests) == 1


@pytest.mark.parametrize(("path", "reason"), [
    ("/403", "HTTP 403"), ("/wrong", "the bytes are wrong"), ("/silent", "timed out"),
    ("/slow", "too slow"), ("/stalls", "timed out"), ("/dies", "stopped after 100,000 of 300,000 bytes"),
])
def test_each_failure_is_named_and_the_next_server_is_tried(server, tmp_path, path, reason):
    target = tmp_path / "file.bin"
    with pytest.raises(OSError, match=f"{server.url}{path}: .*{reason}") as caught:
        fetch(server, [path], target)
    left = [file.name for file in tmp_path.iterdir()]
    assert left in ([], ["file.bin.part"]) and all(name in str(caught.value) for name in left)
    assert fetch(server, [path, "/good"], target).read_bytes() == PAYLOAD
    assert list(tmp_path.iterdir()) == [target]


def test_five_broken_servers_and_a_good_one(server, tmp_path):
    start = time.monotonic()
    paths = ["/403", "/wrong", "/silent", "/slow", "/dies", "/good"]
    assert fetch(server, paths, tmp_path / "file.bin").read_bytes() == PAYLOAD
    assert time.monotonic() - start < 5


def test_no_server_at_all_gives_one_reason_each(tmp_path):
    urls = ["http://127.0.0.1:9/a", "http://127.0.0.1:9/b", "nonsense://c"]
    with pytest.raises(OSError, match="9/a: .*refused.*9/b: .*refused.*nonsense://c: unknown url type"):
        download(urls, tmp_path / "file.bin", sha256=SHA256, **FAST)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["/good", "/no-length", "/ignores-range"])
def test_an_interrupted_download_goes_on(server, tmp_path, path):
    (tmp_path / "file.bin.part").write_bytes(PAYLOAD[:200_000])
    assert fetch(server, [path], tmp_path / "file.bin").read_bytes() == PAYLOAD
    assert server.requests == [(path, "bytes=200000-")]


def test_a_server_that_halves_every_answer_is_resumed_until_done(server, tmp_path):
    with pytest.raises(OSError, match="stopped after"):
        fetch(server, ["/half"], tmp_path / "file.bin")
    starts = [span for _, span in server.requests]
    assert starts[:3] == [None, "bytes=150000-", "bytes=225000-"]
    assert fetch(server, ["/good"], tmp_path / "file.bin").read_bytes() == PAYLOAD


@pytest.mark.parametrize("part", [b"?" * 1000, b"?" * len(PAYLOAD), PAYLOAD + b"?"])
def test_a_partial_file_of_other_bytes_is_fetched_once_from_zero(server, tmp_path, part):
    (tmp_path / "file.bin.part").write_bytes(part)
    assert fetch(server, ["/good"], tmp_path / "file.bin").read_bytes() == PAYLOAD
    assert [span for _, span in server.requests] == [f"bytes={len(part)}-", None]


def test_another_range_than_asked_for_is_not_appended(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(PAYLOAD[:1000])
    with pytest.raises(OSError, match="another range"):
        fetch(server, ["/other-range"], tmp_path / "file.bin")
    assert (tmp_path / "file.bin.part").read_bytes() == PAYLOAD[:1000]


def test_a_damaged_file_under_the_name_is_replaced(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"damaged")
    assert fetch(server, ["/good"], tmp_path / "file.bin").read_bytes() == PAYLOAD


def test_unverified_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected md5 or sha256"):
        download(["http://127.0.0.1:9/"], tmp_path / "file.bin")


def test_a_folder_that_is_a_file_is_the_disks_fault(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        fetch(server, ["/good"], tmp_path / "file" / "file.bin")
    assert not server.requests


FETCH = """
import sys
sys.path.insert(0, {root!r})
from data import download
download([{url!r}], {target!r}, sha256={sha!r}, time_limit={limit})
"""


def start_fetching(server, path, target, limit=30):
    code = FETCH.format(root=str(data.HERE.parent), url=server.url + path, target=str(target), sha=SHA256,
                        limit=limit)
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)


def test_two_processes_fetch_one_file_and_a_killed_one_is_resumed(server, tmp_path):
    target, part = tmp_path / "file.bin", tmp_path / "file.bin.part"
    killed = start_fetching(server, "/slow", target, limit=1e6)
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size > 500) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    had = part.stat().st_size
    assert had > 500 and not target.exists()
    both = [start_fetching(server, "/good", target) for _ in range(2)]
    assert [process.wait(timeout=30) for process in both] == [0, 0]
    assert target.read_bytes() == PAYLOAD and list(tmp_path.iterdir()) == [target]
    assert server.requests[1:] == [("/good", f"bytes={had}-")]  # the second process had nothing to do


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_FSIZE")
def test_a_full_disk_is_named_and_no_other_server_is_tried(server, tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DiskError, match="cannot write .*file.bin.part"):
            fetch(server, ["/good", "/good"], tmp_path / "file.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(server.requests) == 1 and not (tmp_path / "file.bin").exists()
    assert fetch(server, ["/good"], tmp_path / "file.bin").read_bytes() == PAYLOAD


@pytest.fixture
def small_cifar10(server, tmp_path, monkeypatch):
    """An archive in CIFAR-10's layout, 20 images a batch, on the server; torchvision told its hashes."""
    folder, random = tmp_path / "made" / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir(parents=True)
    hashes = {}
    for name in [name for name, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list]:
        batch = {"data": random.integers(0, 256, (20, 3072), dtype=np.uint8),
                 "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    for path in folder.iterdir():
        hashes[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    archive = tmp_path / "made" / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
    server.files["cifar.tar.gz"] = archive.read_bytes()
    monkeypatch.setattr(data, "CIFAR10_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(data, "CIFAR10_URLS", [f"{server.url}/403", f"{server.url}/x/cifar.tar.gz"])
    for attribute in ("train_list", "test_list"):
        names = [name for name, _ in getattr(datasets.CIFAR10, attribute)]
        monkeypatch.setattr(datasets.CIFAR10, attribute, [[name, hashes[name]] for name in names])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {
        "filename": "batches.meta", "key": "label_names", "md5": hashes["batches.meta"]})
    return tmp_path / "root"


def test_cifar10_is_downloaded_once_then_read_from_disk(server, small_cifar10, capsys):
    cifar = load_cifar10(small_cifar10)
    assert cifar.train_images.shape == (100, 3, 32, 32) and cifar.test_images.shape == (20, 3, 32, 32)
    assert cifar.classes[3] == "class 3" and cifar.name.startswith("CIFAR-10")
    assert [path.name for path in small_cifar10.iterdir()] == ["cifar-10-batches-py"]
    theirs = datasets.CIFAR10(small_cifar10, train=False)
    assert np.array_equal(np.asarray(theirs[7][0]).transpose(2, 0, 1), cifar.test_images[7])
    asked = len(server.requests)
    assert len(load_cifar10(small_cifar10, offline=True).train_images) == 100
    assert len(server.requests) == asked
    assert "downloaded" in (out := capsys.readouterr().out) and "from disk" in out


def test_a_damaged_cifar10_is_not_unpickled(small_cifar10, capsys, monkeypatch):
    load_cifar10(small_cifar10)
    trap = b"cos\nsystem\n(S'touch trap'\ntR."
    (small_cifar10 / "cifar-10-batches-py" / "data_batch_2").write_bytes(trap)
    monkeypatch.chdir(small_cifar10)
    stand_in = load_cifar10(small_cifar10)
    assert "stand-in" in stand_in.name
    assert "cifar-10-batches-py is damaged; delete it" in capsys.readouterr().out
    assert not (small_cifar10 / "trap").exists()


def test_without_cifar10_the_stand_in_says_what_it_is(tmp_path, capsys):
    stand_in = load_cifar10(tmp_path, offline=True)
    assert stand_in.name.startswith("colour digits, a stand-in for CIFAR-10")
    assert "python -m data" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_python_m_data_fetches_everything_or_says_what_it_missed(server, small_cifar10, capsys, monkeypatch):
    monkeypatch.setattr(data, "MNIST_MIRRORS", ["http://127.0.0.1:9/"])
    assert fetch_everything.main(["--data-dir", str(small_cifar10)]) == 1
    out, err = capsys.readouterr()
    assert "CIFAR-10: complete" in out and "MNIST: could not fetch" in err
    assert datasets.CIFAR10(small_cifar10)[0]


@pytest.mark.parametrize(("reason", "limits"), [("too slow (50 kB/s)", [180.0, float("inf")]), ("HTTP 403", [180.0])])
def test_python_m_data_waits_for_slow_servers_and_only_for_them(reason, limits, tmp_path, capsys, monkeypatch):
    asked = []

    def fetch(root, time_limit=180.0):
        asked.append(time_limit)
        if time_limit == 180.0:
            raise OSError(f"could not fetch it ({reason})")

    monkeypatch.setattr(fetch_everything, "FETCH", {"it": fetch})
    assert fetch_everything.main(["--data-dir", str(tmp_path)]) == (len(limits) == 1) and asked == limits
    out, err = capsys.readouterr()
    assert ("it: complete" in out) == (len(limits) == 2) and (reason in err) == (len(limits) == 1)
