"""A vector for each image of a data set, kept by the processes together: image i by process i mod world.

Sec. 5.2's moving average needs it: 1.3 million vectors of 2048 numbers are 10 GB, which are spread over the
GPUs.
"""
import torch
import torch.distributed as dist

from .loading import to_device
from .processes import all_sum, everyones

PIECE = 2 ** 16  # vectors that are brought together at a time for a checkpoint: all may not fit one GPU


class PerImageVectors:
    """n vectors of `dim` numbers, zero at first. All processes call each method together."""

    def __init__(self, n, dim, device):
        self.n = n
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        kept_here = len(range(self.rank, n, self.world))
        self.mine = torch.zeros(kept_here, dim, device=device)

    def locate(self, index):
        """This process's indices (N,) among those of all processes, the global batch of B images.

        Returns the slice of the global batch that is this process's share, which of the B images are kept
        here (bool), and in which rows of self.mine those are.
        """
        n = len(index)
        share = slice(self.rank * n, (self.rank + 1) * n)
        index = to_device(index, self.mine.device)
        indices = everyones(index, all_sum, self.rank, self.world)    # (B,)
        here = indices % self.world == self.rank                      # (B,)
        return share, here, indices[here] // self.world

    def get(self, index):
        """The vectors of these images: (N,) -> (N, d)"""
        share, here, rows = self.locate(index)
        vectors = self.mine.new_zeros(len(here), self.mine.shape[1])
        vectors[here] = self.mine[rows]
        return all_sum(vectors)[share]

    def put(self, index, vectors):
        """Keep these vectors (N, d) for these images (N,) from now on."""
        _, here, rows = self.locate(index)
        batch = everyones(vectors.to(self.mine.dtype), all_sum, self.rank, self.world)
        self.mine[rows] = batch[here]

    def state_dict(self):
        """All vectors on process 0, which writes the checkpoint. The others must call it too, and get an
        empty dict."""
        pieces = []
        for index in torch.arange(self.n).split(PIECE):
            here = index % self.world == self.rank
            piece = self.mine.new_zeros(len(index), self.mine.shape[1])
            piece[here] = self.mine[index[here] // self.world]
            piece = all_sum(piece)
            if self.rank == 0:
                pieces.append(piece.cpu())
        return {"vectors": torch.cat(pieces)} if self.rank == 0 else {}

    def load_state_dict(self, state):
        """Take this process's vectors out of all of them."""
        self.mine.copy_(state["vectors"][self.rank::self.world])
