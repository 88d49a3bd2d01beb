"""Tables over experts that are filled batch by batch: the largest entries of each, and a sample of tokens.

A place is where a token is in the text: its row and its position in the row, in one int64.
"""

from collections.abc import Callable

import torch
from torch import Tensor

NEIGHBOURS = 5
"""Number of experts that are named as nearest to an expert."""
PSEUDO_COUNT = 10
"""Added to counts of tokens, so that experts that met a few times by chance are not the nearest."""
_CHUNK_PAIRS = 2**22


def make_places(rows: Tensor, positions: Tensor) -> Tensor:
    """Return the places of positions in rows."""
    return rows << 32 | positions


def split_places(places: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and positions, int32; both are -1 for the place -1, which is none."""
    return (places >> 32).int(), torch.where(places < 0, -1, places & 2**32 - 1).int()


def hashed(places: Tensor, seeds: Tensor | int = 0) -> Tensor:
    """Return random numbers 1 ≤ … < 2^63 that depend on a place and a seed alone, not on batches or devices."""
    numbers = places * -7046029254386353131 + torch.as_tensor(seeds) * -4417276706812531889 + 1
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):  # splitmix64
        numbers = (numbers ^ numbers >> shift) * factor
    return (numbers & 2**63 - 1).clamp_min(1)


def ranks_in_groups(groups: Tensor) -> Tensor:
    """Return 0, 1, 2 … within each run of equal values."""
    _, counts = groups.unique_consecutive(return_counts=True)
    return torch.arange(len(groups), device=groups.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)


def strongest_of_rows(expert: Tensor, value: Tensor, place: Tensor) -> Tensor:
    """Return the index of each expert's entry in a row that has the largest value, and of equal ones the first."""
    order = value.argsort(descending=True, stable=True)
    order = order[(place[order] >> 32).argsort(stable=True)]
    order = order[expert[order].argsort(stable=True)]
    row = place[order] >> 32
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = (row[1:] != row[:-1]) | (expert[order][1:] != expert[order][:-1])
    return order[first]


def count_pairs(table: Tensor, expert: Tensor, column: Tensor) -> None:
    """Add 1 to an entry of a table (N, columns) for each pair."""
    table += (expert * table.shape[1] + column).bincount(minlength=table.numel()).view(table.shape)


class LargestEntries:
    """The C entries with the largest keys of each of N experts, streamed.

    Attributes:
        keys: (N, C), the largest first; 0 where there are fewer entries.
        places: of the entries, (N, C) int64; -1 for none.
        values: coefficients of the entries, (N, C) float32; 0 for none.
        windows: what is around the entries, (N, C, W) uint8; 0 for none.
    """

    def __init__(self, experts: int, count: int, dtype: torch.dtype, device: torch.device, width: int = 0):
        self.keys = torch.zeros(experts, count, dtype=dtype, device=device)
        self.places = torch.full((experts, count), -1, dtype=torch.int64, device=device)
        self.values = torch.zeros(experts, count, device=device)
        self.windows = torch.zeros(experts, count, width, dtype=torch.uint8, device=device)

    def least(self, expert: Tensor) -> Tensor:
        """Return the keys that entries of these experts must exceed, (P)."""
        return self.keys[:, -1].contiguous()[expert]

    def update(
        self,
        expert: Tensor,
        key: Tensor,
        place: Tensor,
        value: Tensor,
        window: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Add entries, (P) each, with keys above 0; `window` returns the windows of some of them, by their indices."""
        better = (key > self.least(expert)).nonzero().squeeze(1)
        better = better[key[better].argsort(descending=True)]
        better = better[expert[better].argsort(stable=True)]
        rank = ranks_in_groups(expert[better])
        better, rank = better[rank < self.keys.shape[1]], rank[rank < self.keys.shape[1]]
        if not len(better):
            return
        changed, line = expert[better].unique_consecutive(return_inverse=True)
        shape = (len(changed), int(rank.max()) + 1)

        def merged(table: Tensor, entries: Tensor, empty: int) -> Tensor:
            new = torch.full((*shape, *table.shape[2:]), empty, dtype=table.dtype, device=table.device)
            new[line, rank] = entries
            return torch.cat([table[changed], new], 1)

        keys, kept = merged(self.keys, key[better], 0).topk(self.keys.shape[1], dim=1)
        self.places[changed] = merged(self.places, place[better], -1).gather(1, kept)
        self.values[changed] = merged(self.values, value[better], 0).gather(1, kept)
        if window is not None:
            self.windows[changed] = merged(self.windows, window(better), 0).take_along_dim(kept[..., None], 1)
        self.keys[changed] = keys


class TokenSample:
    """The experts active on each of at most `size` tokens, drawn at random from a stream.

    A token is kept if its random number is below a threshold, which falls when there are too many tokens.
    """

    def __init__(self, size: int):
        self.size, self.threshold = size, 2**63 - 1
        self.parts: list[tuple[Tensor, Tensor]] = []

    def update(self, experts: Tensor, numbers: Tensor) -> None:
        """Add tokens: their active experts, (T, K), -1 for none, and a random number each, (T)."""
        below = numbers < self.threshold
        self.parts.append((experts[below].int(), numbers[below]))
        if sum(len(numbers) for _, numbers in self.parts) > self.size:
            experts, numbers = (torch.cat(part) for part in zip(*self.parts, strict=True))
            self.threshold = int(numbers.kthvalue(len(numbers) // 2 + 1).values)
            self.parts = [(experts[numbers < self.threshold], numbers[numbers < self.threshold])]

    def co_firing(self, num_experts: int) -> tuple[Tensor, Tensor]:
        """Return the experts that are most often active together with each expert, and how often.

            s_nm = c_nm / √((c_n + λ)(c_m + λ))    with λ = PSEUDO_COUNT

        c_n is the number of the sampled tokens on which n is active, c_nm that on which both are.

        Returns:
            ids (N, 5) int32, -1 for none, and s (N, 5) float32, the largest first.
        """
        active = torch.cat([experts for experts, _ in self.parts]).cpu()  # (S, K)
        token, slot = (active >= 0).nonzero(as_tuple=True)
        expert = active[token, slot].long()
        order = expert.argsort(stable=True)
        expert, token = expert[order], token[order]
        counts = expert.bincount(minlength=num_experts)
        ends = counts.cumsum(0).tolist()
        scale = (counts + PSEUDO_COUNT).float().rsqrt()
        found = empty_neighbours(num_experts)
        size = max(1, _CHUNK_PAIRS // num_experts)
        for begin in range(0, num_experts, size):
            stop = min(begin + size, num_experts)
            together = torch.zeros((stop - begin) * (num_experts + 1), dtype=torch.int64)
            pairs = range(ends[begin] - int(counts[begin]), ends[stop - 1], max(1, _CHUNK_PAIRS // active.shape[1]))
            for first in pairs:
                part = slice(first, min(first + pairs.step, pairs.stop))
                others = active[token[part]].long() + 1  # 0 for none
                keys = (expert[part, None] - begin) * (num_experts + 1) + others
                together += keys.flatten().bincount(minlength=len(together))
            scores = together.view(stop - begin, -1)[:, 1:] * scale[begin:stop, None] * scale
            keep_nearest(found, scores, begin)
        return found


def empty_neighbours(num_experts: int) -> tuple[Tensor, Tensor]:
    """Return ids (N, 5) int32, all -1, and values (N, 5) float32, all 0."""
    return torch.full((num_experts, NEIGHBOURS), -1, dtype=torch.int32), torch.zeros(num_experts, NEIGHBOURS)


def keep_nearest(found: tuple[Tensor, Tensor], scores: Tensor, begin: int) -> None:
    """Write the largest positive scores of experts `begin` … with all, (n, N), into `found`, without themselves."""
    lines = torch.arange(len(scores), device=scores.device)
    scores[lines, begin + lines] = 0
    count = min(NEIGHBOURS, scores.shape[1])
    values, ids = scores.topk(count, dim=1)
    there = values.cpu() > 0
    found[0][begin : begin + len(scores), :count] = torch.where(there, ids.cpu(), -1).int()
    found[1][begin : begin + len(scores), :count] = torch.where(there, values.cpu(), 0)
