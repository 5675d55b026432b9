"""Numbers that are read later than they are made, so that no step waits for the GPU.

A GPU works through a queue, and the CPU only fills it. Whoever asks for a number of the last step waits
until the queue is empty; then the GPU waits for the CPU. So the copy is queued too, and read when the next
step is queued.
"""
import torch


class OnTheirWay:
    """Numbers that are being copied from the device, so that nobody waits until they are asked for."""

    def __init__(self, numbers):
        self.numbers = numbers.to("cpu", non_blocking=True)
        self.arrived = None
        if numbers.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self):
        """The numbers, as a list."""
        if self.arrived:
            self.arrived.synchronize()
        return self.numbers.tolist()
