"""Pages about runs: what they compare, what they refuse, and that they are one safe file."""

import copy
import csv
import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from crosslace.data.errors import UserError
from crosslace.launch.pages import evaluated_below, write_model_demo_report, write_report
from crosslace.launch.pages.charts import Chart, Series
from crosslace.launch.pages.html import page, table


@pytest.fixture(scope="module")
def result(demo: Path) -> dict:
    """A real evaluation, to be varied."""
    return json.loads((demo / "clt" / "eval.json").read_text())


def saved(folder: Path, result: dict, **figures: float) -> Path:
    """The evaluation with other figures, as a run of its own."""
    varied = copy.deepcopy(result)
    for name, value in figures.items():
        varied["overall" if name in varied["overall"] else "behaviour"][name] = value
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text(json.dumps(varied))
    return folder


class Outside(HTMLParser):
    """Finds whatever a page would fetch, and script that came from data."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]


def read(text: str) -> Outside:
    parser = Outside()
    parser.feed(text)
    return parser


def test_a_better_run_dominates(result: dict, tmp_path: Path) -> None:
    worse = saved(tmp_path / "worse", result, nmse=0.5, kl=9.0, ce_recovered=0.1)
    better = saved(tmp_path / "better", result, nmse=0.01, kl=0.01, ce_recovered=0.99)
    sparser = saved(tmp_path / "sparser", result, l0=1.0, nmse=0.9, kl=10.0, ce_recovered=0.0)
    write_report([worse, better, sparser], tmp_path / "report.html")
    rows = {Path(row["run"]).name: row for row in csv.DictReader((tmp_path / "report.csv").open())}
    assert rows["worse"]["dominated_by"] == str(better)
    assert rows["better"]["dominated_by"] == rows["sparser"]["dominated_by"] == ""
    assert {path.name for path in (tmp_path / "plots").glob("*.png")} >= {"l0_nmse.png", "l0_kl.png"}


def test_other_data_is_marked_and_never_dominates(result: dict, tmp_path: Path) -> None:
    worse = saved(tmp_path / "worse", result, nmse=0.5, kl=9.0, ce_recovered=0.1)
    elsewhere = copy.deepcopy(result)
    elsewhere["made_with"]["dataset"] = "another text"
    better = saved(tmp_path / "better", elsewhere, nmse=0.01, kl=0.01, ce_recovered=0.99)
    write_report([worse, better], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "compare only runs of one letter" in text and "another text" in text
    assert all(row["dominated_by"] == "" for row in csv.DictReader((tmp_path / "report.csv").open()))


def test_a_page_is_one_file_and_data_is_text(result: dict, tmp_path: Path) -> None:
    hostile = copy.deepcopy(result)
    hostile["verdicts"] = ["<script>alert(1)</script>"]
    hostile["graph"]["prompts"][0]["prompt"] = '"><img src=x onerror=alert(1)>'
    saved(tmp_path / "run", hostile)
    write_report([tmp_path / "run"], tmp_path / "run" / "report.html")
    found = read((tmp_path / "run" / "report.html").read_text())
    assert found.fetched == [] and found.tags.count("script") == 1 and "img" not in found.tags


def test_every_part_of_an_evaluation_is_on_its_page(result: dict, tmp_path: Path) -> None:
    row = {"nmse": 0.5, "ce_recovered": 0.1, "kl": 2.0, "top1": 0.25, "top1_hard": None}
    result = {**result, "controls": {"transcoder": row, "linear": row}}  # the quick demo leaves them out
    saved(tmp_path / "run", result)
    write_report([tmp_path / "run"], tmp_path / "run" / "report.html")
    text = (tmp_path / "run" / "report.html").read_text()
    for heading in ("In short", "Against controls", "Layer by layer", "Graphs", "Faithfulness", "Health", "Made with"):
        assert f"<h2>{heading}" in text
    for verdict in result["verdicts"]:
        assert html.escape(verdict) in text


def test_what_was_not_evaluated_is_said(tmp_path: Path, result: dict) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="was not evaluated yet"):
        write_report([tmp_path / "run"], tmp_path / "page.html")
    with pytest.raises(UserError, match=r"no run in .* was evaluated"):
        evaluated_below(tmp_path)
    old = copy.deepcopy(result)
    del old["made_with"]
    with pytest.raises(UserError, match=r"evaluate .* again"):
        write_report([saved(tmp_path / "old", old)], tmp_path / "page.html")


def test_charts_leave_out_what_cannot_be_drawn() -> None:
    chart = Chart("t", "x", "y", [Series("a", [(1, 0.0), (2, float("nan")), (3, 5.0)])], log_y=True)
    assert chart.svg().count("<title>") == 1 and "<title>a: 3, 5</title>" in chart.svg()
    narrow = Chart("t", "x", "y", [Series("a", [(1.0, 0.0117), (2.0, 0.0168)])], log_y=True)
    assert re.search(r">0\.01[2-6]\d*<", narrow.svg())  # an axis has numbers, however short
    assert "nothing to draw" in Chart("t", "x", "y", [Series("a", [])]).svg()
    hostile = Chart("<b> $x$", "x", "y", [Series("<i>", [(1.0, 1.0)], labels=["<u>"])], bars=True).svg()
    assert "&lt;b&gt; $x$" in hostile and "&lt;u&gt;" in hostile and "<u>" not in hostile


def test_a_chart_takes_the_colours_of_its_page_and_names_of_its_own() -> None:
    first, second = (Chart(name, "x", "y", [Series("a", [(1, 1), (2, 2)])]).svg() for name in ("one", "two"))
    assert "var(--c0)" in first and "var(--ink)" in first and "#2563eb" not in first
    names = [set(re.findall(r'id="([^"]+)"', text)) for text in (first, second)]
    assert names[0] and not names[0] & names[1]
    assert all(f"#{name}" in first for name in names[0])


def test_tables_sort_by_value_not_by_its_show() -> None:
    text = page("t", "", table(["n"], [[0.123456789], [None], ["<i>"]], sortable=True))
    assert 'data-value="0.123456789">0.1235<' in text and "&lt;i&gt;" in text


def test_the_page_of_a_real_model_s_demo(demo: Path, result: dict, tmp_path: Path) -> None:
    """It holds every prompt's three probabilities, the swaps, and the picture of each traced circuit."""
    shutil.copytree(demo / "plt", tmp_path / "plt", ignore=shutil.ignore_patterns("checkpoints"))
    row = {"kind": "capital", "prompt": "a <prompt>", "answer": " x", "features": 7}
    row |= {"clean": 0.75, "path": 0.125, "matched": 0.625}
    swap = {"prompt": "a", "partner": "b", "other": 0.0, "other_swapped": 0.375, "other_matched": 0.25}
    left = {"path": {"mean": 0.17}, "matched": {"mean": 0.83}}
    figures = {"nmse": 0.3, "ce_recovered": 0.8, "kl": 1.0, "top1": 0.5, "top1_hard": 0.4}
    causal = {"silenced": [row], "swapped": [swap], "left_of_the_answer": left}
    graph = {**row, "path_silenced": 0.125, "path": "one -> two", "slug": "dallas", "replacement_score": 0.4}
    result = {**result, "controls": {"transcoder": figures}, "causal": causal}
    text = write_model_demo_report(tmp_path, {"graphs": [graph], "seconds": {"cache": 3.0}}, result).read_text()
    assert "a &lt;prompt&gt;" in text and "a <prompt>" not in text
    for shown in ("0.75", "0.125", "0.625", "0.375", "17%", "83%", "one -&gt; two", "<svg"):
        assert shown in text
