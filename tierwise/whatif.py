"""``tierwise whatif``: a local page on which a scenario's settings move and its plan moves with them.

Built on NiceGUI, for reasons measured in docs/whatif.md: events reach Python over a websocket, ECharts redraws in the
browser, all assets come with the package.

The page holds no model: :mod:`planner.whatif` answers, :mod:`planner.whatif_charts` says what is drawn,
:mod:`tierwise.whatif_draw` draws, :mod:`tierwise.whatif_page` lays out, :mod:`tierwise.whatif_verify` simulates.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import sys
import threading
import webbrowser
from importlib import import_module
from importlib.util import find_spec

from theory.errors import InfeasibleError, InputError, require

PORT = 8080
HOST = "127.0.0.1"
RECONNECT_S = 60.0  # a page that lost its connection keeps its state so long [s]


def serve(scenario: str | None, host: str = HOST, port: int = PORT, browser: bool = True) -> None:
    """Serve the page until it is ended.

    Parameters
    ----------
    scenario : str, optional
        Shipped name or YAML file that is open at first.
    host : str
        Address to listen at; only this machine by default.
    port : int
        Port to listen at.
    browser : bool
        Whether to open a browser on it.

    Raises
    ------
    InputError
        If the library is missing, the scenario is broken or the port is taken.
    """
    require(
        find_spec("nicegui") is not None,
        "tierwise whatif",
        "needs NiceGUI",
        None,
        "Install it: pip install 'tierwise[web]'.",
    )
    _check_port(host, port)
    from planner.whatif import Planner

    from .whatif_state import opened

    start, planner = opened(scenario), Planner()
    with contextlib.suppress(InfeasibleError):  # the page says so
        planner.answer(start.scenario(), start.folder)
    url = f"http://{_named(host)}:{port}"
    sys.stderr.write(f"tierwise: what-if page at {url} (Ctrl-C ends it)\n")
    sys.stderr.flush()
    if browser:
        threading.Timer(1.0, webbrowser.open, [url]).start()
    nicegui = import_module("nicegui")
    page = import_module("tierwise.whatif_page")
    page.register(planner, start, trusted=_is_loopback(host))
    nicegui.ui.run(
        host=host,
        port=port,
        title="tierwise what-if",
        favicon=page.ICON,
        dark=None,
        show=False,
        reload=False,
        tailwind=False,
        show_welcome_message=False,
        uvicorn_logging_level="error",
        reconnect_timeout=RECONNECT_S,
    )


def _check_port(host: str, port: int) -> None:
    require(1 <= port <= 65535, "port", "must lie in 1..65535 [-]", port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror:
            raise InputError(f"`host` must be an address of this machine; got {host!r}. Leave it out.") from None
        except OSError as error:
            way_out = f"Another program has it: try --port {port + 1 if port < 65535 else port - 1}."
            reason = error.strerror or "not possible"
            raise InputError(f"`port` must be free on {host}; got {port} ({reason}). {way_out}") from None


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _named(host: str) -> str:
    return f"[{host}]" if ":" in host else "localhost" if host in ("0.0.0.0", "127.0.0.1") else host
