"""The report of a sweep as one HTML file, which needs no other file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from vbp.errors import printable
from vbp.report.run_report import setting_text
from vbp.report.style import Drawing
from vbp.runtime.tables import format_count
from vbp.sweeps.report import SweepReport
from vbp.sweeps.rows import SettingRows

PAGE: Final = "sweep.html"


def page(report: SweepReport, settings: Mapping[str, Any], drawings: Mapping[str, Drawing]) -> str:
    """Return the page with the figures, all models in a table, and the settings that they share."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = files("vbp.sweeps") / "assets" / "sweep.html.jinja"
    style = files("vbp.report") / "assets" / "report.css"
    about = {"model_name": "model", "calibration_images": "unknown", "versions": {}} | dict(report.about)
    heading, *rows = report.table_rows()
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        style=Markup(style.read_text(encoding="utf-8")),
        model=printable(str(about["model_name"])),
        report=report,
        about=about,
        keys=_key_figures(report),
        drawings=drawings,
        inline={name: Markup(drawing.inline_svg) for name, drawing in drawings.items()},
        heading=heading,
        rows=[[printable(cell) for cell in row] for row in rows],
        remarks=report.remarks(),
        settings=[(name, printable(setting_text(value))) for name, value in settings.items()],
        versions=[(name, version) for name, version in about["versions"].items()],
    )


def _key_figures(report: SweepReport) -> list[tuple[str, str, str]]:
    """Return the main results: label, number, remark."""
    dense, asked = report.dense, len(report.rows) + len(report.missing)
    keys = [("Dense top-1", f"{dense.top1_text} %", f"{format_count(dense.macs)} MACs an image")]
    front = report.front("macs")
    if front:
        keys.append(_key("Most accurate on the front", front[-1]))
    near = [group for group in front if group.final_top1.mean >= dense.score - (dense.top1_error or 0.0)]
    if near:
        label, text, remark = _key("Cheapest within one standard error", near[0])
        keys.append((label, text, f"of the dense top-1: {remark}"))
    done = "all that were asked for" if not report.missing else f"{len(report.missing)} are missing"
    return [*keys, ("Models measured", f"{len(report.rows)} of {asked}", done)]


def _key(label: str, group: SettingRows) -> tuple[str, str, str]:
    top1 = group.final_top1
    macs = format_count(round(group.mean(lambda row: row.measured.macs)))
    return label, f"{top1.text} %", f"{group.setting.method}, keep_ratio {group.setting.keep_ratio:g}, {macs} MACs"
