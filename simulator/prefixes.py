"""Prompts that begin alike: the blocks they begin with, named so that equal names are equal beginnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from theory.errors import refuse, require

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class PromptBlocks:
    """Names of the blocks of each prompt, from its first token on; the arrays are copied and made read-only.

    A name stands for the tokens of its block and for all before them, as hashes chained over a prompt do (vLLM's block
    hashes, ``hash_ids`` of Mooncake's traces). The last block of a prompt may be cut short.

    Raises
    ------
    InputError
        If a block has no token, a count is negative, or there are not as many names as the counts add up to.

    Examples
    --------
    >>> blocks = PromptBlocks(512, [2, 3], [7, 8, 7, 8, 9])
    >>> blocks.seen_before(np.array([1000, 1400])).tolist()
    [0, 1024]
    """

    tokens: int  # of a block [tokens]
    counts: Ints  # blocks of each request, (n,) [-]
    names: Ints  # of the blocks of all requests, one request after the other, (counts.sum(),) [-]

    def __init__(self, tokens: int, counts: ArrayLike, names: ArrayLike) -> None:
        whole = isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 1
        require(whole, "tokens", "must be a whole number of at least 1 [tokens]", tokens)
        object.__setattr__(self, "tokens", tokens)
        for field, values in (("counts", counts), ("names", names)):
            array = np.array(values, dtype=np.int64, ndmin=1)
            array.flags.writeable = False
            object.__setattr__(self, field, array)
        require(bool(np.all(self.counts >= 0)), "counts", "must be at least 0 [-]", self.counts)
        total = int(self.counts.sum())
        require(self.names.size == total, "names", f"must be as many as the blocks, {total} [-]", self.names.size)

    @classmethod
    def of(cls, tokens: int, names: Sequence[Sequence[int]]) -> PromptBlocks:
        """Return the blocks of prompts given one list of names each."""
        return cls(tokens, [len(n) for n in names], [name for each in names for name in each])

    @property
    def starts(self) -> Ints:
        """Place of the first block of each request among all names, (n,) [-]."""
        return np.cumsum(self.counts) - self.counts

    def take(self, who: NDArray[np.intp]) -> PromptBlocks:
        """Return the blocks of some of the requests, in that order."""
        counts = self.counts[who]
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        return PromptBlocks(self.tokens, counts, self.names[np.repeat(self.starts[who], counts) + within])

    def reusable(self, prompt: Ints) -> Ints:
        """Return how many blocks of each prompt can be found in a cache: whole ones, its last token not in them [-]."""
        return np.minimum(self.counts, (prompt - 1) // self.tokens)

    def seen_before(self, prompt: Ints) -> Ints:
        """Return the tokens that each prompt shares with one before it, (n,): what a cache without end finds."""
        _, first, same = np.unique(self.names, return_index=True, return_inverse=True)
        fresh = np.flatnonzero(first[same] == np.arange(self.names.size))  # where a name stands for the first time
        nearest = np.append(fresh, self.names.size)[np.searchsorted(fresh, self.starts)]
        leading = np.minimum(nearest - self.starts, self.counts)
        return np.asarray(np.minimum(leading, self.reusable(prompt)) * self.tokens)

    def check(self, prompt: Ints) -> None:
        """Refuse by row blocks that are not one for each request, or more than its prompt has.

        Raises
        ------
        InputError
            If a request has none or too many.
        """
        require(self.counts.shape == prompt.shape, "blocks", "must be those of each request", self.counts.size)
        most = -(-prompt // self.tokens)
        bad = self.counts > most
        if bad.any():
            row = int(np.argmax(bad))
            rule = f"must be at most {most[row]}, {self.tokens} tokens each, for a prompt of {prompt[row]} [-]"
            refuse(f"blocks[{row}]", rule, int(self.counts[row]), "Name the length of a block as the trace has it.")
