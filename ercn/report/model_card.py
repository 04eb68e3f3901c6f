"""The model card, ``export/model_card.md``: what a run's files say, by the items of CLAIM and TRIPOD+AI.

Items that no file of a run can answer are listed as not provided. Sources of the items: CLAIM, Mongan et al. 2020
(doi 10.1148/ryai.2020200029); TRIPOD+AI, Collins et al. 2024 (doi 10.1136/bmj-2023-078378).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from ercn._files import DISCLAIMER, read_json, write_text
from ercn.checkpoint import RunInfo
from ercn.config import flatten
from ercn.maps import NAMES
from ercn.report import table
from ercn.report.evaluation import LocalizationResult, read_evaluations

# What only people can say: (text, items of CLAIM, items of TRIPOD+AI).
NOT_PROVIDED = (
    ("Structured summary of a study", "2", "2"),
    ("Intended use and clinical role, target population and users", "3", "3a, 3b"),
    ("Known inequalities between groups of patients, fairness", "", "3c, 14"),
    ("Objectives and hypotheses; prospective or retrospective", "4, 5, 6", "4"),
    ("Setting, places and dates of the recordings, cameras", "8", "5b, 6a"),
    ("Definitions of data elements", "11", ""),
    ("De-identification of the published pictures", "12", ""),
    ("Why this reference standard; qualification, tools and agreement of the graders", "15, 16, 17, 18", "8b, 8c"),
    ("Intended sample size and its reason", "19", "10"),
    ("Age, sex, ethnicity, diabetes and other characteristics of the patients, and results by them", "34", "20b, 23a"),
    ("Comparison with human graders or another test", "", "12"),
    ("Robustness or sensitivity analysis; analysis of failures by an expert", "30, 37", ""),
    ("Interpretation beside earlier evidence; updating of the model", "", "24, 25"),
    ("Implications for practice, needed expertise, handling of poor input in use", "39", "27a, 27b, 27c"),
    ("Ethical approval and consent", "", "17"),
    ("Registration, protocol, funding, conflicts of interest", "40, 41, 42", "18a, 18b, 18c, 18d"),
    ("Involvement of patients and the public", "", "19"),
    ("License of the weights and terms of the data", "", "18e"),
)


def write_model_card(run: Path, model: RunInfo) -> Path:
    """Writes ``run/export/model_card.md`` from ``model``, and the evaluations and the environment of the run."""
    named, old = read_evaluations(run)
    evaluations = list(named.values())
    environment = Environment(
        loader=PackageLoader("ercn.report", "."), undefined=StrictUndefined, trim_blocks=True, autoescape=False
    )
    text = environment.get_template("model_card.md.jinja").render(
        notice=DISCLAIMER,
        model=model,
        settings=flatten(asdict(model.config)),
        environment=read_json(run / "environment.json"),
        evaluations=evaluations,
        old=old,
        results=[(result, table.metric_rows([result.grading]) if result.grading else []) for result in evaluations],
        lesions=[(result, _lesions(result.localization)) for result in evaluations if result.localization],
        external=sorted({e.dataset for e in evaluations if e.manifest != model.manifest}),
        not_provided=NOT_PROVIDED,
    )
    path = run / "export" / "model_card.md"
    write_text(path, text)
    return path


def _lesions(local: LocalizationResult) -> tuple[list[str], list[list[str]]]:
    """The maps' names; for all lesions together and for each, pictures, each map's AUPR, and the floor."""
    parts = {"all lesions": local} | local.lesions
    rows = [
        [
            kind.replace("_", " "),
            str(part.pictures),
            *(table.reading(part.maps[name]["aupr"]) for name in local.maps),
            table.number(part.floor["aupr"]),
        ]
        for kind, part in parts.items()
    ]
    return [NAMES[name] for name in local.maps], rows
