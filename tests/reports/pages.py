"""What tests of pages share: a reader of HTML, a hostile text, and a real browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

HOSTILE = '<script>alert("x")</script><img src=//evil.example/p> {{ 7 * 7 }} & ' + "W" * 300


class Page(HTMLParser):
    """Tags, attributes and text of a page, and the cells of its tables."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.rows, self.in_cell = [], [], [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data.strip()


def browser_widths(html, width, folder):
    """How wide a page wants to be in a frame of this width, and what sticks out; a script put into the page tells."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        # everything else about the pages is tested without one
        pytest.skip("no Chromium here, and only a browser can tell how wide a page is drawn")
    probe = """<script>addEventListener("load", () => {
      const wide = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 0.5);
      parent.postMessage(JSON.stringify({inner: innerWidth, wants: document.documentElement.scrollWidth,
        wide: wide.slice(0, 5).map(e => e.tagName)}), "*");
    });</script></body>"""
    (folder / "page.html").write_text(html.replace("</body>", probe), encoding="utf-8")
    (folder / "frame.html").write_text(
        '<body><pre id="told">nothing</pre><script>addEventListener("message", e => told.textContent = e.data);</script>'
        f'<iframe src="page.html" style="width:{width}px;height:800px;border:0"></iframe></body>'
    )
    quiet = [
        "--hide-scrollbars",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={folder / 'profile'}",
         "--virtual-time-budget=5000", "--dump-dom", (folder / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout)
    assert told, done.stderr[-500:]
    return json.loads(told[1])
