"""The what-if page: its layout, what a move does, what is written where. Everything it says comes from the planner."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from nicegui import background_tasks, events, run, ui
from starlette.requests import Request

from planner import explain
from planner.launch import resolved
from planner.scenario import Scenario, shipped_scenarios
from planner.simulate import HEADROOM
from planner.whatif import Answer, Confidence, Planner, lambdas, plan_json
from planner.whatif_charts import Chart, Simulated, Stack, charts, simulated_rates
from theory.errors import InfeasibleError, InputError, require

from .style import DARK, LIGHT, variables
from .whatif_draw import options, picture
from .whatif_state import (
    OBJECTIVES,
    Field,
    State,
    field_of,
    fields,
    objective_of,
    of_query,
    settings,
    shown,
    uploaded,
)
from .whatif_verify import Verification

STEPS = 120  # of a slider [-]
THROTTLE_S = 0.05  # between two positions of a slider that is dragged [s]
CALM_S = 0.3  # without a move before intervals are worked out [s]
POLL_S = 0.1  # between two looks at a running simulation [s]
WAIT_S = 60.0  # for the first answer before a page is sent at all [s]
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><path d="M2 13h3V9H2zM6.5 13h3V6h-3zM11 13h3V2h-3z" '
    'fill="#0072b2"/></svg>'
)
CHARTS = {
    "frontier": "Quality against cost",
    "load": "Against load",
    "schedule": "Draft length by batch",
    "step": "Where the time of a round goes",
    "stops": "Where requests stop",
}
STYLE = Path(__file__).with_name("whatif.css")
VALUE = "event => emit(event.target.value)"


def register(planner: Planner, start: State, trusted: bool) -> None:
    """Serve the page of a start state at ``/``.

    Parameters
    ----------
    trusted : bool
        Whether only this machine can open it: then scenarios may name files.
    """

    @ui.page("/", response_timeout=WAIT_S)
    async def index(request: Request) -> None:
        await Page(planner, start, trusted).open(request.query_params.multi_items())


class Page:
    """One open page."""

    def __init__(self, planner: Planner, start: State, trusted: bool) -> None:
        self.planner, self.state, self.start, self.trusted = planner, start, start, trusted
        self.answer: Answer | None = None
        self.confidence: Confidence | None = None
        self.simulated: tuple[Simulated, ...] = ()
        self.verification: Verification | None = None
        self.pending: tuple[State, Scenario, str | None] | None = None
        self.working = False
        self.good = start  # the last state that was answered
        self.feasible = True  # whether that has a plan
        self.count = 1  # answers so far
        self.written: dict[int, str] = {}  # what is read in the browser, by number of element
        self.drawn: dict[int, dict[str, Any]] = {}  # the same of the charts
        self.fields: dict[str, tuple[ui.element, ui.label]] = {}  # each with the place for what is wrong with it
        self.scenario: Scenario

    # --- layout ------------------------------------------------------------------------------------------------------

    async def open(self, query: list[tuple[str, str]]) -> None:
        """Build the page of a link; a broken one opens the start state and says what is wrong."""
        wrong, infeasible = "", ""
        try:
            self.state = of_query(query, self.start)
            self.scenario = self._checked(self.state)
            self.answer = await run.io_bound(self.planner.answer, self.scenario, self.state.folder)
        except InfeasibleError as error:
            infeasible = str(error)
        except InputError as error:
            wrong, self.state = str(error), self.start
            self.scenario = self.state.scenario()
            try:
                self.answer = await run.io_bound(self.planner.answer, self.scenario, self.state.folder)
            except InfeasibleError as none:
                infeasible = str(none)
        self.good, self.feasible = self.state, not infeasible
        self._build()
        self._say(wrong, "wrong") if wrong else self._say(infeasible, "infeasible")
        self._write()
        ui.timer(0.05, self._after, once=True)
        self.watch = ui.timer(POLL_S, self._poll, active=False)

    def _build(self) -> None:
        css, script = (STYLE.with_suffix(kind).read_text(encoding="utf-8") for kind in (".css", ".js"))
        light, dark = (" ".join(f"{k}:{v};" for k, v in variables(p).items()) for p in (LIGHT, DARK))
        ui.add_head_html(f"<style>:root{{{light}}} .body--dark{{{dark}}} {css}</style><script>{script}</script>")
        self.dark = ui.dark_mode(None)
        with ui.element("div").classes("tw-page"):
            self._header()
            with ui.element("aside").classes("tw-side"):
                self.side = ui.element("div").classes("tw-controls")
            with ui.element("main").classes("tw-main"):
                self._main()
        self._controls()

    def _header(self) -> None:
        with ui.element("header").classes("tw-header"):
            ui.html(f'<span class="tw-logo">{ICON}</span>', sanitize=False)
            ui.label("tierwise").classes("tw-name")
            ui.label("what-if").classes("tw-sub")
            names = list(shipped_scenarios())
            names += [] if self.state.name in names else [self.state.name]
            self.source = ui.select(names, value=self.state.name, on_change=self._chosen)
            self.source.props("dense outlined options-dense").classes("tw-scenario").mark("scenario")
            self.file = ui.upload(on_upload=self._dropped, auto_upload=True, max_files=None, label="")
            self.file.props('accept=".yaml,.yml"').classes("tw-hidden")
            ui.button("Open YAML", on_click=lambda: self.file.run_method("pickFiles")).props("flat dense no-caps")
            ui.element("div").classes("tw-space")
            self.verify = ui.button("Verify by simulation", on_click=self._verify).props("unelevated dense no-caps")
            self.verify.classes("tw-verify")
            with ui.button("Export").props("flat dense no-caps icon-right=expand_more"), ui.menu():
                ui.menu_item("Scenario (YAML)", self._scenario_file)
                ui.menu_item("Plan (JSON)", self._plan_file)
                ui.menu_item("Command line", self._command)
            ui.button("Copy link", on_click=self._link).props("flat dense no-caps")
            with ui.button(icon="contrast", on_click=self._theme).props("flat dense round aria-label='Light or dark'"):
                ui.tooltip("Light or dark")

    def _main(self) -> None:
        self.banner = ui.label("").classes("tw-banner")
        with ui.element("div").classes("tw-progress") as self.progress:
            self.bar = ui.linear_progress(0, show_value=False).props("rounded")
            self.doing = ui.label("")
            ui.button("Cancel", on_click=self._cancel).props("flat dense no-caps").classes("tw-cancel")
        self.progress.set_visibility(False)
        with ui.element("div").classes("tw-figures") as self.figures:
            with ui.element("section").classes("tw-cards"):
                self.cards = {key: _card(key, label) for key, label in CARDS.items()}
            with ui.element("section").classes("tw-box tw-plan"):
                self.plan = ui.html("", sanitize=False)
                self.binds = ui.html("", sanitize=False).classes("tw-binds")
            with ui.element("section").classes("tw-charts"):
                shown = {name: options(chart) for name, chart in self._data().items()}
                self.charts = {name: self._chart(name, title, shown.get(name, {})) for name, title in CHARTS.items()}
                self.drawn |= {self.charts[name].id: chart for name, chart in shown.items()}
        self.note = ui.html("", sanitize=False).classes("tw-note")
        ui.label("1").classes("tw-hidden tw-count")

    def _chart(self, name: str, title: str, drawn: dict[str, Any]) -> ui.echart:
        with ui.element("div").classes(f"tw-box tw-chart tw-{name}"):
            with ui.element("div").classes("tw-title"):
                ui.label(title)
                with (
                    ui.button(icon="download").props(f"flat dense round size=sm aria-label='Download {title}'"),
                    ui.menu(),
                ):
                    ui.menu_item("SVG", partial(self._picture, name, "svg"))
                    ui.menu_item("PNG", partial(self._picture, name, "png"))
            return ui.echart(drawn, renderer="svg").classes("tw-canvas").mark(name)

    # --- controls ----------------------------------------------------------------------------------------------------

    def _controls(self) -> None:
        self.side.clear()
        self.fields = {}
        group = None
        with self.side:
            self._objective()
            for field in fields(self.scenario):
                if field.group != group:
                    group = field.group
                    ui.label(group).classes("tw-group")
                (self._number if field.kind == "number" else self._choice)(field)

    def _objective(self) -> None:
        kind, value = objective_of(self.scenario)
        ui.label("Objective").classes("tw-group")
        with ui.element("div").classes("tw-field"):
            ui.label("wanted").classes("tw-label")
            names = {key: label for key, (label, _) in OBJECTIVES.items()}
            chosen = ui.select(names, value=kind, on_change=lambda e: self._objective_kind(e.value))
            chosen.props('dense outlined options-dense aria-label="objective"').mark("objective")
        low, high, even = self._objective_range(kind)
        field = Field(f"objective.{kind}", "at", OBJECTIVES[kind][1], "number", "", value, low, high)
        self._number(
            replace(field, label={"quality_floor": "at least", "budget_usd_per_1000": "at most"}.get(kind, "of")), even
        )

    def _objective_range(self, kind: str) -> tuple[float, float, bool]:
        a = self.answer
        if kind == "quality_floor":
            found = [c.rule.quality for c in a.candidates if math.isfinite(c.rule.quality)] if a else []
            return (min(found), max(found), True) if found else (0.5, 1.0, True)
        if kind == "budget_usd_per_1000":
            spent = 1000 * a.chosen.cost if a else 1.0
            return spent / 4, spent * 4, False
        return 1e-5, 0.1, False

    def _objective_kind(self, kind: str) -> None:
        value = "top"
        if kind == "budget_usd_per_1000":
            value = shown(float(f"{1000 * self.answer.chosen.cost:.3g}")) if self.answer else "1"
        elif kind == "lambda_usd":
            ends = lambdas(self.answer) if self.answer else None
            middle = (ends[0] + ends[1]) / 2 if ends and math.isfinite(ends[1]) else 2 * ends[0] if ends else 0.0
            value = shown(float(f"{middle or 0.002:.3g}"))
        self._move([("objective", f"{{{kind}: {value}}}")], None)
        self.scenario = self.state.scenario()
        self._controls()

    def _number(self, field: Field, even: bool = False) -> None:
        """Build a number and its slider, both of plain HTML: what is in them is the browser's, no layout anew a key."""
        with ui.element("div").classes("tw-field") as box:
            ui.label(field.label).classes("tw-label")
            entry = _entry(field.value, "text", {"aria-label": field.path, "inputmode": "decimal"})
            entry.classes("tw-entry").mark(field.path)
            ui.label(field.unit).classes("tw-unit")
        ends = {"min": 0, "max": STEPS, "step": 1}
        slide = _entry(_position(field, field.value, even), "range", ends | {"aria-label": f"{field.path}, slider"})
        slide.classes("tw-slider")
        self.fields[field.path] = box, _error()
        applied = [field.value]

        def typed(event: events.GenericEventArguments) -> None:
            value = str(event.args).strip()
            if value != applied[0]:  # a blank more or less is no move
                applied[0] = value
                ui.run_javascript(f"getHtmlElement({slide.id}).value = {_position(field, value, even)}")
                self._changed(field, value)

        def slid(event: events.GenericEventArguments) -> None:
            value = _at(field, float(event.args), even)
            if value != applied[0]:  # several positions may be one whole number
                applied[0] = value
                ui.run_javascript(f"getHtmlElement({entry.id}).value = {json.dumps(value)}")
                self._changed(field, value)

        entry.on("change", typed, js_handler=VALUE)
        slide.on("input", slid, throttle=THROTTLE_S, js_handler=VALUE)

    def _choice(self, field: Field) -> None:
        with ui.element("div").classes("tw-field") as box:
            ui.label(field.label).classes("tw-label")
            names = dict(field.choices)
            known = field.value if field.value in names else None
            chosen = ui.select(names, value=known, on_change=lambda e: self._changed(field, str(e.value)))
            chosen.props(f'dense outlined options-dense hide-bottom-space aria-label="{field.path}"').mark(field.path)
            chosen.classes("tw-wide")
        self.fields[field.path] = box, _error()

    # --- moves -------------------------------------------------------------------------------------------------------

    def _changed(self, field: Field, value: str) -> None:
        self._move(settings(field, value, self.scenario), field.path)

    def _move(self, moved: list[tuple[str, str]], origin: str | None) -> None:
        """Take in a moved setting: refuse it at its field, or have it answered; the last of many that wait wins."""
        wanted = self.state
        for path, value in moved:
            wanted = wanted.move(path, value)
        try:
            scenario = self._checked(wanted)
        except InputError as error:
            self._mark(str(error), origin)
            return
        if origin is not None:
            self._mark("", origin)
        self.state = wanted
        self.pending = (wanted, scenario, origin)
        if not self.working:
            self.working = True
            background_tasks.create(self._work())

    def _checked(self, state: State) -> Scenario:
        scenario = state.scenario()
        if not self.trusted:
            _no_files(scenario)
        return scenario

    async def _work(self) -> None:
        """Answer what is wanted until nothing is."""
        with self.figures:  # a task of its own does not know its page otherwise
            try:
                while self.pending is not None:
                    (state, scenario, origin), self.pending = self.pending, None
                    await self._answered(state, scenario, origin)
            except Exception as error:  # a defect of ours: said here, and the page goes on
                self._say(
                    f"This could not be answered ({type(error).__name__}: {error}). Move something else.", "wrong"
                )
            finally:
                self.working = False
            await asyncio.sleep(CALM_S)
            await self._after()

    async def _answered(self, state: State, scenario: Scenario, origin: str | None) -> None:
        try:
            answer = await run.io_bound(self.planner.answer, scenario, state.folder)
            assert answer is not None
        except InputError as error:
            self._mark(str(error), origin)
            self.state, self.pending = self.good, None
            return
        except InfeasibleError as error:
            self._stop("stopped: the plan has changed")
            self.simulated, self.scenario, self.good, self.feasible = (), scenario, state, False
            self._say(str(error), "infeasible")
            self._counted()
            return
        self._stop("stopped: the plan has changed")
        self.simulated, self.scenario, self.good, self.feasible = (), scenario, state, True
        self.answer, self.confidence = answer, None
        self._say("", "")
        self._draw()
        self._counted()

    async def _after(self) -> None:
        """Work out the intervals once the settings are at rest."""
        answer = self.answer
        if answer is None or self.working or self.confidence is not None:
            return
        confidence = await run.io_bound(self.planner.confidence, answer, self.state.folder)
        if answer is self.answer:
            self.confidence = confidence
            self._draw()

    # --- what is written ---------------------------------------------------------------------------------------------

    def _data(self) -> dict[str, Chart | Stack]:
        return dict(charts(self.answer, self.confidence, self.simulated)) if self.answer else {}

    def _texts(self) -> dict[ui.html, str]:
        """Return what is to be read, by where it stands."""
        if self.answer is None:
            return {}
        cards = figures(self.answer, self.confidence, self.simulated)
        texts = {at: text for key, card in cards.items() for at, text in zip(self.cards[key], card, strict=True)}
        about = {self.plan: plan_table, self.binds: binding, self.note: provenance}
        return texts | {at: said(self.answer) for at, said in about.items()}

    def _write(self) -> None:
        """Write all that is to be read on a page that is not open yet."""
        for at, text in self._texts().items():
            at.set_content(text)
            self.written[at.id] = text

    def _draw(self) -> None:
        """Write and draw what has changed, in one script: each word of the framework's own lays the page out anew."""
        texts = {at.id: text for at, text in self._texts().items() if self.written.get(at.id) != text}
        drawn = {self.charts[name].id: options(chart) for name, chart in self._data().items()}
        drawn = {at: chart for at, chart in drawn.items() if self.drawn.get(at) != chart}
        self.written |= texts
        self.drawn |= drawn
        if texts or drawn:
            ui.run_javascript(f"tierwise.show({json.dumps(texts)}, {json.dumps(drawn)})")

    def _counted(self) -> None:
        """Note in the browser, after all that was drawn, how many answers there were and the way back to this one."""
        self.count += 1
        address = json.dumps("?" + self.state.query())
        ui.run_javascript(f"tierwise.answered({self.count}, {address})")

    def _say(self, text: str, kind: str) -> None:
        said = ("No plan keeps these constraints: " if text and kind == "infeasible" else "") + text
        if self.banner.text == said:
            return
        self.banner.set_text(said)
        self.banner.classes(replace=f"tw-banner tw-{kind}" if text else "tw-banner")
        stale = "tw-stale" if text and kind == "infeasible" else ""
        self.figures.classes(add=stale, remove="" if stale else "tw-stale")

    def _mark(self, message: str, origin: str | None) -> None:
        """Show what is wrong at the field it is about."""
        at = origin if not message else field_of(message, list(self.fields)) or origin
        if origin is not None and origin.startswith("tiers.") and message:
            at = origin
        if at not in self.fields:
            self._say(message, "wrong")
            return
        box, error = self.fields[at]
        if error.text != message:
            error.set_text(message)
            box.classes(add="tw-bad") if message else box.classes(remove="tw-bad")

    # --- scenarios ---------------------------------------------------------------------------------------------------

    async def _chosen(self, event: events.ValueChangeEventArguments[str]) -> None:
        if event.value in shipped_scenarios() and event.value != self.state.name:
            await self._opened(of_query([("scenario", event.value)], self.start))

    async def _dropped(self, event: events.UploadEventArguments) -> None:
        content = await event.file.read()
        self.file.reset()
        try:
            await self._opened(uploaded(event.file.name, content, self.start.folder))
        except InputError as error:
            self._say(str(error), "wrong")

    async def _opened(self, state: State) -> None:
        """Show another scenario; one that is broken leaves the page as it is."""
        try:
            scenario = self._checked(state)
            answer: Answer | None = await run.io_bound(self.planner.answer, scenario, state.folder)
        except InfeasibleError as error:
            answer, message = None, str(error)
        except InputError as error:
            self._say(str(error), "wrong")
            return
        self._stop("stopped: the plan has changed")
        self.state, self.scenario, self.simulated, self.confidence = state, scenario, (), None
        self.good, self.feasible = state, answer is not None
        self.source.set_options([*dict.fromkeys([*shipped_scenarios(), state.name])], value=state.name)
        if answer is None:
            self._say(message, "infeasible")
            self._controls()
            self._counted()
            return
        self.answer = answer
        self._say("", "")
        self._controls()
        self._draw()
        self._counted()
        await self._after()

    # --- simulation --------------------------------------------------------------------------------------------------

    def _verify(self) -> None:
        if self.answer is None or not self.feasible:
            ui.notify("There is no plan to simulate.", type="warning")
            return
        if self.verification is not None and self.verification.running:
            return
        self.simulated = ()
        a = self.answer
        self.verification = Verification.start(a.problem, a.chosen, simulated_rates(a))
        self.watch.activate()
        self.verify.disable()
        self.progress.set_visibility(True)
        self._progressed()

    def _poll(self) -> None:
        v = self.verification
        if v is None or not v.running:
            return
        before = len(v.done)
        v.poll()
        self._progressed()
        if len(v.done) > before:
            self.simulated = tuple(v.done)
            self._draw()
        if len(v.done) == len(v.rates) or v.ended:
            self._finished(v.said)

    def _progressed(self) -> None:
        v = self.verification
        assert v is not None
        self.bar.set_value((len(v.done) + 0.15) / len(v.rates))
        at, requests = min(len(v.done) + 1, len(v.rates)), self.answer.problem.workload.requests if self.answer else 0
        each = f"simulating {requests} requests at load {at} of {len(v.rates)}"
        self.doing.set_text(v.said or each)

    def _cancel(self) -> None:
        self._stop("cancelled")

    def _stop(self, why: str) -> None:
        if self.verification is not None and self.verification.running:
            self.verification.cancel()
            self._finished(why)

    def _finished(self, said: str) -> None:
        self.watch.deactivate()
        self.verify.enable()
        self.progress.set_visibility(False)
        if said:
            ui.notify(f"Simulation {said}", position="bottom-right", type="info")

    # --- out ---------------------------------------------------------------------------------------------------------

    def _scenario_file(self) -> None:
        here = self.state.folder
        text = resolved(self.scenario, self.scenario.search.seed, here, here)
        ui.download.content(text.encode(), f"{_slug(self.scenario.name)}.yaml", "application/yaml")

    async def _plan_file(self) -> None:
        if self.answer is None or not self.feasible:
            ui.notify("There is no plan to export.", type="warning")
            return
        confidence = self.confidence or await run.io_bound(self.planner.confidence, self.answer, self.state.folder)
        assert confidence is not None
        own = next((s.figures for s in self.simulated if s.asked), None)
        text = json.dumps(plan_json(self.answer, confidence, own), indent=2, allow_nan=False)
        ui.download.content(f"{text}\n".encode(), f"{_slug(self.scenario.name)}-plan.json", "application/json")

    async def _picture(self, name: str, kind: Any) -> None:
        chart = self._data().get(name)
        if chart is None:
            ui.notify("There is no plan to draw.", type="warning")
            return
        data = await run.io_bound(picture, chart, kind, self.scenario.name)
        assert data is not None
        ui.download.content(data, f"{_slug(self.scenario.name)}-{name}.{kind}")

    def _command(self) -> None:
        with ui.dialog() as dialog, ui.card().classes("tw-dialog"):
            ui.label("The same plan from the shell, simulated and explained:")
            ui.code(self.state.command(), language="bash")
            ui.button("Close", on_click=dialog.close).props("flat dense no-caps")
        dialog.open()

    async def _link(self) -> None:
        query = json.dumps("?" + self.state.query())
        link = await ui.run_javascript(f"location.origin + location.pathname + {query}")
        ui.clipboard.write(link)
        ui.notify("Link copied: it opens this page as it is now.", position="bottom-right")

    async def _theme(self) -> None:
        dark = await ui.run_javascript("document.body.classList.contains('body--dark')")
        self.dark.set_value(not dark)


# --- text ------------------------------------------------------------------------------------------------------------

CARDS = {
    "gpus": "GPUs",
    "cost": "USD / 1000 requests",
    "quality": "Quality [share right]",
    "correct": "USD / 1000 right",
    "ttft": "p99 TTFT, visit",
    "tpot": "Mean TPOT, visit",
    "e2e": "Mean time to answer",
    "lambda": "Best for lambda",
}


def _card(key: str, label: str) -> tuple[ui.html, ui.html]:
    with ui.element("div").classes(f"tw-card tw-card-{key}"):
        ui.label(label).classes("tw-card-label")
        value = ui.html("", sanitize=False).classes("tw-card-value").mark(f"card-{key}")
        return value, ui.html("", sanitize=False).classes("tw-card-below")


def _entry(value: object, kind: str, attributes: dict[str, Any]) -> ui.element:
    """Return an input of plain HTML; ``^value`` is what it starts with, the framework never writes it again."""
    found = ui.element("input")
    found.props.update(attributes | {"^value": value, "type": kind, "autocomplete": "off", "spellcheck": "false"})
    return found


def _error() -> ui.label:
    return ui.label("").classes("tw-error").props("role=alert")


def figures(
    answer: Answer, confidence: Confidence | None, simulated: tuple[Simulated, ...]
) -> dict[str, tuple[str, str]]:
    """Return value and small print of each headline card: provenance, interval, what was simulated."""
    a, p, slo = answer, answer.problem, answer.problem.scenario.slo
    own = next((s.figures for s in simulated if s.asked), None)
    now = explain.point(p, a.space, a.chosen)
    steps = " + ".join(dict.fromkeys(pool.profile.provenance for pool in p.pools))
    tpot = confidence.predicted["tpot_interval_s"] if confidence else None
    ends = lambdas(a)
    correct = now["usd_per_correct_answer"]
    known = now["quality"] is not None
    return {
        "gpus": (str(now["gpus"]), _below(f"of {sum(x.gpus for x in p.pools)}", "planned")),
        "cost": (
            f"{now['usd_per_1000_requests']:.3f}",
            _below(
                f"{now['usd_per_hour']:.3g} USD/h",
                "given prices",
                _run(own, ("cost", "usd_per_1000_requests"), 1, ".3f"),
            ),
        ),
        "quality": (
            f"{now['quality']:.4f}" if known else "unknown",
            _below("", "given outcomes" if known else "no outcomes given", _run(own, ("quality", "mean"), 1, ".4f")),
        ),
        "correct": (
            f"{1000 * correct:.3f}" if correct is not None else "none",
            _below("", "given prices", _run(own, ("cost", "usd_per_correct_answer"), 1000, ".3f")),
        ),
        "ttft": (
            _time(now["ttft_p99_s"]),
            _below(f"SLO {_time(slo.ttft_p99_s)}", steps, _run(own, ("ttft_s", "p99"), 1000, ".0f", " ms")),
        ),
        "tpot": (
            _time(now["tpot_mean_s"]),
            _below(
                f"{1000 * tpot[0]:.3g} to {1000 * tpot[1]:.3g} ms, 90 %" if tpot else "…",
                steps,
                _run(own, ("tpot_s", "mean"), 1000, ".3g", " ms"),
            ),
        ),
        "e2e": (_time(now["e2e_mean_s"]), _below("", steps, _run(own, ("e2e_s", "mean"), 1, ".3g", " s"))),
        "lambda": (
            "none"
            if ends is None
            else f"{ends[0]:.3g} to {ends[1]:.3g}"
            if math.isfinite(ends[1])
            else f"≥ {ends[0]:.3g}",
            _below("USD per right answer" if ends else "on no hull", "enumerated"),
        ),
    }


def _below(text: str, tag: str, simulated: str = "") -> str:
    said = f"<span>{text}</span>" if text else ""
    return f'{said}<span class="tw-tag">{tag}</span>{simulated}'


def _run(own: dict[str, Any] | None, at: tuple[str, str], factor: float, form: str, unit: str = "") -> str:
    """Return a simulated value with its interval."""
    if own is None or own[at[0]] is None:
        return ""
    tree, key = own[at[0]], at[1]
    ends = tree.get("interval" if key == "mean" else f"{key}_interval") or [None, None]
    if tree[key] is None:
        return ""
    low, high = ("?" if e is None else f"{factor * e:{form}}" for e in ends)
    return f'<span class="tw-sim">sim. {factor * tree[key]:{form}} ({low} to {high}){unit}</span>'


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def plan_table(answer: Answer) -> str:
    """Return the tiers of the plan as a table of HTML; names are escaped."""
    rows = []
    used = dict(zip((g.tier for g in answer.chosen.groups), answer.search.used(answer.chosen), strict=True))
    for i, t in enumerate(explain.tiers(answer.problem, answer.space, answer.chosen)):
        group = answer.chosen.groups[i]
        lengths = ", ".join(f"{lo}-{hi}: {n}" for lo, hi, n in t["schedule"][:3]) + (
            " …" if len(t["schedule"]) > 3 else ""
        )
        alpha = "-"
        if t["acceptance"] is not None:
            low, high = t["acceptance_interval"]
            tag = f"<span class='tw-tag'>{escape(t['acceptance_provenance'])}</span>"
            alpha = f"{t['acceptance']:.2f} ({low:.2f} to {high:.2f}) {tag}"
        cells = [
            f"<i class='tw-dot tw-dot-{group.tier}'></i>{escape(t['name'])}",
            escape(t["model"]),
            f"{t['replicas']} x TP {t['tp']}",
            escape(t["draft"] or "none"),
            lengths or "-",
            alpha,
            f"{t['share']:.1%}",
            f"{t['stop_fraction']:.1%}",
            f"{HEADROOM * used[group.tier]:.0%}",
        ]
        rows.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    heads = (
        "tier",
        "model",
        "replicas",
        "draft",
        "draft length by batch",
        "acceptance",
        "run",
        "end here",
        "full",
    )
    return f"<table><tr>{''.join(f'<th>{h}</th>' for h in heads)}</tr>{''.join(rows)}</table>"


def binding(answer: Answer) -> str:
    """Return what binds, in a sentence of HTML."""
    b = answer.binding
    return escape(
        f"What binds: the replicas of {b['tier']} are the fullest, {b['used']:.0%} of what they bear by the analytic "
        f"model (plans leave 10 %); {b['constraint']} would break first."
    )


def provenance(answer: Answer) -> str:
    """Return where the numbers are from, in HTML."""
    p = answer.problem
    profiles = ", ".join(dict.fromkeys(pool.profile.name for pool in p.pools))
    steps = ", ".join(dict.fromkeys(pool.profile.provenance for pool in p.pools))
    said = [f"Analytic plan, the one `tierwise simulate` runs. Step times: {steps}, profile {profiles}."]
    if p.left_out > 0:
        said.append(f"{p.left_out:.1%} of requests have more than {p.max_tokens} tokens and are left out.")
    if p.scenario.quality is not None and len(answer.chosen.groups) > 1:
        said.append(f"Stop signal: {p.scenario.quality.signal.source}.")
    return escape(" ".join(said))


def _position(field: Field, value: str, even: bool) -> float:
    try:
        v = min(max(float(value), field.low), field.high)
    except ValueError:
        return STEPS / 2 if value != "top" else STEPS
    if even:
        return round(STEPS * (v - field.low) / max(field.high - field.low, 1e-12))
    return round(STEPS * math.log(v / field.low) / math.log(field.high / field.low)) if field.high > field.low else 0


def _at(field: Field, position: float, even: bool) -> str:
    share = position / STEPS
    if even:
        return f"{field.low + share * (field.high - field.low):.4f}"
    value = field.low * (field.high / field.low) ** share
    return str(max(1, round(value))) if field.whole else shown(float(f"{value:.3g}"))


def _no_files(scenario: Scenario) -> None:
    """Refuse a scenario that names files: the page is open to other machines."""
    names = [
        scenario.traffic.trace,
        *(t.model for t in scenario.tiers),
        *(d.model for t in scenario.tiers for d in t.drafts),
    ]
    names += [pool.profile for pool in scenario.pools]
    files = [
        n
        for n in names
        if n is not None
        and ("/" in n or "\\" in n or n.startswith(".") or n.endswith((".toml", ".json", ".csv", ".jsonl")))
    ]
    require(
        not files,
        "scenario",
        "must not name files on a page that other machines can open",
        files[:1],
        "Leave --host out.",
    )
    require(
        scenario.traffic.trace is None, "traffic.trace", "must not be used on a page that other machines can open", None
    )


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
