"""The what-if page in a real browser: load, move, overlay, export, wrong input, link. Skipped without Chromium."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from planner.scenario import load_scenario
from theory.errors import InputError

pytest.importorskip("nicegui", reason="the what-if page needs NiceGUI: pip install 'tierwise[web]'")
playwright = pytest.importorskip("playwright.sync_api", reason="driving the page needs playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
LONG_MS = 90_000  # the longest anything here may take on a busy machine [ms]
REQUESTS = "traffic.requests=2000"
Page = Any


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of the shipped scenario with fewer requests, as the command serves it."""
    import yaml

    scenario, _ = load_scenario(overrides=[REQUESTS])
    file = tmp_path_factory.mktemp("whatif") / "small.yaml"
    file.write_text(yaml.safe_dump(scenario.model_dump(mode="json", exclude_unset=True), sort_keys=False))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tierwise", "whatif", str(file), "--no-browser", "--port", str(port)]
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}  # NiceGUI serves otherwise in tests
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=outside)
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            assert running.poll() is None, running.stderr.read() if running.stderr else ""
            with suppress(OSError):
                urllib.request.urlopen(url, timeout=60).close()
                break
            time.sleep(0.1)
        yield url
    finally:
        running.terminate()
        said = running.communicate(timeout=20)[1]
    assert "Traceback" not in said, said


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture
def opened(server: str, browser: Any) -> Iterator[Callable[[str], Page]]:
    """Opens the page at a link; fails on anything asked of another machine, an error of the page, a traceback."""
    contexts = []
    strange: list[str] = []

    def at(query: str = "") -> Page:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(LONG_MS)
        page.on("request", lambda r: None if r.url.startswith((server, "data:", "blob:")) else strange.append(r.url))
        page.on("pageerror", lambda error: strange.append(str(error)))
        page.goto(server + query)
        page.wait_for_selector(".tw-frontier svg")
        page.wait_for_function("() => document.querySelector('.tw-card-tpot').textContent.includes('90 %')")
        return page

    yield at
    for context in contexts:
        for page in context.pages:
            assert "Traceback" not in page.content()
        context.close()
    assert not strange


def answers(page: Page) -> int:
    return int(page.text_content(".tw-count"))


def after(page: Page, act: Callable[[], object]) -> None:
    """Do something and wait until the page has answered."""
    before = answers(page)
    act()
    page.wait_for_function("n => +document.querySelector('.tw-count').textContent > n", arg=before)


def type_in(page: Page, path: str, value: str) -> None:
    page.fill(f'input[aria-label="{path}"]', value)
    page.press(f'input[aria-label="{path}"]', "Enter")


def choose(page: Page, path: str, name: str) -> None:
    page.click(f'[aria-label="{path}"]')
    page.locator(".q-menu .q-item").get_by_text(name, exact=True).click()


def card(page: Page, key: str) -> float:
    """Return a headline number; times in seconds."""
    number, *unit = page.text_content(f".tw-card-{key} .tw-card-value").split()
    return float(number) * (1e-3 if unit == ["ms"] else 1.0)


def chart(page: Page, name: str) -> dict[str, list[Any]]:
    """Return the points of a chart's series by name, as the browser draws them."""
    found = page.evaluate(
        """name => {
            const at = document.querySelector(`.tw-${name} .nicegui-echart`);
            return getElement(+at.id.slice(1)).chart.getOption().series.map(
                s => [s.name, s.data.map(d => d && d.value !== undefined ? d.value : d), s.markLine?.data]);
        }""",
        name,
    )
    return {series: data or marks for series, data, marks in found}


def test_three_moves_change_numbers_and_figures_the_right_way(opened: Callable[..., Page]) -> None:
    page = opened()
    cost, gpus, tpot = card(page, "cost"), card(page, "gpus"), card(page, "tpot")
    ring = chart(page, "frontier")["this plan"][0]
    assert ring[0] == pytest.approx(cost, abs=5e-4)
    assert ring[1] == pytest.approx(card(page, "quality"), abs=5e-5)

    after(page, lambda: type_in(page, "fleet.price_per_gpu_hour", "5"))
    assert card(page, "cost") == pytest.approx(2 * cost, abs=1.1e-3)
    assert chart(page, "frontier")["this plan"][0] == pytest.approx([2 * ring[0], ring[1]], rel=1e-6)
    assert card(page, "tpot") == tpot

    marks = chart(page, "load")[""]
    now = marks[0]["xAxis"]
    after(page, lambda: type_in(page, "traffic.rate", "4"))
    assert card(page, "gpus") <= gpus
    assert card(page, "cost") > 2 * cost * 0.99  # fewer requests pay for whole GPUs
    assert chart(page, "load")[""][0]["xAxis"] == pytest.approx(now / 3, rel=1e-6)
    slower = card(page, "e2e")

    for tier in range(3):
        after(page, lambda tier=tier: choose(page, f"tiers.{tier}.draft", "none"))
    assert chart(page, "schedule") == {}
    assert card(page, "e2e") > slower
    assert "none" in page.text_content(".tw-plan")


def test_a_slider_moves_its_field(opened: Callable[..., Page]) -> None:
    page = opened()
    slider = page.locator('.tw-slider[aria-label^="traffic.rate,"]')
    size, before = slider.bounding_box(), card(page, "ttft")
    assert size is not None
    after(page, lambda: slider.click(position={"x": 0.4 * size["width"], "y": size["height"] / 2}))
    assert float(page.input_value('input[aria-label="traffic.rate"]')) < 12
    assert card(page, "ttft") != before


@pytest.mark.parametrize(
    ("name", "at", "said"),
    [
        ("load", (0.5, 0.5), ["requests/s", "cost of this plan: ", "USD per 1000 requests", "time to final answer: "]),
        ("stops", (0.3, 0.35), ["answered here ", " %"]),
    ],
)
def test_a_chart_says_what_is_pointed_at(
    opened: Callable[..., Page], name: str, at: tuple[float, float], said: list[str]
) -> None:
    page = opened()
    canvas, read = page.locator(f".tw-{name} .tw-canvas"), []
    for moved in (False, True):  # as it came, and as a move has drawn it
        if moved:
            after(page, lambda: type_in(page, "traffic.rate", "9"))
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        assert box is not None
        for step in (0, 2):
            page.mouse.move(box["x"] + at[0] * box["width"] + step, box["y"] + at[1] * box["height"])
        tip = page.locator("body > div:not(#app):visible").filter(has_text=said[0]).last
        tip.wait_for()
        read.append(tip.inner_text())
        assert all(words in read[-1] for words in said)
        page.mouse.move(0, 0)
        tip.wait_for(state="hidden")
    assert read[0] != read[1]


def test_the_overlay_of_a_simulation_and_a_page_that_stays_alive(opened: Callable[..., Page]) -> None:
    page = opened("?set=traffic.rate=6&set=traffic.requests=60000")
    button = page.locator(".tw-verify")
    button.click()
    page.wait_for_selector(".tw-progress:visible")
    assert button.is_disabled()  # a second press is refused
    page.click("[aria-label='Light or dark']")
    page.wait_for_selector("body.body--dark")
    assert page.is_visible(".tw-progress")  # still at work while the page answered
    page.wait_for_selector(".tw-progress", state="hidden")
    simulated = chart(page, "frontier")["simulated"][0]
    predicted = chart(page, "frontier")["this plan"][0]
    assert simulated == pytest.approx(predicted, rel=0.06)
    low, high = (end[1] for end in chart(page, "frontier")["simulated, interval"][:2])
    assert low < simulated[1] < high
    points = chart(page, "load")["simulated"]
    assert len(points) >= 3
    assert "sim." in page.text_content(".tw-card-tpot")

    button.click()
    page.wait_for_selector(".tw-progress:visible")
    page.click(".tw-cancel")
    page.wait_for_selector(".tw-progress", state="hidden")
    assert button.is_enabled()


def test_what_is_exported_can_be_opened_again(opened: Callable[..., Page], tmp_path: Path) -> None:
    page = opened()
    after(page, lambda: type_in(page, "traffic.rate", "5.5"))
    after(page, lambda: choose(page, "tiers.2.draft", "llama-2-7b"))

    def export(what: str) -> Path:
        page.click("button:has-text('Export')")
        with page.expect_download() as got:
            page.click(f".q-menu .q-item:has-text('{what}')")
        path = tmp_path / got.value.suggested_filename
        got.value.save_as(path)
        return path

    scenario, plan = export("Scenario"), export("Plan")
    told = json.loads(plan.read_text())
    cost, quality = card(page, "cost"), card(page, "quality")
    assert told["predicted"]["usd_per_1000_requests"] == pytest.approx(cost, abs=5e-4)
    assert told["predicted"]["tpot_interval_s"][0] < told["predicted"]["tpot_mean_s"]
    again = load_scenario(scenario)[0]
    assert (again.traffic.rate, again.tiers[2].draft, again.traffic.requests) == (5.5, "llama-2-7b", 2000)

    page.click(".tw-schedule button")
    with page.expect_download() as got:
        page.click(".q-menu .q-item:has-text('SVG')")
    assert Path(got.value.path()).read_bytes().startswith(b"<?xml")

    other = opened()
    assert card(other, "cost") != cost
    after(other, lambda: other.set_input_files("input[type=file]", scenario))
    assert (card(other, "cost"), card(other, "quality")) == (cost, quality)
    assert other.input_value('input[aria-label="traffic.rate"]') == "5.5"

    broken = tmp_path / "broken.yaml"
    broken.write_text(scenario.read_text() + "enginee: {}\n")
    other.set_input_files("input[type=file]", broken)
    other.wait_for_selector(".tw-banner.tw-wrong")
    assert "Did you mean `engine`?" in other.text_content(".tw-banner")
    assert card(other, "cost") == cost


@pytest.mark.parametrize(("path", "value"), [("traffic.rate", "-3"), ("fleet.gpus", "many")])
def test_wrong_input_is_marked_at_its_field_as_the_command_line_says_it(
    opened: Callable[..., Page], path: str, value: str
) -> None:
    with pytest.raises(InputError) as said:
        load_scenario(overrides=[f"{path}={value}"])
    page = opened()
    cost = card(page, "cost")
    type_in(page, path, value)
    page.wait_for_selector(f".tw-error:text-is({json.dumps(str(said.value))})")
    assert page.locator(f'.tw-bad:has(input[aria-label="{path}"])').count() == 1
    assert page.locator(".tw-bad").count() == 1
    assert card(page, "cost") == cost
    after(page, lambda: type_in(page, path, "6"))
    assert page.locator(".tw-bad").count() == 0
    assert page.locator(".tw-error:visible").count() == 0


def test_what_is_not_feasible_is_said_and_can_be_left(opened: Callable[..., Page]) -> None:
    page = opened()
    after(page, lambda: type_in(page, "slo.ttft_p99_s", "0.001"))
    assert "The nearest plan has ttft_p99_s" in page.text_content(".tw-banner")
    assert page.locator(".tw-stale").count() == 1
    after(page, lambda: type_in(page, "slo.ttft_p99_s", "1"))
    assert not page.is_visible(".tw-banner")
    assert page.locator(".tw-stale").count() == 0


def test_the_address_restores_the_state(opened: Callable[..., Page], server: str) -> None:
    page = opened()
    after(page, lambda: type_in(page, "traffic.rate", "9"))
    after(page, lambda: choose(page, "objective", "budget"))
    after(page, lambda: type_in(page, "objective.budget_usd_per_1000", "0.5"))
    page.wait_for_function("() => location.search.includes('0.5')")
    other = opened(page.url.removeprefix(server))
    for key in ("gpus", "cost", "quality", "e2e"):
        assert card(other, key) == card(page, key)
    assert other.input_value('input[aria-label="traffic.rate"]') == "9"
    wrong = opened("?scenario=nothing")
    assert "must be a shipped name" in wrong.text_content(".tw-banner")
