"""The page in a real browser, at a phone's width and a screen's: nothing overflows, values show under the pointer."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

from megadyn.report.report import write_report
from tests.report.conftest import full_records, start, write_metrics, write_starts

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=3000",
    "--dump-dom",
)

PROBE = """<body><iframe id="page" width="{width}" height="900" srcdoc="{page}"></iframe><p id="found"></p><script>
page.onload = () => {{
  const inside = page.contentDocument, found = {{failed: []}};
  const point = (node, x, y) => {{
    const box = node.getBoundingClientRect();
    node.dispatchEvent(new page.contentWindow.PointerEvent("pointermove", {{
      clientX: box.left + x * box.width, clientY: box.top + y * box.height, bubbles: true}}));
  }};
  for (const figure of inside.querySelectorAll("figure.chart")) {{
    const picture = figure.querySelector(":scope > svg"), box = figure.getBoundingClientRect();
    point(picture, 0.99, 0.15);
    const said = figure.querySelector("output").textContent.trim();
    if (!said) found.failed.push(figure.querySelector("figcaption").textContent);
    if (figure.textContent.startsWith("Loss (")) found.loss = said;
    if (figure.textContent.startsWith("Share of tokens")) found.share = said;
  }}
  const token = inside.querySelector(".text b");
  token.dispatchEvent(new page.contentWindow.PointerEvent("pointerdown", {{bubbles: true}}));
  found.token = token.closest(".card").querySelector("output").textContent;
  found.overflow = inside.documentElement.scrollWidth - inside.documentElement.clientWidth;
  found.smallest = Math.min(...[...inside.querySelectorAll("text.tick")]
    .filter((text) => text.textContent && !text.closest("details")).map((text) => text.getBoundingClientRect().height));
  document.getElementById("found").textContent = JSON.stringify(found);
}};
</script></body>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    return found or pytest.skip(f"no browser here ({', '.join(BROWSERS)})")


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_and_answers_the_pointer(browser, make_run, tmp_path, width):
    page = tmp_path / "report.html"
    first, second = make_run("dtf", "a-run-of-a-long-name-" + "x" * 60), make_run("mod", "other")
    write_metrics(first, full_records())
    write_starts(first, start(variables={"NCCL_SOCKET_IFNAME": "eth" * 60}))
    write_starts(second, start())
    write_report([first, second], page, tokens=24)
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(width=width, page=escape(page.read_text())))
    done = subprocess.run(
        [browser, *FLAGS, f"--user-data-dir={tmp_path}/profile", "--window-size=1280,1000", probe.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = json.loads(unescape(re.search(r'<p id="found">(.*?)</p>', done.stdout, re.S)[1]))
    assert found["failed"] == []
    assert "training, " in found["loss"] and "4.9 at 6" in found["loss"]
    assert re.fullmatch(r"layer 1, iteration 6: 0\.5", found["share"])
    assert "routed layers" in found["token"]
    assert found["overflow"] == 0
    assert found["smallest"] > 9  # pixels
    assert Path(page).stat().st_size < 2_000_000
