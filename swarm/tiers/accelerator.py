"""What a tier in an accelerator's memory needs of it: memory, copies on a stream of their own, events.

`TorchAccelerator` is the real one. Its lines are the same for a GPU and for torch's processor device, on which streams
do nothing and copies are over when they return: so everything but the hardware runs where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from moehive.protocol.errors import ConfigError


class Event(Protocol):
    """A point in the work that was enqueued on a stream."""

    def query(self) -> bool:
        """Whether all work before it is done."""

    def synchronize(self) -> None:
        """Block this thread until it is."""


class Accelerator(Protocol):
    """One device. Called from any thread; "the caller's stream" is that on which the calling thread computes."""

    @property
    def device(self) -> torch.device:
        """Where its memory is."""

    def allocate(self, nbytes: int) -> Tensor:
        """Uninitialised uint8 [nbytes] in device memory, to be written by `copy`. Raises torch.OutOfMemoryError."""

    def staging(self, nbytes: int) -> Tensor:
        """Uninitialised uint8 [nbytes] in host memory from which `copy` needs no processor."""

    def copy(self, target: Tensor, source: Tensor, after: Sequence[Event]) -> Event:
        """Begin to copy a staging tensor to device memory, once `after` has come; the event of its end.

        Copies are made one after the other, beside what is computed. `source` must not change until the event.
        """

    def record(self) -> Event:
        """The event of all that was enqueued on the caller's stream so far."""

    def wait(self, event: Event) -> None:
        """Let what the caller's stream computes from now on wait for `event`. Does not block this thread."""


class TorchAccelerator:
    """An Accelerator through torch. `device` with its index, as tensors on it say."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)  # torch.cuda, torch.cpu
        self._copies = self._module.Stream(device)

    @classmethod
    def named(cls, name: str) -> TorchAccelerator:
        """The device that torch calls so, such as "cuda" or "cuda:1". Raises ConfigError where there is no such one."""
        try:
            device = torch.empty(0, device=name).device  # with its index
        except (RuntimeError, AssertionError) as error:  # so does torch say that it has none, or not that many
            raise ConfigError(f"torch finds no device {name!r} here; `moehive doctor` shows what there is") from error
        if device.type == "meta":
            raise ConfigError("torch's device 'meta' has no memory and computes nothing; choose another")
        return cls(device)

    def allocate(self, nbytes: int) -> Tensor:
        """See Accelerator."""
        with torch.inference_mode(False):  # others write to it, who may not be in that mode
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        # The allocator may give memory that earlier work of this stream still uses.
        self.record().wait(self._copies)
        return memory

    def staging(self, nbytes: int) -> Tensor:
        """See Accelerator. Page-locked where the device has memory of its own."""
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.device.type != "cpu")

    def copy(self, target: Tensor, source: Tensor, after: Sequence[Event]) -> Any:
        """See Accelerator."""
        for event in after:
            event.wait(self._copies)  # type: ignore[attr-defined]  # one that `record` gave
        with self._module.stream(self._copies):
            target.copy_(source, non_blocking=True)
        done = self._module.Event()
        done.record(self._copies)
        return done

    def record(self) -> Any:
        """See Accelerator."""
        event = self._module.Event()
        event.record(self._module.current_stream(self.device))
        return event

    def wait(self, event: Event) -> None:
        """See Accelerator."""
        event.wait(self._module.current_stream(self.device))  # type: ignore[attr-defined]  # one that `copy` gave
