"""A vector for each image of a data set, kept by the processes together: image i by process i mod world.

Sec. 5.2's moving average needs it: 1.3 million vectors of 2048 numbers are 10 GB, spread over the GPUs.
"""
import torch
import torch.distributed as dist

from ..common.machine import to_device
from .processes import all_sum, everyones

PIECE = 2 ** 16  # vectors that are gathered at a time for a checkpoint: one GPU may not hold them all


class PerImageVectors:
    """n vectors of `dim` numbers, zero at first. All processes call each method together.

    The last row is zeros and stands for all vectors that are kept elsewhere. Picking out our own instead
    would make the CPU wait until the GPU says how many they are.
    """

    def __init__(self, n, dim, device):
        self.n = n
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        kept_here = len(range(self.rank, n, self.world))
        self.mine = torch.zeros(kept_here + 1, dim, device=device)

    def rows_of(self, index):
        """The row of each of these images (B,), a tensor: the last row if it is kept elsewhere."""
        here = index % self.world == self.rank                        # (B,)
        return torch.where(here, index // self.world, len(self.mine) - 1)

    def rows_of_everyones(self, index):
        """The same for the global batch of B images, of which this process has `index` (N,)."""
        index = to_device(index, self.mine.device)
        return self.rows_of(everyones(index, all_sum, self.rank, self.world))

    def get(self, index):
        """The vectors of these images: (N,) -> (N, d)"""
        n = len(index)
        vectors = all_sum(self.mine[self.rows_of_everyones(index)])   # (B, d)
        return vectors[self.rank * n:(self.rank + 1) * n]

    def put(self, index, vectors):
        """Keep these vectors (N, d) for these images (N,) from now on."""
        batch = everyones(vectors.to(self.mine.dtype), all_sum, self.rank, self.world)
        self.mine[self.rows_of_everyones(index)] = batch
        self.mine[-1].zero_()

    def state_dict(self):
        """All vectors on process 0, which writes the checkpoint. The others must call it too, and get an
        empty dict."""
        pieces = []
        for index in torch.arange(self.n, device=self.mine.device).split(PIECE):
            piece = all_sum(self.mine[self.rows_of(index)])
            if self.rank == 0:
                pieces.append(piece.cpu())
        return {"vectors": torch.cat(pieces)} if self.rank == 0 else {}

    def load_state_dict(self, state):
        """Take this process's vectors from all of them."""
        self.mine[:-1].copy_(state["vectors"][self.rank::self.world])
