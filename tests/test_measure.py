"""Timing real models: what is planned, what is timed, what is kept when a run ends early."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calibration.measure import Grid, Request, commands, load_recipe, measure, need, plan_report, plan_run
from calibration.measurements import COLUMNS, Log, Point, Row, header_of, read_measurements
from theory.catalog import accelerator, model
from theory.errors import InfeasibleError, InputError
from theory.latency import Pass, roofline_time
from tierwise.cli import app

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
transformers = pytest.importorskip("transformers", reason="the torch extra is not installed")
torch.set_num_threads(1)

SMALL = Grid(batch=(1, 2), context=(32,), new=(1, 3), prefill=(16,))


def silent(what: str, done: int, of: int) -> None: ...


def config(folder: Path, **fields: Any) -> Path:
    """A config.json of a tiny Llama."""
    usual = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    usual |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    transformers.LlamaConfig(**usual | fields).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return config(tmp_path_factory.mktemp("models") / "tiny")


def request(tiny: Path, **fields: Any) -> Request:
    return Request(**{"models": (str(tiny),), "grid": SMALL, "warmup": 1, "repeats": 3} | fields)


# --- what is timed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "context", "new"), [("decode", 33, 1), ("verify", 33, 5), ("prefill", 0, 16)])
def test_a_pass_is_the_same_each_time_and_with_either_cache(tiny: Path, phase: Any, context: int, new: int) -> None:
    from calibration.forward import GrowingStep, Loading, StaticStep, load_model

    network = load_model(tiny, model(tiny), Loading("cpu", "fp32"))
    point = Point("tiny", 1, "eager", phase, 2, context, new)
    with torch.inference_mode():
        growing, static = GrowingStep(network, point), StaticStep(network, point)
        static._tokens = growing._tokens
        for ours, theirs in zip(growing._cache.layers if context else (), static._cache.layers, strict=False):
            theirs.keys[:, :, :context], theirs.values[:, :, :context] = ours.keys, ours.values
        first = growing.run().clone()
        again = []
        for step in (growing, static, static):
            step.reset()
            again.append(step.run())
        unreset = growing.run()  # reads its own tokens a second time: must differ
    assert first.shape == (2, 1 if phase == "prefill" else new, 256)
    for logits in again:
        torch.testing.assert_close(logits, first, atol=1e-5, rtol=1e-5)
    assert phase == "prefill" or not torch.allclose(unreset, first, atol=1e-5)


def test_bytes_of_wider_numbers_are_counted() -> None:
    """At four bytes a number the roofline of streaming weights and KV is twice that at two; FLOPs are as they are."""
    from calibration.machine import in_law_numbers

    gpu, shape = accelerator("h100-sxm"), model("llama-2-13b")
    wide = in_law_numbers(gpu, "fp32")
    narrow, wider = (roofline_time(shape, a, Pass(2, context=2048)) for a in (gpu, wide))
    assert float(wider.weights) == pytest.approx(2 * float(narrow.weights))
    assert float(wider.attention) == pytest.approx(2 * float(narrow.attention))
    assert float(wider.weights) == pytest.approx(4 * 12.85e9 / gpu.bandwidth, rel=0.02)
    long = [roofline_time(shape, a, Pass(0, prefill_tokens=8192)).total for a in (gpu, wide)]
    assert float(long[1]) == pytest.approx(float(long[0]), rel=0.05)  # compute-bound: the same FLOP rate


def test_memory_holds_the_weights_and_grows_with_the_cache(tiny: Path) -> None:
    from calibration.forward import Loading, load_model
    from calibration.measure import RESERVE

    shape = model(tiny)
    network = load_model(tiny, shape, Loading("cpu", "fp32"))
    held = sum(p.nbytes for p in network.parameters())
    short, long = (need(shape, Point("t", 1, "eager", "decode", 8, s, 1), "fp32", "cpu") for s in (1, 1001))
    assert held < short - RESERVE["cpu"] < 1.5 * held
    assert long - short >= 8 * 1000 * 2 * 2 * 2 * 16 * 4  # layers x KV heads x keys and values x head size x bytes


def test_every_point_is_timed_once(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    plan = plan_run(request(tiny))
    result = measure(plan, out, silent)
    assert (result["points"], result["measured"], result["measured_before"]) == (5, 5, 0)
    found = read_measurements(out)
    assert found.done() == set(plan.points)
    assert found.models["tiny"] == model(tiny)
    assert not found.accelerator.matrix_units
    assert {"torch", "transformers", "python", "processor", "threads", "started"} <= set(found.header)
    times = [[float(t) for t in cell.split()] for cell in found.rows["times_s"]]
    assert all(len(t) == 3 and sorted(t)[1] == m for t, m in zip(times, found.rows["median_s"], strict=True))
    before = out.read_bytes()
    assert measure(plan_run(request(tiny)), out, silent)["measured"] == 0
    assert out.read_bytes() == before


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_other_conditions_are_refused(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    few = replace(SMALL, batch=(1,), new=(1,))
    measure(plan_run(request(tiny, grid=few)), out, silent)
    with pytest.raises(InputError, match=r"`output` must be a new file.*repeats: 3 there, 4 now.*another --output"):
        measure(plan_run(request(tiny, repeats=4)), out, silent)
    other = config(tmp_path / "tiny", hidden_size=32)
    with pytest.raises(InputError, match="models"):
        measure(plan_run(request(other)), out, silent)
    assert measure(plan_run(request(tiny)), out, silent)["measured_before"] == 2  # more points: the same conditions


def test_a_row_cut_off_is_measured_again(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    plan = plan_run(request(tiny))
    measure(plan, out, silent)
    whole = out.read_bytes()
    out.write_bytes(whole[:-20])
    assert measure(plan, out, silent)["measured"] == 1
    assert read_measurements(out).done() == set(plan.points)
    assert out.read_bytes().count(b"\n") == whole.count(b"\n")


def test_one_run_writes_a_file_at_a_time(tiny: Path, tmp_path: Path) -> None:
    header = header_of({"tiny": model(tiny)}, accelerator("h100-sxm"), {"dtype": "bf16"})
    with Log(tmp_path / "a.csv", header), pytest.raises(InputError, match="in use by another run"):
        Log(tmp_path / "a.csv", header)


def test_what_is_not_a_file_of_measurements_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="must begin with `# format: tierwise measurements 1`; got 'no header'"):
        read_measurements(path)
    header = header_of({"m": model("llama-2-7b")}, accelerator("h100-sxm"), {"dtype": "bf16"})
    with Log(path.with_name("b.csv"), header) as log:
        log.add(Row(Point("stranger", 1, "eager", "decode", 1, 1, 1), "ok", (1.0, 2.0, 3.0)))
    with pytest.raises(InputError, match=r"`model` must be one of the header's: m; got \['stranger'\]"):
        read_measurements(path.with_name("b.csv"))
    with pytest.raises(InputError, match="must be a CSV that `tierwise measure` wrote"):
        read_measurements(tmp_path / "absent.csv")


def test_an_interrupted_run_keeps_its_rows_and_goes_on(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    args = ("measure", str(tiny), "--output", str(out), "--batch", "1,2,3,4,5,6,7", "--context", "16", "--new", "1")
    command = [sys.executable, "-m", "tierwise", *args, "--prefill", "16", "--repeats", "60"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while time.monotonic() < until and (not out.exists() or out.read_text().count(",ok,") < 2):
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 130, said
    assert "interrupted; what was measured is in" in said
    assert "Traceback" not in said
    kept = read_measurements(out).done()
    assert 2 <= len(kept) < 8
    grid = Grid(batch=tuple(range(1, 8)), context=(16,), new=(1,), prefill=(16,))
    plan = plan_run(Request(models=(str(tiny),), grid=grid, repeats=60))
    result = measure(plan, out, silent)
    assert (result["measured_before"], result["measured"]) == (len(kept), 8 - len(kept))


def test_a_run_that_is_killed_goes_on(tiny: Path, tmp_path: Path) -> None:
    """SIGKILL leaves no time to say anything: rows are on disk as they are measured, the lock is gone."""
    out = tmp_path / "a.csv"
    args = ("measure", str(tiny), "--output", str(out), "--batch", "1,2,3,4,5,6,7", "--context", "16", "--new", "1")
    command = [sys.executable, "-m", "tierwise", *args, "--prefill", "16", "--repeats", "60"]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while time.monotonic() < until and (not out.exists() or out.read_text().count(",ok,") < 2):
        time.sleep(0.05)
    running.kill()
    running.wait(timeout=60)
    kept = out.read_text().count(",ok,")
    assert 2 <= kept < 8
    grid = Grid(batch=tuple(range(1, 8)), context=(16,), new=(1,), prefill=(16,))
    result = measure(plan_run(Request(models=(str(tiny),), grid=grid, repeats=60)), out, silent)
    assert result["measured_before"] + result["measured"] == 8
    assert result["measured_before"] in (kept, kept - 1)  # the last row may be cut off


def test_two_processes_split_a_model(tiny: Path, tmp_path: Path) -> None:
    """Tensor parallelism as the recipe runs it, with two processes of a CPU for two GPUs."""
    out = tmp_path / "a.csv"
    launch = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tierwise")
    asked = ("measure", str(tiny), "--tp", "1,2", "--batch", "1,2", "--context", "16", "--new", "1", "--prefill", "16")
    command = [sys.executable, "-m", *launch, *asked, "--repeats", "3", "--output", str(out), "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["measured"] == 3
    found = read_measurements(out)
    assert {p.tp for p in found.done()} == {2}
    grid = Grid(batch=(1, 2), context=(16,), new=(1,), prefill=(16,))
    alone = measure(plan_run(Request(models=(str(tiny),), tp=(1, 2), grid=grid, repeats=3)), out, silent)
    assert (alone["points"], alone["measured"]) == (3, 3)  # the launch for one device, into the same file
    assert {p.tp for p in read_measurements(out).done()} == {1, 2}


def test_points_that_do_not_fit_are_kept_as_such_and_smaller_ones_timed(tiny: Path, tmp_path: Path) -> None:
    """Real allocations that fail: the address space of this process is limited while it measures."""
    out = tmp_path / "a.csv"
    big = {"context": (64, 8000), "new": (1,), "prefill": (16,)}
    plan = plan_run(request(tiny, grid=Grid(batch=(1, 32, 64), **big)))
    status = Path("/proc/self/status").read_text().splitlines()
    used = 1024 * int(next(line.split()[1] for line in status if line.startswith("VmSize")))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000, limits[1]))
        result = measure(plan, out, silent)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    rows = read_measurements(out).rows.set_index(["phase", "batch", "context"])["status"]
    assert rows["decode", 32, 8000] == "oom"
    assert rows["decode", 64, 8000] == "skipped"
    assert {rows["decode", 1, 8000], rows["decode", 64, 64], rows["prefill", 1, 0]} == {"ok"}
    assert "memory ran out at tiny, tp 1, eager, batch 32, 8001 tokens; 2 points were not timed" in result["advice"]
    assert "smaller batch or context; the same command tries them again" in result["advice"]
    again = measure(plan_run(request(tiny, grid=Grid(batch=(1, 32), **big))), out, silent)
    assert (again["measured_before"], again["measured"], again["oom"]) == (4, 1, 0)


# --- the plan --------------------------------------------------------------------------------------------------------


def test_the_recipe_takes_as_long_as_it_says() -> None:
    recipe = load_recipe("node-8xh100")
    plan = plan_run(recipe, dry=True)
    assert plan.expected_s() == pytest.approx(recipe.expected_s, rel=0.1)
    assert {"llama-2-13b", "codellama-34b", "llama-2-70b"} == set(plan.shapes)
    assert {p.tp for p in plan.points} == {1, 2, 4, 8}
    assert not any(p.model == "llama-2-70b" and p.tp == 1 for p in plan.points)
    assert "llama-2-70b 1 eager" in plan.left_out
    assert all(size <= plan.machine.memory for size in plan.bytes.values())


def test_the_dry_run_prints_a_command_for_each_launch(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["measure", "--recipe", "node-8xh100", "--dry-run", "--output", "node.csv"]
    app([*words, "--format", "json"], standalone_mode=False)
    result = json.loads(capsys.readouterr().out)
    lines = [launch["command"] for launch in result["launches"]]
    assert lines[0] == "tierwise measure --recipe node-8xh100 --output node.csv"
    assert lines[3] == f"torchrun --standalone --nproc-per-node 8 -m {lines[0]}"
    assert result["expected_s"] == pytest.approx(sum(launch["expected_s"] for launch in result["launches"]), abs=1)
    assert {"model", "tp", "mode", "points", "done", "memory_gb", "expected_s"} <= set(result["groups"][0])
    assert not Path("node.csv").exists()
    app(words, standalone_mode=False)
    said = capsys.readouterr().out
    assert all(line in said for line in lines)
    assert "Left out: llama-2-70b 1 eager" in said


def test_the_recipes_code_runs_on_a_cpu(tiny: Path, tmp_path: Path) -> None:
    """The recipe's own file with tiny models instead: every row, one device."""
    text = (Path(__file__).parents[1] / "calibration" / "recipes" / "node-8xh100.toml").read_text()
    swaps = {
        'models = ["llama-2-13b", "codellama-34b", "llama-2-70b"]': f'models = ["{tiny}"]',
        "tp = [1, 2, 4, 8]": "tp = [1]",
        'mode = ["eager", "graphs"]': 'mode = ["eager"]',
        'device = "cuda"\naccelerator = "h100-sxm"\ndtype = "bf16"': 'device = "cpu"\ndtype = "fp32"',
        "repeats = 20": "repeats = 3",
        "warmup = 3": "warmup = 0",
        "batch = [1, 4, 16, 64]": "batch = [1, 4]",
        "context = [256, 1024, 3072]": "context = [256]",
        "prefill = [128, 512, 2048]": "prefill = [128]",
    }
    for old, new in swaps.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "mine.toml").write_text(text)
    plan = plan_run(load_recipe(str(tmp_path / "mine.toml")))
    result = measure(plan, tmp_path / "a.csv", silent)
    assert result["measured"] == result["points"] == 2 * 4 + 2
    assert [g["done"] for g in plan_report(plan, tmp_path / "a.csv")["groups"]] == [10]


def test_commands_repeat_what_was_asked(tiny: Path) -> None:
    plan = plan_run(request(tiny, repeats=10, tp=(1, 2), mode=("compile",)))
    assert commands(plan, "a.csv")[1] == (
        f"torchrun --standalone --nproc-per-node 2 -m tierwise measure {tiny} --tp 1,2 --mode compile --batch 1,2 "
        "--context 32 --new 1,3 --prefill 16 --output a.csv"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_message_says_what_to_do() -> None:
    words = ("measure", "llama-2-13b", "--device", "cuda", "--output", "a.csv")
    command = [sys.executable, "-m", "tierwise", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "tierwise: `device` must be one that PyTorch sees; got 'cuda'. There is no CUDA device"
    )
    assert "--device cpu" in done.stderr
    assert "--dry-run --accelerator" in done.stderr


def test_what_never_fits_is_infeasible() -> None:
    grid = Request(models=("llama-2-70b",), device="cuda", accelerator="h100-sxm", dtype="bf16")
    with pytest.raises(InfeasibleError, match=r"nothing fits the 84.9 GB of h100-sxm.*139.\d GB.*more GPUs"):
        plan_run(grid, dry=True)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mode": ("graphs",)}, "`mode` must not be graphs on a CPU; got 'graphs'. CUDA graphs need"),
        ({"mode": ("fast",)}, "`mode` must be of eager, graphs, compile"),
        ({"dtype": "int4"}, "`dtype` must be one of bf16, fp16, fp32; got 'int4'"),
        ({"device": "tpu"}, "`device` must be one of cpu, cuda"),
        ({"clock": "cpu", "threads": 2}, "`clock` must be wall, unless for --device cpu with one thread; got 'cpu'"),
        ({"repeats": 2}, "`repeats` must be at least 3; got 2"),
        ({"models": ()}, "`model` must be given at least once"),
        ({"models": ("llama-2-14b",)}, "`model` must be a name of the catalog"),
        ({"tp": (3,)}, "`tp` must split the 4 heads"),
        ({"tp": (2,)}, "`tp` must be 1, the processes of this launch.*torchrun --standalone --nproc-per-node 2"),
        ({"accelerator": "h100-sxm"}, "`accelerator` must be left out for --device cpu"),
        ({"grid": Grid(context=(9000,))}, "`context` must, new tokens included, be at most 8192"),
    ],
)
def test_bad_requests_are_refused(tiny: Path, tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        measure(plan_run(request(tiny, **fields)), tmp_path / "a.csv", silent)


def test_bad_grids_and_points_are_refused() -> None:
    with pytest.raises(InputError, match="`batch` must be a list of whole numbers"):
        Grid(batch=(0,))
    with pytest.raises(InputError, match="`grid` must hold at least one point"):
        Grid(batch=(), prefill=())
    with pytest.raises(InputError, match="`phase` must be one of decode, verify, prefill"):
        Point("m", 1, "eager", "train", 1, 1, 1)  # type: ignore[arg-type]
    assert set(COLUMNS) >= {"status", "median_s", "times_s", "temperature_c", "clock_mhz"}
