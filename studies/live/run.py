"""Claim: on models trained on the spot, acceptance, tokens per round, speed-up and a cascade come out as predicted.

    python studies/live/run.py [--quick] [--models DIR] [--result FILE] [--output DIR]

``--result`` takes the live.json that ``tierwise validate live --output DIR`` wrote, instead of running it. Bars on
times are not judged where the machine was too noisy. Exits with 1 when a bar is missed that was judged.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

from calibration.live import FULL, NOISE_LIMIT, QUICK, validate_live
from studies.study import Bar, Study, Validation
from theory.errors import require

HERE = Path(__file__).parent
SAID = {True: "**holds**", False: "**missed**", None: "**not judged**: the machine was too noisy"}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw predicted against measured: acceptance, tokens per round, speed-up."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    laws = (("loss law", result["acceptance"]), ("perplexity law", result["acceptance"]["perplexity_law"]))
    for i, (name, law) in enumerate(laws):
        x, y = ([r[key] for r in law["rows"]] for key in ("measured", "predicted"))
        axes[0].plot(
            x, y, "o" if i == 0 else "x", color=f"C{i}", ms=4, label=f"{name}, worst {law['largest_error']:.3f}"
        )
    rows = result["speedup"]["rows"]
    for i, (name, key) in enumerate((("i.i.d.", "tokens_iid"), ("replay", "tokens_replayed"))):
        for decoding, marker in (("sampling", "o"), ("greedy", "^")):
            of = [r for r in rows if r["decoding"] == decoding]
            x, y = [r["tokens_measured"] for r in of], [r[key] for r in of]
            axes[1].plot(x, y, marker, color=f"C{i}", ms=5, mfc="none" if i else None, label=f"{name}, {decoding}")
    for decoding, marker in (("sampling", "o"), ("greedy", "^")):
        of = [r for r in rows if r["decoding"] == decoding]
        x, y = ([r[key] for r in of] for key in ("measured_speedup", "predicted_speedup"))
        wide = [[max(0.0, v - r["measured_interval"][0]) for v, r in zip(x, of, strict=True)]]
        wide.append([max(0.0, r["measured_interval"][1] - v) for v, r in zip(x, of, strict=True)])
        axes[2].errorbar(x, y, xerr=wide, fmt=marker, ms=5, lw=0.8, label=decoding)
    axes[2].axvline(1, color="0.7", lw=0.8)
    axes[2].axhline(1, color="0.7", lw=0.8)
    noisy = "" if result["noise"]["quiet"] else " (too noisy to judge)"
    titles = ("acceptance, model left out [-]", "tokens per round [tokens]", f"speed-up{noisy} [-]")
    for axis, title in zip(axes, titles, strict=True):
        ends = [min(axis.get_xlim()[0], axis.get_ylim()[0]), max(axis.get_xlim()[1], axis.get_ylim()[1])]
        axis.plot(ends, ends, color="0.5", lw=0.8)
        axis.set(xlabel="measured", ylabel="predicted", title=title)
        axis.legend(fontsize=8)
    figure.suptitle(f"{result['size']} run: models of up to {result['models'][-2]['name']}, trained here")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(columns: list[str], rows: list[list[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in lines)


def readme(result: dict[str, Any]) -> str:
    """Return README.md with the numbers of the result."""
    noise, cascade = result["noise"], result["cascade"]
    bars = [
        [
            v["bar"],
            ", ".join(f"{x:.1f}" for x in v["reached"]) if v["limit"] is None else f"{v['reached']:.3f}",
            "-" if v["limit"] is None else f"{'>' if v['bar'].startswith('largest measured') else '<='} {v['limit']:g}",
            SAID[v["holds"]],
        ]
        for v in result["verdicts"]
    ]
    models = [
        [
            m["name"],
            m["parameters"] or "-",
            f"{m['loss']:.3f} ± {m['loss_standard_error']:.3f}",
            f"{m['perplexity']:.1f}",
        ]
        for m in result["models"]
    ]
    laws = [
        [law["law"], *(f"{law[k]:.4f}" for k in ("mean_error", "worst_model_error", "largest_error", "r_squared"))]
        for law in (result["acceptance"], result["acceptance"]["perplexity_law"])
    ]
    gains = [
        [
            f"{r['draft']} -> {r['target']}",
            r["draft_length"],
            r["decoding"],
            f"{r['acceptance']:.3f}",
            f"{r['tokens_iid']:.2f} / {r['tokens_replayed']:.2f} / {r['tokens_measured']:.2f}",
            f"{r['predicted_speedup']:.2f} / {r['measured_speedup']:.2f}",
            "{:.2f} to {:.2f}".format(*r["measured_interval"]),
        ]
        for r in result["speedup"]["rows"]
    ]
    tokens = result["tokens_per_round"]
    errors = [
        [name, e["n"], f"{e['median_ape']:.1%}", f"{e['mape']:.1%}", f"{e['bias']:+.1%}", f"{e['p90_ape']:.1%}"]
        for name, e in (
            ("acceptance, loss law", result["acceptance"]),
            ("acceptance, perplexity law", result["acceptance"]["perplexity_law"]),
            ("tokens per round, replay", tokens),
            ("tokens per round, i.i.d., sampling", tokens["iid_sampling"]),
            ("tokens per round, i.i.d., greedy", tokens["iid_greedy"]),
            ("tokens per round, acceptance by the loss law", tokens["by_law_sampling"]),
            ("speed-up", result["speedup"]),
            ("speed-up, acceptance by the loss law", result["speedup"]["by_law"]),
            ("step time of a left-out model, a + b layers", result["step_time"]),
            ("cascade cost in seconds", cascade),
            ("cascade cost at planned prices", cascade["at_planned_prices"]),
        )
        if e is not None
    ]
    plans = [
        [
            f"{r['share_of_gap']:.0%}",
            f"{1e3 * r['predicted_cost']:.3f} / {1e3 * r['realised_cost']:.3f}",
            f"{1e3 * r['planned_cost']:.3f} / {1e3 * r['cost_at_planned_prices']:.3f}",
            f"{r['predicted_quality']:.4f} / {r['realised_quality']:.4f} ± {r['realised_quality_standard_error']:.4f}",
            ", ".join(f"{v:.0%}" for v in r["visits"]),
        ]
        for r in cascade["rows"]
    ]
    state = "quiet enough to judge times" if noise["quiet"] else "**too noisy to judge times**"
    full = (
        ""
        if result["size"] == "full"
        else "**This is the quick run.** The full one has not been measured on a quiet machine: `python "
        "studies/live/run.py` on two idle cores (about half an hour) is what the bars are meant for.\n\n"
    )
    return README.format(
        full=full,
        verdicts=table(["bar", "reached", "limit", "verdict"], bars),
        noise=f"the same run repeated at once differs by {noise['repeat_spread']:.1%} (median; 90 % of repeats within "
        f"{noise['repeat_spread_p90']:.1%}), {noise['waited']:.0%} of the wall time was spent waiting for a core; "
        f"limit {NOISE_LIMIT:.0%}: {state}",
        models=table(["model", "parameters", "loss [nat/token]", "perplexity"], models),
        laws=table(["law", "mean error", "worst left-out model", "largest on a pair", "R2, all pairs"], laws),
        gains=table(
            ["pair", "length", "decoding", "acceptance", "tokens: i.i.d. / replay / measured", "speed-up", "90 %"],
            gains,
        ),
        errors=table(["quantity", "n", "median", "mean", "bias", "p90"], errors),
        plans=table(["share of the gap", "cost [ms]", "at planned prices", "quality", "visits"], plans),
        tiers=", ".join(cascade["tiers"]),
        planned=cascade["planned_on"],
        run=cascade["run_on"],
        trained=result["trained_tokens"],
        seed=result["seed"],
        wall=result["wall_s"],
        other=tokens["other_text"],
        losers=result["speedup"]["losers"],
        better=min(laws, key=lambda row: row[1])[0],
        # a difference of two means of halves of one size
        chance=200 * 2**0.5 * max(r["realised_quality_standard_error"] for r in cascade["rows"]),
    )


README = """# Theory held against models trained on the spot

**Claim.** On a family of small models trained here, acceptance is predicted from losses, tokens per round and speed-up
from acceptance and step times taken on other prompts, cost and quality of a cascade from other requests.

{full}{verdicts}

Machine: {noise}. Where it is too noisy, the times below are shown as they came and are not results.

Written by `python studies/live/run.py`, which fails when a judged bar is missed. Each model saw {trained} tokens of
Python's own library, seed {seed}; {wall:.0f} s in all.

![predicted against measured](live.png)

## Models on held-out text

{models}

The trigram is counted on as many tokens as the networks saw.

## Acceptance of the pairs of a left-out model

{laws}

Errors in acceptance [-]: each model in turn is left out of the fit and all its pairs are predicted. Drafts outside the
family (the trigram) are not predicted: such laws do not hold for them. On this run **the law "{better}" has the smaller
error** in the mean.

## Errors, relative

{errors}

## Speculation

Predicted from one half of the prompts, measured on the other; intervals by resampling prompts. {losers} combinations
lose (below 1) and are judged like the others. Greedy runs whose text differs from the target's own: {other}.

{gains}

## Cascade {tiers}

A request is the next token of a held-out text, right if it is the one that stands there; the rule sees the largest
probability of the tiers that ran. Planned on {planned} requests, run tier by tier on {run} others. Predicted / run;
the plans share their requests, and between two halves of this size quality differs by {chance:.1f} points by chance
alone (two standard errors), beside a bar of 2. The cost in seconds is predicted from the visits the plan expects and
the times of visits on requests it knows, served between the others; planned prices are times of all tiers in turn:

{plans}

## What this does not say

One family, one text, one seed, one stream: batches, other tokenizers and large models are not in it. Step times of
models this small are launch times of their layers, not bandwidth. The half of the prompts that predicts and the half
that is measured come from the same text; a law fitted here is good for this family.
"""


def bars(result: dict[str, Any]) -> list[Bar]:
    """Return the bars of the run."""
    return [Bar(v["bar"], v["holds"], v["reached"], v["limit"]) for v in result["verdicts"]]


def headline(result: dict[str, Any]) -> str:
    """Return the number to remember."""
    tokens, acceptance = result["tokens_per_round"], result["acceptance"]
    return (
        f"{result['size']} run: acceptance within {acceptance['largest_error']:.3f}, "
        f"tokens per round {tokens['median_ape']:.1%} off in the median, speed-up {result['speedup']['median_ape']:.1%}"
    )


def validations(result: dict[str, Any]) -> list[Validation]:
    """Return what was predicted of models trained on the spot."""
    noisy = "" if result["noise"]["quiet"] else ", machine too noisy to judge times"
    against = f"measured here ({result['size']} run{noisy})"
    cascade = result["cascade"]
    rows = (
        (result["tokens_per_round"], "tokens per round, replay", "acceptance on other prompts", None),
        (result["speedup"], "speed-up", "acceptance and step times on other prompts", None),
        (result["step_time"], "step time of a left-out model, a + b layers", "the other models", None),
        (cascade, "cost of a cascade in seconds", "outcomes of other requests", cascade["largest_cost_error"]),
        (
            cascade["at_planned_prices"],
            "cost of a cascade at planned prices",
            "outcomes of other requests",
            cascade["largest_priced_error"],
        ),
    )
    laws = {"loss law": result["acceptance"], "perplexity law": result["acceptance"]["perplexity_law"]}
    return [
        *(
            Validation.errors(
                [r["predicted"] - r["measured"] for r in law["rows"]],
                "live",
                f"acceptance of the pairs of a left-out model, {name}",
                against,
                "the pairs of the other models",
                coverage=law["coverage"],
                unit="absolute",
            )
            for name, law in laws.items()
        ),
        *(
            Validation.of(summary, "live", what, against, fitted, **({} if worst is None else {"worst": worst}))
            for summary, what, fitted, worst in rows
            if summary is not None
        ),
        Validation.errors(
            [r["predicted_quality"] - r["realised_quality"] for r in cascade["rows"]],
            "live",
            "quality of a cascade",
            against,
            "outcomes of other requests",
            unit="absolute",
        ),
    ]


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Return the result of a run, or of the one that is given."""
    if given.result is not None:
        require(given.result.is_file(), "--result", "must be the live.json of a run", str(given.result))
        result: dict[str, Any] = json.loads(given.result.read_text(encoding="utf-8"))
        return result
    return validate_live(QUICK if given.quick else FULL, given.models)


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this study."""
    parser.add_argument("--models", type=Path, help="folder in which models are kept")
    parser.add_argument("--result", type=Path, help="live.json of a run")


STUDY = Study(
    __file__,
    __doc__,
    run,
    readme,
    headline,
    bars=bars,
    draw=lambda given, result: plot(result, given.folder / "live.png"),
    n=lambda result: result["speedup"]["n"],
    validations=validations,
    options=options,
    quick="smaller models, fewer prompts",
)


if __name__ == "__main__":
    sys.exit(STUDY.main())
