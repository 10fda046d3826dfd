"""Trees: exhaustive search over all trees, walks of the tree, limits, and the refusals."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory.errors import InputError
from theory.speculation import tokens_per_round
from theory.trees import best_tree, best_tree_for, geometric_vector, node_depths, tree_tokens, tree_values

SEQUOIA = [0.634, 0.108, 0.057, 0.0225, 0.0195, 0.015]  # the vector shipped with Sequoia's code, first six
VECTORS = {
    "sequoia": SEQUOIA,
    "flat": [0.2, 0.2, 0.2, 0.2],
    "second child better": [0.1, 0.6, 0.2],
    "first child impossible": [0.0, 0.9],
    "certain": [1.0],
    "never": [0.0, 0.0],
}
CATALAN = (1, 1, 2, 5, 14, 42, 132, 429)  # ordered trees of 1..8 nodes


@cache
def all_trees(nodes: int) -> tuple[tuple[int, ...], ...]:
    """Return every ordered tree as parents in depth-first order: the next node hangs on the path to the last one."""
    trees: list[tuple[int, ...]] = [(-1,)]
    for node in range(1, nodes):
        trees = [(*t, p) for t in trees for p in path(t, node - 1)]
    return tuple(trees)


def path(parents: tuple[int, ...], node: int) -> list[int]:
    nodes = []
    while node != -1:
        nodes.append(node)
        node = parents[node]
    return nodes


def width(parents: tuple[int, ...]) -> int:
    return max(Counter(parents[1:]).values(), default=0)


def most_tokens(p: list[float], nodes: int, depth: int) -> float:
    """Return the most tokens of all trees of that size and depth, each scored by itself."""
    fitting = [t for t in all_trees(nodes) if max(node_depths(t)) <= depth and width(t) <= len(p)]
    return max((tree_tokens(t, p) for t in fitting), default=-np.inf)


def greedy_tokens(p: list[float], nodes: int, depth: int) -> float:
    """Return the sum of the most probable nodes, grown one by one (right where p falls from child to child)."""
    tokens, frontier = 1.0, [(p[0], 1, 0, 1.0)] if depth else []  # probability, depth, rank, of the parent
    for _ in range(nodes - 1):
        f, d, rank, above = max(frontier)
        frontier.remove((f, d, rank, above))
        tokens += f
        if d < depth:
            frontier.append((f * p[0], d + 1, 0, f))
        if rank + 1 < len(p):
            frontier.append((above * p[rank + 1], d, rank + 1, above))
    return tokens


def walk(parents: tuple[int, ...], p: list[float], rounds: int, rng: np.random.Generator) -> np.ndarray:
    """Return the tokens of ``rounds`` rounds: from the root, draw which child is accepted, or none, until none is."""
    children: dict[int, list[int]] = {v: [] for v in range(len(parents))}
    for node, parent in enumerate(parents[1:], start=1):
        children[parent].append(node)
    edges = np.cumsum(p)
    tokens = np.zeros(rounds)
    for i in range(rounds):
        node, on = 0, True
        while on:
            tokens[i] += 1
            rank = int(np.searchsorted(edges, rng.random(), side="right"))
            on = rank < len(children[node])
            node = children[node][rank] if on else node
    return tokens


def interval(samples: np.ndarray) -> tuple[float, float]:
    half = 2.576 * samples.std(ddof=1) / np.sqrt(samples.size)
    return samples.mean() - half, samples.mean() + half


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("length", [0, 1, 4, 9])
def test_one_child_is_a_chain(alpha: float, length: int) -> None:
    tree = best_tree([alpha], length + 1, length)
    assert tree.parents == tuple(range(-1, length))
    assert tree.tokens == pytest.approx(float(tokens_per_round(alpha, length)), rel=1e-12)


def test_a_root_alone_is_plain_decoding() -> None:
    assert best_tree(SEQUOIA, 1, 5).parents == (-1,)
    assert best_tree(SEQUOIA, 1, 0).tokens == 1.0


def test_depth_one_is_a_fan() -> None:
    tree = best_tree(SEQUOIA, 4, 1)
    assert tree.parents == (-1, 0, 0, 0)
    assert tree.tokens == pytest.approx(1 + sum(SEQUOIA[:3]))


def test_a_useless_draft_adds_nothing() -> None:
    assert best_tree([0.0, 0.0], 7, 3).tokens == 1.0


def test_a_vector_that_sums_to_one_and_a_full_tree_give_depth_plus_one_tokens() -> None:
    assert best_tree([0.5, 0.5], 2**4 - 1, 3).tokens == pytest.approx(4.0)


# --- against every tree there is -------------------------------------------------------------------------------------


def test_the_enumeration_is_complete() -> None:
    assert tuple(len(set(all_trees(n))) for n in range(1, 9)) == CATALAN


@pytest.mark.parametrize("name", VECTORS)
def test_programme_equals_exhaustive_search_up_to_eight_nodes(name: str) -> None:
    p = VECTORS[name]
    values = tree_values(p, 8, 7)
    for nodes in range(1, 9):
        for depth in range(8):
            expected = most_tokens(p, nodes, depth)
            assert values[depth, nodes] == pytest.approx(expected, rel=1e-12) or values[depth, nodes] == expected


@pytest.mark.parametrize("name", VECTORS)
def test_the_tree_returned_is_worth_what_it_says(name: str) -> None:
    p = VECTORS[name]
    for nodes in range(1, 9):
        for depth in range(1, 8):
            if np.isfinite(tree_values(p, nodes, depth)[-1, nodes]):
                tree = best_tree(p, nodes, depth)
                assert tree.nodes == nodes
                assert tree.depth <= depth
                assert tree_tokens(tree.parents, p) == pytest.approx(tree.tokens, rel=1e-12)


def test_a_slightly_worse_tree_would_be_noticed() -> None:
    """Negative control: a chain and a fan of eight nodes are worse than the best tree by more than rounding."""
    best = best_tree(SEQUOIA, 7, 6).tokens
    assert best > tree_tokens(range(-1, 6), SEQUOIA) + 1e-3
    assert best > tree_tokens((-1, 0, 0, 0, 0, 0, 0), SEQUOIA) + 1e-3


@settings(max_examples=40, deadline=None)
@given(
    p=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4).map(lambda v: sorted((np.array(v) / 4).tolist())[::-1]),
    nodes=st.integers(1, 24),
    depth=st.integers(5, 8),
)
def test_where_p_falls_the_most_probable_nodes_are_the_best_tree(p: list[float], nodes: int, depth: int) -> None:
    if nodes <= depth + 1 or len(p) > 1:
        assert best_tree(p, nodes, depth).tokens == pytest.approx(greedy_tokens(p, nodes, depth), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(p=st.lists(st.floats(0.0, 0.24), min_size=2, max_size=4))
def test_more_nodes_and_more_depth_never_hurt(p: list[float]) -> None:
    values = tree_values(p, 12, 6)[3:, 1:]
    assert bool(np.all(np.diff(values, axis=0) >= -1e-12))
    assert bool(np.all(np.diff(values, axis=1) >= -1e-12))


# --- against walks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "depth"), [(4, 2), (16, 5), (64, 8)])
def test_walks_of_the_tree_agree(nodes: int, depth: int) -> None:
    tree = best_tree(SEQUOIA, nodes, depth)
    low, high = interval(walk(tree.parents, SEQUOIA, 30_000, np.random.default_rng(nodes)))
    assert low <= tree.tokens <= high
    assert not low <= tree_tokens(tree.parents, [0.9 * x for x in SEQUOIA]) <= high  # the test can fail


# --- the tree that pays ----------------------------------------------------------------------------------------------


def test_free_verification_and_drafting_take_the_largest_tree() -> None:
    choice = best_tree_for(SEQUOIA, np.ones(32), draft=0.0, target=1.0, depth=31)
    assert choice.tree.nodes == 32
    assert choice.speedup == pytest.approx(best_tree(SEQUOIA, 32, 31).tokens)


def test_dear_drafting_decodes_plainly() -> None:
    choice = best_tree_for(SEQUOIA, np.ones(16), draft=1.0, target=1.0, depth=8)
    assert choice.tree.parents == (-1,)
    assert choice.speedup == 1.0


def test_the_choice_beats_every_size_and_depth() -> None:
    times = 1.0 + 0.02 * np.arange(24)
    choice = best_tree_for(SEQUOIA, times, draft=0.05, target=1.0, depth=10, overhead=0.01)
    for nodes in range(2, 25):
        for depth in range(1, 11):
            if np.isfinite(tree_values(SEQUOIA, nodes, depth)[-1, nodes]):
                tree = best_tree(SEQUOIA, nodes, depth)
                assert choice.speedup >= tree.tokens / (times[nodes - 1] + 0.05 * tree.depth + 0.01) - 1e-12
    tree = choice.tree
    assert choice.speedup == pytest.approx(tree.tokens / (times[tree.nodes - 1] + 0.05 * tree.depth + 0.01))


def test_dearer_verification_means_smaller_trees() -> None:
    sizes = [
        best_tree_for(SEQUOIA, 1 + slope * np.arange(64), 0.02, 1.0, depth=12).tree.nodes
        for slope in (0.0, 0.001, 0.01, 0.1, 1.0)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 64
    assert sizes[-1] == 1


def test_with_one_candidate_the_best_tree_is_the_best_chain() -> None:
    """The best length of a chain is 8 at alpha 0.8 and c 0.05 (speed-up 3.09), worked by hand in the literature."""
    choice = best_tree_for([0.8], np.ones(32), draft=0.05, target=1.0, depth=31)
    assert choice.tree.depth == 8
    assert round(choice.speedup, 2) == 3.09


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", [[], [60, 20], [-0.1], [float("nan")], [[0.5], [0.2]]])
def test_what_is_no_probability_is_refused(vector: list[float]) -> None:
    with pytest.raises(InputError, match=r"`acceptance` must be a list of probabilities.*pass 0.6, not 60"):
        best_tree(vector, 3, 2)


def test_children_that_exclude_each_other_sum_to_one_at_most() -> None:
    with pytest.raises(InputError, match=r"`acceptance` must sum to at most 1"):
        best_tree([0.7, 0.4], 3, 2)


def test_a_tree_too_large_for_its_depth_is_refused_with_the_largest() -> None:
    with pytest.raises(InputError, match=r"`nodes` must be at most 7 at depth 2 with 2 children a node.*got 8"):
        best_tree([0.5, 0.5], 8, 2)


@pytest.mark.parametrize(("name", "nodes", "depth"), [("nodes", 0, 2), ("nodes", 2.5, 2), ("depth", 3, -1)])
def test_sizes_are_whole_numbers(name: str, nodes: int, depth: int) -> None:
    with pytest.raises(InputError, match=f"`{name}` must be an integer of at least"):
        best_tree([0.5], nodes, depth)


@pytest.mark.parametrize("parents", [(), (0,), (-1, 1), (-1, -1), (-1, 2, 0)])
def test_what_is_no_tree_is_refused(parents: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"`parents` must"):
        node_depths(parents)


def test_times_are_checked() -> None:
    with pytest.raises(InputError, match=r"`verify` must be a list of finite times above 0 \[s\]"):
        best_tree_for([0.5], [1.0, 0.0], 0.1, 1.0, 1)
    with pytest.raises(InputError, match=r"`draft` must be finite and at least 0 \[s\]"):
        best_tree_for([0.5], [1.0, 1.0], -0.1, 1.0, 1)
    with pytest.raises(InputError, match=r"`target` must be finite and above 0"):
        best_tree_for([0.5], [1.0, 1.0], 0.1, 0.0, 1)


def test_percent_is_refused() -> None:
    with pytest.raises(InputError, match=r"`acceptance` must lie in \[0, 1\].*got 80.*pass 0.8"):
        geometric_vector(80, 3)
