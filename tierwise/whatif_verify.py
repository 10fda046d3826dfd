"""Verify by simulation beside a page that stays alive: the engine in a process of its own, which can be ended."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from planner.build import Problem
from planner.search import Candidate
from planner.whatif_charts import Simulated, simulate_at

COMPILING = "compiling the simulator, once (about 15 s)"


def work(out: Connection, problem: Problem, chosen: Candidate, rates: list[float]) -> None:
    """Simulate a plan at each load and send what is done as it is done: a text, or a result."""
    from simulator.engine import is_compiled

    out.send("" if is_compiled() else COMPILING)
    try:
        for rate in rates:
            out.send(simulate_at(problem, chosen, rate))
    except Exception as error:  # said on the page, never a traceback
        out.send(error.args[0] if error.args else type(error).__name__)


@dataclass(slots=True, eq=False)
class Verification:
    """A simulation under way; ``poll`` from time to time."""

    rates: list[float]  # the load asked about first [requests/s]
    done: list[Simulated] = field(default_factory=list)
    said: str = "starting"
    _process: BaseProcess | None = None
    _end: Connection | None = None

    @classmethod
    def start(cls, problem: Problem, chosen: Candidate, rates: list[float]) -> Verification:
        """Begin in a fresh process, which inherits nothing of the page's threads."""
        context = multiprocessing.get_context("spawn")
        end, far = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(far, problem, chosen, rates), daemon=True)
        process.start()
        far.close()
        return cls(rates, _process=process, _end=end)

    @property
    def running(self) -> bool:
        """Return whether there is more to come."""
        return self._process is not None

    @property
    def ended(self) -> bool:
        """Return whether nothing more will come."""
        return self._process is None

    def poll(self) -> None:
        """Take in what has come; a process that ended early leaves a word about it."""
        if self._process is None or self._end is None:
            return
        alive = self._process.is_alive()
        try:
            while self._end.poll():
                came = self._end.recv()
                if isinstance(came, Simulated):
                    self.done.append(came)
                    self.said = ""
                else:
                    self.said = came
        except EOFError:
            alive = False
        if len(self.done) == len(self.rates) or not alive:
            if len(self.done) < len(self.rates):
                self.said = self.said or f"the simulation ended early (exit code {self._process.exitcode})"
            self._close()

    def cancel(self) -> None:
        """End it now; what is done is kept."""
        if self._process is not None:
            self._process.terminate()
            self.said = "cancelled"
            self._close()

    def _close(self) -> None:
        assert self._process is not None
        self._process.join(timeout=2)
        self._process, self._end = None, None
