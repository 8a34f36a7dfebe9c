"""A report on groups of runs: report.md with tables, report.html with tables and plots."""

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
from bigdet.reporting.facts import (
    cost_table,
    environment_table,
    option_table,
    other_sets_table,
    run_table,
)
from bigdet.reporting.figures import cost_figures, curve_figures, training_figures
from bigdet.reporting.page import cards_html, pager_html, paragraph_html, table_html, write_page
from bigdet.reporting.runs import Groups
from bigdet.reporting.table import Outcome, Table, outcome_table

RESULTS = (
    "AP in percent at the last evaluation: mean over seeds +- their standard deviation. GPU time "
    "is that of training; data wait is the share of it in which the GPUs waited for data. Runs on "
    "CPUs have CPU time instead: of all threads of the ranks, so that of loader threads counts and "
    "that of loader processes does not (data.worker_kind)."
)
OTHER_SETS = (
    "AP in percent at the last evaluation of phases that were evaluated on another set than the "
    "last one of the run. It is part of no other table or curve: AP on different sets is not "
    "comparable."
)
NOISE = (
    "In percentage points. The noise band is two standard errors of the difference of two means, "
    "from the standard deviation within all groups with several seeds."
)
BUDGETS = (
    "Of the groups whose training took about the same time (each at most "
    f"{NEAR - 1:.0%} longer than the next shorter one), the one with the highest last AP, and its "
    "lead over the others in percentage points. Finished runs only; the cost of imported weights "
    "is not counted. The noise band is two standard errors of the difference, as above."
)
EQUAL_AP = (
    "The cost up to the first evaluation that reached the other run's last AP, as a fraction of "
    "the other run's total cost. GPU-hours and CPU-hours are those of training."
)
IMPORTS = (
    " With imports: the stated cost of imported weights (phases.NAME.start_from.cost) is included "
    "on both sides."
)
PICTURES = (
    "Validation images with the most and the fewest mistakes, drawn by each run at the end of its "
    "last phase; with several seeds, those of the first. Arrow keys change the image, a click "
    "enlarges it."
)
SEEDS = "Means over the seeds of each group; whiskers are one standard deviation."
OTHER_METRIC = (
    "AP by overlap and by class are VOC's; everything else is measured as in COCO, with difficult "
    "objects as crowds."
)


def write_report(
    groups: Groups,
    out: Path,
    title: str,
    outcomes: Mapping[str, Sequence[Outcome | None]],
    about: str = "",
) -> tuple[Path, Path]:
    """Write both files and return their paths.

    Args:
        groups: runs to compare; the first group is the reference for the others.
        out: folder, made if needed.
        title: heading of the HTML file.
        outcomes: rows of the first table; may have groups whose runs have not begun.
        about: a paragraph before the results.
    """
    results, results_note = outcome_table(outcomes), RESULTS + _limit_note(groups)
    same, environment = environment_table(groups)
    costs = equal_ap_table(groups)
    imports = IMPORTS if any(name.endswith("with imports") for name in costs.header) else ""
    tables = {
        "Runs": (run_table(groups), ""),
        "AP on other sets": (other_sets_table(groups), OTHER_SETS),
        "Differences": (difference_table(groups), NOISE),
        "Equal time": (budget_table(groups), BUDGETS),
        "Cost at equal AP": (costs, EQUAL_AP + imports),
        "Cost of each phase": (cost_table(groups), ""),
        "Options that differ": (option_table(groups), ""),
        "Environment": (environment, same),
    }
    sentences = {
        "Equal time": budget_sentences(groups),
        "Cost at equal AP": equal_ap_sentences(groups),
    }
    markdown = [f"{about}\n\n" if about else "", results.markdown(), f"\n{results_note}\n"]
    for heading, (table, note) in tables.items():
        if table.rows:
            said = "".join(f"{line}\n\n" for line in sentences.get(heading, []))
            text = said + table.markdown()
            markdown.append(f"\n## {heading}\n\n{text}" + (f"\n{note}\n" if note else ""))
    written = out / "report.md", out / "report.html"
    write_text(written[0], "".join(markdown))
    write_text(written[1], _page(groups, title, about, results, tables, sentences))
    return written


def _page(
    groups: Groups,
    title: str,
    about: str,
    results: Table,
    tables: Mapping[str, tuple[Table, str]],
    sentences: Mapping[str, Sequence[str]],
) -> str:
    """Return the text of the HTML file."""
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
        "About": paragraph_html(about),
        "Results": table_html(results)
        + paragraph_html(RESULTS + _limit_note(groups), is_note=True),
        "Runs": html["Runs"],
        "AP": cards_html(curves, wide=True),
        "AP on other sets": html["AP on other sets"],
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
        "Cost": cards_html(costs, wide=True) + html["Cost of each phase"],
        "Options that differ": html["Options that differ"],
        "Environment": html["Environment"],
    }
    figures = [*curves, *(each for many in analysis.values() for each in many), *training, *costs]
    return write_page(title, list(groups), sections, figures, albums)


def _limit_note(groups: Groups) -> str:
    """Return how many detections AP counts if it is not COCO's 100; otherwise empty."""
    key = "evaluation.max_detections"
    counts = {run.options[key] for runs in groups.values() for run in runs} - {MAX_DETECTIONS}
    text = (
        f" AP counts up to %d detections per class and image ({key}); COCO counts {MAX_DETECTIONS}."
    )
    return "".join(text % count for count in sorted(counts))


def _analysis_note(groups: Groups) -> str:
    """Return the note on all plots of an analysis."""
    several = any(len(runs) > 1 for runs in groups.values())
    metrics = {run.options["evaluation.metric"] for runs in groups.values() for run in runs}
    other = bool(metrics - {"coco"})
    return " ".join([SEEDS] * several + [OTHER_METRIC] * other)
