"""The page as a whole: all of the run is on it, nothing of elsewhere, and no text of the run becomes markup."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megadyn.report.page import Subject, page, shown_counts, size, visible
from megadyn.report.report import write_report
from megadyn.report.run import read_checkpoints, read_runs
from megadyn.report.text_map import TextMap
from tests.report.conftest import full_records, records, start, write_metrics, write_starts

VOID = {"meta", "line", "path", "rect", "circle", "polygon", "br", "wbr"}


class Outline(HTMLParser):
    """Tags in order, the text of each heading and figure caption, and whether tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open:
            self.text.setdefault(self._open[-1], []).append(data)


def made(folders: list[Path], output: Path, **options) -> str:
    write_report(folders, output, tokens=options.pop("tokens", 24), **options)
    return output.read_text()


def captions(html: str) -> list[str]:
    return Outline(html).text.get("figcaption", [])


def test_everything_of_a_run_is_on_its_page(make_run, tmp_path):
    html = made([make_run()], tmp_path / "a.html")
    shown = captions(html)
    for wanted in (
        "Loss (nats per token)",
        "Auxiliary loss: prior, unweighted",
        "Learning rate",
        "Throughput (tokens/s)",
        "Model TFLOP/s per device",
        "Share of tokens routed",
        "Causal agreement: share of tokens on which the causal rule and top-k agree",
        "S_CE: expected change, mean over tokens",
        "Layer 1",
        "Layer 3",
    ):
        assert wanted in shown
    outline = Outline(html)
    assert {
        "Loss",
        "Routing by layer",
        "A validation text, token by token",
        "Configuration",
        "Environment",
        "Checkpoints",
    } <= set(outline.text["h2"])
    assert "validation, causal" in outline.text["span"]
    assert {"4.9000", "5.0000"} <= set(outline.text["b"])
    tokens = [attributes["title"] for tag, attributes in outline.tags if tag == "b" and "title" in attributes]
    assert len(tokens) == 24 and all("of 2 routed layers" in title for title in tokens)
    shades = {
        attributes["title"].split(" in ")[-1][0]: attributes["style"]
        for tag, attributes in outline.tags
        if tag == "b" and "title" in attributes
    }
    assert {count: {"0": "--k:0", "1": "--k:0.6", "2": "--k:1"}[count] for count in shades} == shades
    assert len(shades) > 1
    assert "intact: the sha256 of every file matches" in html and "not recorded by the run" in html
    assert "routing:\n" in "".join(outline.text["pre"])


def test_speed_and_environment_are_shown_where_they_were_recorded(make_run, tmp_path):
    run = make_run()
    write_metrics(run, full_records())
    write_starts(run, start(), start(4, hosts={"node<1>": 4}))
    html = made([run], tmp_path / "a.html", tokens=0)
    assert {
        "Where the time of the reported step goes (ms, mean over ranks)",
        "MFU: share of the device's peak",
        "Tokens/s per device",
        "TFLOP/s per device that a dense model needs to be as fast",
        "Memory of the rank that uses most (GiB)",
        "Gradient norm by component",
        "Learning rate by parameter group",
    } <= set(captions(html))
    outline = Outline(html)
    assert {"forward", "communication", "other", "allocated peak", "head", "causal attention at half"} <= set(
        outline.text["span"]
    )
    assert {"41.0%", "45.0%", "2,400"} <= set(outline.text["b"])
    assert "ot recorded" not in html.replace("not recorded by both", "")
    cells = outline.text["td"]
    assert "python 3.11.7, torch 2.13.0+cu130, megadyn commit 0123abc, flash-attn not known" in cells
    assert {"4 x NVIDIA H200", "node<1> (4 ranks)", "NCCL_DEBUG=INFO"} <= set(cells)
    assert "iteration 0 at 2026-01-02T03:04:05Z; iteration 4 at 2026-01-02T03:04:05Z" in cells


def test_what_an_earlier_run_lacks_is_not_recorded(make_run, tmp_path):
    html = made([make_run()], tmp_path / "a.html", tokens=0)
    assert (
        "Not recorded by this run: tokens/s per device, MFU, dense-equivalent TFLOP/s, where a step&#x27;s time goes, "
        "memory, gradient norm by component, learning rate by parameter group."
    ) in html
    assert "not recorded by the run" in html
    on_cpu = make_run("mod", "cpu")
    write_metrics(
        on_cpu,
        [
            record | {"mfu_causal_half": None, "mfu_whole_square": None} if "lm_loss" in record else record
            for record in full_records()
        ],
    )
    (on_cpu / "environment.jsonl").write_text('{"iteration": 3, "versions": {}}\n{"iterat')
    html = made([on_cpu], tmp_path / "b.html", tokens=0)
    assert "Not recorded by this run" not in html
    assert "No MFU: the peak of its device is unknown" in html and "MFU" not in " ".join(captions(html))
    assert "Left out as incomplete: 1 line(s) of environment.jsonl." in html
    assert {"none", "not recorded"} <= set(Outline(html).text["td"])


def test_two_runs_compare_speed_and_environment(make_run, tmp_path):
    first, second = make_run("dtf", "one"), make_run("mod", "two")
    for run in (first, second):
        write_metrics(run, full_records())
    write_starts(first, start())
    write_starts(second, start(9, started="later", devices={"NVIDIA H100": 4}))
    html = made([first, second], tmp_path / "a.html", tokens=0)
    for run in ("one", "two"):
        assert f"Where the time of the reported step goes (ms, mean over ranks), {run}" in captions(html)
    assert captions(html).count("MFU: share of the device's peak") == 1
    assert "causal attention at half, two" in Outline(html).text["span"]
    table = html[html.rindex('class="differences"') :]
    assert re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", table)[:2] == [
        ("devices.NVIDIA H200", "4", "-"),
        ("devices.NVIDIA H100", "-", "4"),
    ]
    (second / "environment.jsonl").unlink()
    assert "not recorded by both runs" in made([first, second], tmp_path / "a.html", tokens=0)


def test_the_page_asks_for_nothing_from_elsewhere(make_run, tmp_path):
    html = made([make_run()], tmp_path / "a.html")
    outline = Outline(html)
    for tag, attributes in outline.tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert not {"src", "href", "xlink:href", "action", "onload", "onerror"} & set(attributes)
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttp", html)
    policy = next(attributes["content"] for tag, attributes in outline.tags if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


def test_no_text_of_a_run_becomes_markup(make_run, tmp_path):
    hostile = '</title></pre><script>alert("&")</script>'
    run = make_run(name="<b>run")
    (run / "config.yaml").write_text(f"note: '{hostile}'\ntraining: {{iterations: 6}}\n")
    lines = records()
    lines[1]["aux_losses"] = {hostile: 1.0}
    lines[1]["routing"]["1"][hostile] = 1.0
    write_metrics(run, [*lines, {"iteration": 6, hostile: {"a": hostile}}])
    subject = Subject(
        read_runs([run])[0],
        read_checkpoints(run),
        TextMap([hostile, "", "\x00\r\n"], [1], np.array([[True, False, True]]), 1.0),
        hostile,
    )
    outline = Outline(page([subject]))
    assert [tag for tag, _ in outline.tags].count("script") == 1
    assert "".join(outline.text["title"]) == "<b>run"
    assert hostile in "".join(outline.text["pre"])
    assert "sub" not in outline.text
    labelled = subject._replace(
        text=subject.text._replace(following=[(hostile, 12), ("text", 0), ("sum", 3)])
    )
    outline = Outline(page([labelled]))
    assert "".join(outline.text["sub"]) == "123", (
        "the steps that predicting the next token takes, where there are any"
    )
    write_metrics(run, lines)
    assert [tag for tag, _ in Outline(made([run, make_run("mod")], tmp_path / "b.html")).tags].count(
        "script"
    ) == 1


@pytest.mark.parametrize("value", [None, "x", 0.5])
def test_a_run_whose_numbers_are_all_missing_or_constant_has_a_page(make_run, tmp_path, value):
    """fp16's overflows leave nulls; a page of them has fewer charts."""

    def emptied(found):
        return {
            key: emptied(inner) if isinstance(inner, dict) else inner if key == "iteration" else value
            for key, inner in found.items()
        }

    run = make_run()
    write_metrics(run, [emptied(record) for record in records()])
    shown = captions(made([run, run], tmp_path / "a.html"))
    assert ("Learning rate" in shown) == ("Layer 1" in shown) == (value == 0.5)


def test_many_records_are_thinned(make_run, tmp_path):
    run = make_run()
    write_metrics(run, records(steps=3000))
    assert len(made([run], tmp_path / "a.html", tokens=0)) < 400_000


def test_two_runs_share_their_charts_and_show_their_differences(make_run, tmp_path):
    first, second = make_run("dtf", "one"), make_run("mod", "two")
    html = made([first, second], tmp_path / "a.html")
    outline = Outline(html)
    assert captions(html).count("Learning rate") == 1
    assert {"training, one", "training, two", "validation, causal, two"} <= set(outline.text["span"])
    table = html[html.index('class="differences"') :]
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", table)
    assert ("model.routing.kind", "&quot;dtf&quot;", "&quot;mod&quot;") in rows
    assert "model.num_layers" not in [key for key, _, _ in rows]
    assert "Share of tokens routed (one)" in captions(html) and "Share of tokens routed (two)" in captions(
        html
    )
    assert [name for name in outline.text["h2"] if "token by token" in name] == [
        "A validation text, token by token: one",
        "A validation text, token by token: two",
    ]


def test_runs_of_unequal_steps_are_compared_by_tokens(make_run, tmp_path):
    first, second = make_run("dtf", "one"), make_run("dtf", "two")
    assert '"name":"iteration","x":[0.0,6.0]' in made([first, second], tmp_path / "a.html", tokens=0).replace(
        "&quot;", '"'
    )
    write_metrics(second, records(per_step=48))
    html = made([first, second], tmp_path / "a.html", tokens=0).replace("&quot;", '"')
    assert '"name":"tokens","x":[0.0,576.0]' in html
    assert '{"name":"validation, causal, two","x":[0.0,288.0],"y":[5.6,5.0]}' in html


def test_what_is_missing_is_said(make_run, tmp_path):
    dense = make_run("dense", "dense")
    lines = [
        {key: value for key, value in record.items() if key != "routing"} | {"aux_losses": {}}
        for record in records()[1:-1]
    ]
    write_metrics(dense, lines)
    html = made([dense], tmp_path / "a.html")
    assert "as in a dense model" in html and "the model is dense" in html
    for path in sorted((dense / "checkpoints").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (dense / "config.yaml").unlink()
    html = made([dense], tmp_path / "a.html")
    assert (
        "The run folder holds none." in html
        and "holds no intact checkpoint" in html
        and "config.yaml cannot be read" in html
    )
    write_metrics(dense, records()[:1])
    assert "No training step was logged yet." in made([dense], tmp_path / "a.html")
    for options, said in (
        ({"tokens": 0}, "left out (--tokens 0)"),
        ({"look_at_checkpoints": False}, "(--no-checkpoints)"),
    ):
        assert said in made([make_run("mod", said)], tmp_path / "a.html", **options)


def test_an_older_whole_checkpoint_stands_in_for_a_damaged_one(make_run, tmp_path):
    run = make_run()
    (run / "checkpoints" / "iteration-00000009").mkdir()
    (run / "checkpoints" / "latest").write_text("iteration-00000009\n")
    html = made([run], tmp_path / "a.html")
    assert "run through iteration-00000006 with causal routing" in html
    assert "damaged: checkpoints/iteration-00000009: not a checkpoint" in html


def test_a_checkpoint_that_the_run_went_back_from_is_not_run(make_run, tmp_path):
    run = make_run()
    shutil.copytree(run / "checkpoints" / "iteration-00000006", run / "checkpoints" / "iteration-00000009")
    html = made([run], tmp_path / "a.html")
    assert "run through iteration-00000006 with causal routing" in html
    assert "intact: the sha256 of every file matches; not used: the run has since gone back before it" in html


def test_events_are_listed(make_run, tmp_path):
    run = make_run()
    write_metrics(run, [*records(), {"iteration": 4, "bad_step": {"problem": "loss is nan"}}])
    assert "bad_step: {&quot;problem&quot;: &quot;loss is nan&quot;}" in made(
        [run], tmp_path / "a.html", tokens=0
    )


def test_what_training_warned_of_stands_at_the_top_once_for_each_layer_and_problem(make_run, tmp_path):
    run = make_run()
    warned = [
        {
            "iteration": at,
            "router_warning": {
                "layer": layer,
                "problem": "closed_gate",
                "since": at,
                "value": 0.01,
                "sentence": f"layer {layer}: its <gate> is closed, since iteration {at}",
            },
        }
        for at, layer in ((3, 1), (4, 3), (5, 1))
    ]
    write_metrics(run, [*records(), *warned, {"iteration": 5, "router_warning": "odd"}])
    top = made([run], tmp_path / "a.html", tokens=0).partition("<h2>")[0]
    notes = re.findall(r'<p class="note">(Warned in training: .*?)</p>', top)
    assert notes == [
        f"Warned in training: layer {layer}: its &lt;gate&gt; is closed, since iteration {at}."
        for layer, at in ((1, 5), (3, 4))
    ]


@pytest.mark.parametrize(
    ("piece", "shown"),
    [
        (" a", "<i>·</i><wbr>a"),
        ("\n", "<i>↵</i>\n"),
        ("\t", "<i>→</i>\t"),
        ("", "<i>▫</i>"),
        ("\x00\x1b\x7f", "<i>␀</i><i>␛</i><i>␡</i>"),
        ("<&", "&lt;&amp;"),
        ("é日", "é日"),
    ],
)
def test_whitespace_and_control_characters_are_seen(piece, shown):
    assert visible(piece) == shown


def test_the_key_has_all_counts_or_nine():
    assert shown_counts(1) == [0, 1]
    assert shown_counts(8) == list(range(9))
    assert shown_counts(36)[0] == 0 and shown_counts(36)[-1] == 36 and len(shown_counts(36)) == 9


def test_sizes():
    assert [size(count) for count in (0, 999, 57_113_576, 84e9, 2.5e13)] == [
        "0 B",
        "999 B",
        "57.1 MB",
        "84 GB",
        "25 TB",
    ]


def test_phases_are_in_a_table_and_marked_in_the_curves(make_run, tmp_path):
    folder = make_run()
    begins = [
        {
            "iteration": begin,
            "phase": name,
            "phase_begins": {
                "name": name,
                "number": number,
                "begin": begin,
                "end": end,
                "global_batch_size": 4,
                "sequence_length": 24,
                "changes": changes,
            },
        }
        for number, name, begin, end, changes in (
            (1, "hold", 0, 4, {}),
            (2, "<b>", 4, 8, {"model.routing.capacity": 0.25, "data.train": [{"prefix": "<i>"}]}),
        )
    ]
    write_metrics(folder, [*begins, *records()])
    html = made([folder], tmp_path / "a.html")
    outline = Outline(html)
    assert "Phases" in outline.text["h2"]
    cells = outline.text["td"]
    at = cells.index("hold")
    assert cells[at : at + 5] == ["hold", "1 to 4", "4 x 24", "384", "5.1000"]
    assert cells[at + 5 : at + 10] == ["<b>", "5 to 8", "4 x 24", "192", "4.9000"]
    assert cells[at + 10] == 'model.routing.capacity = 0.25; data.train = [{"prefix": "<i>"}]'
    assert html.count('class="mark"') == html.count(">&lt;b&gt;</text>") >= 5  # one per chart over the steps
    plain = made([make_run(name="plain")], tmp_path / "b.html")
    assert 'class="mark"' not in plain and "Phases" not in Outline(plain).text["h2"]


def test_scores_on_tasks_are_in_curves_and_a_table(make_run, tmp_path):
    folder = make_run()
    scores = [
        {"iteration": 4, "tasks": {"<b>": {"acc": 0.25, "acc_stderr": 0.125}, "next": {"acc": None}}},
        {"iteration": 2, "tasks": {"<b>": {"acc": 0.5}, "sum": {"em/strict": 0.75, "em_stderr/strict": 0.1}}},
        {"iteration": 2, "tasks_left_out": {"why": "late"}},
    ]
    write_metrics(folder, [*records(), *scores])
    html = made([folder], tmp_path / "a.html")
    outline = Outline(html)
    assert "Tasks" in outline.text["h2"]
    assert {"Tasks: acc", "Tasks: em/strict"} <= set(captions(html))
    cells = outline.text["td"]
    at = cells.index("sum")
    assert cells[at - 5 : at + 5] == [
        "<b>",
        "acc",
        "0.25",
        "0.125",
        "4",
        "sum",
        "em/strict",
        "0.75",
        "0.1",
        "2",
    ]
    assert cells[at + 5 : at + 10] == ["next", "acc", "-", "-", "4"]
    assert "tasks_left_out" in html
    both = made([folder, make_run(name="plain")], tmp_path / "b.html")
    assert f"Tasks: acc, {folder.name}" in captions(both)
    assert "Tasks" not in Outline(made([make_run(name="other")], tmp_path / "c.html")).text["h2"]
