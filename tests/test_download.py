"""Downloads against servers on this machine, each broken in its own way.

Slow servers are slow by a clock of their own, which the downloads read too. So nothing waits for them.
"""

import gzip
import hashlib
import http.server
import io
import math
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from torchvision import datasets

import data
from data import __main__ as fetch_everything
from data import download, fetch_mnist, fetch_resnet18, load_cifar10
from data import fetch as fetch_module
from data.fetch import DiskError, TooSlowError, one_process_at_a_time, write_whole

PAYLOAD = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(PAYLOAD).hexdigest()
LIMITS = dict(time_limit=20.0, timeout=20.0, patience=0.2)
SILENT = ("/silent", "/stalls")                                  # these hang until the test is over


class Handler(http.server.BaseHTTPRequestHandler):
    """/good and its broken relatives; each request is noted as (path, Range)."""

    def do_GET(self):
        path, span = self.path.split("?")[0], self.headers["Range"]
        self.server.requests.append((path, span))
        payload = self.server.files.get(path.rpartition("/")[2], PAYLOAD)
        start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
        if path == "/403":
            return self.send_error(403)
        if path == "/busy":
            return self.send_error(503, "too slow today")
        if path == "/silent":
            return self.server.go_on.wait(60)
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
        if path.startswith("/held"):
            begin = min(100_000, len(rest) // 2)
            self.wfile.write(rest[:begin])
            self.server.go_on.wait(60)
            self.wfile.write(rest[begin:])
        elif path == "/trickle":
            for i in range(0, len(rest), 30_000):
                self.server.now += 0.05
                self.wfile.write(rest[i:i + 30_000])
        elif path == "/slow":
            for i in range(0, 100):
                self.server.now += 0.5
                self.wfile.write(rest[i * 100:(i + 1) * 100])
        elif path == "/stalls":
            self.wfile.write(rest[:1000])
            self.wfile.flush()
            self.server.go_on.wait(60)
        else:
            self.wfile.write(rest)

    def log_message(self, *_):
        """Print nothing."""


@pytest.fixture
def server(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.handle_error = lambda *_: None  # clients that leave early are expected
        server.requests, server.files, server.go_on, server.now = [], {}, threading.Event(), 0.0
        monkeypatch.setattr(fetch_module, "time", SimpleNamespace(monotonic=lambda: server.now))
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.go_on.set()
        server.shutdown()


def names(folder):
    """What is in a folder, apart from the locks, which stay."""
    return sorted(file.name for file in folder.iterdir() if file.suffix != ".lock")


def fetch(server, paths, target, **settings):
    urls = [f"{server.url}{path}" for path in paths]
    if any(path in SILENT for path in paths):
        settings = {"timeout": 0.5} | settings
    return download(urls, target, **{"sha256": SHA256} | LIMITS | settings)


@pytest.mark.parametrize("hashes", [{"sha256": SHA256}, {"sha256": SHA256[:8]},
                                    {"sha256": None, "md5": hashlib.md5(PAYLOAD).hexdigest()}])
def test_a_good_file_arrives_alone_and_is_not_fetched_again(server, tmp_path, hashes):
    target = tmp_path / "below" / "file.bin"
    assert fetch(server, ["/good"], target, **hashes) == target
    assert target.read_bytes() == PAYLOAD and names(target.parent) == ["file.bin"]
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
    assert isinstance(caught.value, TooSlowError) == (path == "/slow")
    left = names(tmp_path)
    assert left in ([], ["file.bin.part"]) and all(name in str(caught.value) for name in left)
    assert fetch(server, [path, "/good"], target).read_bytes() == PAYLOAD
    assert names(tmp_path) == ["file.bin"]


def test_five_broken_servers_and_a_good_one(server, tmp_path):
    paths = ["/403", "/wrong", "/silent", "/slow", "/dies", "/good"]
    assert fetch(server, paths, tmp_path / "file.bin").read_bytes() == PAYLOAD
    asked = [path for path, _ in server.requests]
    assert [*dict.fromkeys(asked)] == paths                      # in this order; "/dies" more than once


def test_no_server_at_all_gives_one_reason_each(tmp_path):
    urls = ["http://127.0.0.1:9/a", "http://127.0.0.1:9/b", "nonsense://c"]
    with pytest.raises(OSError, match="9/a: .*refused.*9/b: .*refused.*nonsense://c: unknown url type"):
        download(urls, tmp_path / "file.bin", sha256=SHA256, **LIMITS)
    assert names(tmp_path) == []


def test_being_too_slow_is_a_kind_of_error_not_a_text(server, tmp_path):
    """One slow server is enough: with more time it may deliver. One that says so is broken."""
    with pytest.raises(OSError, match="HTTP 503 too slow today") as caught:
        fetch(server, ["/busy", "/403"], tmp_path / "file.bin")
    assert not isinstance(caught.value, TooSlowError)
    with pytest.raises(TooSlowError, match=r"/slow: too slow \(\d+ kB/s\).*/403: HTTP 403"):
        fetch(server, ["/slow", "/403"], tmp_path / "file.bin")


def test_with_time_enough_a_slow_server_delivers(server, tmp_path):
    """It needs half a second."""
    with pytest.raises(TooSlowError, match="file.bin.part"):
        fetch(server, ["/trickle"], tmp_path / "file.bin", time_limit=0.3, patience=0.1)
    fetch(server, ["/trickle"], tmp_path / "file.bin", time_limit=math.inf, patience=0.1)
    assert (tmp_path / "file.bin").read_bytes() == PAYLOAD and names(tmp_path) == ["file.bin"]
    assert server.requests[1][1] is not None                     # it went on where it was
    fetch(server, ["/trickle"], tmp_path / "in time.bin", time_limit=60, patience=0.1)


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
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(OSError):
        fetch(server, ["/good"], tmp_path / "file" / "file.bin")
    assert not server.requests


FETCH = """
import sys
folder, url, target, sha256 = sys.argv[1:]
sys.path.insert(0, folder)
from fetch import download  # data/fetch.py by itself, without PyTorch
print("ready", flush=True)
download([url], target, sha256=sha256, time_limit=60, timeout=60)
"""


def start_fetching(server, path, target):
    """Start a process, and wait until it is about to download."""
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, str(data.HERE), server.url + path, str(target), SHA256],
        stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout.readline() == "ready\n"
    return process


def wait_until(happened):
    for _ in range(1000):
        if happened():
            return
        time.sleep(0.02)
    raise AssertionError("waited for 20 s in vain")


def test_a_second_process_waits_and_does_not_fetch_again(server, tmp_path):
    target = tmp_path / "file.bin"
    first = start_fetching(server, "/held", target)
    wait_until(lambda: server.requests)
    second = start_fetching(server, "/held", target)
    time.sleep(0.3)                                              # for it to ask the server, if it would
    assert server.requests == [("/held", None)] and not target.exists()
    server.go_on.set()
    assert [process.wait(timeout=30) for process in (first, second)] == [0, 0]
    assert server.requests == [("/held", None)] and target.read_bytes() == PAYLOAD
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file.bin", "file.bin.lock"]


def test_what_a_killed_process_has_fetched_is_not_fetched_again(server, tmp_path):
    target, part = tmp_path / "file.bin", tmp_path / "file.bin.part"
    killed = start_fetching(server, "/held", target)
    wait_until(lambda: part.exists() and part.stat().st_size == 100_000)
    killed.kill()
    killed.wait()
    assert not target.exists()
    fetch(server, ["/good"], target)                             # the lock went with the process
    assert target.read_bytes() == PAYLOAD and names(tmp_path) == ["file.bin"]
    assert server.requests[1:] == [("/good", "bytes=100000-")]


def test_the_lock_keeps_out_a_third_process_after_the_first_has_left(tmp_path):
    """Were the lock's file removed, the second would hold the removed one, and the third a new one."""
    path, has_begun, may_end = tmp_path / "file.bin", threading.Event(), threading.Event()

    def second():
        with one_process_at_a_time(path, 60):
            has_begun.set()
            may_end.wait(60)

    thread = threading.Thread(target=second, daemon=True)
    with one_process_at_a_time(path, 0):
        number = (tmp_path / "file.bin.lock").stat().st_ino
        thread.start()
        assert not has_begun.wait(0.3)
    assert has_begun.wait(60)
    with pytest.raises(OSError, match=r"another process has been fetching file\.bin for 0 s"):
        with one_process_at_a_time(path, 0.1):
            pass
    may_end.set()
    thread.join()
    with one_process_at_a_time(path, math.inf):
        assert (tmp_path / "file.bin.lock").stat().st_ino == number
    assert (tmp_path / "file.bin.lock").exists()


def test_a_file_written_whole_replaces_the_old_one_or_leaves_it(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", b"old")
    write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new" and names(tmp_path) == ["file"]

    def no_rename(*_):
        raise OSError("no")

    monkeypatch.setattr("os.replace", no_rename)
    with pytest.raises(OSError, match="no"):
        write_whole(tmp_path / "file", b"newer")
    assert (tmp_path / "file").read_bytes() == b"new" and names(tmp_path) == ["file"]


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
    assert cifar.classes[3] == "class 3" and cifar.name.startswith("CIFAR-10") and not cifar.stand_in
    assert names(small_cifar10) == ["cifar-10-batches-py"]
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
    assert stand_in.stand_in and "stand-in for CIFAR-10" in stand_in.name
    assert "cifar-10-batches-py is damaged; delete it" in capsys.readouterr().out
    assert not (small_cifar10 / "trap").exists()


def test_verified_files_go_before_a_copy(small_cifar10, capsys):
    load_cifar10(small_cifar10)
    (small_cifar10 / "cifar10.npz").write_bytes(b"not looked at")
    assert not load_cifar10(small_cifar10, offline=True).stand_in


def test_unpacking_needs_no_filter_which_came_in_python_3_11_4(small_cifar10, monkeypatch):
    unpack = tarfile.TarFile.extractall

    def unpack_as_before(self, path=".", members=None, *, numeric_owner=False):
        unpack(self, path, members, numeric_owner=numeric_owner)

    monkeypatch.setattr(tarfile.TarFile, "extractall", unpack_as_before)
    assert not load_cifar10(small_cifar10).stand_in
    (small_cifar10 / "cifar-10-batches-py").rename(small_cifar10 / "first")
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    assert not load_cifar10(small_cifar10).stand_in


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python cannot refuse it")
def test_an_archive_that_leads_out_of_its_folder_is_refused(server, small_cifar10, capsys, monkeypatch):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../evil"))
    server.files["cifar.tar.gz"] = file.getvalue()
    monkeypatch.setattr(data, "CIFAR10_MD5", hashlib.md5(file.getvalue()).hexdigest())
    assert load_cifar10(small_cifar10).stand_in and "evil" in capsys.readouterr().out
    assert not [*small_cifar10.parent.rglob("evil")] and names(small_cifar10) == ["cifar-10-python.tar.gz"]


@pytest.fixture
def small_mnist(server, monkeypatch):
    """Four files with MNIST's names, on the server; torchvision told their hashes."""
    resources = []
    for name, _ in datasets.MNIST.resources:
        server.files[name] = gzip.compress(name.encode())
        resources.append((name, hashlib.md5(server.files[name]).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    monkeypatch.setattr(data, "MNIST_MIRRORS", ["http://127.0.0.1:9/", f"{server.url}/x/"])
    return [name.removesuffix(".gz") for name, _ in resources]


def test_mnist_is_fetched_and_unpacked_file_by_file(server, small_mnist, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    fetch_mnist(tmp_path)
    assert names(raw) == sorted(small_mnist)
    assert all((raw / name).read_bytes() == f"{name}.gz".encode() for name in small_mnist)
    fetch_mnist(tmp_path)
    assert len(server.requests) == 4
    (raw / small_mnist[2]).unlink()
    fetch_mnist(tmp_path, math.inf)
    assert server.requests[4:] == [(f"/x/{small_mnist[2]}.gz", None)] and names(raw) == sorted(small_mnist)


@pytest.mark.parametrize("which", ["CIFAR-10", "MNIST"])
def test_a_second_process_that_wants_the_same_data_set_waits_and_takes_what_the_first_unpacked(
        which, server, small_cifar10, small_mnist, monkeypatch):
    """Two threads stand for the processes: the lock tells one holder from another, not one process."""
    monkeypatch.setattr(data, "CIFAR10_URLS", [f"{server.url}/held/cifar.tar.gz"])
    monkeypatch.setattr(data, "MNIST_MIRRORS", [f"{server.url}/held/"])
    failures = []

    def fetch_it():
        try:
            fetch_everything.FETCH[which](small_cifar10)
        except Exception as error:
            failures.append(error)

    both = [threading.Thread(target=fetch_it, daemon=True) for _ in range(2)]
    both[0].start()
    wait_until(lambda: server.requests)
    both[1].start()
    both[1].join(0.3)                                            # for it to ask the server, if it would
    assert len(server.requests) == 1 and all(thread.is_alive() for thread in both)
    server.go_on.set()
    for thread in both:
        thread.join(30)
        assert not thread.is_alive()
    assert not failures and len(server.requests) == {"CIFAR-10": 1, "MNIST": 4}[which]
    if which == "CIFAR-10":
        assert len(load_cifar10(small_cifar10, offline=True).train_images) == 100
    else:
        assert names(small_cifar10 / "MNIST" / "raw") == sorted(small_mnist)


def test_python_m_data_fetches_everything_or_says_what_it_missed(
        server, small_cifar10, small_mnist, capsys, monkeypatch):
    file = f"resnet18-{SHA256[:8]}.pth"
    monkeypatch.setitem(fetch_everything.FETCH, "ResNet-18 weights",
                        lambda root: fetch_resnet18(root, url=f"{server.url}/x/{file}"))
    assert fetch_everything.main(["--data-dir", str(small_cifar10)]) == 0
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == [*fetch_everything.FETCH] and not err
    assert (small_cifar10 / "checkpoints" / file).read_bytes() == PAYLOAD
    assert names(small_cifar10) == ["MNIST", "checkpoints", "cifar-10-batches-py"]
    assert len(datasets.CIFAR10(small_cifar10)) == 100
    asked = len(server.requests)
    assert fetch_everything.main(["--data-dir", str(small_cifar10)]) == 0 and len(server.requests) == asked

    (small_cifar10 / "MNIST" / "raw" / small_mnist[0]).unlink()
    monkeypatch.setattr(data, "MNIST_MIRRORS", ["http://127.0.0.1:9/"])
    capsys.readouterr()
    assert fetch_everything.main(["--data-dir", str(small_cifar10)]) == 1
    out, err = capsys.readouterr()
    assert "CIFAR-10: complete" in out and "MNIST: could not fetch" in err and "MNIST: complete" not in out


@pytest.mark.parametrize(("error", "limits"), [
    (TooSlowError("could not fetch it (50 kB/s)"), [180.0, math.inf]),
    (OSError("could not fetch it (HTTP 503 too slow)"), [180.0])])
def test_python_m_data_waits_for_slow_servers_and_only_for_them(error, limits, tmp_path, capsys, monkeypatch):
    asked = []

    def fetch_it(root, time_limit=180.0):
        asked.append(time_limit)
        if time_limit == 180.0:
            raise error

    monkeypatch.setattr(fetch_everything, "FETCH", {"it": fetch_it})
    assert fetch_everything.main(["--data-dir", str(tmp_path)]) == (len(limits) == 1) and asked == limits
    out, err = capsys.readouterr()
    assert ("it: complete" in out) == (len(limits) == 2) and (str(error) in err) == (len(limits) == 1)


@pytest.mark.parametrize("name", ["MNIST", "CIFAR-10", "ResNet-18 weights"])
def test_each_of_them_can_be_given_more_time(name, tmp_path, monkeypatch):
    """As `python -m data` does it: the second argument reaches every download."""
    limits = []

    def note(urls, path, *_, time_limit, **__):
        limits.append(time_limit)
        raise TooSlowError("noted")

    monkeypatch.setattr(data, "download", note)
    with pytest.raises(TooSlowError, match="noted"):
        fetch_everything.FETCH[name](tmp_path, math.inf)
    assert limits == [math.inf]
