"""The pages in a real browser: offline, at a phone's and a desk's width, light and dark; and the figures for papers."""

import itertools
import json
import re
import shutil
import subprocess
import sys

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from spikesink import files, schema
from spikesink.edit.findings import Ablation
from spikesink.measure import history
from spikesink.measure.examples import unpacked
from spikesink.measure.findings import Findings
from spikesink.show import ablation_figures, drawing, figures, page
from spikesink.show.text import visible

from .conftest import ROOT, SMALL_RUN

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run", "--disable-quic", "--enable-unsafe-swiftshader"),
)
WIDTHS = {400: 800, 1400: 900}
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=hacked=1>\"'\x1b\n"
KINDS = ("detect", "ablate", "steps", "arms", "prompt", "hostile")
LIVE = {"detect": "dark", "ablate": "light", "prompt": "light", "hostile": "dark"}  # in which scheme they are tried


def with_monitor(path):
    """Monitor's entries in some rows of a log."""
    rows = [
        {
            **row,
            "monitor": {
                "layers": [{"name": "ffn 0", "top1": 9.0, "median": 1.0, "ratio": 9.0 + row["step"], "kurtosis": 3.0}],
                "attention": [{"name": "attn 0", "sink_rate": 0.25, "best_position": 0}],
                "spike_tokens": 0.1,
                "sink_tokens": 0.0,
                "p_sink_given_spike": None,
                "p_spike_given_sink": None,
            },
        }
        for row in files.rows_of(path)
    ]
    assert len(rows) > 1
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder with a page and a JSON of every kind, and the figures of `detect` and of `arms`."""
    import importlib
    import sys

    from spikesink.errors import cli

    out = tmp_path_factory.mktemp("pages")

    def call(script, *args):
        old, sys.argv = sys.argv, [f"{script}.py", *map(str, args)]
        try:
            cli(importlib.import_module(script).main)
        finally:
            sys.argv = old

    small = [*SMALL_RUN, "--vocab_size=257", "--bos", "--dataset=stdlib", "--log_interval=1"]
    call("train", *small, f"--out_dir={out / 'pre'}")
    call("train", "postnorm", *small, f"--out_dir={out / 'post'}")
    with_monitor(out / "pre" / "log.jsonl")
    of = lambda kind: ("--seq_len=16", f"--html={out / kind}.html", f"--json={out / kind}.json")
    some = ("--n_seq=12", "--nulls=2")
    call("detect", out / "pre", *of("detect"), *some, f"--figures={out / 'paper'}")
    call("ablate", out / "pre", *of("ablate"), *some, "--no-probes", "--only", "spike_zero", "sink_mask")
    steps = sorted((out / "pre").glob("ckpt-*.pt"))
    call("detect", "--compare", *steps, *of("steps"), *some)
    call("detect", "--compare", out / "pre", out / "post", *of("arms"), *some, f"--figures={out / 'paper_arms'}")
    call("detect", out / "pre", "--prompt", "<b>x</b> $a", *of("prompt"))
    found = json.loads((out / "detect.json").read_text())
    first = found["examples"]["sequences"][0]
    first["texts"][0] = HOSTILE
    first["spikes"][0] = first["sink_heads"][0] = first["enough_queries"][0] = 1
    for token in (*found["spikes"]["tokens"], *found["sinks"]["tokens"]):
        token["text"] = token["before"] = HOSTILE
    found["checkpoint"]["path"] = HOSTILE
    page.detection_page(out / "hostile.html", schema.from_json(Findings, found))
    return out


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def show(browser, made):
    """show(kind, width, scheme) -> an open page, which may have nothing to complain about until the test ends."""
    complaints, pages = [], []

    def call(kind, width, scheme, **options):
        context = browser.new_context(
            viewport={"width": width, "height": WIDTHS[width]}, color_scheme=scheme, **options
        )
        pages.append(context)
        page = context.new_page()
        page.on("console", lambda m: m.type == "error" and complaints.append(m.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or complaints.append(r.url))
        page.goto(f"file://{made / kind}.html")
        return page

    yield call
    for context in pages:
        context.close()
    assert complaints == []


def live(page, name):
    """A figure that answers, once it does."""
    page.locator(f"figure[data-live={name}]").first.scroll_into_view_if_needed()
    page.wait_for_selector(f"figure[data-live={name}] .live", timeout=20_000)
    return page.locator(f"figure[data-live={name}]").first


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_pages_open_without_complaint_and_fit(show, kind, width, scheme):
    page = show(kind, width, scheme)
    if LIVE.get(kind) == scheme:
        live(page, "text")
        live(page, "matrix")
        page.wait_for_selector(".plot .main-svg")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for details in page.locator("details").all():
        details.evaluate("node => node.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.hacked === undefined")
    levels = [int(tag[1]) for tag in page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => h.tagName)")]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    for figure in page.locator("figure").all():
        assert len(figure.locator("figcaption").text_content()) > 20


@pytest.mark.parametrize("kind", ["detect", "ablate"])
def test_first_screen_holds_verdicts_and_conditions(show, kind):
    bottom = "nodes => Math.max(...nodes.map(n => n.getBoundingClientRect().bottom))"
    page = show(kind, 1400, "light")
    assert page.locator(".verdict").count() == 3
    assert page.locator(".verdict, .conditions").evaluate_all(bottom) <= 900
    assert "sha256" in page.locator(".conditions").first.text_content()
    assert show(kind, 400, "light").locator(".verdict").first.bounding_box()["y"] < 300


@pytest.mark.parametrize("width", WIDTHS)
def test_text_answers(show, width):
    page = show("hostile", width, "light")
    figure = live(page, "text")
    tokens = figure.locator(".text span")
    shades = lambda: tokens.evaluate_all("all => all.map(s => getComputedStyle(s).backgroundColor)")
    assert tokens.first.text_content() == visible(HOSTILE)
    assert "spike" in tokens.first.get_attribute("class") and "sink" in tokens.first.get_attribute("class")
    how = figure.locator("select").last
    before, choices = shades(), how.locator("option").all_text_contents()
    assert choices == ["embedding", "attn 0", "ffn 0", "share over all heads", "in head 0.0", "in head 0.1"]
    for choice in ({"embedding", "ffn 0"} - {how.locator("option:checked").text_content()}, {"in head 0.1"}):
        how.select_option(label=choice.pop())
        assert shades() != before
        before = shades()
    assert "sink in this head" in figure.locator(".legend").text_content()
    which = figure.locator("select").first
    texts = tokens.all_text_contents()
    which.select_option(index=1)
    assert tokens.all_text_contents() != texts and tokens.first.text_content() == "<bos>"
    tokens.nth(3).click()
    assert "position 3 " in figure.locator(".told").text_content()
    tokens.nth(3).focus()
    page.keyboard.press("ArrowRight")
    assert "position 4 " in figure.locator(".told").text_content()


def test_magnitudes_answer(show, made):
    page = show("detect", 1400, "dark")
    figure = live(page, "matrix")
    page.wait_for_selector(".plot .main-svg")
    peak = lambda: page.evaluate("Math.max(...document.querySelector('.plot').data[0].z.flat())")
    found = Findings.load(made / "detect.json")
    matrices = {m.layer: unpacked(m.values).max() for m in found.examples.matrices}
    assert list(matrices) == ["embedding", "attn 0", "ffn 0"]
    for layer, expected in matrices.items():
        figure.locator("select").select_option(label=layer)
        assert peak() == pytest.approx(float(expected))


def test_still_figures_stay_without_scripts(show):
    page = show("detect", 400, "light", java_script_enabled=False)
    for name in ("matrix", "text"):
        assert page.locator(f"#{name} .still svg").is_visible()


@pytest.mark.parametrize("medium", drawing.SIZES)
def test_labels_stay_within_their_figure(made, medium):
    edits = json.loads((made / "ablate.json").read_text())
    for cause in edits["causes"]:
        cause.update(judged=9, verdict="cannot tell", lost={"share": 0.3, "ci95": [0.2, 0.4]})
    drawn = itertools.chain(
        drawing._draw(figures.DETECTION, Findings.load(made / "detect.json"), medium),
        drawing._draw(ablation_figures.ABLATION, schema.from_json(Ablation, edits), medium),
    )
    names = set()
    for name, _, canvas in drawn:
        names.add(name)
        FigureCanvasAgg(canvas).draw()
        width, height = canvas.bbox.size
        for axes in canvas.axes:
            for text in filter(Text.get_text, (axes.xaxis.label, axes.yaxis.label, axes.title)):
                (left, bottom), (right, top) = text.get_window_extent().get_points()
                assert min(left, bottom) > -1 and right < width + 1 and top < height + 1, (name, text.get_text())
    assert {"tokens", "causes"} <= names


@pytest.mark.parametrize("kind", KINDS)
def test_pages_are_self_contained_and_small(made, kind):
    html = (made / f"{kind}.html").read_text()
    assert len(html.encode()) < 6e6
    links = re.findall(r"<[^<>]*\b(?:src|href)=[\"']?([^\"' >]+)", html)
    assert all(link.startswith(("#", "data:")) for link in links), links
    assert "url(http" not in html and "@import" not in html and "<script>window.hacked" not in html


def test_history_is_shown_where_there_is_one(made):
    assert "Over training" in (made / "detect.html").read_text()
    found = json.loads((made / "detect.json").read_text())
    assert [row["ratio"] for row in found["history"]] == [9.0 + row["step"] for row in found["history"]]
    steps, arms = ((made / f"{kind}.html").read_text() for kind in ("steps", "arms"))
    assert "Over training, steps 4 to 8" in steps and "Over training" not in arms


def test_history_skips_what_the_monitor_did_not_see(tmp_path):
    assert history.log_rows(tmp_path / "log.jsonl") == []
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(900)))
    assert history.log_rows(tmp_path / "log.jsonl") == []
    with_monitor(tmp_path / "log.jsonl")
    rows = history.log_rows(tmp_path / "log.jsonl", 800)
    assert len(rows) == history.ROWS and (rows[0].step, rows[-1].step) == (0, 800)


def test_figures_for_a_paper(made):
    from PIL import Image

    captions = (made / "paper" / "captions.txt").read_text()
    names = [name for name in figures.DETECTION]
    for folder, expected in (("paper", names), ("paper_arms", ["comparison"])):
        folder = made / folder
        assert sorted(path.stem for path in folder.glob("*.svg")) == sorted(expected)
        for name in expected:
            svg = (folder / f"{name}.svg").read_text()
            assert "<text" in svg and "currentColor" not in svg
            with Image.open(folder / f"{name}.png") as image:
                assert image.width in (1005, 2070)
    assert all(f"{name}: " in captions for name in names)


def test_the_backend_stays_as_it_is():
    """In a notebook another is chosen. Neither the import nor a figure touches it, or loads pyplot."""
    program = """
import matplotlib as mpl
mpl.rcParams["backend"] = "svg"
from spikesink.show import drawing, figures, page, ablation_figures
import studies.figures
def draw(found):
    figure, axes = drawing.canvas()
    axes.plot([1, 2])
    return figure
table = {"one": drawing.Figure(draw, lambda found: "")}
assert drawing.for_page(table, None)["one"].svg.startswith("<svg") and list(drawing.for_paper(table, None))[0][2]
print(mpl.rcParams["backend"], "matplotlib.pyplot" in __import__("sys").modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "svg False\n"
