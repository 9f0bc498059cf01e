"""`layerscope report`: one page of measured and simulated runs, which needs nothing but itself."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from command_lines import refusal
from recorded import small_profile, small_routing

from layerscope_jax import load, simulate_profile
from layerscope_jax.cli import main as cli
from layerscope_jax.cli.report_lanes import COLORS
from layerscope_jax.cli.report_runs import runs_of
from layerscope_jax.runtime.timeline_figures import lane_and_kind
from layerscope_jax.runtime.timeline_files import read_timeline
from layerscope_jax.simulation import comparison

pytestmark = pytest.mark.usefixtures("quick_compiles")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

VOID = {"meta", "link", "br", "input"}


class Page(HTMLParser):
    """A page, read strictly: what is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.ids, self.data, self.words = [], [], set(), "", ""
        self.addresses = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.addresses += [named[name] for name in ("src", "href") if name in named]
        self.ids.add(named.get("id"))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.data = self.data or data
        elif self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        self.words += data


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("measured") / "run.json"
    command = ["generate", str(tiny), "--prompt=The sea", "--prompt=def f", "--max-new-tokens=4"]
    assert cli.main([*command, "--policy=lru", "--device-budget=70KB", f"--timeline={path}"]) == 0
    return path


@pytest.fixture(scope="module")
def from_disk(tiny, tmp_path_factory):
    """A measured run that holds few of its experts in memory, and reads the others from the disk."""
    path = tmp_path_factory.mktemp("disk") / "run.json"
    size = load(tiny, experts="disk").bank.expert_bytes
    command = ["generate", str(tiny), "--prompt=The sea", "--max-new-tokens=3", f"--host-budget={5 * size}"]
    assert cli.main([*command, "--policy=host-only", f"--timeline={path}"]) == 0
    return path


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    path = tmp_path_factory.mktemp("simulated") / "runs.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "lower_bound_ms", lambda *of, **more: 1.0)  # compiles for long
        simulate_profile(
            small_profile(), small_routing(), batches=[4], policies=["lru", "presched"], timeline=path
        )
    return path


@pytest.fixture(scope="module")
def files(measured, from_disk, simulated):
    """Timelines of two measured and two simulated runs."""
    return [measured, from_disk, simulated]


@pytest.fixture(scope="module")
def reported(files, tmp_path_factory):
    """Their page, picture and joined timeline."""
    folder = tmp_path_factory.mktemp("reported")
    options = ["--out", folder / "page.html", "--svg", folder / "lanes.svg", "--join", folder / "all.json"]
    assert cli.main(["report", *map(str, [*files, *options])]) == 0
    return folder


def test_the_page_says_what_the_statistics_say(reported, files):
    page = Page((reported / "page.html").read_text())
    assert not page.addresses  # nothing is fetched
    assert "http" not in page.words
    assert {"lanes", "time", "hits", "recall", "bytes", "unknown"} <= page.ids
    table = {row[0]: row[1:] for row in page.rows if row}
    outcomes = [outcome for file in files for run in runs_of(file) for outcome in run.outcomes]
    assert len(outcomes) == 2 + 2 * 2
    assert table["policy"] == [outcome["policy"] for outcome in outcomes]
    assert table["hit rate"] == [f"{outcome['hit_rate']:.1%}" for outcome in outcomes]
    assert table["share of the lower bound"] == [
        "-" if outcome["share_of_bound"] is None else f"{outcome['share_of_bound']:.1%}"
        for outcome in outcomes
    ]
    assert table["time to first token"][2:] == [
        f"{1e3 * outcome['ttft_s']:,.2f} ms" if outcome["phase"] == "prefill" else "-"
        for outcome in outcomes[2:]
    ]
    assert table["on-demand loads"] == [f"{outcome['bytes_demand'] / 1e6:,.1f} MB" for outcome in outcomes]
    share = outcomes[1]["disk_share"]
    assert share > 0
    assert table["disk busy"] == ["-", f"{share:.1%}", *["-"] * 4]  # only one of them has a disk
    read = outcomes[1]["bytes_read"]
    assert table["read from the disk"][1] == f"{read / 1e6:,.1f} MB"
    data = json.loads(page.data)
    assert [len(run["slices"]) for run in data["runs"]] == [
        len(run.slices) for file in files for run in runs_of(file)
    ]
    disk = data["lanes"].index("disk")
    reads = [sum(one[0] == disk for one in run["slices"]) for run in data["runs"]]
    assert reads[1] > 0
    assert reads == [0, reads[1], 0, 0]


def test_without_a_disk_nothing_is_said_of_one(simulated, tmp_path):
    assert cli.main(["report", str(simulated), f"--out={tmp_path / 'page.html'}"]) == 0
    page = Page((tmp_path / "page.html").read_text())
    assert not any(row and row[0] in ("disk busy", "read from the disk") for row in page.rows)


def test_what_is_not_known_is_said_and_not_shown(reported):
    text = Page((reported / "page.html").read_text()).words
    assert "had a forecast, so there is no recall" in text
    assert "lower bound was not asked for" in text


def test_the_picture_holds_every_lane(reported):
    picture = ElementTree.parse(reported / "lanes.svg").getroot()
    texts = [node.text for node in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("scheduler") == 4
    assert texts.count("disk") == 1
    assert {"demand", "attention", "read"} <= set(texts)
    fills = {node.get("fill") for node in picture.iter("{http://www.w3.org/2000/svg}rect")}
    assert COLORS["read"] in fills


def test_the_joined_timeline_holds_every_run(reported, files):
    content = read_timeline(reported / "all.json")
    clocks = [process["clock"] for process in content["otherData"]["processes"]]
    assert clocks == ["real", "real", "virtual", "virtual"]
    each = [len(read_timeline(file)["traceEvents"]) for file in files]
    assert len(content["traceEvents"]) == sum(each)


def test_steps_are_chosen(simulated, tmp_path):
    out = tmp_path / "page.html"
    assert cli.main(["report", str(simulated), "--out", str(out), "--steps=1:2"]) == 0
    page = Page(out.read_text())
    for drawn, run in zip(json.loads(page.data)["runs"], runs_of(simulated), strict=True):
        chosen = [event for event in run.slices if event["args"]["step"] in (1, 2)]
        assert len(drawn["slices"]) == len(chosen) < len(run.slices)
    assert "steps 1 to 2 are drawn" in page.words


def test_texts_of_a_file_cannot_end_the_script(simulated, tmp_path):
    content = read_timeline(simulated)
    content["otherData"]["processes"][0]["name"] = "</script><script>x()</script>"
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert cli.main(["report", str(tmp_path / "run.json")]) == 0
    text = (tmp_path / "run.html").read_text()
    assert "<script>x()" not in text
    assert Page(text).open == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["none.json"], "none.json: expected what --timeline FILE wrote, found no such file"),
        (["RUN", "--steps=3:1"], "--steps must be FIRST:LAST"),
        (["RUN", "--layers=x"], "--layers must be FIRST:LAST"),
        (["RUN", "--out=RUN"], "is one of the timelines"),
        (["RUN", "--steps=99", "--svg=lanes.svg"], "--svg: there are no steps"),
    ],
)
def test_refusals(arguments, problem, simulated, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.replace("RUN", str(simulated)) for argument in arguments]
    assert re.search(re.escape(problem), refusal(capsys, "report", *arguments))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page in")
def test_a_browser_draws_the_chosen_layers(reported, files, tmp_path):
    """A canvas says how many slices it has drawn: those that lie in the window."""
    address = f"file://{reported / 'page.html'}#steps=1-1&layers=0-1"
    shown = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}",
            "--dump-dom",
            address,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    drawn = [int(number) for number in re.findall(r'data-drawn="(\d+)"', shown)]
    runs = [run for file in files for run in runs_of(file)]
    windows = []
    for run in runs:
        inside = [
            event for event in run.slices if lane_and_kind(event)[1] == "layer" and event["args"]["step"] == 1
        ]
        chosen = [event for event in inside if event["args"]["layer"] in (0, 1)]
        windows.append((chosen[0]["ts"], chosen[-1]["ts"] + chosen[-1]["dur"]))
    longest = max(end - begin for begin, end in windows)  # all runs are on one scale
    assert len(drawn) == len(runs)
    for count, run, (begin, _) in zip(drawn, runs, windows, strict=True):
        touched = [e for e in run.slices if e["ts"] + e["dur"] >= begin and e["ts"] <= begin + longest]
        assert count == pytest.approx(len(touched), abs=2)  # the last may end at the edge
