"""A report on groups of runs: report.md with the tables, report.html with these and the plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bigdet.config.evaluation import MAX_DETECTIONS
from bigdet.evaluation.coco_metrics import KIND_NAMES
from bigdet.host.files import write_text
from bigdet.reporting.albums import read_albums
from bigdet.reporting.analysis_figures import WIDE, analysis_figures
from bigdet.reporting.budgets import NEAR, budget_sentences, budget_table
from bigdet.reporting.compare import difference_table, equal_ap_sentences, equal_ap_table
from bigdet.reporting.facts import cost_table, environment_table, option_table, run_table
from bigdet.reporting.figures import cost_figures, curve_figures, training_figures
from bigdet.reporting.page import cards_html, pager_html, paragraph_html, table_html, write_page
from bigdet.reporting.runs import Groups
from bigdet.reporting.table import Outcome, Table, outcome_table

RESULTS = (
    "AP in percent: of the last evaluation, the mean over seeds and behind +- their standard "
    "deviation. GPU time is that of training; of it, data wait is what GPUs stood still for. Runs "
    "on CPUs have CPU time instead: that of all threads of the ranks, loader processes "
    "(data.workers) not counted."
)
NOISE = (
    "In percent points. The noise band is two standard errors of the difference of two means, from "
    "the standard deviation within all groups of several seeds."
)
BUDGETS = (
    f"Of the groups whose training took about as long (each at most {NEAR - 1:.0%} longer than the "
    "one before), the one with the highest last AP, and in percent points how far it is ahead of "
    "the others. Finished runs only; what weights from elsewhere had cost is not counted. The "
    "noise band is two standard errors of the difference, as above."
)
EQUAL_AP = (
    "The part of the other run's whole cost that had been spent at the first evaluation that "
    "showed as much. GPU-hours, and CPU-hours, are those of training."
)
IMPORTS = (
    " With imports: what was stated of weights from elsewhere (phases.NAME.start_from.cost) counts "
    "on both sides."
)
PICTURES = (
    "Validation images with the most and the fewest mistakes, as each run drew them at the end of "
    "its last phase; of several seeds, those of the first. Arrow keys page through "
    "them, a click makes them larger."
)
SEEDS = "Means over the seeds of each group; whiskers are one standard deviation."
OTHER_METRIC = (
    "AP by overlap and by class are of VOC's metric; all else is measured as COCO does, with "
    "difficult objects as crowds."
)


def write_report(
    groups: Groups, out: Path, title: str, outcomes: Mapping[str, Sequence[Outcome | None]]
) -> tuple[Path, Path]:
    """Write both files and return their paths.

    Args:
        groups: runs to compare; the first is what the others are compared with.
        out: folder, made if need be.
        title: of the report.
        outcomes: rows of the first table; may have groups of which no run has begun.
    """
    results, results_note = outcome_table(outcomes), RESULTS + _limit_note(groups)
    same, environment = environment_table(groups)
    costs = equal_ap_table(groups)
    imports = IMPORTS if any(name.endswith("with imports") for name in costs.header) else ""
    tables = {
        "Runs": (run_table(groups), ""),
        "Differences": (difference_table(groups), NOISE),
        "Equal time": (budget_table(groups), BUDGETS),
        "Cost at equal AP": (costs, EQUAL_AP + imports),
        "What each phase took": (cost_table(groups), ""),
        "Options that differ": (option_table(groups), ""),
        "Environment": (environment, same),
    }
    sentences = {
        "Equal time": budget_sentences(groups),
        "Cost at equal AP": equal_ap_sentences(groups),
    }
    markdown = [results.markdown(), f"\n{results_note}\n"]
    for heading, (table, note) in tables.items():
        if table.rows:
            said = "".join(f"{line}\n\n" for line in sentences.get(heading, []))
            text = said + table.markdown()
            markdown.append(f"\n## {heading}\n\n{text}" + (f"\n{note}\n" if note else ""))
    written = out / "report.md", out / "report.html"
    write_text(written[0], "".join(markdown))
    write_text(written[1], _page(groups, title, results, tables, sentences))
    return written


def _page(
    groups: Groups,
    title: str,
    results: Table,
    tables: Mapping[str, tuple[Table, str]],
    sentences: Mapping[str, Sequence[str]],
) -> str:
    """Return the HTML file."""
    curves, training, costs = curve_figures(groups), training_figures(groups), cost_figures(groups)
    analysis = analysis_figures(groups)
    albums = read_albums(groups)
    html = {
        heading: "".join(paragraph_html(sentence) for sentence in sentences.get(heading, []))
        + table_html(table)
        + paragraph_html(note, is_note=True)
        if table.rows
        else ""
        for heading, (table, note) in tables.items()
    }
    sections = {
        "Results": table_html(results)
        + paragraph_html(RESULTS + _limit_note(groups), is_note=True),
        "Runs": html["Runs"],
        "AP": cards_html(curves, wide=True),
        "Differences": html["Differences"],
        "Equal time": html["Equal time"],
        "Cost at equal AP": html["Cost at equal AP"],
        "Ground truth and detections": pager_html(albums)
        + (paragraph_html(PICTURES, is_note=True) if albums else ""),
        **{
            f"What keeps {KIND_NAMES[kind]} AP down": paragraph_html(_analysis_note(groups), True)
            + cards_html([each for each in figures if not each.key.endswith(WIDE)])
            + cards_html([each for each in figures if each.key.endswith(WIDE)], wide=True)
            for kind, figures in analysis.items()
        },
        "Training": cards_html(training),
        "What it took": cards_html(costs, wide=True) + html["What each phase took"],
        "Options that differ": html["Options that differ"],
        "Environment": html["Environment"],
    }
    figures = [*curves, *(each for many in analysis.values() for each in many), *training, *costs]
    return write_page(title, list(groups), sections, figures, albums)


def _limit_note(groups: Groups) -> str:
    """Say how many detections AP counts where it is not COCO's 100."""
    key = "evaluation.max_detections"
    counts = {run.options[key] for runs in groups.values() for run in runs} - {MAX_DETECTIONS}
    return "".join(
        f" AP counts up to {count} detections of a class on an image ({key}); COCO counts "
        f"{MAX_DETECTIONS}." for count in sorted(counts)
    )  # fmt: skip


def _analysis_note(groups: Groups) -> str:
    """Return what one should know of all plots of an analysis."""
    several = any(len(runs) > 1 for runs in groups.values())
    other = any(run.options["evaluation.metric"] != "coco" for runs in groups.values()
                for run in runs)  # fmt: skip
    return " ".join([SEEDS] * several + [OTHER_METRIC] * other)
