"""Catalog and config.json reader: published counts, sources, round trips, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from theory.catalog import accelerator, accelerators, from_hf_config, model, models, published_parameters
from theory.errors import InputError
from theory.specs import Transformer, check_tp
from theory.work import parameters

ROUNDED = {"opt-66b": 0.005, "internlm-20b": 0.005, "llama-68m": 0.005}  # only the size in the name is published


@pytest.mark.parametrize("name", models())
def test_computed_parameters_are_the_published_ones(name: str) -> None:
    computed, published = parameters(model(name)), published_parameters(name)
    assert abs(computed / published - 1) <= ROUNDED.get(name, 0.0)


@pytest.mark.parametrize("change", [{"layers": 39}, {"ffn": 13696}, {"tied": True}, {"vocab": 50272}])
def test_a_wrong_dimension_is_noticed(change: dict[str, Any]) -> None:
    wrong = replace(model("llama-2-13b"), **change)
    assert abs(parameters(wrong) / published_parameters("llama-2-13b") - 1) > 0.005


@pytest.mark.parametrize("name", models())
def test_models_have_a_dated_source_and_run_on_one_gpu(name: str) -> None:
    assert model(name).source.startswith("config.json of ")
    assert model(name).source.endswith(")")
    check_tp(model(name), 1)


@pytest.mark.parametrize("name", accelerators())
def test_accelerators_are_plausible_and_sourced(name: str) -> None:
    gpu = accelerator(name)
    assert "NVIDIA" in gpu.source
    assert "memory:" in gpu.source
    assert gpu.flops_fp8 / gpu.flops_bf16 == pytest.approx(1.0 if name.startswith(("a100", "a40")) else 2.0, rel=0.02)
    assert 50 < gpu.flops_bf16 / gpu.bandwidth < 500  # FLOP/byte at the knee; sparse figures would double it
    assert gpu.link_bandwidth < gpu.bandwidth


def test_the_catalog_has_the_names_of_the_design() -> None:
    expected = {"a100-40g-sxm", "a100-80g-sxm", "h100-sxm", "h100-pcie", "h200-sxm", "l40s", "b200", "a40"}
    assert expected == set(accelerators())
    assert {"llama-2-13b", "codellama-34b", "llama-2-70b", "llama-68m", "tinyllama-1.1b", "qwen3-32b"} <= set(models())


@pytest.mark.parametrize(
    ("lookup", "name", "text"),
    [
        (accelerator, "h100", r"`accelerator` must be a name of the catalog \(nearest: h100-sxm.*got 'h100'"),
        (accelerator, "H200-SXM", r"nearest: h200-sxm"),
        (accelerator, "", r"nearest: a100-40g-sxm, .*b200"),
        (model, "Llama-2-13B", r"nearest: llama-2-13b.*got 'Llama-2-13B'.*path to a Hugging Face config.json"),
        (model, "qwen-2.5-32b", r"nearest: qwen2.5-32b"),
        (
            model,
            "no/such/config.json",
            r"`config` must be a config.json or a folder with one; got 'no/such/config.json'",
        ),
        (published_parameters, "gpt-5", r"`model` must be a name of the catalog"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(lookup: Any, name: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        lookup(name)


LLAMA = {
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": 32768,
}
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 5120,
    "head_dim": 128,
    "intermediate_size": 25600,
    "num_attention_heads": 64,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "attention_bias": False,
    "sliding_window": None,
}
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
OPT_350M = {
    "model_type": "opt",
    "hidden_size": 1024,
    "word_embed_proj_dim": 512,
    "do_layer_norm_before": False,
    "ffn_dim": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
}
OPT_13B = OPT_350M | {
    "hidden_size": 5120,
    "word_embed_proj_dim": 5120,
    "do_layer_norm_before": True,
    "ffn_dim": 20480,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
}
GPT2_XL = {
    "model_type": "gpt2",
    "n_embd": 1600,
    "n_layer": 48,
    "n_head": 25,
    "n_inner": None,
    "n_positions": 1024,
    "vocab_size": 50257,
}


def write(folder: Path, values: Any, name: str = "my-model") -> Path:
    """Write a config.json into a folder called ``name`` and return the folder."""
    home = folder / name
    home.mkdir()
    text = values if isinstance(values, str) else json.dumps(values)
    (home / "config.json").write_text(text, encoding="utf-8")
    return home


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama-2-13b", LLAMA),
        ("qwen2.5-0.5b", QWEN2),
        ("qwen3-32b", QWEN3),
        ("mistral-7b", MISTRAL),
        ("opt-350m", OPT_350M),
        ("opt-13b", OPT_13B),
        ("gpt2-xl", GPT2_XL),
    ],
)
def test_a_config_gives_the_dimensions_of_the_catalog(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    folder = write(tmp_path, config)
    read = from_hf_config(folder)
    assert read == model(folder) == from_hf_config(folder / "config.json") == model(str(folder / "config.json"))
    assert replace(read, name="", source="") == replace(model(name), name="", source="")
    assert read.name == "my-model"
    assert ("sliding window of 4096 tokens not modelled" in read.source) == (name == "mistral-7b")


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    folder = write(tmp_path, LLAMA)
    assert model(folder).layers == 40
    (folder / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 20}), encoding="utf-8")
    assert model(folder).layers == 20


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"attention_bias": True}, {"qkv_bias": True, "output_bias": True}),
        ({"mlp_bias": True}, {"ffn_bias": True}),
        ({"tie_word_embeddings": True}, {"tied": True}),
        ({"head_dim": 64}, {"head_dim": 64}),
        ({"num_key_value_heads": 8}, {"kv_heads": 8}),
    ],
)
def test_optional_keys_count(tmp_path: Path, change: dict[str, Any], field: dict[str, Any]) -> None:
    read: Transformer = from_hf_config(write(tmp_path, LLAMA | change))
    assert replace(read, name="", source="") == replace(model("llama-2-13b"), name="", source="", **field)


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in LLAMA.items() if k != key}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (without("hidden_size"), r"my-model/config.json: hidden_size` must be given"),
        (without("model_type"), r"model_type` must be a supported architecture; got None.*llama, mistral, qwen2"),
        (LLAMA | {"model_type": "mamba"}, r"model_type` must be a supported architecture; got 'mamba'.*opt, gpt2"),
        (LLAMA | {"num_local_experts": 8}, r"num_local_experts` must be absent: mixtures of experts.*dense text"),
        (QWEN3 | {"model_type": "qwen3_moe", "num_experts": 128}, r"mixtures of experts are not modelled"),
        (LLAMA | {"hidden_size": 5120.5}, r"hidden_size` must be a positive integer \[-\]; got 5120.5"),
        (LLAMA | {"num_hidden_layers": -40}, r"num_hidden_layers` must be a positive integer.*got -40"),
        (LLAMA | {"num_hidden_layers": True}, r"num_hidden_layers` must be a positive integer.*got True"),
        (LLAMA | {"vocab_size": "32000"}, r"vocab_size` must be a positive integer.*got '32000'"),
        (LLAMA | {"hidden_size": 5121}, r"hidden_size` must be a multiple of the 40 heads.*got 5121"),
        (LLAMA | {"num_key_value_heads": 7}, r"`kv_heads` must divide the 40 query heads"),
        (LLAMA | {"tie_word_embeddings": "yes"}, r"tie_word_embeddings` must be true or false; got 'yes'"),
        (LLAMA | {"hidden_size": float("nan")}, r"must be a readable JSON file \(NaN is not a number in JSON\)"),
        (json.dumps(LLAMA)[:60], r"`config` must be a readable JSON file \(.*char.*my-model/config.json"),
        ("[1, 2]", r"must be a JSON object"),
        ("", r"must be a readable JSON file"),
    ],
)
def test_bad_configs_are_refused_by_file_and_key(tmp_path: Path, values: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        from_hf_config(write(tmp_path, values))


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be a config.json or a folder with one"):
        model(tmp_path)
