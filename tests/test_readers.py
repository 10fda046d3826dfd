"""calibration/readers.py: each layout with a small synthetic file; what is wrong with a file is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from calibration.readers import (
    VIDUR_MODELS,
    Kernels,
    empty_kernels,
    read_aiconfigurator,
    read_attention,
    read_vidur_allreduce,
    read_vidur_layers,
    read_vidur_mlp,
    serving_rows,
    vidur_models,
)
from theory.catalog import model
from theory.errors import InputError
from theory.work import layer_gemms

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MLP = (
    "tp,num_tokens,emb_ms,input_layernorm_ms,attn_pre_proj_ms,attn_rope_ms,attn_post_proj_ms,"
    "post_attention_layernorm_ms,mlp_up_proj_ms,mlp_act_ms,mlp_down_proj_ms,add_ms\n"
    "1,8,0.1,0.004,0.04,0.003,0.016,0.005,0.08,0.007,0.04,0.002\n"
    "2,8,0.1,0.004,0.02,0.003,0.008,0.005,0.04,0.004,0.02,0.002\n"
    "2,8192,0.1,1,1,1,1,1,1,1,1,1\n"
)


@pytest.fixture
def vidur(tmp_path: Path) -> Path:
    """Return a folder in Vidur's layout, numbers made up."""
    (tmp_path / "h100_Llama-2-7b-hf_mlp.csv").write_text(MLP, encoding="utf-8")
    reduces = ["num_workers,devices_per_node,size_bytes,median_ms", "4,2,1024,9"]
    reduces += [f"2,2,{1024 * i},{t}" for i, t in enumerate((0.01, 0.01, 0.5, 0.02, 0.02), start=1)]
    (tmp_path / "network_h100_dgx_all_reduce.csv").write_text("\n".join(reduces) + "\n", encoding="utf-8")
    (tmp_path / "substitute_attention_aiconfigurator_vllm0140.csv").write_text(
        "device,phase,q_heads,kv_heads,batch_size,tokens,latency_ms\n"
        "h100,decode,32,8,4,512,0.02\nh100,prefill,32,8,2,128,0.03\na100,decode,1,1,1,2,0.01\n",
        encoding="utf-8",
    )
    return tmp_path


@pytest.fixture
def aic(tmp_path: Path) -> Path:
    """Return a folder in AIConfigurator's layout, numbers made up."""
    folder = tmp_path / "h200_sxm"
    folder.mkdir()
    for name in ("gemm_bfloat16_vllm-0.24.0", "gemm_fp8_vllm-0.24.0"):
        (folder / f"{name}.csv").write_text("m,n,k,latency\n8,4096,1024,0.005\n8,32,32,0.002\n", encoding="utf-8")
    head = "kernel_source,batch_size,isl,step,num_heads,num_key_value_heads,head_dim,latency\n"
    (folder / "context_attention_bf16_hd128_vllm-0.24.0.csv").write_text(head + "fa3,2,256,0,32,8,128,0.1\n")
    (folder / "generation_attention_bf16_hd128_vllm-0.24.0.csv").write_text(head + "fa3,4,1,1023,32,8,128,0.02\n")
    (folder / "custom_allreduce_vllm-0.24.0.csv").write_text(
        "backend,allreduce_dtype,num_gpus,message_size,latency\n"
        "vllm_graph,bfloat16,2,1024,0.004\nvllm_eager,bfloat16,2,1024,0.02\n"
    )
    return tmp_path


# --- what is read ----------------------------------------------------------------------------------------------------


def test_vidur_products_have_the_shapes_of_the_model_and_seconds(vidur: Path) -> None:
    rows = read_vidur_layers(vidur, "h100").gemm
    assert len(rows) == 8  # 4 products x 2 degrees; 8192 tokens are more than asked for
    for tp in (1, 2):
        for gemm in layer_gemms(model("llama-2-7b"), tp):
            assert ((rows["n"] == gemm.n) & (rows["k"] == gemm.k)).any()
    down = rows[rows["follows_activation"]]
    assert down["time"].tolist() == pytest.approx([4e-5, 2e-5])
    assert down["k"].tolist() == [11008, 5504]


def test_vidur_element_wise_kernels_are_summed(vidur: Path) -> None:
    rows = read_vidur_layers(vidur, "h100").elementwise
    assert rows["time"].tolist() == pytest.approx([21e-6, 18e-6])


def test_vidur_allreduces_are_one_node_and_smoothed(vidur: Path) -> None:
    rows = read_vidur_allreduce(vidur, "h100").allreduce
    assert rows["tp"].tolist() == [2] * 5
    assert rows["time"].max() < 1e-3  # the single median of 0.5 ms is gone
    assert rows["size"].tolist() == [1024.0 * i for i in range(1, 6)]


def test_attention_counts_the_new_token_and_the_prompts(vidur: Path) -> None:
    kernels = read_attention(vidur, "h100")
    assert kernels.decode[["batch", "query", "context", "heads", "kv_heads"]].to_numpy().tolist() == [
        [4, 1, 511, 32, 8]
    ]
    assert kernels.prefill[["tokens", "cached", "prompts"]].to_numpy().tolist() == [[256, 0, 2]]


def test_aiconfigurator_tables(aic: Path) -> None:
    kernels = read_aiconfigurator(aic, "h200")
    assert kernels.counts() == {"gemm": 4, "decode": 1, "prefill": 1, "elementwise": 0, "allreduce": 1}
    assert set(kernels.gemm["precision"]) == {"bf16", "fp8"}
    assert kernels.decode["context"].tolist() == [1023]
    assert kernels.prefill["tokens"].tolist() == [512]
    assert kernels.allreduce[["size", "time"]].to_numpy().tolist() == [[2048, 4e-6]]  # elements of 2 bytes
    assert len(serving_rows(kernels).gemm) == 2  # 32 x 32 is no product of a model


def test_dimensions_behind_vidur_names_agree_with_the_catalogue() -> None:
    for name, known in (
        ("Llama-2-7b-hf", "llama-2-7b"),
        ("internlm-20b", "llama-2-13b"),
        ("CodeLlama-34b-Instruct-hf", "codellama-34b"),
        ("Llama-2-70b-hf", "llama-2-70b"),
    ):
        assert layer_gemms(VIDUR_MODELS[name], 2) == layer_gemms(model(known), 2)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_an_unknown_device_is_named(vidur: Path) -> None:
    with pytest.raises(InputError, match=r"`device` must be one of a100, a40, h100; got 'mi300'"):
        vidur_models(vidur, "mi300")
    with pytest.raises(InputError, match=r"`device` must be one of h100, h200; got 'b200'"):
        read_aiconfigurator(vidur, "b200")


def test_a_missing_column_is_named(vidur: Path) -> None:
    (vidur / "h100_Llama-2-7b-hf_mlp.csv").write_text(MLP.replace("attn_rope_ms", "rope"), encoding="utf-8")
    with pytest.raises(InputError, match=r"`attn_rope_ms` must be a column of h100_Llama-2-7b-hf_mlp.csv"):
        read_vidur_mlp(vidur, "h100", "Llama-2-7b-hf")


def test_another_unit_is_named(vidur: Path) -> None:
    (vidur / "h100_Llama-2-7b-hf_mlp.csv").write_text(MLP.replace("add_ms", "add_us"), encoding="utf-8")
    with pytest.raises(InputError, match=r"`add_ms` must be a column.*Found add_us: times are read in milliseconds"):
        read_vidur_mlp(vidur, "h100", "Llama-2-7b-hf")


def test_an_unknown_model_is_named(vidur: Path) -> None:
    (vidur / "h100_gpt-9_mlp.csv").write_text(MLP, encoding="utf-8")
    with pytest.raises(InputError, match=r"`model` must be one of .*Llama-2-7b-hf.*got 'gpt-9'"):
        vidur_models(vidur, "h100")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`directory` must hold h100_<model>_mlp.csv files"):
        vidur_models(tmp_path, "h100")


def test_a_gap_is_refused(vidur: Path) -> None:
    (vidur / "h100_Llama-2-7b-hf_mlp.csv").write_text(MLP.replace("2,8,0.1,0.004", "2,8,0.1,"), encoding="utf-8")
    with pytest.raises(InputError, match=r"`input_layernorm_ms` must not be empty anywhere"):
        read_vidur_mlp(vidur, "h100", "Llama-2-7b-hf")


def test_a_time_of_zero_is_refused() -> None:
    rows = pd.DataFrame({"tp": [2], "size": [1024.0], "group": ["tp2"], "time": [0.0]})
    with pytest.raises(InputError, match=r"`allreduce.time` must be finite and above 0 \[s\]; got \[0.0\]"):
        empty_kernels("h100", allreduce=rows)


def test_another_head_width_is_refused(aic: Path) -> None:
    path = aic / "h200_sxm" / "generation_attention_bf16_hd128_vllm-0.24.0.csv"
    path.write_text(path.read_text().replace(",128,", ",64,"))
    with pytest.raises(InputError, match=r"`head_dim` must be 128 \[-\]; got \[64\]"):
        read_aiconfigurator(aic, "h200")


def test_two_devices_do_not_join() -> None:
    with pytest.raises(InputError, match=r"`device` must be h100 in both; got 'a100'"):
        empty_kernels("h100").join(empty_kernels("a100"))


# --- the real files --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "vidur").is_dir(), reason="the Vidur tables are not beside the project")
@pytest.mark.parametrize("device", ["h100", "a100"])
def test_real_vidur_files_are_read(device: str) -> None:
    kernels: Kernels = read_vidur_layers(SHARED / "vidur", device, ("Llama-2-7b-hf",))
    assert kernels.counts()["gemm"] == 4 * 4 * 259
    assert np.median(kernels.gemm["time"]) < 1e-3
    assert read_attention(SHARED / "vidur", device).counts()["decode"] > 1000


@pytest.mark.skipif(not (SHARED / "aiconfigurator").is_dir(), reason="the AIConfigurator tables are not beside it")
def test_real_aiconfigurator_files_are_read() -> None:
    counts = read_aiconfigurator(SHARED / "aiconfigurator", "h200").counts()
    assert counts["gemm"] == 2 * 35742
    assert counts["decode"] == 6770
