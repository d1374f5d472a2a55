"""The report in a real browser: it renders on desk and phone, in light and dark, alone and without a complaint."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from common.config import load_config
from privacy.report import report_of
from privacy.report_page import read_evaluation, render, write_reports
from umbel.empirical import empirical_audit
from umbel.simulate import simulate

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium"),
]
HOSTILE = "<script>document.title='broken'</script>" + 40 * "wide"
# Looks at the page from outside, because the page's own policy lets no script run in it.
PROBE = """<!doctype html><body style="margin:0">
<iframe src="{page}" style="border:0;width:{width}px;height:900px"></iframe>
<pre id="found"></pre><script>
onload = () => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument, root = page.documentElement;
  const style = frame.contentWindow.getComputedStyle(root);
  const contrast = (element) => {{
    const light = (css) => {{
      const [r, g, b] = css.match(/[0-9.]+/g).slice(0, 3).map((v) => v / 255)
        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    }};
    const both = [frame.contentWindow.getComputedStyle(element).color, style.backgroundColor].map(light);
    return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
  }};
  const text = [...page.querySelectorAll("p, li, td, th, dt, dd, h1, h2, h3, a, figcaption, caption")];
  document.querySelector("#found").textContent = JSON.stringify({{
    title: page.title,
    background: style.backgroundColor,
    sideways: root.scrollWidth - root.clientWidth,
    cut: [...page.querySelectorAll(".scroll, figure, .panels, svg")]
      .filter((box) => box.scrollWidth > box.clientWidth + 1)
      .map((box) => box.getAttribute("aria-label") || box.className),
    svgs: [...page.querySelectorAll("svg")].map((svg) => {{
      const box = svg.getBoundingClientRect();
      return {{width: box.width, height: box.height, label: svg.getAttribute("aria-label")}};
    }}),
    letters: Math.min(...[...page.querySelectorAll("svg text")].map((text) => text.getBoundingClientRect().height)),
    requests: frame.contentWindow.performance.getEntriesByType("resource").map((entry) => entry.name),
    headings: [...page.querySelectorAll("h1, h2, h3")].map((heading) => Number(heading.tagName[1])),
    scripts: page.scripts.length,
    contrast: Math.min(...text.map(contrast)),
  }});
}};
</script>"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small simulation with its reports."""

    class Silent:
        def step(self, name):
            pass

        def warn(self, message):
            pass

    root = tmp_path_factory.mktemp("runs") / "run"
    options = {"data.synthetic.users": 60, "data.synthetic.examples": [5, 40], "training.rounds": 3}
    simulate(load_config(None, options | {"run.out": str(root)}), progress=Silent())
    empirical_audit(root, canaries=100, seed=0)
    write_reports(root)
    return root


def chromium(profile, *options):
    """What a headless Chromium prints, and what it logs."""
    quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    flags = ["--headless", "--no-sandbox", "--disable-sync", *quiet.split(), f"--user-data-dir={profile}"]
    done = subprocess.run([CHROMIUM, *flags, *options], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


def look(tmp_path: Path, page: Path, width: int, *options):
    """What the probe finds in a page of so many pixels, which must leave nothing on the console."""
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(page=page.as_uri(), width=width))
    flags = ("--enable-logging=stderr", "--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom")
    printed, logged = chromium(tmp_path / "profile", *options, *flags, probe.as_uri())
    assert [line for line in logged.splitlines() if "CONSOLE" in line] == []
    found = re.search(r'<pre id="found">(.*?)</pre>', printed, re.DOTALL)
    assert found is not None
    assert found[1], "the probe found no page"
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.parametrize("width", [360, 400, 1100])
def test_the_page_renders(tmp_path, run, width):
    """Plots are whole and readable, nothing is asked for, and nothing on the page scrolls sideways, even at 360 px."""
    found = look(tmp_path, run / "report.html", width)
    assert found["sideways"] == 0
    assert found["requests"] == []
    assert found["cut"] == []
    assert len(found["svgs"]) >= 8
    assert all(250 < svg["width"] < width and svg["height"] > 80 and svg["label"] for svg in found["svgs"])
    assert found["letters"] >= 11
    assert found["headings"][0] == 1
    assert all(after - before <= 1 for before, after in zip(found["headings"], found["headings"][1:], strict=False))


def test_both_themes_have_contrast(tmp_path, run):
    """Text stands out from the page by 4.5 to 1 or more, in light and in dark."""
    light = look(tmp_path, run / "report.html", 1100)
    dark = look(tmp_path, run / "report.html", 1100, "--blink-settings=preferredColorScheme=0")
    assert light["background"] != dark["background"]
    assert light["contrast"] >= 4.5
    assert dark["contrast"] >= 4.5


def test_hostile_and_long_names_change_nothing(tmp_path, run):
    """Markup in a name does not run, and a name of 200 letters without a space does not widen the page."""
    report = report_of(run)
    model = dataclasses.replace(report.model, feature_names=(HOSTILE, *report.model.feature_names))
    rounds = tuple(dataclasses.replace(facts, run=HOSTILE) for facts in report.rounds)
    hostile = dataclasses.replace(report, population=HOSTILE, run=HOSTILE, model=model, rounds=rounds)
    page = tmp_path / "hostile.html"
    page.write_text(render(hostile, read_evaluation(run)))
    found = look(tmp_path, page, 360)
    assert found["title"] == f"Privacy report: {HOSTILE}"
    assert found["scripts"] == 0
    assert found["sideways"] == 0


def test_the_publishable_page_prints(tmp_path, run):
    """The page without the evaluation has epsilon, residual scale and attack as plots, and comes out of a printer."""
    found = look(tmp_path, run / "release" / "report.html", 1100)
    assert len(found["svgs"]) == 4
    paper = tmp_path / "report.pdf"
    chromium(tmp_path / "printing", f"--print-to-pdf={paper}", (run / "release" / "report.html").as_uri())
    assert paper.read_bytes().startswith(b"%PDF")
