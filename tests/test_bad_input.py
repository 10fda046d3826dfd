"""Bad input: exit 2 or 3, one message that names the thing, no traceback, nothing written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tierwise.cli import main

TRACE = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
SMALL = ["--set", "traffic.requests=300", "--set", "search.trials=0"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text(TRACE)
    (tmp_path / "nan.csv").write_text(TRACE + "0.0,100,10\n0.5,nan,10\n")
    (tmp_path / "order.csv").write_text(TRACE + "1.0,100,10\n0.5,100,10\n")
    (tmp_path / "column.csv").write_text("arrived_at,num_decode_tokens\n0.0,5\n")
    (tmp_path / "broken.yaml").write_text("name: x\n  fleet: [1,\n")
    (tmp_path / "twice.yaml").write_text("name: a\nname: b\n")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text('{"model_type": "llama", "hidden_size": 40')
    (tmp_path / "moe").mkdir()
    moe = {"model_type": "mixtral", "num_local_experts": 8, "hidden_size": 4096}
    (tmp_path / "moe" / "config.json").write_text(json.dumps(moe))
    return tmp_path


def no_lengths(trace: str) -> list[str]:
    return [
        *("--set", f"traffic.trace={trace}"),
        *("--set", "traffic.prompt_tokens=null"),
        *("--set", "traffic.output_tokens=null"),
    ]


POOL = "{accelerator: h100-sxm, gpus: 8, price_per_gpu_hour: 2.5}"
ON_POOL = ["--set", 'deployment={"tiers": [{"tier": "13b", "tp": 2}]}']
PREDICT = ["predict", "--target", "llama-2-70b", "--accelerator", "h100-sxm", "--tp", "4"]
CASES: list[tuple[list[str], int, str]] = [
    (["plan", "nowhere.yaml"], 2, "`scenario` must be a YAML file or a shipped name; got 'nowhere.yaml'"),
    (["plan", "{dir}/broken.yaml"], 2, "must be valid YAML"),
    (["plan", "{dir}/twice.yaml"], 2, "key 'name' given twice"),
    (["plan", "{dir}/list.yaml"], 2, "must hold a mapping"),
    (["plan", "{dir}/binary.yaml"], 2, "must be a readable UTF-8 file"),
    (["plan", "--set", "traffic.ratee=3"], 2, "Did you mean `rate`"),
    (["plan", "--set", "tiers.0.drafts.0.acceptence=0.5"], 2, "Did you mean `acceptance`"),
    (["plan", "--set", "traffic.rate"], 2, "must have the form a.b=value"),
    (["plan", "--set", "tiers.9.tp=[2]"], 2, "must index the 3 items"),
    (["plan", "--set", "traffic.rate=-1"], 2, "`traffic.rate` must be greater than 0; got -1"),
    (["plan", "--set", "traffic.rate=.nan"], 2, "`traffic.rate` must be a finite number; got nan"),
    (["plan", "--set", "traffic.rate=fast"], 2, "`traffic.rate` must be a valid number"),
    (["plan", "--set", "fleet.gpus=0"], 2, "`fleet.gpus` must be greater than or equal to 1; got 0"),
    (["plan", "--set", "fleet.price_per_gpu_hour=0"], 2, "`fleet.price_per_gpu_hour` must be greater than 0"),
    (["plan", "--set", "fleet.accelerator=h100"], 2, "h100-sxm"),
    (["plan", "--set", "fleet.gpuss=4"], 2, "Did you mean `gpus`"),
    (["plan", "--set", "fleet=[]"], 2, "`fleet` must have at least 1 item"),
    (["plan", "--set", f"fleet=[{POOL}, {POOL}]"], 2, "`fleet` must have pools of different accelerators; got"),
    (["plan", "--set", f"fleet=[{POOL}]", "--set", "fleet.0.gpus=0"], 2, "`fleet.0.gpus` must be greater than or"),
    (["plan", "--set", f"fleet=[{POOL}]", "--set", "fleet.0.gpuss=1"], 2, "Did you mean `gpus`"),
    (["plan", "--set", f"fleet=[{POOL}, 3]"], 2, "`fleet.1` must be"),
    (["plan", "--set", f"fleet=[{POOL}]", "--set", "fleet.0.accelerator=l40"], 2, "l40s"),
    (["plan", "--set", f"fleet=[{POOL}]", "--set", "traffic.rate=400"], 3, "the load does not fit"),
    (["plan", "--set", "tiers.0.max_num_seqs=[0]"], 2, "`tiers.0.max_num_seqs.0` must be greater than or equal to 1"),
    (["plan", "--set", "tiers.0.drafts.0.draft_lengths=[]"], 2, "`tiers.0.drafts.0.draft_lengths` must"),
    (["plan", "--set", "tiers.0.drafts.0.draft_lengths=[12]"], 2, "must be at most `max_length` 8 [tokens]; got 12"),
    (["plan", "--set", "tiers.0.drafts.0.draft_lengths=[best]"], 2, "`tiers.0.drafts.0.draft_lengths.0` must be"),
    (["simulate", *ON_POOL, "--set", "deployment.tiers.0.accelerator=a100"], 2, "must be one of the fleet's pools"),
    (["plan", "--set", "fleet.profile=nope"], 2, "`profile`"),
    (["plan", "--set", "tiers.0.model=llama-2-13c"], 2, "llama-2-13b"),
    (["plan", "--set", "tiers.0.model={dir}/cut"], 2, "config.json"),
    (["plan", "--set", "tiers.0.model={dir}/moe"], 2, "config.json"),
    (["plan", "--set", "tiers.1.tp=[3]"], 2, "`tp` must split the 64 heads"),
    (["plan", "--set", "tiers.0.drafts.0.acceptance=80"], 2, "pass 0.8, not 80"),
    (["plan", "--set", "tiers.0.drafts.0.source=null"], 2, "needs a `source`"),
    (["plan", "--set", "tiers.0.drafts.0.model=llama-2-70b"], 2, "must be smaller than the target"),
    (["plan", "--set", "quality.outcomes.11=5"], 2, "must be 3 digits"),
    (["plan", "--set", "quality.signal.auroc=[0.8]"], 2, "needs one value per tier (3); got 1"),
    (["plan", "--set", "quality.signal.auroc=[0.8,0.8,80]"], 2, "must be less than or equal to 1; got 80"),
    (["plan", "--set", "objective.lambda_usd=1"], 2, "needs exactly one of"),
    (["plan", "--set", "slo.ttft_p99_s=0"], 2, "`slo.ttft_p99_s` must be greater than 0"),
    (["plan", "--set", "traffic.trace=absent.csv"], 2, "not both"),
    (["plan", *no_lengths("{dir}/absent.csv")], 2, "absent.csv"),
    (["plan", *no_lengths("{dir}/empty.csv")], 2, "empty"),
    (["plan", *no_lengths("{dir}/header.csv")], 2, "trace"),
    (["plan", *no_lengths("{dir}/nan.csv")], 2, "line 3"),
    (["plan", *no_lengths("{dir}/order.csv")], 2, "line 3"),
    (["plan", *no_lengths("{dir}/column.csv")], 2, "num_prefill_tokens"),
    (["plan", *no_lengths("{dir}/nan.csv"), "--set", "traffic.format=parquet"], 2, "Known: vidur, azure, burstgpt"),
    (["plan", *no_lengths("{dir}/nan.csv"), "--set", "traffic.format=azure"], 2, "Missing: TIMESTAMP"),
    (["plan", "--set", "traffic.format=azure"], 2, "with a `trace`"),
    (["plan", "--set", "traffic.arrivals.kind=bursty"], 2, "`traffic.arrivals.kind` must be"),
    (["plan", "--set", "traffic.arrivals.kind=weibull"], 2, "kind weibull needs `cv`"),
    (["plan", "--set", "traffic.arrivals.cv=2"], 2, "with kind gamma or weibull, not poisson"),
    (["plan", "--set", "traffic.arrivals={{kind: weibull, cv: 5000}}"], 2, "must be 0 or lie in [0.0001, 1000]"),
    (["plan", "--set", "traffic.arrivals.kind=piecewise"], 2, "needs `rates` [requests/s] and `durations_s` [s]"),
    (
        ["plan", "--set", "traffic.arrivals={{kind: piecewise, rates: [1, 2, 3], durations_s: [9, 9]}}"],
        2,
        "one for each of 3 rates; got 2",
    ),
    (
        ["plan", "--set", "traffic.arrivals={{kind: piecewise, rates: [0, 0], durations_s: [9]}}"],
        2,
        "`rates` must be finite, at least 0 and not all 0",
    ),
    (["simulate", "--set", "traffic.requests_per_client=8"], 2, "in a closed loop only: give `clients`"),
    (["simulate", "--set", "traffic.think_time_s=8"], 2, "in a closed loop only: give `clients`"),
    (["simulate", "--set", "traffic.clients=8", "--set", "traffic.arrivals.kind=poisson"], 2, "not both"),
    (["plan", "--set", "traffic.clients=8"], 2, "closed loop"),
    (["plan", "--format", "xml"], 2, "xml"),
    (["plan", "--seed", "-1"], 2, "-1"),
    (["plan", "--no-such-flag"], 2, "--no-such-flag"),
    (["plan", *SMALL, "--set", "slo.ttft_p99_s=0.001"], 3, "`slo.ttft_p99_s` = 0.001"),
    (["plan", *SMALL, "--set", "slo.tpot_mean_s=0.0001"], 3, "`slo.tpot_mean_s` = 0.0001"),
    (["plan", *SMALL, "--set", "traffic.rate=500"], 3, "the load does not fit"),
    (["plan", *SMALL, "--set", "fleet.gpus=1", "--set", "tiers.0.tp=[2]", "--set", "tiers.1.tp=[2]"], 3, "fleet.gpus"),
    (
        ["plan", *SMALL, "--set", "objective.quality_floor=0.99"],
        3,
        "`objective.quality_floor` = 0.99 is above",
    ),
    (
        ["plan", *SMALL, "--set", "objective.quality_floor=null", "--set", "objective.budget_usd_per_1000=0.0001"],
        3,
        "is below the cheapest plan",
    ),
    (["simulate", "--set", "deployment.tiers=[{{tier: 99b, tp: 4}}]"], 2, "names no tier '99b'"),
    (["simulate", "--set", "deployment.tiers=[{{tier: 70b, tp: 1}}]"], 3, "do not fit"),
    (["simulate", "--set", "deployment.tiers=[{{tier: 70b, tp: 4, draft: gpt2}}]"], 2, "gpt2"),
    (["predict", "--target", "llama-2-70b"], 2, "accelerator"),
    ([*PREDICT, "--draft", "llama-2-7b", "--acceptance", "80"], 2, "pass 0.8, not 80"),
    ([*PREDICT, "--draft", "llama-2-7b"], 2, "`acceptance` must come with `draft`"),
    ([*PREDICT, "--draft", "llama-2-7b", "--acceptance", "0.8", "--draft-tp", "8"], 2, "`draft-tp` must lie in 1..4"),
    ([*PREDICT, "--draft", "qwen2.5-72b", "--acceptance", "0.8"], 2, "`draft` must be smaller than the target"),
    (["draft", "--target-params", "7e9", "--target-tokens", "2e12", "--draft-tokens", "1e11"], 2, "`cost` must be"),
    (
        ["draft", "--target-params", "-1", "--target-tokens", "2e12", "--draft-tokens", "1e11", "--cost", "flops"],
        2,
        "`target_params` must be finite and above 0",
    ),
    (
        ["draft", "--target-params", "7e9", "--target-tokens", "2e12", "--draft-tokens", "1e11", "--cost", "flops"],
        2,
        "--extrapolate",
    ),
    (
        ["validate", "kernels", "{dir}", "--device", "h100", "--profile", "h100-sxm"],
        2,
        "must hold h100_<model>_mlp.csv",
    ),
    (["validate", "kernels", "{dir}", "--device", "mi300", "--profile", "h100-sxm"], 2, "`device` must be one of"),
    (["validate", "cascade", "{dir}/absent.csv"], 2, "must be a readable CSV file"),
    (["validate", "cascade", "{dir}/nan.csv"], 2, "`"),
    (["validate", "quality", "{dir}/nan.csv"], 2, "`"),
    (["validate", "speculation", "{dir}/absent.csv"], 2, "must be a readable CSV file"),
    ([*PREDICT, "--batch", "0"], 2, "`batch` must be at least 1"),
    ([*PREDICT, "--context", "99999"], 2, "`context` must lie in [0, 4096]"),
    ([*PREDICT, "--precision", "int4"], 2, "`precision` must be one of"),
    (["predict", "--target", "llama-2-70b", "--accelerator", "h100-sxm", "--tp", "3"], 2, "`tp` must split"),
    (["predict", "--target", "llama-2-70b", "--accelerator", "tpu"], 2, "accelerator"),
]


@pytest.mark.parametrize(("args", "code", "words"), CASES, ids=[f"{i}-{c[0][-1][:40]}" for i, c in enumerate(CASES)])
def test_bad_input(
    args: list[str],
    code: int,
    words: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = folder / "out"
    filled = [a.replace("{dir}", str(folder)).replace("{{", "{").replace("}}", "}") for a in args]
    output = [] if "--no-such-flag" in args else ["--output", str(out)]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["tierwise", *filled, *output])
    with pytest.raises(SystemExit) as leave:
        main()
    captured = capsys.readouterr()
    assert leave.value.code == code, captured.err
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("tierwise: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not out.exists() or not any(out.iterdir())
