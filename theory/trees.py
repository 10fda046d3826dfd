"""Tree drafts: the best tree of a given size and depth for a positional acceptance vector, and the size that pays.

A tree is a tuple of parents: node 0 is the root (the last token already known, whose verification yields the bonus
token), ``parents[0]`` is -1, and a node comes after its parent. The children of a node are ranked in their order: the
k-th child is accepted with probability p_k, given that its parent was and that the children before it were not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import refuse, require

Array = NDArray[np.float64]
Parents = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tree:
    """A draft tree and what it yields."""

    parents: Parents  # parent of each node, -1 for the root
    tokens: float  # F(T), mean tokens a round emits, the bonus token included [tokens/round]

    @property
    def nodes(self) -> int:
        """Tokens of one sequence in the verify pass, root included [tokens]."""
        return len(self.parents)

    @property
    def depth(self) -> int:
        """Draft steps a round takes [-]."""
        return max(node_depths(self.parents))


@dataclass(frozen=True, slots=True)
class TreeChoice:
    """The tree that pays most on given step times."""

    tree: Tree
    speedup: float  # against plain decoding [-]


def node_depths(parents: Sequence[int]) -> tuple[int, ...]:
    """Return the depth of each node, 0 for the root.

    Raises
    ------
    InputError
        If the first node is not the root or a node does not come after its parent.

    Examples
    --------
    >>> node_depths((-1, 0, 0, 1))
    (0, 1, 1, 2)
    """
    depths: list[int] = []
    for node, parent in enumerate(parents):
        ok = parent == -1 if node == 0 else 0 <= parent < node
        require(ok, "parents", "must start with -1 and name an earlier node each", tuple(parents))
        depths.append(0 if node == 0 else depths[parent] + 1)
    require(bool(depths), "parents", "must hold at least the root", tuple(parents))
    return tuple(depths)


def node_probabilities(parents: Sequence[int], acceptance: ArrayLike) -> Array:
    r"""Return the probability that each node is emitted, the product of p along its path, shape (nodes,) [-].

    .. math:: f(v) = \prod_{u \in \text{path}(v)} p_{\text{rank}(u)}

    Raises
    ------
    InputError
        If a node has more children than the vector has entries, or see :func:`node_depths`, :func:`best_tree`.

    Source
    ------
    Chen et al. (2024), Sequoia, arXiv:2402.12374 (positional acceptance).
    """
    p = _checked_vector(acceptance)
    node_depths(parents)
    children = np.zeros(len(parents), dtype=int)
    f = np.ones(len(parents))
    for node, parent in enumerate(parents[1:], start=1):
        rank = children[parent]
        require(rank < p.size, "acceptance", f"must have an entry for child {rank + 1} of a node [-]", p.tolist())
        f[node] = f[parent] * p[rank]
        children[parent] += 1
    return f


def tree_tokens(parents: Sequence[int], acceptance: ArrayLike) -> float:
    r"""Return the mean tokens a round with this tree emits, the bonus token included [tokens/round].

    .. math:: F(T) = \sum_{v \in T} f(v)

    Source
    ------
    Sequoia, arXiv:2402.12374; also a derivation: the sum over nodes of the probability to reach them is the mean
    number of nodes on the accepted path.

    Examples
    --------
    >>> round(tree_tokens((-1, 0, 0, 1), [0.6, 0.2]), 4)
    2.16
    """
    return float(node_probabilities(parents, acceptance).sum())


def tree_values(acceptance: ArrayLike, nodes: int, depth: int) -> Array:
    r"""Return the most tokens a round can emit for each depth and size, shape (depth + 1, nodes + 1) [tokens/round].

    .. math:: V_d(m) = 1 + W_d^1(m - 1), \qquad
              W_d^k(m) = \max_{1 \le y \le m} \left[p_k V_{d-1}(y) + W_d^{k+1}(m - y)\right],
              \qquad W_d^k(0) = 0

    with V of a tree of m nodes no deeper than d, and W^k of what the children from the k-th on add with m nodes among
    them. Entries no tree has (size 0; more nodes than the depth and the vector allow) are -inf.

    Source
    ------
    Derivation, equivalent to the programme of Sequoia's code (arXiv:2402.12374): there over the number of children,
    here over those still to come, which keeps to the rule that the k-th child needs the ones before it.

    Examples
    --------
    >>> tree_values([0.5, 0.25], nodes=3, depth=2)[2].tolist()
    [-inf, 1.0, 1.5, 1.75]
    """
    return _programme(_checked_vector(acceptance), *_checked_size(nodes, depth))[0]


def best_tree(acceptance: ArrayLike, nodes: int, depth: int) -> Tree:
    r"""Return a tree of ``nodes`` nodes, no deeper than ``depth``, that emits most tokens a round.

    Parameters
    ----------
    acceptance : array_like, shape (widest,)
        p_k of the first, second, ... child of a node [-]; they exclude each other, so their sum is at most 1.
    nodes : int
        Tokens in the verify pass, root included [tokens].
    depth : int
        Draft steps at most [-].

    Raises
    ------
    InputError
        If the vector is empty, not in [0, 1] or sums to more than 1, or no tree has that many nodes at that depth.

    Notes
    -----
    Where p falls from child to child, the best tree is simply the ``nodes`` most probable nodes no deeper than
    ``depth``: that set is closed under parent and elder sibling. The programme needs no such order.

    Source
    ------
    :func:`tree_values`.

    Examples
    --------
    >>> best_tree([0.6, 0.3], nodes=4, depth=3).parents
    (-1, 0, 1, 0)
    """
    p = _checked_vector(acceptance)
    nodes, depth = _checked_size(nodes, depth)
    values, splits = _programme(p, nodes, depth)
    if not np.isfinite(values[depth, nodes]):
        most = int(np.flatnonzero(np.isfinite(values[depth]))[-1])
        refuse("nodes", f"must be at most {most} at depth {depth} with {p.size} children a node [tokens]", nodes)
    return Tree(_trace(splits, nodes, depth), float(values[depth, nodes]))


def best_tree_for(
    acceptance: ArrayLike, verify: ArrayLike, draft: float, target: float, depth: int, overhead: float = 0.0
) -> TreeChoice:
    r"""Return the tree size and depth, and the tree itself, that speed decoding up most on given step times.

    .. math:: S(n, d) = \frac{F(n, d)\; T_T}{T_V(n) + d\, T_D + T_o}

    Parameters
    ----------
    acceptance : array_like, shape (widest,)
        p_k [-].
    verify : array_like, shape (largest,)
        T_V of 1, 2, ... tokens of one sequence [s].
    draft : float
        T_D, one draft step; it extends all nodes of a level at once [s].
    target : float
        T_T, one plain decode step [s].
    depth : int
        Deepest tree to consider [-]; a tree of the root alone, plain decoding, is considered too.
    overhead : float
        T_o, what a round with a draft takes besides [s].

    Raises
    ------
    InputError
        If a time is not finite and above 0 (draft, overhead: below 0), or see :func:`best_tree`.

    Assumes
    -------
    A draft step takes the same time however wide the level: true while it is bound by reading weights.

    Source
    ------
    Sequoia, arXiv:2402.12374, the hardware-aware choice as its code has it; T_o added.

    Examples
    --------
    >>> choice = best_tree_for([0.7, 0.1], verify=[1.0, 1.0, 1.0, 1.0, 1.5], draft=0.05, target=1.0, depth=4)
    >>> choice.tree.nodes, choice.tree.depth
    (4, 3)
    """
    times = np.atleast_1d(np.asarray(verify, dtype=float))
    require(times.ndim == 1 and _positive(times), "verify", "must be a list of finite times above 0 [s]", verify)
    require(_positive(np.asarray(target)), "target", "must be finite and above 0 [s]", target)
    for name, value in (("draft", draft), ("overhead", overhead)):
        require(np.isfinite(value) and value >= 0, name, "must be finite and at least 0 [s]", value)
    p = _checked_vector(acceptance)
    values, splits = _programme(p, *_checked_size(times.size, depth))
    d = np.arange(values.shape[0])[:, None]
    rate = values[:, 1:] * target / (times + d * draft + overhead * (d > 0))
    deep, index = np.unravel_index(int(np.argmax(rate)), rate.shape)
    tree = Tree(_trace(splits, int(index) + 1, int(deep)), float(values[deep, index + 1]))
    return TreeChoice(tree, float(rate[deep, index]))


def geometric_vector(acceptance: float, width: int) -> Array:
    r"""Return :math:`p_k = \alpha (1 - \alpha)^{k-1}`, shape (width,) [-].

    Raises
    ------
    InputError
        If the acceptance is outside [0, 1] or the width below 1.

    Assumes
    -------
    Every further candidate is as good as the first: optimistic, measured vectors fall faster (Sequoia's code ships
    .634, .108, .057, ... where this gives .634, .232, .085).

    Examples
    --------
    >>> geometric_vector(0.5, 3).tolist()
    [0.5, 0.25, 0.125]
    """
    require(
        0 <= acceptance <= 1,
        "acceptance",
        "must lie in [0, 1] [-]",
        acceptance,
        "It is a probability per drafted token: pass 0.8, not 80.",
    )
    require(isinstance(width, int) and width >= 1, "width", "must be an integer of at least 1 [-]", width)
    return np.asarray(acceptance * (1 - acceptance) ** np.arange(width))


# --- the dynamic programme -------------------------------------------------------------------------------------------


def _programme(p: Array, nodes: int, depth: int) -> tuple[Array, NDArray[np.int64]]:
    """Return V of :func:`tree_values` and the size of child k that attains W, shape (depth + 1, width, nodes)."""
    values = np.full((depth + 1, nodes + 1), -np.inf)
    values[:, 1] = 1.0
    splits = np.zeros((depth + 1, p.size, nodes), dtype=np.int64)
    for d in range(1, depth + 1):
        rest = np.full(nodes, -np.inf)  # W of the children after the last: only no node at all
        rest[0] = 0.0
        for k in range(p.size - 1, -1, -1):
            rest, splits[d, k] = _place_child(_times(p[k], values[d - 1, 1:nodes]), rest)
        values[d, 1:] = 1.0 + rest
    return values, splits


def _times(p: float, values: Array) -> Array:
    # 0 * -inf is no number; an impossible subtree stays impossible
    return np.where(np.isfinite(values), p * np.where(np.isfinite(values), values, 0.0), -np.inf)


def _place_child(child: Array, rest: Array) -> tuple[Array, NDArray[np.int64]]:
    """Return the best value of m nodes shared by one child (1..m nodes, ``child``) and those after it, and its size."""
    if rest.size == 1:
        return rest, np.zeros(1, dtype=np.int64)
    m = np.arange(rest.size)
    after = m[:, None] - np.arange(1, rest.size)[None, :]  # nodes left for later children, shape (m, y)
    total = np.where(after >= 0, child[None, :] + rest[np.maximum(after, 0)], -np.inf)
    size = np.argmax(total, axis=1) + 1
    best = total[m, size - 1]
    best[0] = 0.0
    return best, size


def _trace(splits: NDArray[np.int64], nodes: int, depth: int) -> Parents:
    """Return the parents of the tree that the programme found, node by node with its subtree after it."""
    parents = [-1]

    def grow(parent: int, left: int, d: int) -> None:
        rank = 0
        while left > 0:
            size = int(splits[d, rank, left])
            parents.append(parent)
            grow(len(parents) - 1, size - 1, d - 1)
            left, rank = left - size, rank + 1

    grow(0, nodes - 1, depth)
    return tuple(parents)


def _checked_vector(acceptance: ArrayLike) -> Array:
    p = np.atleast_1d(np.asarray(acceptance, dtype=float))
    way_out = "Entry k is the probability that the k-th child is accepted and none before it: pass 0.6, not 60."
    ok = p.ndim == 1 and p.size > 0 and bool(np.all((p >= 0) & (p <= 1)))
    require(ok, "acceptance", "must be a list of probabilities, one per child [-]", acceptance, way_out)
    require(bool(p.sum() <= 1 + 1e-9), "acceptance", "must sum to at most 1 over the children [-]", acceptance, way_out)
    return p


def _checked_size(nodes: int, depth: int) -> tuple[int, int]:
    for name, value, least in (("nodes", nodes, 1), ("depth", depth, 0)):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        require(whole and value >= least, name, f"must be an integer of at least {least}", value)
    return int(nodes), min(int(depth), int(nodes) - 1)


def _positive(times: Array) -> bool:
    return bool(np.all(np.isfinite(times) & (times > 0)))
