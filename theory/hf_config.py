"""Dimensions of a transformer from a Hugging Face ``config.json`` on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from .errors import refuse, require
from .specs import Transformer


class _Config(NamedTuple):
    """The content of a config.json with the words for its refusals."""

    path: Path
    values: dict[str, Any]

    def label(self, key: str) -> str:
        return f"{self.path.parent.name}/{self.path.name}: {key}"

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer; ``default`` is that of the model class of transformers."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                refuse(self.label(key), "must be given [-]", "no such key", "Take the config.json of the checkpoint.")
            return default
        ok = isinstance(value, int) and not isinstance(value, bool) and value > 0
        require(ok, self.label(key), "must be a positive integer [-]", value)
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean; ``default`` is that of the model class of transformers."""
        value = self.values.get(key)
        require(value is None or isinstance(value, bool), self.label(key), "must be true or false", value)
        return default if value is None else bool(value)

    def head_dim(self, hidden: int, heads: int, key: str = "head_dim") -> int:
        require(
            self.values.get(key) is not None or hidden % heads == 0,
            self.label("hidden_size"),
            f"must be a multiple of the {heads} heads when head_dim is not given [-]",
            hidden,
        )
        return self.integer(key, hidden // heads)


def _llama_like(config: _Config) -> dict[str, Any]:
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    return {
        "layers": config.integer("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": config.integer("num_key_value_heads", heads),
        "head_dim": config.head_dim(hidden, heads),
        "ffn": config.integer("intermediate_size"),
        "vocab": config.integer("vocab_size"),
        "max_context": config.integer("max_position_embeddings"),
        "tied": config.flag("tie_word_embeddings", False),
    }


def _llama(config: _Config) -> dict[str, Any]:
    bias = config.flag("attention_bias", False)
    return _llama_like(config) | {
        "qkv_bias": bias,
        "output_bias": bias,
        "ffn_bias": config.flag("mlp_bias", False),
    }


def _qwen2(config: _Config) -> dict[str, Any]:
    return _llama_like(config) | {"qkv_bias": True}  # the class has it, the config has no key for it


def _qwen3(config: _Config) -> dict[str, Any]:
    bias = config.flag("attention_bias", False)
    return _llama_like(config) | {"qkv_bias": bias, "output_bias": bias, "qk_norm": True}


def _opt(config: _Config) -> dict[str, Any]:
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    context, bias = config.integer("max_position_embeddings"), config.flag("enable_bias", True)
    embedding = config.integer("word_embed_proj_dim", hidden)
    pre_norm = config.flag("do_layer_norm_before", True)
    return {
        "layers": config.integer("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": config.head_dim(hidden, heads),
        "ffn": config.integer("ffn_dim"),
        "vocab": config.integer("vocab_size"),
        "max_context": context,
        "gated": False,
        "tied": config.flag("tie_word_embeddings", True),
        "qkv_bias": bias,
        "output_bias": bias,
        "ffn_bias": bias,
        "norm_bias": True,
        "final_norm": pre_norm and not config.flag("_remove_final_layer_norm", False),
        "positions": context + 2,  # OPT offsets its position table by two rows
        "embedding_dim": 0 if embedding == hidden else embedding,
    }


def _gpt2(config: _Config) -> dict[str, Any]:
    hidden, heads = config.integer("n_embd"), config.integer("n_head")
    context = config.integer("n_positions")
    return {
        "layers": config.integer("n_layer"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": config.head_dim(hidden, heads),
        "ffn": config.integer("n_inner", 4 * hidden),
        "vocab": config.integer("vocab_size"),
        "max_context": context,
        "gated": False,
        "tied": config.flag("tie_word_embeddings", True),
        "qkv_bias": True,
        "output_bias": True,
        "ffn_bias": True,
        "norm_bias": True,
        "positions": context,
    }


_READERS: dict[str, Callable[[_Config], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _llama_like,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "opt": _opt,
    "gpt2": _gpt2,
}
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


def from_hf_config(path: str | Path) -> Transformer:
    """Return the dimensions in a Hugging Face ``config.json`` (or in the folder that holds one); nothing is downloaded.

    An absent optional key means what the model class of transformers takes it to mean (``num_key_value_heads``: the
    number of heads; ``head_dim``: hidden / heads; ...). Sliding windows are not modelled: ``source`` then says that KV
    bytes beyond the window are an upper bound.

    Raises
    ------
    InputError
        If there is no such file, it is not JSON, a key is missing or not a number, the architecture is unknown, or it
        is a mixture of experts; the message names the file and what is supported.

    Source
    ------
    The configuration classes of transformers: Llama, Mistral, Qwen2, Qwen3, OPT, GPT-2.
    """
    config = _read(Path(path))
    kind = config.values.get("model_type")
    supported = f"Supported are dense text models of type {', '.join(_READERS)}."
    experts = [key for key in _EXPERT_KEYS if config.values.get(key) not in (None, 0, 1)]
    if experts:
        refuse(config.label(experts[0]), "must be absent: mixtures of experts are not modelled", kind, supported)
    if kind not in _READERS:
        refuse(config.label("model_type"), "must be a supported architecture", kind, supported)
    window = _sliding_window(config)
    note = f"; sliding window of {window} tokens not modelled: KV bytes beyond it are an upper bound" if window else ""
    folder = config.path.parent.name
    return Transformer(name=folder, source=f"config.json in {folder}{note}", **_READERS[kind](config))


def _sliding_window(config: _Config) -> int:
    if not config.flag("use_sliding_window", True):
        return 0
    return int(config.values.get("sliding_window") or 0)


def _read(path: Path) -> _Config:
    file = (path / "config.json" if path.is_dir() else path).resolve()
    try:
        values = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except FileNotFoundError:
        refuse(
            "config",
            "must be a config.json or a folder with one",
            str(path),
            "Give the path of a checkpoint, or the name of a catalog model such as llama-2-13b.",
        )
    except (OSError, UnicodeDecodeError, ValueError) as error:
        refuse("config", f"must be a readable JSON file ({error})", str(file), "Fetch the file again.")
    require(isinstance(values, dict), "config", "must be a JSON object with the model's dimensions", str(file))
    return _Config(file, values)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")
