"""Parameter counts against the modelling code of transformers, built without weights from the same config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from theory.catalog import from_hf_config
from theory.work import parameters

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
transformers = pytest.importorskip("transformers", reason="the torch extra is not installed")

LLAMA = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("LlamaConfig", LLAMA | {"num_key_value_heads": 16, "vocab_size": 32000}),
    ("LlamaConfig", LLAMA | {"num_key_value_heads": 4, "vocab_size": 128256, "tie_word_embeddings": True}),
    ("LlamaConfig", LLAMA | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    ("LlamaConfig", LLAMA | {"num_key_value_heads": 4, "head_dim": 96}),
    ("MistralConfig", LLAMA | {"num_key_value_heads": 8, "vocab_size": 32768}),
    ("Qwen2Config", LLAMA | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}),
    ("Qwen3Config", LLAMA | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}),
    ("OPTConfig", {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 4, "num_attention_heads": 12}),
    (
        "OPTConfig",
        {
            "hidden_size": 1024,
            "ffn_dim": 4096,
            "num_hidden_layers": 3,
            "num_attention_heads": 16,
            "word_embed_proj_dim": 512,
            "do_layer_norm_before": False,
        },
    ),
    ("GPT2Config", {"n_embd": 768, "n_layer": 3, "n_head": 12, "n_positions": 1024}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "fields"), CONFIGS, ids=[f"{i}-{c[0]}" for i, c in enumerate(CONFIGS)])
def test_counts_are_those_of_the_modelling_code(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    config = getattr(transformers, kind)(**fields)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    counted = sum(p.numel() for p in model.parameters())
    assert parameters(from_hf_config(tmp_path)) == counted
