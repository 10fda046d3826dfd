"""A target and a draft on a text: acceptance, perplexities, and real speculative decoding against plain decoding.

Acceptance is read from the even windows of the text, speculation runs from the odd ones, so that what predicts and what
is predicted have no text in common. Plain and speculative runs alternate prompt by prompt.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.catalog import model
from theory.errors import InputError, require
from theory.speculation import tokens_per_round
from theory.work import parameters

from .forward import Loading, has_weights, load_model, quiet, untyped
from .machine import Device, processor, require_cuda, versions
from .measurements import NUMBER_BYTES
from .speculative_loop import CachedModel, Decoded, decode, kept_given_text, losses, overlap, replayed, speculate

Array = NDArray[np.float64]

BINS = 8  # stretches of a window whose acceptance is reported apart [-]


@dataclass(frozen=True, slots=True)
class Pair:
    """What is measured.

    Raises
    ------
    InputError
        If a number is out of range, or a folder holds no checkpoint.
    """

    target: Path  # checkpoint folder with its tokenizer
    draft: Path  # checkpoint folder
    text: Path  # UTF-8
    draft_lengths: tuple[int, ...] = (1, 2, 4)  # gamma [tokens]
    tokens: int = 64  # written after each prompt [tokens]
    prompts: int = 12  # continued, and as many windows read [-]
    prompt_tokens: int = 32  # given of each window before anything counts [tokens]
    temperature: float = 1.0  # 0 takes the likeliest token [-]
    device: Device = "cpu"
    dtype: str = "fp32"
    threads: int = 1  # of the CPU [-]
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("target", "draft"):
            folder = getattr(self, name)
            require(has_weights(folder), name, "must be a folder with a checkpoint", str(folder))
        require(self.text.is_file(), "text", "must be a text file", str(self.text))
        require(self.device in ("cpu", "cuda"), "device", "must be one of cpu, cuda", self.device)
        require(self.dtype in NUMBER_BYTES, "dtype", f"must be one of {', '.join(NUMBER_BYTES)}", self.dtype)
        require(self.temperature >= 0, "temperature", "must be at least 0 [-]", self.temperature)
        for name, least in (("tokens", 8), ("prompts", 2), ("prompt_tokens", 1), ("threads", 1)):
            require(getattr(self, name) >= least, name, f"must be at least {least}", getattr(self, name))
        ok = len(self.draft_lengths) > 0 and all(1 <= g < self.tokens for g in self.draft_lengths)
        require(ok, "draft-length", f"must lie in [1, {self.tokens - 1}] [tokens]", list(self.draft_lengths))


def measure_acceptance(pair: Pair) -> dict[str, Any]:
    """Return acceptance, perplexities, tokens per round and speed-ups of a target with a draft.

    Returns
    -------
    dict
        ``acceptance`` {value, standard_error (windows as clusters), by_position}, ``perplexity`` {target, draft},
        ``by_draft_length`` (one per gamma: tokens per round measured, by the i.i.d. law and by replay along the
        target's own text; acceptance by depth; speed-up of the reference loop with quartiles over prompts, and of
        assisted generation in transformers), ``header`` (what it was measured with).

    Raises
    ------
    InputError
        If the text is too short, the two do not share a vocabulary, or the device is missing.
    """
    import torch

    if pair.device == "cuda":
        require_cuda()
    torch.set_num_threads(pair.threads)
    shapes = {name: model(getattr(pair, name)) for name in ("target", "draft")}
    windows = _windows(pair, min(s.max_context for s in shapes.values()))
    how = Loading(pair.device, pair.dtype, seed=pair.seed)
    target, draft = (load_model(getattr(pair, name), shapes[name], how) for name in ("target", "draft"))
    require(
        target.config.vocab_size == draft.config.vocab_size,
        "draft",
        f"must have the target's {target.config.vocab_size} rows of the embedding [-]",
        draft.config.vocab_size,
    )
    readers = CachedModel(target), CachedModel(draft)
    read, runs = windows[0::2], windows[1::2]
    places = np.stack([overlap(*readers, w, pair.temperature)[pair.prompt_tokens - 1 :] for w in read])
    alpha = float(places.mean())
    own, by_length = _own_runs(pair, readers, runs)
    shares = [kept_given_text(*readers, [*w[: pair.prompt_tokens], *plain.tokens], pair.temperature)
              for w, plain in zip(runs, own, strict=True)]  # fmt: skip
    with quiet():
        assisted = _assisted_runs(pair, target, draft, runs)
    return {
        "header": _header(pair, shapes),
        "acceptance": {
            "value": alpha,
            "standard_error": float(places.mean(axis=1).std(ddof=1) / len(places) ** 0.5),
            "by_position": [float(part.mean()) for part in np.array_split(places, BINS, axis=1)],
        },
        "perplexity": {
            name: float(np.exp(np.mean([losses(reader, w)[pair.prompt_tokens - 1 :] for w in read])))
            for name, reader in zip(("target", "draft"), readers, strict=True)
        },
        "by_draft_length": [
            _of_length(gamma, alpha, own, by_length[gamma], shares, pair) | {"assisted": assisted[gamma]}
            for gamma in pair.draft_lengths
        ],
    }


def _windows(pair: Pair, longest: int) -> list[list[int]]:
    """Return disjoint stretches of the text, spread over it: prompt and as many tokens as will be written."""
    tokenizers = untyped("transformers", "AutoTokenizer")
    try:
        ours = tokenizers.from_pretrained(str(pair.target), local_files_only=True)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0][:120]
        raise InputError(f"`target` must hold its tokenizer; {pair.target} does not: {why}.") from None
    if any(pair.draft.glob("tokenizer*")):
        theirs = tokenizers.from_pretrained(str(pair.draft), local_files_only=True)
        same = ours.get_vocab() == theirs.get_vocab()
        require(same, "draft", "must have the target's tokenizer", str(pair.draft), "Take a draft of its family.")
    try:
        text = pair.text.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"`text` must be UTF-8; {pair.text} is not.") from None
    tokens = ours(text, add_special_tokens=False, verbose=False)["input_ids"]
    length, count = pair.prompt_tokens + pair.tokens, 2 * pair.prompts
    require(length + 8 <= longest, "tokens", f"must leave prompt and output below {longest - 8} [tokens]", pair.tokens)
    require(
        len(tokens) >= length * count,
        "text",
        f"must have at least {length * count} tokens, {count} stretches of {length} [tokens]",
        len(tokens),
        "Take a longer text, or fewer --prompts or --tokens.",
    )
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    return [tokens[s : s + length] for s in starts]


# --- the reference loop ----------------------------------------------------------------------------------------------


def _own_runs(
    pair: Pair, readers: tuple[CachedModel, CachedModel], windows: list[list[int]]
) -> tuple[list[Decoded], dict[int, list[Decoded]]]:
    """Return plain runs and speculative ones by draft length, taken in turns; the first prompt also warms up."""
    import torch

    rng = torch.Generator().manual_seed(pair.seed)
    plain: list[Decoded] = []
    fast: dict[int, list[Decoded]] = {g: [] for g in pair.draft_lengths}
    for i, window in enumerate([windows[0], *windows]):
        prompt = window[: pair.prompt_tokens]
        once = decode(readers[0], prompt, pair.tokens, pair.temperature, rng)
        many = {g: speculate(*readers, prompt, pair.tokens, g, pair.temperature, rng) for g in pair.draft_lengths}
        if i == 0:
            continue
        plain.append(once)
        for gamma, run in many.items():
            fast[gamma].append(run)
    return plain, fast


def _of_length(
    gamma: int, alpha: float, plain: list[Decoded], fast: list[Decoded], shares: list[Array], pair: Pair
) -> dict[str, Any]:
    """Return what the runs at one draft length say, with what theory says of them."""
    accepted = np.concatenate([run.accepted for run in fast])
    law = float(tokens_per_round(alpha, gamma))
    steps = [t for run in plain for t in run.clock.target]
    rounds = sum(run.seconds for run in fast) / len(accepted)
    result: dict[str, Any] = {
        "draft_length": gamma,
        "rounds": int(accepted.size),
        "tokens_per_round": float(accepted.mean() + 1),
        "tokens_per_round_standard_error": float(accepted.std(ddof=1) / accepted.size**0.5),
        "tokens_per_round_iid": law,
        "tokens_per_round_replayed": _replayed_over(shares, gamma, pair.prompt_tokens),
        "acceptance_by_depth": [_at_depth(accepted, k) for k in range(1, gamma + 1)],
        "speedup": _quartiles([p.seconds / f.seconds for p, f in zip(plain, fast, strict=True)]),
        "speedup_iid": law * (sum(r.seconds for r in plain) / (len(plain) * (pair.tokens - 1))) / rounds,
        "step_time_s": {
            "plain": float(np.median(steps)),
            "draft": float(np.median([t for run in fast for t in run.clock.draft])),
            "verify": float(np.median([t for run in fast for t in run.clock.target])),
            "round": rounds,
        },
    }
    if pair.temperature == 0:
        same = [p.tokens == f.tokens for p, f in zip(plain, fast, strict=True)]
        result["same_as_plain"] = float(np.mean(same))
    return result


def _replayed_over(shares: list[Array], gamma: int, prompt: int) -> float:
    """Return tokens per expected round along what the target wrote after each prompt."""
    texts = [s[prompt - 1 :] for s in shares]
    rounds = sum(len(t) / replayed(t, gamma) for t in texts)
    return sum(map(len, texts)) / rounds


def _at_depth(accepted: NDArray[np.int64], depth: int) -> float | None:
    """Return the share of rounds that accept their token at that depth, of those that got there; None if none did."""
    reached = accepted[accepted >= depth - 1]
    return float((reached >= depth).mean()) if reached.size else None


def _quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high)}


# --- assisted generation of transformers -----------------------------------------------------------------------------


def _assisted_runs(pair: Pair, target: Any, draft: Any, windows: list[list[int]]) -> dict[int, dict[str, Any]]:
    """Return speed-up and tokens per pass of the target of ``generate`` with an assistant, prompts in turns."""
    import torch

    passes = [0]
    hook = target.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    for network in (target, draft):
        network.generation_config = _generation_config(pair)
    ratios: dict[int, list[float]] = {g: [] for g in pair.draft_lengths}
    counts = dict.fromkeys(pair.draft_lengths, 0)
    torch.manual_seed(pair.seed)
    try:
        for i, window in enumerate([windows[0], *windows]):
            prompt = torch.tensor([window[: pair.prompt_tokens]], device=pair.device)
            options = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
            plain = _seconds(lambda o=options: target.generate(**o), pair.device)  # type: ignore[misc]
            for gamma in pair.draft_lengths:
                draft.generation_config.num_assistant_tokens = gamma
                passes[0] = 0
                fast = _seconds(
                    lambda o=options: target.generate(**o, assistant_model=draft),  # type: ignore[misc]
                    pair.device,
                )
                if i > 0:
                    ratios[gamma].append(plain / fast)
                    counts[gamma] += passes[0]
    finally:
        hook.remove()
    written = pair.tokens * len(windows)
    return {
        g: {"speedup": _quartiles(ratios[g]), "tokens_per_round": written / counts[g], "prompt_included": True}
        for g in pair.draft_lengths
    }


def _generation_config(pair: Pair) -> Any:
    """Return settings under which exactly ``tokens`` tokens are written, from the whole law."""
    sampling = {"do_sample": False}
    if pair.temperature > 0:
        sampling = {"do_sample": True, "temperature": pair.temperature, "top_k": 0, "top_p": 1.0}  # type: ignore[dict-item]
    return untyped("transformers", "GenerationConfig")(
        max_new_tokens=pair.tokens,
        eos_token_id=None,
        pad_token_id=0,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
        **sampling,
    )


def _seconds(run: Callable[[], object], device: Device) -> float:
    import torch

    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _header(pair: Pair, shapes: dict[str, Any]) -> dict[str, Any]:
    models = {n: {"name": s.name, "parameters": parameters(s), "layers": s.layers} for n, s in shapes.items()}
    return {
        **models,
        "text": pair.text.name,
        "temperature": pair.temperature,
        "prompts": pair.prompts,
        "prompt_tokens": pair.prompt_tokens,
        "tokens": pair.tokens,
        "device": pair.device,
        "processor": processor(pair.device),
        "dtype": pair.dtype,
        "threads": pair.threads,
        "seed": pair.seed,
        "date": datetime.date.today().isoformat(),
        "provenance": "measured",
        **versions(pair.device),
    }
