"""Claim: on the models they were fitted on, the shipped H100 and A100 profiles are within 2.5 % (MAPE).

    python studies/latency_in_sample/run.py --data DIR

DIR holds `vidur`. Nothing is fitted here: the profiles are those in calibration/profiles. There is no quick mode: it
takes seconds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from calibration.profiles import load_profile
from calibration.validate import ACCELERATORS, measured_steps, plot_steps, predict_steps, summarise
from theory.catalog import accelerator

HERE = Path(__file__).parent
BAR = 0.025  # largest MAPE [-]
DEVICES = ("h100", "a100")  # with layers and attention measured


def main(data: Path) -> dict[str, Any]:
    """Return the numbers; write them, the README and the pictures."""
    result: dict[str, Any] = {}
    for device in DEVICES:
        name = ACCELERATORS[device]
        steps = predict_steps(measured_steps(data / "vidur", device), accelerator(name), load_profile(name))
        own = steps.assign(predicted=steps["predicted"] - steps["predicted_communication"] + steps["communication"])
        for phase in ("decode", "prefill"):
            rows = steps["phase"] == phase
            one_gpu = rows & (steps["tp"] == 1)
            result[f"{device} {phase}"] = summarise(steps[rows]) | {
                "mape_one_gpu": summarise(steps[one_gpu])["mape"],
                "mape_with_measured_allreduce": summarise(own[rows])["mape"],
            }
        plot_steps(steps, HERE / f"{device}.png", f"{device}: models the profile was fitted on")
    (HERE / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (HERE / "README.md").write_text(readme(result), encoding="utf-8")
    return result


def readme(result: dict[str, Any]) -> str:
    """Return the page of this study."""
    holds = all(row["mape"] <= BAR for row in result.values())
    lines = [
        "# Models that were fitted",
        "",
        "**Claim.** On the models they were fitted on, the shipped profiles have a MAPE of at most 2.5%.",
        "",
        f"**Verdict: {'holds' if holds else 'does not hold'}.**",
        "",
        "Written by `python studies/latency_in_sample/run.py --data DIR`, which exits with 1 if the bar is missed.",
        "",
        "| device, phase | n | MAPE | bias | p90 | in 90% interval | MAPE at TP 1 | MAPE, measured all-reduce |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {case} | {r['n']} | {r['mape']:.2%} | {r['bias']:+.2%} | {r['p90_ape']:.2%} | {r['coverage']:.1%} | "
        f"{r['mape_one_gpu']:.2%} | {r['mape_with_measured_allreduce']:.2%} |"
        for case, r in result.items()
    ]
    lines += [
        "",
        "Two things are left over, and neither is the law's to learn without becoming a table. Measured all-reduces",
        "below 1 MB jump by a factor of up to six between neighbouring sizes; the profile's curve does not fall, so",
        "that a larger batch is never faster (last column: the same steps with the measured all-reduce). In prefill",
        "the library's choice of kernel scatters products from one shape to the next (H100, width 8192: 1024 tokens",
        "are slower than 768 and 2048 suggest).",
        "",
        "![H100](h100.png)",
        "",
        "![A100](a100.png)",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    found = main(parser.parse_args().data)
    for case, row in found.items():
        print(case, row)
    raise SystemExit(0 if all(row["mape"] <= BAR for row in found.values()) else 1)
