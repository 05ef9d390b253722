"""Step inputs on their way to the device: pinned memory, and copies beside the step that computes."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from elmo_ray.training.step_input import StepInput

device_quiet = threading.Lock()
"""Held by who must be alone with the GPU for a moment: a graph that is captured bears no other thread's memory."""


@dataclass
class Sent:
    """A step's input on its way; arrived: what the stream that uses it must wait for."""

    batch: StepInput
    arrived: torch.cuda.Event | None = None

    def received(self) -> StepInput:
        """The input, for operations that are asked for from here on; waits on the device and not here."""
        if self.arrived is not None:
            stream = torch.cuda.current_stream(self.batch.inputs.device)
            stream.wait_event(self.arrived)
            for batch in (self.batch, *(part for _, part in self.batch.parts)):
                for tensor in batch.tensors().values():
                    # its memory belongs to the stream of copies, and is not to be used again before this one is done
                    tensor.record_stream(stream)
        return self.batch


class Transfer:
    """Sends step inputs to a device, from the thread that made them."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, batch: StepInput) -> Sent:
        if self.device.type != "cuda":
            return Sent(batch)
        with device_quiet, torch.cuda.device(self.device):  # a new thread begins with device 0
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            with torch.cuda.stream(self._stream):
                # torch keeps pinned memory until the copies out of it are done
                sent = Sent(batch.pinned().to(self.device), torch.cuda.Event())
            assert sent.arrived is not None
            sent.arrived.record(self._stream)
        return sent
