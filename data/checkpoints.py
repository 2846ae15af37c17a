"""Training that loses nothing: what `train_model` keeps, and how it goes on from there."""

import copy
import math
import os
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from data import ImageData


def fingerprint(model: nn.Module, data: ImageData, recipe: dict[str, Any]) -> dict[str, str]:
    """Return what a checkpoint belongs to: the model's structure, the data and the recipe."""
    def text(value: Any) -> str:
        if isinstance(value, partial):
            return f"{text(value.func)}{value.args}{value.keywords}"
        if type(value).__repr__ is object.__repr__:              # that would give an address
            return type(value).__qualname__
        return getattr(value, "__qualname__", repr(value))

    settings = {f"recipe ({name})": text(value) for name, value in recipe.items() if name not in NOT_RECIPE}
    shapes = [(name, list(value.shape)) for name, value in model.state_dict().items()]
    checksum = 0
    for tensor in (data.train_images, data.train_labels):
        checksum = zlib.crc32(tensor.cpu().contiguous().numpy(), checksum)
    return {"model": f"{type(model).__name__} ({zlib.crc32(f'{model}{shapes}'.encode()):08x})",
            "data": f"{data.name} ({checksum:08x})"} | settings


NOT_RECIPE = ("model", "data", "checkpoint", "progress")  # arguments that make no other training


class Keeper:
    """Keeps the weights that were best on validation and, if it has a path, all of a run on disk.

    Args:
        path: of the checkpoint, or None: then nothing is written. Of several processes one writes.
        model, data: what is trained, and on what.
        recipe: the arguments of `train_model`; those in `NOT_RECIPE` do not count.

    Raises:
        OSError: the path's folder does not exist, or it is a folder itself.
        ValueError: the file there is damaged, or of another model, data or recipe. It is not touched.
    """

    def __init__(self, path: str | Path | None, model: nn.Module, data: ImageData,
                 recipe: dict[str, Any]) -> None:
        self.path, self.epochs = path and Path(path), recipe["epochs"]
        self.writes = not distributed.is_initialized() or distributed.get_rank() == 0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"score": [-1.0, 0.0], "weights": {}}
        self.saved: dict[str, Any] = {}
        if self.path is not None:
            if self.path.is_dir() or not self.path.parent.is_dir():
                raise OSError(f"checkpoint: expected a file in a folder that exists, got {self.path}")
            self.belongs_to = fingerprint(model, data, recipe)
            if self.path.exists():
                self.saved = self.read()

    def read(self) -> dict[str, Any]:
        """Return what the file holds, if it is whole and belongs to this run."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                if archive.testzip() is not None:
                    raise ValueError("a checksum differs")
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            theirs = saved["belongs_to"]
        except (ValueError, KeyError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile,
                pickle.UnpicklingError) as error:
            raise ValueError(f"checkpoint: {self.path} is damaged, or is none of train_model's "
                             f"({str(error).splitlines()[0]}); give another path, or delete it to "
                             "start anew") from None
        for name, ours in self.belongs_to.items():
            if theirs.get(name) != ours:
                raise ValueError(f"checkpoint: {self.path} is of another {name}: this is {ours}, that"
                                 f" was {theirs.get(name)}; give another path, or delete it")
        return saved

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer,
                schedule: torch.optim.lr_scheduler.LRScheduler | None,
                report: bool) -> list[dict[str, float]]:
        """Put everything back as it was, if something was saved; return the history so far."""
        if self.saved:
            model.load_state_dict(self.saved["model"])
            optimizer.load_state_dict(self.saved["optimizer"])
            if schedule is not None:
                schedule.load_state_dict(self.saved["schedule"])
            self.history, self.best = self.saved["history"], self.saved["best"]
            restore_random_states(self.saved["random"])
            if report:
                done = f"{len(self.history)} of {self.epochs} epochs are done"
                left = "goes on from there" if len(self.history) < self.epochs else "nothing left to train"
                print(f"{self.path}: {done}, {left}")
        else:
            self.best["weights"] = copy.deepcopy(model.state_dict())
        return self.history

    def keep(self, model: nn.Module, optimizer: torch.optim.Optimizer,
             schedule: torch.optim.lr_scheduler.LRScheduler | None, speed: tuple[str, bool]) -> None:
        """After an epoch: keep the weights if they are the best so far; write the checkpoint."""
        score = [self.history[-1]["val_accuracy"], -self.history[-1]["val_loss"]]
        if score > self.best["score"]:
            self.best = {"score": score, "weights": copy.deepcopy(model.state_dict())}
        if self.path is None or not self.writes:
            return
        write_whole(self.path, {
            "belongs_to": self.belongs_to, "speed": list(speed), "best": self.best,
            "history": self.history, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "schedule": schedule and schedule.state_dict(), "random": random_states()})

    @contextmanager
    def watching(self, model: nn.Module, epochs: int, keep_best: bool) -> Iterator[None]:
        """Put the best weights back at the end if `keep_best`, and after a loss that is not finite; after
        Ctrl-C say what is kept."""
        try:
            yield
            if keep_best:
                model.load_state_dict(self.best["weights"])
        except FloatingPointError:
            model.load_state_dict(self.best["weights"])
            raise
        except KeyboardInterrupt:
            done = f"stopped after {len(self.history)} of {epochs} epochs"
            if self.path is None:
                kept = "with checkpoint=PATH a later call could go on from there"
            elif not self.history:
                kept = "nothing is kept yet"
            else:
                kept = f"{self.path} keeps them, and the same call again goes on from there"
            raise KeyboardInterrupt(f"{done}; {kept}") from None


def write_whole(path: Path, contents: dict[str, Any]) -> None:
    """Write beside `path` with `torch.save`, then rename: the file appears only whole.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except RuntimeError as error:  # torch's own, when the disk is full
        raise OSError(f"{path} cannot be written; is the disk full? ({error})") from None
    finally:
        beside.unlink(missing_ok=True)


def print_epoch(history: list[dict[str, float]], epochs: int, report: bool = True) -> None:
    """Print the last row of the history, if `report`: of at most about five epochs of a run."""
    if report and (len(history) == epochs or len(history) % math.ceil(epochs / 5) == 0):
        print("epoch {epoch:2}: training loss {train_loss:.3f}, validation loss {val_loss:.3f}, "
              "accuracy {val_accuracy:.2%}, {seconds:.1f} s".format(**history[-1]))


def random_states() -> dict[str, Tensor]:
    """Return the state of torch's random generators, on the processor and on the accelerator."""
    states = {"cpu": torch.get_rng_state()}
    if (device := torch.accelerator.current_accelerator(check_available=True)) is not None:
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def restore_random_states(states: dict[str, Tensor]) -> None:
    """Set torch's random generators to what `random_states` returned."""
    for device, state in states.items():
        (torch if device == "cpu" else torch.get_device_module(device)).set_rng_state(state)
