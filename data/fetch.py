"""Downloads that cannot hang, and that leave nothing half-written."""

import hashlib
import http.client
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm


class DiskError(OSError):
    """The disk, not the server, is at fault: other servers would not help."""


class CutOffError(OSError):
    """The server stopped before the end."""


class TooSlowError(OSError):
    """At least one server was left because it was too slow: with more time it may deliver."""


@contextmanager
def one_process_at_a_time(path: Path, wait: float) -> Iterator[None]:
    """Hold the lock `path` + ".lock" during this block; another process waits for it.

    The lock's file stays where it is. Whoever removed it would let in two processes: one that has
    just locked the removed file, and one that makes a new file.

    Raises:
        OSError: another process has held the lock for `wait` seconds (infinite: wait for ever).
    """
    lock = path.with_name(path.name + ".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=wait if math.isfinite(wait) else -1):
            yield
    except Timeout:
        raise OSError(f"another process has been fetching {path.name} for {wait:.0f} s") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside `path` and rename it, so that `path` appears only whole.

    Raises:
        OSError: the disk did not take it; what was there before is untouched.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def download(
    urls: Sequence[str],
    path: str | Path,
    md5: str | None = None,
    sha256: str | None = None,
    *,
    time_limit: float = 180.0,
    timeout: float = 10.0,
    patience: float = 5.0,
) -> Path:
    """Fetch a file from the first URL that delivers the right bytes fast enough.

    `path` appears only whole and verified. Until then the bytes are in `path` + ".part", which a
    later call resumes, from any of the URLs. Other processes that want the same file wait.

    Args:
        urls: tried in order.
        path: where the file shall be. If it is there with the right hash, nothing is fetched.
        md5, sha256: its hash in hexadecimal; a prefix of the SHA-256 is enough. One is needed.
        time_limit: seconds that one server may take for the whole file.
        timeout: seconds to wait for a connection, and for each next piece.
        patience: seconds before a server that would miss `time_limit` is left for the next.

    Raises:
        ValueError: neither hash was given.
        OSError: no URL delivered, with one reason for each (a `TooSlowError` if one of them was
            too slow); or the disk did not take the file.
    """
    if not (md5 or sha256):
        raise ValueError("download: expected md5 or sha256, since unverified files are not used")
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with one_process_at_a_time(path, time_limit * len(urls)):
        if path.is_file() and has_hash(path, md5, sha256):
            return path
        reasons, too_slow = [], False
        for url in urls:
            try:
                _fetch_from(url, part, md5, sha256, time_limit, timeout, patience)
            except DiskError:
                raise
            except (OSError, http.client.HTTPException, ValueError) as error:
                too_slow |= isinstance(error, TooSlowError)
                reason = getattr(error, "reason", None) or error
                reasons.append(f"{url}: {str(reason) or type(error).__name__}")
            else:
                os.replace(part, path)
                return path
    kept = f"; what came is kept in {part}" if part.exists() else ""
    kind = TooSlowError if too_slow else OSError
    raise kind(f"could not fetch {path.name} ({'; '.join(reasons)}){kept}")


def _fetch_from(url: str, part: Path, md5: str | None, sha256: str | None,
                time_limit: float, timeout: float, patience: float) -> None:
    """Complete `part` from one server, or raise the reason why that failed."""
    deadline = time.monotonic() + time_limit
    while True:
        start = part.stat().st_size if part.exists() else 0
        try:
            resumed = _receive(url, part, start, deadline, timeout, patience)
        except CutOffError:
            if part.stat().st_size > start and time.monotonic() < deadline:
                continue  # go on where it stopped
            raise
        if has_hash(part, md5, sha256):
            return
        part.unlink()
        if not resumed:
            raise ValueError("the bytes are wrong (another hash than expected)")


def _receive(url: str, part: Path, start: int, deadline: float, timeout: float,
             patience: float) -> bool:
    """Append to `part` what the server sends from byte `start` on; return whether it resumed."""
    headers = {"User-Agent": "cnn-tutorial"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers),
                                          timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:  # nothing left to send: `part` is as long as the file
            return True
        raise ConnectionError(f"HTTP {error.code} {error.reason}") from None
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise ConnectionError("sent another range than asked for")
        have = start if resumed else 0
        total = have + int(response.headers["Content-Length"]) \
            if response.headers["Content-Length"] else None
        began, first = time.monotonic(), have
        with open(part, "ab" if resumed else "wb") as file, tqdm(
                desc=part.stem, total=total, initial=have, unit="B", unit_scale=True,
                disable=None, leave=False) as bar:
            while block := response.read1(1 << 18):
                try:
                    file.write(block)
                    file.flush()
                except OSError as error:
                    raise DiskError(f"cannot write {part}: {error.strerror}") from error
                bar.update(len(block))
                have += len(block)
                now = time.monotonic()
                rate = (have - first) / max(now - began, 1e-9)
                needed = (total - have) / rate if total else 0
                if now > deadline or (now - began > patience and now + needed > deadline):
                    raise TooSlowError(f"too slow ({rate / 1000:.0f} kB/s)")
    if total is not None and have < total:
        raise CutOffError(f"stopped after {have:,} of {total:,} bytes")
    return resumed


def has_hash(path: Path, md5: str | None, sha256: str | None) -> bool:
    """Return whether the file has this SHA-256 (or begins so), or else this MD5."""
    with open(path, "rb") as file:
        algorithm, expected = ("sha256", sha256) if sha256 else ("md5", md5)
        return hashlib.file_digest(file, algorithm).hexdigest().startswith(expected.lower())
