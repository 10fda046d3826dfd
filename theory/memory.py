"""Memory of a replica: weights, KV cache, the largest batch that fits, and why a model does not fit."""

from __future__ import annotations

import math
from dataclasses import replace

from .errors import InputError, require
from .specs import PRECISION_BYTES, Deployment, Precision, Transformer, check_tp
from .work import kv_bytes_per_token, layer_gemms, parameters

_DEGREES = (1, 2, 4, 8, 16)  # tensor-parallel degrees tried for an answer [GPUs]


def weights_per_gpu(model: Transformer, tp: int = 1, precision: Precision = "bf16") -> float:
    r"""Return the bytes of weights that each of ``tp`` GPUs holds [byte/GPU].

    .. math:: W_t = b \sum_{\text{layers}} n_t k + 2\,(P - \sum_{\text{layers}} n k) / t

    Matrices of the layers are split (KV heads replicated when ``tp`` exceeds their number) at :math:`b` bytes a number;
    the rest (embeddings, LM head, norms, biases) is bf16 and split by vocabulary.

    Raises
    ------
    InputError
        If ``tp`` does not split the model.

    Source
    ------
    Derivation from :func:`theory.work.layer_gemms`; vocabulary split as in vLLM's ``VocabParallelEmbedding``.

    Examples
    --------
    >>> from theory.catalog import model
    >>> round(weights_per_gpu(model("llama-2-70b"), tp=4) / 1e9, 1)
    34.5
    """
    check_tp(model, tp)
    split = sum(g.n * g.k * g.calls for g in layer_gemms(model, tp))
    whole = sum(g.n * g.k * g.calls for g in layer_gemms(model))
    return split * PRECISION_BYTES[precision] + (parameters(model) - whole) * PRECISION_BYTES["bf16"] / tp


def load_time(deployment: Deployment, bytes_per_s: float, draft: Transformer | None = None, draft_tp: int = 1) -> float:
    r"""Return the time to load the weights of a replica, :math:`(t W_t + t_d W_d) / B` [s].

    Parameters
    ----------
    deployment : Deployment
        Model, tensor-parallel degree t and precision.
    bytes_per_s : float
        B, what the replica reads from storage or network, all its GPUs together [byte/s].
    draft : Transformer, optional
        Draft model beside it, on ``draft_tp`` of the GPUs.

    Assumes
    -------
    Each GPU reads its share, replicated heads included; starting the engine takes no time of its own.

    Raises
    ------
    InputError
        If the rate is not above 0.

    Examples
    --------
    >>> from theory.catalog import accelerator, model
    >>> round(load_time(Deployment(model("llama-2-70b"), accelerator("h100-sxm"), 4), 4.2e9), 1)
    32.8
    """
    require(math.isfinite(bytes_per_s) and bytes_per_s > 0, "bytes_per_s", "must be above 0 [byte/s]", bytes_per_s)
    d = deployment
    return (
        d.tp * weights_per_gpu(d.model, d.tp, d.precision) + draft_tp * _draft_weights(d, draft, draft_tp)
    ) / bytes_per_s


def free_for_kv(deployment: Deployment, draft: Transformer | None = None, draft_tp: int = 1) -> float:
    r"""Return what is left for KV cache on the fullest GPU, below 0 if the weights do not fit [byte/GPU].

    .. math:: F = u M - R - W_t - W^{draft}_{t_d} \qquad\text{or}\qquad F = u\,(M - R - W_t - W^{draft}_{t_d})

    the second where the engine's share is one of the memory that is left free (``Rules.memory_left``; TensorRT-LLM).
    A draft on ``draft_tp`` GPUs of the group leaves the other GPUs emptier, but every GPU keeps the same number of KV
    blocks, so the one that holds a share of the draft decides. Draft weights have the precision of the target.

    Raises
    ------
    InputError
        If ``draft_tp`` does not split the draft or exceeds the degree of the target.

    Source
    ------
    vLLM: ``gpu_memory_utilization`` of the device memory, the smallest number of blocks over the workers, and
    ``draft_tensor_parallel_size``.

    Examples
    --------
    >>> from theory.catalog import accelerator, model
    >>> round(free_for_kv(Deployment(model("llama-2-13b"), accelerator("h100-sxm"))) / 1e9, 1)
    47.9
    """
    d = deployment
    share, taken = d.limits.gpu_memory_utilization, d.limits.reserve
    taken += weights_per_gpu(d.model, d.tp, d.precision) + _draft_weights(d, draft, draft_tp)
    if d.limits.rules.memory_left:
        return share * (d.accelerator.memory - taken)
    return share * d.accelerator.memory - taken


def _draft_weights(d: Deployment, draft: Transformer | None, draft_tp: int) -> float:
    require(
        isinstance(draft_tp, int) and 1 <= draft_tp <= d.tp,
        "draft_tp",
        f"must be an integer from 1 to the target's tp = {d.tp} [GPUs]",
        draft_tp,
    )
    return 0.0 if draft is None else weights_per_gpu(draft, draft_tp, d.precision)


def kv_per_gpu(deployment: Deployment, draft: Transformer | None = None, draft_tp: int = 1) -> float:
    """Return the KV bytes that one cached token takes on the fullest GPU, target and draft together [byte/token/GPU].

    Target and draft keep the same tokens (vLLM shares the block table between them).

    Examples
    --------
    >>> from theory.catalog import accelerator, model
    >>> kv_per_gpu(Deployment(model("llama-2-70b"), accelerator("h100-sxm"), tp=4))
    81920.0
    """
    d = deployment
    target = kv_bytes_per_token(d.model, d.kv_precision, d.tp) / d.tp
    return target if draft is None else target + kv_bytes_per_token(draft, d.kv_precision, draft_tp) / draft_tp


def kv_capacity_tokens(deployment: Deployment, draft: Transformer | None = None, draft_tp: int = 1) -> int:
    r"""Return the tokens whose KV a replica can hold, a whole number of blocks; 0 if the weights do not fit [tokens].

    .. math:: C = B \left\lfloor \frac{\max(F, 0)}{B\,\kappa} \right\rfloor

    with block size :math:`B`, free bytes :math:`F` of :func:`free_for_kv` and :math:`\kappa` of :func:`kv_per_gpu`.
    Look-ahead slots belong to the sequences, not to the capacity: see :func:`largest_batch`.

    Source
    ------
    Derivation; the share of memory that may be used and the blocks are vLLM's.

    Examples
    --------
    >>> from theory.catalog import accelerator, model
    >>> kv_capacity_tokens(Deployment(model("llama-2-70b"), accelerator("h100-sxm")))
    0
    """
    block = deployment.limits.block_size
    free = max(0.0, free_for_kv(deployment, draft, draft_tp))
    return block * int(free // (block * kv_per_gpu(deployment, draft, draft_tp)))


def _slots(deployment: Deployment, tokens_per_sequence: float, lookahead: int) -> int:
    """Return the KV slots of one sequence: its tokens and its look-ahead, rounded up to blocks [tokens]."""
    require(
        math.isfinite(tokens_per_sequence) and tokens_per_sequence > 0,
        "tokens_per_sequence",
        "must be finite and above 0 [tokens]",
        tokens_per_sequence,
    )
    require(lookahead >= 0, "lookahead", "must be at least 0 [tokens]", lookahead)
    block = deployment.limits.block_size
    return block * math.ceil((tokens_per_sequence + lookahead) / block)


def largest_batch(
    deployment: Deployment,
    tokens_per_sequence: float,
    draft: Transformer | None = None,
    draft_tp: int = 1,
    lookahead: int = 0,
) -> int:
    r"""Return how many sequences run at once: what the KV cache holds, at most ``max_num_seqs``; 0 if none [sequences].

    .. math:: n = \min\left(n_{max}, \left\lfloor \frac{C}{B \lceil (S + \ell) / B \rceil} \right\rfloor\right)

    with :math:`S` tokens cached for a sequence (its final length is safe, its mean length typical) and :math:`\ell`
    look-ahead slots (the draft length when there is a draft).

    Raises
    ------
    InputError
        If the tokens are not finite and positive or the look-ahead is negative.

    Source
    ------
    Derivation: whole blocks of each sequence at its longest, within :func:`kv_capacity_tokens`.

    Examples
    --------
    >>> from theory.catalog import accelerator, model
    >>> largest_batch(Deployment(model("llama-2-13b"), accelerator("h100-sxm")), tokens_per_sequence=1500)
    38
    """
    capacity = kv_capacity_tokens(deployment, draft, draft_tp)
    return min(deployment.limits.max_num_seqs, capacity // _slots(deployment, tokens_per_sequence, lookahead))


def fits(
    deployment: Deployment,
    tokens_per_sequence: float,
    draft: Transformer | None = None,
    draft_tp: int = 1,
    lookahead: int = 0,
) -> bool:
    """Return whether the weights and at least one sequence fit.

    Examples
    --------
    >>> from theory.catalog import accelerator, model
    >>> fits(Deployment(model("llama-2-70b"), accelerator("h100-sxm"), tp=2), tokens_per_sequence=4096)
    True
    """
    return largest_batch(deployment, tokens_per_sequence, draft, draft_tp, lookahead) >= 1


def why_not(
    deployment: Deployment,
    tokens_per_sequence: float,
    draft: Transformer | None = None,
    draft_tp: int = 1,
    lookahead: int = 0,
) -> str:
    """Return the sentence that says why nothing fits and which degree would; empty if the replica fits.

    Examples
    --------
    >>> from theory.catalog import accelerator, model
    >>> alone = Deployment(model("llama-2-70b"), accelerator("h100-sxm"))
    >>> print(why_not(alone, tokens_per_sequence=4096))  # doctest: +ELLIPSIS
    llama-2-70b does not fit on 1 x h100-sxm: ... 141.8 GB in all, ... 76.4 GB ...; the smallest tp that fits is 2.
    """
    if fits(deployment, tokens_per_sequence, draft, draft_tp, lookahead):
        return ""
    d = deployment
    usable = (1.0 if d.limits.rules.memory_left else d.limits.gpu_memory_utilization) * d.accelerator.memory
    weights = weights_per_gpu(d.model, d.tp, d.precision) + _draft_weights(d, draft, draft_tp)
    kv = kv_per_gpu(d, draft, draft_tp) * _slots(d, tokens_per_sequence, lookahead)
    names = d.model.name + (f" with draft {draft.name}" if draft else "")
    return (
        f"{names} does not fit on {d.tp} x {d.accelerator.name}: a GPU needs {weights / 1e9:.1f} GB for weights, "
        f"{d.limits.reserve / 1e9:.1f} GB in reserve and {kv / 1e9:.1f} GB for the KV cache of one sequence of "
        f"{tokens_per_sequence:.0f} tokens, {(weights + d.limits.reserve + kv) / 1e9:.1f} GB in all, and may use "
        f"{usable / 1e9:.1f} GB ({d.limits.gpu_memory_utilization:g} of {d.accelerator.memory / 1e9:.1f} GB); "
        f"{_way_out(d, tokens_per_sequence, draft, draft_tp, lookahead)}."
    )


def _way_out(
    d: Deployment, tokens_per_sequence: float, draft: Transformer | None, draft_tp: int, lookahead: int
) -> str:
    for tp in _DEGREES:
        if tp >= draft_tp and _splits(d.model, tp):
            wider = replace(d, tp=tp)
            if fits(wider, tokens_per_sequence, draft, draft_tp, lookahead):
                return f"the smallest tp that fits is {tp}"
    return "no tp up to 16 fits: take a smaller model, a GPU with more memory, fp8, or shorter sequences"


def _splits(model: Transformer, tp: int) -> bool:
    try:
        check_tp(model, tp)
    except InputError:
        return False
    return True
