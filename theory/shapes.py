"""A Llama-style shape from a parameter count, for models that do not exist yet."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from .errors import require
from .specs import Transformer
from .work import layer_gemms, parameters

VOCAB = 128256  # rows of the embedding table, as in Llama 3 [-]; assumed: a draft needs its target's vocabulary
CONTEXT = 131072  # longest sequence of a model that does not exist yet [tokens]; assumed
DEPTH_SCALE = 0.108  # layers of a model of one parameter [-]; Theil-Sen line over the catalog, see the tests
DEPTH_EXPONENT = 0.252  # how layers grow with parameters of the layers [-]; the same line
FFN_RATIO = 3.5  # inner width over width, Llama 3.1 [-]; published
TIED_BELOW = 4e9  # smaller models share embedding and LM head [parameters]; Llama 3.2 and Qwen2.5 do up to 3 B
KV_HEADS = 8  # Llama 3 at every size [-]; published. Half the heads where there are only 8

# heads are multiples of 8, so that every width runs on 1, 2, 4 or 8 GPUs; head sizes are what attention kernels take
HEADS = (  # (query heads, head size) of the widths tried [-]
    *((8, size) for size in range(32, 129, 8)),
    *((heads, size) for heads in (16, 24) for size in range(72, 129, 8) if heads * size > 16 * 128 or heads == 16),
    *((heads, size) for heads in (32, 40, 48) for size in (112, 120, 128) if heads * size > (heads - 8) * 128),
    *((heads, 128) for heads in range(56, 145, 8)),
)
WIDTHS = tuple(heads * size for heads, size in HEADS)
# widths along which the KV cache of a layer never shrinks: step times between them are smooth in size
SMOOTH_WIDTHS = tuple(heads * size for heads, size in HEADS if heads <= 16 or size == 128)


def depth(layer_parameters: float) -> float:
    r"""Return the usual number of layers for that many parameters in layers, :math:`L = 0.108\,P^{0.252}` [-].

    Raises
    ------
    InputError
        If the parameters are not above 0.

    Assumes
    -------
    What the catalog's models have in common; half of them have within 14 % of these layers. Families differ: GPT-2 XL
    has twice as many, a 68 M Llama draft a quarter.

    Source
    ------
    Theil-Sen line of ln L against ln P over the catalog.

    Examples
    --------
    >>> round(depth(6.5e9))
    32
    """
    require(layer_parameters > 0, "layer_parameters", "must be above 0 [-]", layer_parameters)
    return float(DEPTH_SCALE * layer_parameters**DEPTH_EXPONENT)


def usual_layers(width: int, vocab: int = VOCAB) -> float:
    """Return the real number of layers that :func:`depth` gives a model of that width [-]."""
    per_layer = _layer_parameters(_shape(width, 1, vocab, True))
    return float((DEPTH_SCALE * per_layer**DEPTH_EXPONENT) ** (1 / (1 - DEPTH_EXPONENT)))


def llama_shape(target_parameters: float, vocab: int = VOCAB, name: str = "") -> Transformer:
    """Return a Llama-style model with about that many parameters; :func:`theory.work.parameters` says how many.

    The width is the one whose usual model (:func:`usual_layers`) is nearest in size, the layers then meet the count as
    well as whole layers can.

    Raises
    ------
    InputError
        If the count is below that of one layer of the narrowest width, or above twice the widest usual model.

    Source
    ------
    Derivation from the catalog; see :func:`depth`. Tied embeddings below 4 B parameters, grouped-query attention with
    8 KV heads (4 beside 8 query heads), gated feed-forward of 3.5 widths.

    Examples
    --------
    >>> shape = llama_shape(8.03e9)
    >>> shape.layers, shape.hidden, round(parameters(shape) / 1e9, 2)
    (32, 4096, 8.03)
    """
    sizes = usual_sizes(vocab)
    smallest = parameters(_shape(WIDTHS[0], 1, vocab, True))
    require(
        smallest <= target_parameters <= 2 * sizes[-1],
        "parameters",
        f"must lie between {smallest:.3g} and {2 * sizes[-1]:.3g} for a vocabulary of {vocab} [-]",
        target_parameters,
        "A smaller vocabulary leaves more room for layers." if target_parameters < smallest else "",
    )
    width = WIDTHS[int(np.argmin(np.abs(np.log(np.array(sizes) / target_parameters))))]
    tied = target_parameters < TIED_BELOW
    one = _shape(width, 1, vocab, tied)
    more = parameters(_shape(width, 2, vocab, tied)) - parameters(one)
    layers = max(1, 1 + round((target_parameters - parameters(one)) / more))
    return _shape(width, layers, vocab, tied, name or f"llama-style-{_short(target_parameters)}")


@cache
def usual_sizes(vocab: int = VOCAB) -> tuple[float, ...]:
    """Return the parameters of the usual model of each of WIDTHS, layers not rounded [-]."""
    sizes = []
    for width in WIDTHS:
        tied = parameters(_shape(width, max(1, round(usual_layers(width, vocab))), vocab, True)) < TIED_BELOW
        first = parameters(_shape(width, 1, vocab, tied))
        sizes.append(first + (usual_layers(width, vocab) - 1) * (parameters(_shape(width, 2, vocab, tied)) - first))
    return tuple(sizes)


def usual_pair(width: int, vocab: int = VOCAB) -> tuple[Transformer, Transformer]:
    """Return the models of that width with the whole layers just below and just above the usual number."""
    below = max(1, math.floor(usual_layers(width, vocab)))
    tied = usual_sizes(vocab)[WIDTHS.index(width)] < TIED_BELOW
    return _shape(width, below, vocab, tied), _shape(width, below + 1, vocab, tied)


def _shape(width: int, layers: int, vocab: int, tied: bool, name: str = "") -> Transformer:
    heads, size = HEADS[WIDTHS.index(width)]
    return Transformer(
        name=name or f"llama-style-{width}x{layers}",
        layers=layers,
        hidden=width,
        heads=heads,
        kv_heads=min(KV_HEADS, heads // 2),
        head_dim=size,
        ffn=int(FFN_RATIO * width),
        vocab=vocab,
        max_context=CONTEXT,
        tied=tied,
        source="derived from a parameter count by theory.shapes.llama_shape",
    )


def _layer_parameters(model: Transformer) -> float:
    return float(sum(g.n * g.k for g in layer_gemms(model)))


def _short(count: float) -> str:
    """Return a count as 313m or 70b."""
    return f"{count / 1e9:.3g}b" if count >= 1e9 else f"{count / 1e6:.3g}m"
