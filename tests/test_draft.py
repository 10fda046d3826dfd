"""The draft to pre-train: published optima, refusals, fast search against brute force, limits of hardware."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from planner.draft import (
    Costs,
    Hardware,
    Laws,
    Training,
    best_sizes,
    draft_plan,
    hardware_plan,
    nearest_models,
    search_range,
)
from planner.predict import DraftModel, round_time
from theory import catalog
from theory.acceptance import SDSL, SMALL_FAMILY_LOG, Acceptance, acceptance_band
from theory.errors import InfeasibleError, InputError
from theory.latency import Efficiency, Pass, Profile, step_time
from theory.scaling import EPOCH, HOFFMANN, loss
from theory.shapes import (
    DEPTH_EXPONENT,
    HEADS,
    WIDTHS,
    depth,
    llama_shape,
    usual_layers,
    usual_sizes,
)
from theory.specs import Accelerator, Transformer
from theory.speculation import tokens_per_round
from theory.work import layer_gemms, parameters
from tierwise.report.draft import files as report_files

PROFILE = Profile(
    "test",
    "h100-sxm",
    "kernels",
    "assumed",
    Efficiency(),
    residual={"gemm": 0.1, "attention": 0.1, "elementwise": 0.1, "communication": 0.1},
)
SEVENTY = Training(70e9, 2e12, 1e11)


def hardware(**changes: object) -> Hardware:
    return replace(Hardware(catalog.accelerator("h100-sxm"), PROFILE, tp=4), **changes)


@pytest.fixture(scope="module")
def plan() -> dict[str, object]:
    return draft_plan(SEVENTY, hardware(batches=(1, 64), context=1024))


# shapes


def gated_layers() -> tuple[np.ndarray, np.ndarray]:
    rows = [
        (model.layers, sum(g.n * g.k * g.calls for g in layer_gemms(model)))
        for model in map(catalog.model, catalog.models())
    ]
    return np.array(rows, float).T


def test_depth_is_the_line_through_the_catalog() -> None:
    """Theil-Sen: the median slope between pairs of models, through the medians."""
    layers, size = gated_layers()
    i, j = np.triu_indices(len(layers), 1)
    apart = size[i] != size[j]
    slopes = (np.log(layers[i] / layers[j])[apart]) / np.log(size[i] / size[j])[apart]
    assert np.median(slopes) == pytest.approx(DEPTH_EXPONENT, abs=0.02)
    intercept = np.median(np.log(layers)) - np.median(slopes) * np.median(np.log(size))
    assert depth(1e9) == pytest.approx(np.exp(intercept) * 1e9 ** np.median(slopes), rel=0.1)
    assert np.median(np.abs(np.log(layers / [depth(s) for s in size]))) < 0.2


@pytest.mark.parametrize("size", [120e6, 313e6, 1e9, 3.9e9, 8e9, 34e9, 110e9])
@pytest.mark.parametrize("vocab", [32000, 128256])
def test_shape_has_the_parameters_asked_for(size: float, vocab: int) -> None:
    assert parameters(llama_shape(size, vocab)) == pytest.approx(size, rel=0.06)


def test_shapes_of_published_models() -> None:
    """8 B comes out as Llama 3.1 8B is; widths and depths of others within the scatter of the families."""
    eight = llama_shape(8.03e9)
    real = catalog.model("llama-3.1-8b")
    assert (eight.layers, eight.hidden, eight.ffn, eight.kv_heads) == (32, 4096, 14336, 8)
    assert parameters(eight) == parameters(real)
    for name in ("llama-2-13b", "qwen2.5-14b", "opt-30b", "codellama-34b", "opt-66b"):
        known = catalog.model(name)
        shape = llama_shape(parameters(known), known.vocab)
        assert shape.layers == pytest.approx(known.layers, rel=0.25)
        assert shape.hidden == pytest.approx(known.hidden, rel=0.25)


def test_step_time_of_derived_shapes() -> None:
    """At batch 1 half of the catalog's models are within 10 % of the step time of their derived shape."""
    gpu, misses = catalog.accelerator("h100-sxm"), []
    for model in map(catalog.model, catalog.models()):
        shape = llama_shape(parameters(model), model.vocab)
        ours, theirs = (float(step_time(m, gpu, PROFILE, Pass(1, 1, 1024)).total) for m in (shape, model))
        misses.append(abs(ours / theirs - 1))
    assert np.median(misses) < 0.10


def test_widths_split_over_eight_gpus() -> None:
    assert all(heads % 8 == 0 for heads, _ in HEADS)
    assert np.all(np.diff(WIDTHS) > 0)
    assert np.all(np.diff(usual_sizes()) > 0)
    assert usual_layers(4096) == pytest.approx(32, abs=1.5)
    with pytest.raises(InputError, match=r"`parameters` must lie between.*smaller vocabulary"):
        llama_shape(1e7)


# FLOP cost


@pytest.mark.parametrize(("target", "published"), [(13e9, 117e6), (30e9, 189e6), (70e9, 312.5e6), (110e9, 410e6)])
def test_published_optima(target: float, published: float) -> None:
    """SDSL (2026), table 5, at 100 B tokens each, within 1 %."""
    assert draft_plan(Training(target, 1e11, 1e11))["draft_params"] == pytest.approx(published, rel=0.01)
    wrong = replace(SDSL, draft_slope=1.05 * SDSL.draft_slope)
    assert best_sizes(target, 1e11, 1e11, Laws(acceptance=wrong)) != pytest.approx(published, rel=0.01)


def test_fast_search_is_brute_force() -> None:
    """The vectorised search finds the maximum over a fine table of sizes and real draft lengths."""
    targets, n = np.array([7e9, 34e9, 70e9]), np.geomspace(3e7, 3e9, 4001)
    g = np.linspace(0, 30, 601)[:, None]
    found = best_sizes(targets, 2e12, 3e11, Laws(loss=EPOCH))
    for m, best in zip(targets, found, strict=True):
        _, alpha, _ = acceptance_band(SDSL, loss(EPOCH, n, 3e11), loss(EPOCH, m, 2e12))
        gain = (1 - alpha ** (g + 1)) / ((1 - alpha) * (g * n / m + 1))
        assert best == pytest.approx(n[np.argmax(gain.max(axis=0))], rel=0.01)


def test_flop_plan_has_its_keys() -> None:
    plan = draft_plan(SEVENTY)
    for key in ("draft_params", "draft_length", "acceptance", "acceptance_interval", "speedup", "speedup_interval"):
        assert key in plan
    assert (plan["loss_law"], plan["acceptance_law"]) == ("hoffmann-2022", "sdsl")
    assert plan["provenance"]["acceptance_law"]["r_squared"] == 0.602
    assert plan["provenance"]["loss_law"]["target"] == "extrapolated"
    assert "target loss: extrapolated" in plan["notes"]
    low, high = plan["speedup_interval"]
    assert low < plan["speedup"] < high
    low, high = plan["acceptance_interval"]
    assert high - low == pytest.approx(2 * 1.645 * 0.00128**0.5, rel=1e-3)
    assert plan["speedup"] >= max(row["speedup"] for row in plan["curve"]) * 0.999
    assert json.loads(json.dumps(plan)) == plan


def test_more_draft_tokens_help() -> None:
    rows = draft_plan(SEVENTY)["by_draft_tokens"]
    assert np.all(np.diff([row["draft_tokens"] for row in rows]) > 0)
    assert np.all(np.diff([row["speedup"] for row in rows]) > 0)


# refusals


def test_extrapolation_is_refused_unless_asked() -> None:
    with pytest.raises(InputError, match=r"`target_params` must lie in the range of the acceptance law sdsl"):
        draft_plan(Training(7e9, 1e12, 1e11))
    asked = draft_plan(Training(7e9, 1e12, 1e11), laws=Laws(extrapolate=True))
    assert asked["provenance"]["acceptance_law"]["use"] == "extrapolated"
    with pytest.raises(InputError, match="within a factor 10 of what hoffmann-2022 was fitted on"):
        draft_plan(Training(70e9, 15e12, 1e11))
    with pytest.raises(InputError, match="range of the acceptance law small-family-log"):
        draft_plan(SEVENTY, laws=Laws(acceptance=replace(SMALL_FAMILY_LOG, draft_sizes=(1e8, 4e9))))
    with pytest.raises(InputError, match=r"`target_params` must leave drafts inside the laws' ranges"):
        draft_plan(SEVENTY, laws=Laws(acceptance=SMALL_FAMILY_LOG))
    assert search_range(SEVENTY, Laws(extrapolate=True))[1] == 70e9


@pytest.mark.parametrize("name", ["target_params", "target_tokens", "draft_tokens"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_counts_are_checked(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"`{name}` must be finite and above 0.*70e9"):
        replace(SEVENTY, **{name: value})


def test_hardware_is_checked() -> None:
    with pytest.raises(InputError, match="`batch` must be at least 1"):
        hardware(batches=(0,))
    with pytest.raises(InputError, match="`tp` must split"):
        draft_plan(SEVENTY, hardware(tp=3))
    with pytest.raises(InfeasibleError, match="does not fit on 1 x h100-sxm"):
        draft_plan(SEVENTY, hardware(tp=1))


# hardware cost


def test_hardware_plan_has_its_keys(plan: dict) -> None:
    for key in ("draft_params", "draft_length", "acceptance_interval", "speedup_interval", "curve", "by_batch"):
        assert key in plan
    assert [row["batch"] for row in plan["by_batch"]] == [1, 64]
    assert plan["speedup"] == plan["by_batch"][0]["speedup"]
    assert plan["provenance"]["step_time"]["provenance"] == "assumed"
    assert json.loads(json.dumps(plan))["draft_length"] == plan["draft_length"]
    low, high = plan["draft_params_within_1_percent"]
    assert low <= plan["draft_params"] <= high


def test_step_times_widen_the_interval(plan: dict) -> None:
    nearest = min(plan["curve"], key=lambda row: abs(row["draft_params"] - plan["draft_params"]))
    assert plan["speedup_interval"][0] < nearest["speedup_interval"][0]
    assert plan["speedup_interval"][1] > nearest["speedup_interval"][1]


def test_interpolated_draft_times_are_those_of_the_shapes() -> None:
    """Drafts are timed by interpolation between usual widths: within 15 % of the whole shape of that size."""
    costs = Costs(70e9, hardware(batches=(1, 32)), (1e8, 4e9))
    sizes = np.geomspace(1.2e8, 3.5e9, 15)
    shapes = [llama_shape(size) for size in sizes]
    direct = np.array([costs.draft_time(shape, costs.batches, 1024.0) for shape in shapes])
    between = costs.draft(np.array([parameters(shape) for shape in shapes]))
    assert np.abs(between / direct - 1).max() < 0.15
    assert np.all(np.diff(between[:, 0]) > 0)


def test_speedup_is_the_ratio_of_rates(plan: dict) -> None:
    """What the plan says at its draft equals tokens over round time with the planner's own round time."""
    costs = Costs(70e9, hardware(), (1e8, 4e9))
    draft = llama_shape(plan["draft_params"])
    given = Acceptance(plan["acceptance"], plan["acceptance"], plan["acceptance"], "assumed", "")
    pair = DraftModel(draft, given, costs.draft_degree(draft, 1.0))
    times = [
        float(round_time(costs.deployment, PROFILE, pair, np.asarray(g), 1.0, 1024.0))
        for g in (0, plan["draft_length"])
    ]
    rate = float(tokens_per_round(plan["acceptance"], plan["draft_length"])) * times[0] / times[1]
    assert plan["speedup"] == pytest.approx(rate, rel=0.05)  # the shape's layers are whole, the curve's are not


def test_launch_bound_hardware_is_the_memory_bound_limit() -> None:
    """On a GPU without fixed times, at batch 1 and no context, a draft costs its bytes: c tends to N / M."""
    ideal = Efficiency(
        gemm_start=0.0,
        attention_start=0.0,
        element_start=0.0,
        element_row=0.0,
        split_start=0.0,
    )
    gpu = Accelerator("fast", 4e12, 1e12, 1e18, 1e18, 1e18, 132, 5e7, 700)
    bare = replace(hardware(), accelerator=gpu, profile=replace(PROFILE, efficiency=ideal), tp=1, context=0.0)
    costs = Costs(70e9, bare, (1e8, 4e9))
    sizes = np.array([3e8, 1e9, 3e9])
    assert costs.draft(sizes)[:, 0] / costs.plain[0] == pytest.approx(sizes / 70e9, rel=0.35)


def test_overhead_shortens_nothing_but_gain() -> None:
    costs, slower = (Costs(70e9, hardware(overhead=o), (1e8, 4e9)) for o in (0.0, 5e-3))
    fast, slow = hardware_plan(SEVENTY, costs), hardware_plan(SEVENTY, slower)
    assert slow["speedup"] < fast["speedup"]
    assert slow["draft_length"] >= fast["draft_length"]  # a fixed cost is shared by longer drafts


def test_load_takes_the_gain_away(plan: dict) -> None:
    assert plan["by_batch"][1]["speedup"] < plan["by_batch"][0]["speedup"]
    assert plan["by_batch"][1]["draft_length"] <= plan["by_batch"][0]["draft_length"]
    assert plan["schedule"]["gain_over_fixed"] >= 1.0
    ranges = plan["schedule"]["num_speculative_tokens_per_batch_size"]
    assert ranges[0][0] == 1
    assert ranges[-1][1] == plan["largest_batch"]["with_draft"]


def test_draft_takes_memory() -> None:
    plan = draft_plan(SEVENTY, hardware(context=8192.0, batches=(1,)))
    assert plan["largest_batch"]["with_draft"] < plan["largest_batch"]["plain"]
    crowded = draft_plan(SEVENTY, hardware(context=8192.0, batches=(4096,)))
    assert any("does not fit beside this draft" in note for note in crowded["notes"])


def test_a_real_target_may_be_given() -> None:
    target: Transformer = catalog.model("llama-3.1-70b")
    plan = draft_plan(replace(SEVENTY, target_params=float(parameters(target))), hardware(target=target))
    assert plan["target_shape"]["layers"] == 80
    assert plan["provenance"]["target_shape"] == "given"


def test_nearest_models_are_near() -> None:
    assert [name for name, _ in nearest_models(1.3e9, (1e8, 4e9))][:2] == ["opt-1.3b", "llama-3.2-1b"]
    assert nearest_models(1e9, (1e3, 2e3)) == []


@pytest.mark.parametrize("kind", ["flops", "hardware"])
def test_report_is_written(kind: str, plan: dict) -> None:
    files = report_files(plan if kind == "hardware" else draft_plan(SEVENTY))
    assert set(files) == {"report.html", "draft.png", "draft.svg"}
    assert files["draft.png"][:8] == b"\x89PNG\r\n\x1a\n"


def test_laws_matter() -> None:
    """Another loss law is another answer: nothing is ignored."""
    assert best_sizes(70e9, 2e12, 1e11, Laws(loss=EPOCH)) != pytest.approx(
        float(best_sizes(70e9, 2e12, 1e11, Laws(loss=HOFFMANN))), rel=0.005
    )
