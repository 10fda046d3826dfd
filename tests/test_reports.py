"""Reports and their figures: for one, two and three tiers, without quality, drafts or load; valid, whole, escaped."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import html5lib
import pytest
import yaml

from planner.plan import plan_scenario
from planner.scenario import load_scenario
from planner.simulate import simulation
from tierwise.figures import plan as figures
from tierwise.figures import validation
from tierwise.figures.picture import Picture, files
from tierwise.report import plan as plan_report
from tierwise.report import simulation as simulation_report
from tierwise.report import validation as validation_report
from tierwise.style import LIGHT, variables

EVIL = "one $tier <script>alert(1)</script> & 'more'"
SHORT = {"rate": 3.0, "requests": 4000}
LENGTHS = {
    "prompt_tokens": {"median": 500, "sigma": 0.8, "low": 1, "high": 2000},
    "output_tokens": {"median": 150, "sigma": 0.7, "low": 1, "high": 800},
}
ONE: dict[str, Any] = {
    "name": EVIL,
    "description": "<b>bold</b>",
    "fleet": {"accelerator": "h100-sxm", "gpus": 2, "price_per_gpu_hour": 2.0},
    "traffic": SHORT | LENGTHS,
    "tiers": [{"name": "<i>solo</i>", "model": "llama-2-13b"}],
    "slo": {"ttft_p99_s": 1.0, "tpot_mean_s": 0.05},
    "objective": {"lambda_usd": 0.01},
    "search": {"trials": 2},
}
QUALITY = {
    "outcomes": {"11": 600, "10": 50, "01": 250, "00": 100},
    "source": "made up",
    "signal": {"kind": "confidence", "auroc": [0.8, 0.85], "levels": 4, "source": "assumed"},
}
TWO = ONE | {
    "name": "two",
    "fleet": ONE["fleet"] | {"gpus": 8},
    "tiers": [{"name": "13b", "model": "llama-2-13b"}, {"name": "70b", "model": "llama-2-70b"}],
    "quality": QUALITY,
    "objective": {"quality_floor": "top"},
}
Planned = tuple[dict[str, Any], Any, Path]


def planned(scenario: dict[str, Any] | None, folder: Path) -> Planned:
    if scenario is None:
        asked = load_scenario(overrides=["traffic.requests=4000", "search.trials=4"])
    else:
        (folder / "own.yaml").write_text(yaml.safe_dump(scenario))
        asked = load_scenario(folder / "own.yaml")
    return plan_scenario(*asked), *asked


@pytest.fixture(scope="module", params=[None, TWO, ONE], ids=["three", "two", "one"])
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Planned:
    return planned(request.param, tmp_path_factory.mktemp("scenario"))


def parsed(page: bytes) -> Any:
    """Read a page as a browser would; anything that HTML does not allow is an error here."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(page)


def check_page(page: bytes) -> None:
    """Valid, nothing fetched, no script, ids once, every link within the page leads somewhere, colours by name."""
    root = parsed(page)
    tags = [e.tag for e in root.iter() if isinstance(e.tag, str)]
    assert not {"script", "link", "img", "iframe", "object"} & set(tags)
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    text = page.decode()
    for target in re.findall(r'href="([^"]*)"', text) + re.findall(r"url\(([^)]*)\)", text):
        assert target.startswith("#")
        assert target[1:] in ids
    assert "@import" not in text
    for colour in variables(LIGHT).values():
        assert f"fill: {colour}" not in text.partition("</style>")[2]
    contents = [e.get("href")[1:] for e in root.find("body/nav").iter("a")]
    assert contents == [e.get("id") for e in root.iter("h2")]


def boxes(picture: Picture) -> Iterator[tuple[str, Any]]:
    """Return every text of a figure that is drawn, with where it lies [pixel]."""
    figure = picture.figure
    assert figure is not None
    figure.draw_without_rendering()
    texts = [*figure.texts, *(t for legend in figure.legends for t in legend.get_texts())]
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high and t.label1.get_visible()]
    for text in texts:
        if text.get_visible() and text.get_text():
            yield text.get_text(), text.get_window_extent()


def check_texts(picture: Picture) -> None:
    """No text lies on another, and none leaves the picture."""
    assert picture.figure is not None
    found = list(boxes(picture))
    width, height = picture.figure.bbox.size
    for name, box in found:
        assert box.x0 >= -1, (picture.name, name)
        assert box.y0 >= -1, (picture.name, name)
        assert box.x1 <= width + 1, (picture.name, name)
        assert box.y1 <= height + 1, (picture.name, name)
    for (one, a), (other, b) in itertools.combinations(found, 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, f"{picture.name}: {one!r} lies on {other!r}"


def test_every_figure_of_a_plan_is_drawn_or_says_why_not(plan: Planned) -> None:
    result, *_ = plan
    drawn = {p.name: p for p in figures.pictures(result)}
    assert list(drawn) == ["frontier", "agreement", "stops", "rounds", "schedule", "load"]
    missing = {name for name, p in drawn.items() if p.figure is None}
    assert all(drawn[name].caption.startswith("Not drawn: ") for name in missing)
    drafted = any(t["draft"] for t in result["plan"]["tiers"])
    quality = result["predicted"]["quality"] is not None
    assert missing == ({"schedule"} if not drafted else set()) | ({"frontier"} if not quality else set())
    for picture in drawn.values():
        if picture.figure is not None:
            check_texts(picture)
    for name, data in files(drawn.values()).items():
        assert data.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml"), name


def test_overlapping_texts_are_found() -> None:
    series = [validation.Series("a", [1.0, 2.0], [1.0, 2.0])]
    picture = validation.scatter("s", "S", [validation.Comparison("one", "x [-]", series)])
    check_texts(picture)
    assert picture.figure is not None
    picture.figure.axes[0].text(0.03, 0.97, "on it", transform=picture.figure.axes[0].transAxes, va="top")
    with pytest.raises(AssertionError, match="lies on"):
        check_texts(picture)


def test_the_report_of_a_plan(plan: Planned, tmp_path: Path) -> None:
    result, scenario, start = plan
    written = plan_report.files(result, scenario, start, tmp_path)
    page = written["report.html"]
    check_page(page)
    assert page == plan_report.files(result, scenario, start, tmp_path)["report.html"]
    text = " ".join("".join(parsed(page).itertext()).split())
    assert " ".join(result["explanation"][0].split()) in text
    for sentence in (*result["paragraphs"]["lambda"], *result["paragraphs"]["trust"]):
        assert " ".join(sentence.split()) in text
    for reason in result["evaluated"]["excluded"]:
        assert reason in text
    assert scenario.name in text


def test_names_are_escaped(tmp_path: Path) -> None:
    result, scenario, start = planned(ONE, tmp_path)
    page = plan_report.files(result, scenario, start, tmp_path)["report.html"].decode()
    assert "<script" not in page
    assert "<i>solo" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_a_curve_ends_where_the_replicas_do(plan: Planned) -> None:
    """At its own load the curve is what is predicted; beyond the limit there is nothing."""
    result, *_ = plan
    load = result["curves"]["load"]
    way = load["ways"]["schedule"]
    for x, y in zip(load["requests_per_s"], way["e2e_mean_s"], strict=True):
        assert (y is not None) == (x < way["limit_requests_per_s"])
    known = [y for y in way["e2e_mean_s"] if y is not None]
    assert known == sorted(known)
    below = [
        y for x, y in zip(load["requests_per_s"], way["e2e_mean_s"], strict=True) if x <= load["own_requests_per_s"]
    ]
    assert below[-1] <= result["predicted"]["e2e_mean_s"] * (1 + 1e-9)
    assert all(
        c * x == pytest.approx(load["usd_per_1000_requests"][0] * load["requests_per_s"][0])
        for x, c in zip(load["requests_per_s"], load["usd_per_1000_requests"], strict=True)
    )


def test_the_parts_of_a_round_add_up(plan: Planned) -> None:
    result, *_ = plan
    for row, tier in zip(result["curves"]["rounds"], result["predicted"]["tiers"], strict=True):
        assert sum(row["parts_s"].values()) == pytest.approx(row["round_s"])
        assert row["batch"] == pytest.approx(max(tier["mean_batch"], 1.0))


def test_a_plan_whose_simulation_is_overloaded_is_drawn_and_says_so(plan: Planned, tmp_path: Path) -> None:
    result, scenario, start = plan
    over = copy.deepcopy(result)
    seen = over["simulated"]
    seen["status"] = "overloaded"
    for metric in (seen["ttft_s"], seen["e2e_s"], *(t["ttft_s"] for t in seen["tiers"])):
        metric |= {key: [None, None] for key in metric if key.endswith("interval")}
    page = plan_report.files(over, scenario, start, tmp_path)["report.html"]
    check_page(page)
    assert b"overloaded" in page
    assert b"interval unknown" in page


def test_a_plan_without_its_curves_says_so(plan: Planned) -> None:
    """JSON of an earlier version has none."""
    old = {k: v for k, v in plan[0].items() if k != "curves"}
    drawn = {p.name: p for p in figures.pictures(old)}
    assert drawn["load"].figure is None
    assert drawn["rounds"].caption.startswith("Not drawn: ")


@pytest.mark.parametrize("rate", [2.0, 60.0], ids=["steady", "overloaded"])
def test_the_report_of_a_simulation(rate: float, tmp_path: Path) -> None:
    tier = {"tier": "<i>solo</i>", "tp": 1, "replicas": 1}
    own = ONE | {"traffic": SHORT | LENGTHS | {"rate": rate}, "deployment": {"tiers": [tier]}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    found = simulation(*load_scenario(tmp_path / "own.yaml"), None, 0, lambda *_: None, in_detail=True)
    assert found.result["status"] == ("steady" if rate < 10 else "overloaded")
    written = simulation_report.files(found)
    assert set(written) == {"report.html", "timeseries.svg", "timeseries.png"}
    check_page(written["report.html"])
    assert b"<i>solo" not in written["report.html"]
    assert (b"Overloaded at" in written["report.html"]) == (rate > 10)


def error(n: int = 4, mape: float = 0.1) -> dict[str, Any]:
    return {"n": n, "mape": mape, "median_ape": mape, "bias": -mape, "p90_ape": 2 * mape}


def test_errors_of_many_groups_with_long_names() -> None:
    rows = [{"model": f"a model of a long name {i:03d}" * 3, **error(i, 0.01 * i)} for i in range(60)]
    picture = validation.errors("e", rows, ("model",))
    check_texts(picture)
    assert "19 groups of least error are in the table alone" in picture.caption
    assert validation.errors("e", [{"model": "m", **error(0)}], ("model",)).figure is None


def test_a_validation_without_rows_says_so() -> None:
    nothing = {"n": 0, "mape": None, "median_ape": None, "bias": None, "p90_ape": None}
    result = {
        "time_model": nothing,
        "length_model": nothing,
        "by_group": [],
        "worst": [],
        "skipped": {"time_model": [{"rows": 2, "reason": "no time"}], "length_model": []},
        "rows": 2,
    }
    found: Any = type("Found", (), {"timed": [], "lengths": []})
    written = validation_report.speculation(result, found, "tierwise validate speculation <x>.csv")
    assert set(written) == {"report.html"}
    check_page(written["report.html"])
    text = written["report.html"].decode()
    assert text.count("Not drawn: ") == 2
    assert "2 no time" in text
    assert "&lt;x&gt;.csv" in text


def test_the_report_of_a_cascade() -> None:
    plan = {
        "share_of_gap": 0.9,
        "predicted_cost": 1.0,
        "realised_cost": 1.1,
        "predicted_quality": 0.8,
        "realised_quality": 0.79,
        "realised_cost_interval": [1.0, 1.2],
        "realised_quality_interval": None,
    }
    kinds = ("policy", "pairwise", "singles", "oracle")
    group = {
        "name": "a <set>",
        "n": 100,
        "cost_unit": "USD",
        "area": dict.fromkeys(kinds, 0.5),
        "area_interval": dict.fromkeys(kinds),
        "ece": 0.02,
        "coverage": {"n": 5, "cost": 1.0, "quality": 0.8},
        "plans": [plan],
    }
    written = validation_report.cascade({"by_group": [group] * 4, "folds": 5, "repeats": 2, "seed": 0}, "tierwise")
    check_page(written["report.html"])
    assert set(written) == {"report.html", "cascade.svg", "cascade.png"}
