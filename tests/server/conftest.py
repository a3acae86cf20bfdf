"""A real browser, for the pages."""

import os
import shutil
import subprocess

import pytest

SECONDS = 150


@pytest.fixture(scope="module")
def chromium():
    """`chromium(folder, width, *flags)`: what a browser of that width says of a page; skips where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed, which shows the page")

    def show(folder, width, *flags):
        usual = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}",
            f"--window-size={width},1400",
        ]
        environment = {**os.environ, "HOME": str(folder)}
        done = subprocess.run(
            [program, *usual, "--virtual-time-budget=20000", *flags],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return show
