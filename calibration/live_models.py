"""A family of small language models trained on the spot: text, tokens, networks, training, decoding with a cache.

Llama's arithmetic in plain tensors (RMSNorm, rotary positions, SwiGLU, tied embeddings, no bias), small enough that a
family trains in minutes on two cores: one thread a process, as many processes as cores up to two, Muon for matrices
and AdamW for the rest, equal tokens for all sizes in the same order. torch and tokenizers are imported where used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from theory.errors import require

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float64]
Tokens = NDArray[np.int64]
Weights = dict[str, "torch.Tensor"]

HEAD = 32  # width of an attention head where the model is at least two of them wide [-]
ROPE_BASE = 1e4  # of the rotary positions [-]
EPS = 1e-5  # of RMSNorm [-]
SKIPPED = ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages")  # folders without plain text
FILE_BYTES = (500, 200_000)  # files shorter or longer than this are left out [bytes]
HELD_OUT = 10  # one file in so many is never trained on [files]
MUON_RATE, MUON_MOMENTUM, MUON_DECAY = 0.01, 0.95, 0.05  # [-]
ADAM_RATE, ADAM_BETAS = 0.02, (0.9, 0.98)  # [-]
WARM_UP, CLIP = 0.05, 1.0  # share of the steps with a rising rate; norm that gradients are cut to [-]
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan et al. (2024), Muon
CHECKPOINT_S = 30.0  # wall time between checkpoints [s]
CACHE = 512  # places of a decoding cache [tokens]


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """Width and depth of a model."""

    width: int  # d [-]
    layers: int  # L [-]

    @property
    def name(self) -> str:
        """Return such as ``d64-l3``."""
        return f"d{self.width}-l{self.layers}"

    @property
    def heads(self) -> int:
        """Return the attention heads."""
        return max(1, self.width // HEAD) if self.width % HEAD == 0 else 1

    @property
    def inner(self) -> int:
        """Return the width of the feed-forward part, 8 d / 3 rounded up to 16."""
        return math.ceil(8 * self.width / 3 / 16) * 16

    def parameters(self, vocabulary: int) -> int:
        """Return the parameters, the tied embedding counted once [-].

        Examples
        --------
        >>> Shape(16, 1).parameters(512), Shape(128, 8).parameters(512)
        (11568, 1673344)
        """
        d = self.width
        return vocabulary * d + d + self.layers * (4 * d * d + 3 * d * self.inner + 2 * d)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is trained, on how much."""

    shapes: tuple[Shape, ...]  # smallest first
    tokens: int  # each model sees [tokens]
    batch: int  # windows of a step [windows]
    vocabulary: int = 512  # of the byte-level BPE [tokens]
    context: int = 128  # of a window [tokens]
    text_bytes: int = 10_000_000  # of text that is read at most [bytes]
    seed: int = 0

    def __post_init__(self) -> None:
        require(len(set(self.shapes)) == len(self.shapes) > 0, "shapes", "must be different models", self.shapes)
        even = all(s.width >= 8 and s.width % (2 * s.heads) == 0 and s.layers >= 1 for s in self.shapes)
        require(even, "shapes", "must have an even head width, 8 or more wide, 1 or more deep", self.shapes)
        require(self.vocabulary >= 257, "vocabulary", "must be at least 257, the bytes and one more", self.vocabulary)
        whole = self.tokens >= self.batch * self.context > 0
        require(whole, "tokens", f"must be at least one step, {self.batch * self.context} [tokens]", self.tokens)
        require(self.seed >= 0, "seed", "must be at least 0 [-]", self.seed)

    @property
    def steps(self) -> int:
        """Return the steps of training."""
        return self.tokens // (self.batch * self.context)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text as tokens, divided by file."""

    train: Tokens
    held_out: Tokens
    bytes_per_token: float  # of the held-out text [bytes/token]
    files: int
    source: str
    key: str  # names text and recipe [-]


# --- text -------------------------------------------------------------------------------------------------------------


def read_text(folder: Path | None, seed: int, most: int) -> list[str]:
    """Return the text files of a folder in a random order, at most ``most`` bytes; by default Python's own library.

    Raises
    ------
    InputError
        If the folder does not exist or holds fewer than 20 files of text of 500 B to 200 kB.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    require(root.is_dir(), "text", "must be a folder that exists", str(root))
    paths: list[Path] = []
    for at, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        paths += [Path(at, name) for name in names if folder is not None or name.endswith(".py")]
    paths.sort()
    found: list[str] = []
    spent = 0
    for i in np.random.default_rng(seed).permutation(len(paths)):
        path = paths[i]
        if not path.is_file() or not FILE_BYTES[0] <= path.stat().st_size <= FILE_BYTES[1]:
            continue
        try:
            found.append(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError):
            continue  # not text
        spent += len(found[-1])
        if spent >= most:
            break
    require(len(found) >= 20, "text", "must hold at least 20 UTF-8 files of 500 B to 200 kB", len(found))
    return found


def corpus(recipe: Recipe, folder: Path | None, work: Path) -> Corpus:
    """Return the text as tokens of a byte-level BPE trained on its training files; kept in ``work``.

    Raises
    ------
    InputError
        As :func:`read_text`, or if a division of the text is shorter than ten windows.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = read_text(folder, recipe.seed, recipe.text_bytes)
    digest = hashlib.sha256("\0".join(texts).encode())
    digest.update(json.dumps({**asdict(recipe), "shapes": 0}, sort_keys=True).encode())
    key = digest.hexdigest()[:16]
    path = work / f"tokenizer-{key}.json"
    held, train = texts[::HELD_OUT], [t for i, t in enumerate(texts) if i % HELD_OUT]
    if path.exists():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=recipe.vocabulary, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(train, trainer)
        tokenizer.save(str(path))
    ids = [np.array([t for e in tokenizer.encode_batch(part) for t in e.ids], dtype=np.int64) for part in (train, held)]
    for part in ids:
        least = 10 * recipe.context
        require(part.size >= least, "text", f"must give at least {least} tokens on each side", part.size)
    size = sum(len(t.encode()) for t in held)
    source = "Python standard library" if folder is None else "folder given"
    return Corpus(ids[0], ids[1], size / ids[1].size, len(texts), source, key)


# --- the network ------------------------------------------------------------------------------------------------------


def fresh_weights(shape: Shape, vocabulary: int, seed: int) -> Weights:
    """Return random weights: normal, matrices scaled by their inputs, gains 1."""
    import torch

    rng = torch.Generator().manual_seed(seed)
    d, f = shape.width, shape.inner

    def matrix(rows: int, columns: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=rng) * scale

    weights = {"embed": matrix(vocabulary, d, 0.02), "norm": torch.ones(d)}
    for i in range(shape.layers):
        weights |= {
            f"{i}.norm1": torch.ones(d),
            f"{i}.qkv": matrix(3 * d, d, d**-0.5),
            f"{i}.out": matrix(d, d, (2 * shape.layers * d) ** -0.5),
            f"{i}.norm2": torch.ones(d),
            f"{i}.up": matrix(2 * f, d, d**-0.5),  # gate and up
            f"{i}.down": matrix(d, f, (2 * shape.layers * f) ** -0.5),
        }
    return weights


def rotary(width: int, places: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of the rotary positions, (places, width) each; first half rotates with the second."""
    import torch

    speed = ROPE_BASE ** (-torch.arange(0, width, 2).float() / width)
    angle = torch.arange(places).float()[:, None] * speed
    both = torch.cat([angle, angle], dim=-1)
    return both.cos(), both.sin()


Attend = Callable[[int, "torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]


def forward(
    weights: Weights, shape: Shape, ids: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], attend: Attend
) -> torch.Tensor:
    """Return the logits of what follows each token, (..., tokens, vocabulary).

    ``attend`` gets the layer and its rotated queries, keys and values, (..., heads, tokens, head width) each.
    """
    import torch
    from torch.nn.functional import linear, rms_norm, silu

    d, h = shape.width, shape.heads
    cos, sin = turn

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    x = weights["embed"][ids]
    for i in range(shape.layers):
        normed = rms_norm(x, (d,), weights[f"{i}.norm1"], EPS)
        fused = linear(normed, weights[f"{i}.qkv"])
        q, k, v = fused.reshape(*fused.shape[:-1], 3 * h, d // h).transpose(-2, -3).chunk(3, dim=-3)
        seen = attend(i, turned(q), turned(k), v).transpose(-2, -3).flatten(-2)
        x = x + linear(seen, weights[f"{i}.out"])
        normed = rms_norm(x, (d,), weights[f"{i}.norm2"], EPS)
        gate, up = linear(normed, weights[f"{i}.up"]).chunk(2, dim=-1)
        x = x + linear(silu(gate) * up, weights[f"{i}.down"])
    return linear(rms_norm(x, (d,), weights["norm"], EPS), weights["embed"])


def whole_text(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend to a text that is there as a whole: each place to itself and those before it."""
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(q, k, v, is_causal=True)


class FastModel:
    """A trained model with a cache allocated once: to forget is to move a counter."""

    def __init__(self, weights: Weights, shape: Shape, places: int = CACHE) -> None:
        import torch

        self._weights, self._shape = weights, shape
        device = weights["embed"].device
        self._turn = tuple(t.to(device) for t in rotary(shape.width // shape.heads, places))
        size = (shape.layers, shape.heads, places, shape.width // shape.heads)
        self._keys, self._values = torch.zeros(size, device=device), torch.zeros(size, device=device)
        self._places = places
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens read so far [tokens]."""
        return self._length

    def read(self, tokens: Sequence[int]) -> torch.Tensor:
        """Read more tokens in one forward pass; return the logits of what follows each of them.

        Raises
        ------
        InputError
            If the cache has no place left.
        """
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        start, end = self._length, self._length + len(tokens)
        require(end <= self._places, "tokens", f"must fit the cache of {self._places} [tokens]", end)
        device = self._keys.device
        mask = None
        if len(tokens) > 1 and start > 0:
            mask = torch.ones(len(tokens), end, dtype=torch.bool, device=device).tril(start)

        def attend(i: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self._keys[i, :, start:end], self._values[i, :, start:end] = k, v
            keys, values = self._keys[i, :, :end], self._values[i, :, :end]
            first = start == 0 and len(tokens) > 1
            return scaled_dot_product_attention(q[None], keys[None], values[None], mask, is_causal=first)[0]

        with torch.inference_mode():
            turn = (self._turn[0][start:end], self._turn[1][start:end])
            logits = forward(self._weights, self._shape, torch.tensor(list(tokens), device=device), turn, attend)
        self._length = end
        return logits

    def forget(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self._length = min(length, self._length)


class Trigram:
    r"""Counts of three tokens as a language model, backed off to two, one and none where a context is rare or new.

    .. math:: P(x \mid c) = \lambda_c \hat P(x \mid c) + (1 - \lambda_c) P(x \mid c'), \quad
              \lambda_c = \frac{n_c}{n_c + t_c}

    with c' the context without its oldest token, n the times c was seen and t the different tokens seen after it.

    Source
    ------
    Witten & Bell (1991), IEEE Transactions on Information Theory 37:1085-1094, method C, interpolated.
    """

    name = "trigram"

    def __init__(self, tokens: Tokens, vocabulary: int) -> None:
        V = vocabulary
        one = np.bincount(tokens, minlength=V).astype(np.float64)
        seen = int((one > 0).sum())
        base = (one + seen / V) / (one.sum() + seen)
        pairs = np.bincount(tokens[:-1] * V + tokens[1:], minlength=V * V).reshape(V, V).astype(np.float64)
        kinds = (pairs > 0).sum(axis=1, keepdims=True)
        total = np.maximum(pairs.sum(axis=1, keepdims=True) + kinds, 1.0)
        self._pairs = np.where(kinds > 0, (pairs + kinds * base) / total, base)
        triples, self._counts = np.unique((tokens[:-2] * V + tokens[1:-1]) * V + tokens[2:], return_counts=True)
        self._last = triples % V
        self._edges = np.searchsorted(triples // V, np.arange(V * V + 1))
        self._base, self._V = base, V
        self._text: list[int] = []

    @property
    def length(self) -> int:
        """Tokens read so far [tokens]."""
        return len(self._text)

    def read(self, tokens: Sequence[int]) -> torch.Tensor:
        """Read more tokens; return the log probabilities of what follows each of them."""
        import torch

        start = len(self._text)
        self._text.extend(tokens)
        laws = np.stack([self._after(i) for i in range(start, len(self._text))])
        return torch.from_numpy(np.log(laws))

    def _after(self, i: int) -> Array:
        """Return the law of what follows place i of the text, (vocabulary,)."""
        law: Array = self._pairs[self._text[i]]
        if i == 0:
            return law
        context = self._text[i - 1] * self._V + self._text[i]
        low, high = self._edges[context], self._edges[context + 1]
        if low == high:
            return law
        counts = self._counts[low:high]
        mixed = law * (high - low)
        mixed[self._last[low:high]] += counts
        return np.asarray(mixed / (counts.sum() + high - low))

    def forget(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        del self._text[length:]


# --- training ---------------------------------------------------------------------------------------------------------


def orthogonal(gradient: torch.Tensor) -> torch.Tensor:
    r"""Return the gradient with its singular values brought near 1 by five Newton-Schulz steps.

    .. math:: X \leftarrow a X + (b X X^T + c (X X^T)^2) X, \qquad X_0 = G / \lVert G \rVert_F

    Source
    ------
    Jordan et al. (2024), Muon: an optimizer for hidden layers in neural networks; Bernstein & Newhouse (2024),
    arXiv:2409.20325.
    """
    import torch

    a, b, c = NEWTON_SCHULZ
    wide = gradient.shape[0] <= gradient.shape[1]
    x = gradient if wide else gradient.T
    x = x / (torch.linalg.matrix_norm(x) + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    result: torch.Tensor = x if wide else x.T
    return result


@dataclass(frozen=True, eq=False)
class _Job:
    """What a training process is given."""

    shape: Shape
    recipe: Recipe
    tokens: Tokens
    folder: Path
    key: str
    device: str


def train_family(
    recipe: Recipe,
    text: Corpus,
    folder: Path,
    workers: int = 2,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[Shape, Weights], dict[Shape, float]]:
    """Return the trained models and the CPU seconds each took [s]; finished and half-done ones in ``folder`` are used.

    The longest is started first; each process has one thread.
    """
    from safetensors.torch import load_file

    order = sorted(recipe.shapes, key=lambda s: -s.layers * (s.width + 64))
    jobs = [_Job(s, recipe, text.train, folder, text.key, device) for s in order]
    spent: dict[Shape, float] = {}
    told = progress or (lambda *_: None)
    told("training", 0, len(jobs))
    if workers == 1:
        for job in jobs:
            spent[job.shape] = _train(job)
            told("training", len(spent), len(jobs))
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            waiting = {pool.submit(_train, job): job.shape for job in jobs}
            for done in as_completed(waiting):
                spent[waiting[done]] = done.result()
                told("training", len(spent), len(jobs))
    return {j.shape: load_file(_file(j, "model"), device=device) for j in jobs[::-1]}, spent


def _file(job: _Job, kind: str) -> Path:
    return job.folder / f"{kind}-{job.shape.name}-{job.key}.safetensors"


def _train(job: _Job) -> float:
    """Train one model to its end, from its last checkpoint if there is one; return the CPU seconds of all parts [s]."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    with one_thread():
        if (done := _file(job, "model")).exists():
            with safe_open(str(done), "pt") as file:
                return float(file.metadata()["cpu_s"])
        state, step, spent = _start(job), 0, 0.0
        if (part := _file(job, "part")).exists():
            with safe_open(str(part), "pt") as file:
                step, spent = int(file.metadata()["step"]), float(file.metadata()["cpu_s"])
            state = load_file(str(part), device=job.device)
        weights = {k[2:]: v.requires_grad_() for k, v in state.items() if k.startswith("w:")}
        turn = rotary(job.shape.width // job.shape.heads, job.recipe.context)
        turn = (turn[0].to(job.device), turn[1].to(job.device))
        windows = _windows(job)
        began, saved = time.process_time(), time.monotonic()
        for at in range(step, job.recipe.steps):
            ids = torch.from_numpy(next_windows(windows, at, job.recipe.batch)).to(job.device)
            logits = forward(weights, job.shape, ids[:, :-1], turn, whole_text)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            gradients = torch.autograd.grad(loss, list(weights.values()))
            _update(state, weights, gradients, at, job.recipe.steps)
            if time.monotonic() - saved > CHECKPOINT_S:
                _save(state, part, at + 1, spent + time.process_time() - began)
                saved = time.monotonic()
        spent += time.process_time() - began
        _save({k: v.detach() for k, v in weights.items()}, done, job.recipe.steps, spent)
        part.unlink(missing_ok=True)
        return spent


def _start(job: _Job) -> Weights:
    """Return fresh weights ``w:``, momenta ``m:`` and, where AdamW moves them, squares ``v:``."""
    import torch

    state: Weights = {}
    for name, w in fresh_weights(job.shape, job.recipe.vocabulary, job.recipe.seed).items():
        state[f"w:{name}"] = w.to(job.device)
        state[f"m:{name}"] = torch.zeros_like(state[f"w:{name}"])
        if not _by_muon(name):
            state[f"v:{name}"] = torch.zeros_like(state[f"w:{name}"])
    return state


def _by_muon(name: str) -> bool:
    return name != "embed" and "norm" not in name


def _windows(job: _Job) -> Tokens:
    """Return all windows of the training text in the order they are seen, (windows, context + 1)."""
    long = job.recipe.context + 1
    count = job.tokens.size // long
    order = np.random.default_rng(job.recipe.seed).permutation(count)
    return job.tokens[: count * long].reshape(count, long)[order]


def next_windows(windows: Tokens, step: int, batch: int) -> Tokens:
    """Return the windows of a step, from the beginning again when all were seen, (batch, context + 1)."""
    return windows[(np.arange(batch) + step * batch) % len(windows)]


def rate(step: int, steps: int) -> float:
    """Return the share of the full learning rate: a rise over 5 % of the steps, then a straight fall to 0 [-].

    Examples
    --------
    >>> [round(rate(s, 100), 2) for s in (0, 4, 52, 99)]
    [0.2, 1.0, 0.5, 0.01]
    """
    rise = max(1, round(WARM_UP * steps))
    return (step + 1) / rise if step < rise else (steps - step) / (steps - rise + 1)


def _update(
    state: Weights, weights: Weights, gradients: Sequence[torch.Tensor], step: int, steps: int
) -> None:  # in place: a copy of the state at each step would cost more than the step
    r"""Move the weights: Muon, :math:`W \leftarrow (1 - \eta d) W - 0.2 \eta \sqrt{\max(m, n)}\, O(G + \mu M)`; AdamW.

    Source
    ------
    Scale 0.2 sqrt(max dimension): Liu et al. (2025), arXiv:2502.16982, eq. (4); AdamW: arXiv:1711.05101.
    """
    import torch

    share = rate(step, steps)
    with torch.no_grad():
        norm = torch.stack([g.norm() for g in gradients]).norm()
        factor = float(torch.clamp(CLIP / (norm + 1e-6), max=1.0))
        for (name, w), gradient in zip(weights.items(), gradients, strict=True):
            g, m = gradient * factor, state[f"m:{name}"]
            if _by_muon(name):
                m.mul_(MUON_MOMENTUM).add_(g)
                fused = {"qkv": 3, "up": 2}.get(name.rpartition(".")[2], 1)
                parts = [orthogonal(p) for p in (g + MUON_MOMENTUM * m).chunk(fused)]
                scale = 0.2 * math.sqrt(max(parts[0].shape))
                w.mul_(1 - share * MUON_RATE * MUON_DECAY).sub_(torch.cat(parts), alpha=share * MUON_RATE * scale)
            else:
                v, (b1, b2) = state[f"v:{name}"], ADAM_BETAS
                m.mul_(b1).add_(g, alpha=1 - b1)
                v.mul_(b2).addcmul_(g, g, value=1 - b2)
                size = (v / (1 - b2 ** (step + 1))).sqrt_().add_(1e-8)
                w.addcdiv_(m, size, value=-share * ADAM_RATE / (1 - b1 ** (step + 1)))


def _save(state: Weights, path: Path, step: int, spent: float) -> None:
    """Write a checkpoint whole or not at all."""
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".tmp")
    kept = {k: v.detach().contiguous() for k, v in state.items()}
    save_file(kept, str(part), metadata={"step": str(step), "cpu_s": repr(spent)})
    os.replace(part, path)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: for products this small more threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_llama(weights: Weights, shape: Shape) -> Any:
    """Return the same model as ``LlamaForCausalLM`` of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = weights["embed"].shape[0]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=CACHE,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    given = {"model.embed_tokens.weight": weights["embed"], "model.norm.weight": weights["norm"]}
    for i in range(shape.layers):
        at = f"model.layers.{i}."
        q, k, v = weights[f"{i}.qkv"].chunk(3)
        gate, up = weights[f"{i}.up"].chunk(2)
        given |= {
            at + "input_layernorm.weight": weights[f"{i}.norm1"],
            at + "post_attention_layernorm.weight": weights[f"{i}.norm2"],
            at + "self_attn.q_proj.weight": q,
            at + "self_attn.k_proj.weight": k,
            at + "self_attn.v_proj.weight": v,
            at + "self_attn.o_proj.weight": weights[f"{i}.out"],
            at + "mlp.gate_proj.weight": gate,
            at + "mlp.up_proj.weight": up,
            at + "mlp.down_proj.weight": weights[f"{i}.down"],
        }
    model.load_state_dict(given, strict=False)
    model.tie_weights()
    model.train(False)
    return model
