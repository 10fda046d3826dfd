"""Forward passes of transformers models, set up so that one pass at a given batch and context can be timed again.

The KV cache is filled with random numbers: a step takes as long whatever the numbers are, and no prompt need be read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from theory.errors import refuse, require
from theory.specs import Transformer

from .machine import Device, torch_dtype
from .measurements import Point

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

Placement = Literal["single", "device-map", "tp"]
Clock = Literal["events", "wall", "cpu"]
MODES = ("eager", "graphs", "compile")
GRAPH_WARMUP = 3  # passes before a CUDA graph is captured [-]; as PyTorch's notes on CUDA graphs do


@dataclass(frozen=True, slots=True)
class Loading:
    """How a model is brought to where it runs."""

    device: Device
    dtype: str
    placement: Placement = "single"
    seed: int = 0


def llama_config(model: Transformer) -> Any:
    """Return the configuration of transformers for a model of the catalog.

    Raises
    ------
    InputError
        If its layers are not Llama's (norms without bias, gated, rotary): then a config.json must be given.
    """
    from transformers import LlamaConfig

    same = model.gated and not (model.norm_bias or model.positions or model.qk_norm or model.embedding_dim)
    if not (same and model.qkv_bias == model.output_bias):
        refuse("model", "must have the layers of Llama to be built by name", model.name, "Give its config.json.")
    d = asdict(model)
    return LlamaConfig(
        vocab_size=d["vocab"],
        hidden_size=d["hidden"],
        intermediate_size=d["ffn"],
        num_hidden_layers=d["layers"],
        num_attention_heads=d["heads"],
        num_key_value_heads=d["kv_heads"],
        head_dim=d["head_dim"],
        max_position_embeddings=d["max_context"],
        tie_word_embeddings=d["tied"],
        attention_bias=d["qkv_bias"],
        mlp_bias=d["ffn_bias"],
    )


def has_weights(source: str | Path) -> bool:
    """Return whether a model is given as a checkpoint folder, weights and all."""
    folder = Path(source)
    return folder.is_dir() and any(any(folder.glob(p)) for p in ("*.safetensors", "pytorch_model*.bin"))


def load_model(source: str | Path, shape: Transformer, how: Loading) -> Any:
    """Return a model of transformers: a checkpoint's, or random weights of a config.json or a catalog model.

    Raises
    ------
    InputError
        If a placement over several devices is asked for without the accelerate package.
    """
    import torch

    auto, configs = untyped("transformers", "AutoModelForCausalLM"), untyped("transformers", "AutoConfig")
    torch.manual_seed(how.seed)
    options: dict[str, Any] = {"dtype": torch_dtype(how.dtype), "attn_implementation": "sdpa"}
    config = configs.from_pretrained(source) if Path(source).exists() else llama_config(shape)
    with quiet():
        if how.placement == "single" and not has_weights(source):
            with torch.device(how.device):
                model = auto.from_config(config, **options)
            return model.eval()
        options |= _placed(how)
        if has_weights(source):
            model = auto.from_pretrained(str(source), local_files_only=True, **options)
        else:  # weights that are missing from an empty state are drawn, each where it belongs
            kind = auto._model_mapping[type(config)]
            model = kind.from_pretrained(None, config=config, state_dict={}, **options)
    return (model.to(how.device) if how.placement == "single" else model).eval()


def _placed(how: Loading) -> dict[str, Any]:
    if how.placement == "single":
        return {}
    from importlib.util import find_spec

    installed = find_spec("accelerate") is not None
    way_out = "Install accelerate (`pip install accelerate`), or measure on one device."
    require(installed, "placement", "must be single without the accelerate package", how.placement, way_out)
    if how.placement == "device-map":
        return {"device_map": "auto" if how.device == "cuda" else {"": "cpu"}}
    import torch

    distributed = untyped("transformers.distributed", "DistributedConfig")
    return {"distributed_config": distributed(tp_plan="auto", tp_size=torch.distributed.get_world_size())}


def untyped(module: str, name: str) -> Any:
    """Return something of transformers, whose annotations do not cover what is used of it here."""
    return getattr(import_module(module), name)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the loading report of random weights and its progress bars off the screen."""
    logging = untyped("transformers.utils", "logging")
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


# --- one pass, again and again ---------------------------------------------------------------------------------------


class GrowingStep:
    """A pass over a cache that grows by concatenation, as ``generate`` runs by default."""

    def __init__(self, model: Any, point: Point) -> None:
        """Make the inputs and fill the cache."""
        self._model, self._point = model, point
        self._tokens = _tokens(model, point)
        self._fresh: Callable[[], Any] = partial(untyped("transformers", "DynamicCache"), config=model.config)
        self._cache = self._fresh()
        self._used = False
        if point.context:
            _fill(model, self._cache, point)

    def reset(self) -> None:
        """Take back what the last pass added to the cache."""
        if self._used and self._point.context:
            self._cache.crop(-self._point.new)
        elif self._used:
            self._cache = self._fresh()
        self._used = False

    def run(self) -> torch.Tensor:
        """Return the logits of one pass."""
        self._used = True
        options = {"past_key_values": self._cache, "use_cache": True} | _kept(self._point)
        logits: torch.Tensor = self._model(input_ids=self._tokens, **options).logits
        return logits


class StaticStep:
    """A pass over a cache of fixed size: what CUDA graphs and compiled code need."""

    def __init__(self, model: Any, point: Point) -> None:
        import torch

        self._model, self._point = model, point
        self._tokens = _tokens(model, point)
        length = point.context + point.new
        self._cache = untyped("transformers", "StaticCache")(config=model.config, max_cache_len=length)
        _fill(model, self._cache, point)
        at = torch.arange(point.context, length, device=self._tokens.device)
        self._positions = at[None]
        seen = torch.arange(length, device=self._tokens.device)[None] <= at[:, None]
        self._mask = seen[None, None].expand(point.batch, 1, point.new, length)
        self.call: Callable[..., Any] = model

    def reset(self) -> None:
        """Take back what the last pass added to the cache."""
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self._point.context)

    def run(self) -> torch.Tensor:
        """Return the logits of one pass."""
        logits: torch.Tensor = self.call(
            input_ids=self._tokens,
            position_ids=self._positions,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **_kept(self._point),
        ).logits
        return logits


class GraphStep(StaticStep):
    """The static pass captured in a CUDA graph and replayed."""

    def __init__(self, model: Any, point: Point) -> None:
        import torch

        super().__init__(model, point)
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(GRAPH_WARMUP):
                self.reset()
                super().run()
        torch.cuda.current_stream().wait_stream(stream)
        self.reset()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = super().run()

    def run(self) -> torch.Tensor:
        """Replay the pass; return its logits."""
        self._graph.replay()
        return self._logits


def prepare(model: Any, point: Point) -> GrowingStep | StaticStep:
    """Return the pass of a point, ready to run."""
    import torch

    if point.mode == "eager":
        return GrowingStep(model, point)
    if point.mode == "graphs":
        return GraphStep(model, point)
    step = StaticStep(model, point)
    on_gpu = next(model.parameters()).is_cuda
    torch._dynamo.reset()  # past 8 shapes of one model it would silently stop compiling
    step.call = torch.compile(model, mode="reduce-overhead" if on_gpu else "default", dynamic=False)
    return step


def _tokens(model: Any, point: Point) -> torch.Tensor:
    import torch

    device = next(model.parameters()).device
    return torch.randint(model.config.vocab_size, (point.batch, point.new), device=device)


def _kept(point: Point) -> dict[str, int]:
    """Return which logits a pass computes: those of the last token of a prompt, all of other passes."""
    return {"logits_to_keep": 1} if point.phase == "prefill" else {}


def _fill(model: Any, cache: Any, point: Point) -> None:
    """Put ``context`` random tokens of each sequence into the cache, whatever shard of it this process holds."""
    import torch

    device = next(model.parameters()).device
    first = torch.zeros(point.batch, 1, dtype=torch.long, device=device)
    mask = torch.ones(point.batch, 1, 1, point.context + point.new, dtype=torch.bool, device=device)
    static = hasattr(cache.layers[0], "max_cache_len") if cache.layers else False
    fixed = {"attention_mask": mask, "position_ids": first[:1]} if static else {}
    model(input_ids=first, past_key_values=cache, use_cache=True, **fixed)  # makes the layers, each on its device
    for layer in cache.layers:
        if static:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(point.context)
        else:
            shape = (*layer.keys.shape[:2], point.context, layer.keys.shape[3])
            layer.keys, layer.values = (torch.randn(shape, dtype=layer.dtype, device=layer.device) for _ in range(2))


# --- clocks ----------------------------------------------------------------------------------------------------------


def time_passes(step: GrowingStep | StaticStep, clock: Clock, warmup: int, repeats: int) -> list[float]:
    """Return how long each repeat took [s].

    ``events`` are CUDA events, for one GPU a process; ``wall`` is the monotonic clock, waiting for all GPUs there are,
    since a pass over several ends on another stream than it began on; ``cpu`` is the CPU time of this process, for a
    CPU that others use too.
    """
    import torch

    read = {"events": _event_clock, "wall": _wall_clock, "cpu": _cpu_clock}[clock]
    with torch.inference_mode():
        for _ in range(warmup):
            step.reset()
            step.run()
        times = []
        for _ in range(repeats):
            step.reset()
            times.append(read(step.run))
    return times


def _wall_clock(run: Callable[[], object]) -> float:
    _wait_for_gpus()
    start = time.perf_counter()
    run()
    _wait_for_gpus()
    return time.perf_counter() - start


def _cpu_clock(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _event_clock(run: Callable[[], object]) -> float:
    import torch

    make: Any = torch.cuda.Event
    begin, end = make(enable_timing=True), make(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3


def _wait_for_gpus() -> None:
    import torch

    for i in range(torch.cuda.device_count()):
        torch.cuda.synchronize(i)
