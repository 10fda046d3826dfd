"""Claim: the what-if page is painted within 3 s, and answers a move of a control in a median of 200 ms.

`tierwise whatif` as a user starts it, driven in Chromium. A move is timed in the browser, from the key or click to the
end of the frame in which the last figure was painted. Moves of all controls, one after another; those that need other
services (lengths, GPU type) take longest and are listed by themselves.

    python studies/whatif_speed/run.py [--quick] [--output DIR]

Exits with 1 when a bar is missed. Needs the extra `web`, playwright and a Chromium.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from studies.study import Study
from theory.errors import refuse

MOVE_MS, PAINT_S = 200.0, 3.0  # stated
SLIDERS = {  # by what the page calls them in words
    "arrivals": "traffic.rate",
    "GPUs": "fleet.gpus",
    "price": "fleet.price_per_gpu_hour",
    "p99 TTFT": "slo.ttft_p99_s",
    "mean TPOT": "slo.tpot_mean_s",
    "quality floor": "objective.quality_floor",
    "median prompt": "traffic.prompt_tokens.median",
    "median output": "traffic.output_tokens.median",
}
CHOICES = {
    "draft": ("tiers.2.draft", ("none", "tinyllama-1.1b", "llama-2-7b", "best, or none")),
    "draft length": ("tiers.2.drafts.*.draft_lengths", ("2", "4", "best for each batch")),
    "GPU type": ("fleet.accelerator", ("h200-sxm", "b200", "h100-sxm")),
}
WATCH = """() => {
    window.moves = [];
    let began = 0;
    for (const kind of ['keydown', 'mousedown'])
        document.addEventListener(kind, () => { began = performance.now(); }, true);
    new MutationObserver(() => {
        const from = began, painted = new MessageChannel();
        painted.port1.onmessage = () => window.moves.push(performance.now() - from);
        requestAnimationFrame(() => painted.port2.postMessage(0));  // comes after the frame was painted
    }).observe(document.querySelector('.tw-count'), {childList: true, characterData: true, subtree: true});
}"""


def timed(page: Any, act: Callable[[], object]) -> float:
    """Return how long the page takes to answer, once the intervals of the move before are there [ms]."""
    page.wait_for_function("() => document.querySelector('.tw-card-tpot').textContent.includes('90 %')")
    page.wait_for_timeout(100)
    before = page.evaluate("() => window.moves.length")
    act()
    page.wait_for_function("n => window.moves.length > n", arg=before, timeout=60_000)
    return float(page.evaluate("n => window.moves[n]", before))


def choose(page: Any, path: str, name: str) -> None:
    """Open a choice and take one."""
    page.locator(f'[aria-label="{path}"]').click()
    page.locator(".q-menu .q-item").get_by_text(name, exact=True).click()


def moves(page: Any, count: int) -> dict[str, list[float]]:
    """Return the times of the moves of each control, down and up again [ms]."""
    found: dict[str, list[float]] = {}
    for name, path in SLIDERS.items():
        page.locator(f'.tw-slider[aria-label^="{path},"]').focus()
        keys = ["PageDown"] * count + ["PageUp"] * count  # a tenth of the 120 steps each
        found[name] = [timed(page, lambda key=key: page.keyboard.press(key)) for key in keys]
    for name, (path, values) in CHOICES.items():
        found[name] = [timed(page, lambda v=v, p=path: choose(page, p, v)) for v in values]
    return found


def painted(page: Any, url: str) -> dict[str, float]:
    """Return when the page first showed something and when all figures were there, from the request on [s]."""
    page.goto(url, wait_until="commit")
    page.wait_for_function("() => document.querySelectorAll('.tw-canvas svg').length === 5", timeout=60_000)
    whole, first = page.evaluate(
        "() => [performance.now(), performance.getEntriesByName('first-contentful-paint')[0].startTime]"
    )
    return {"first_paint_s": first / 1000, "figures_s": whole / 1000}


def analyse(quick: bool) -> dict[str, Any]:
    """Return the result of the study."""
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        refuse("chromium", "must be installed", None, "apt-get install chromium")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    start = time.perf_counter()
    server = subprocess.Popen([sys.executable, "-m", "tierwise", "whatif", "--no-browser", "--port", str(port)])
    try:
        while server.poll() is None:
            with suppress(OSError):
                urllib.request.urlopen(url, timeout=60).close()
                break
            time.sleep(0.05)
        up = time.perf_counter() - start
        with sync_playwright() as driver:
            chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
            paints = [painted(chromium.new_page(), url) for _ in range(2 if quick else 5)]
            page = chromium.new_page(viewport={"width": 1600, "height": 1000})
            painted(page, url)
            page.evaluate(WATCH)
            found = moves(page, 1 if quick else 3)
            chromium.close()
    finally:
        server.terminate()
        server.wait(timeout=20)
    every = np.concatenate([np.array(times) for times in found.values()])
    rows = [
        {"control": name, "moves": len(t), "median_ms": float(np.median(t)), "worst_ms": float(np.max(t))}
        for name, t in found.items()
    ]
    paint = {key: float(np.median([p[key] for p in paints])) for key in paints[0]}
    return {
        "start_s": up,
        **paint,
        "moves": len(every),
        "median_ms": float(np.median(every)),
        "p90_ms": float(np.quantile(every, 0.9)),
        "controls": rows,
        "load_average": os.getloadavg()[0],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "verdicts": {
            "first paint under 3 s": paint["first_paint_s"] < PAINT_S,
            "median move under 200 ms": float(np.median(every)) < MOVE_MS,
        },
    }


README = """# Speed of the what-if page

**Claim.** The page is painted within 3 s once the server is up, and a move of a control is answered in a median of
200 ms. Measured: first paint after **{first_paint_s:.2f} s**, all figures after {figures_s:.2f} s;
**{median_ms:.0f} ms** a move (median of {moves}; 90 % under {p90_ms:.0f} ms). {verdict}

Written by `python studies/whatif_speed/run.py`, which fails when the claim stops being true. Machine: {machine};
server, browser and driver share it with other work (load average {load_average:.1f}), so times are upper bounds. The
server is up {start_s:.1f} s after the command.

| control | moves | median [ms] | worst [ms] |
|---|---|---|---|
{rows}

## What it does not say

- Lengths and GPU type change every service: they are worked out anew, once for each value.
- Intervals follow when the settings are at rest; they are not in these times.
- What would refute it: a scenario of more tiers and drafts than the shipped one.
"""


def readme(result: dict[str, Any]) -> str:
    """Return README.md with the numbers of the result."""
    line = "| {control} | {moves} | {median_ms:.0f} | {worst_ms:.0f} |"
    rows = "\n".join(line.format(**r) for r in result["controls"])
    holds = all(result["verdicts"].values())
    verdict = "The claim holds." if holds else "**The claim does not hold here.**"
    return README.format(**(result | {"rows": rows, "verdict": verdict}))


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    return f"{result['median_ms']:.0f} ms a move in the median, first paint after {result['first_paint_s']:.2f} s"


STUDY = Study(
    __file__,
    __doc__,
    lambda given: analyse(given.quick),
    readme,
    headline,
    n=lambda result: result["moves"],
    quick="fewer moves",
    times=("start_s", "first_paint_s", "figures_s", "median_ms", "p90_ms", "worst_ms"),
)


if __name__ == "__main__":
    sys.exit(STUDY.main())
