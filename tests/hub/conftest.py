"""Children that drive the real client against the Hub on the loopback interface."""

import json
import textwrap

import pytest

from tests.hub_server import HubServer
from tests.processes import python

PRELUDE = """
import json, os
from pathlib import Path
import hf_earlyexit as ee
from tests.hub.toy import *
from transformers.utils import logging
logging.disable_progress_bar()
out = {}
"""


@pytest.fixture(scope="session")
def run_child():
    """`run_child(hub, folder, code, home="home", token=None)`: the child works in `folder`; its `out` comes back."""

    def run(hub, folder, code, home="home", token=None):
        script = f"{PRELUDE}\n{textwrap.dedent(code)}\nPath('out.json').write_text(json.dumps(out))"
        (folder / "out.json").unlink(missing_ok=True)
        child = python(script, cwd=folder, environment=hub.environment(folder / home, token))
        assert child.returncode == 0, child.stderr[-4000:]
        return json.loads((folder / "out.json").read_text()) | {"stdout": child.stdout, "stderr": child.stderr}

    return run


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub, run_child, tmp_path_factory, request):
    """What the `PUSH` of the test's module says, run in a child."""
    return run_child(hub, tmp_path_factory.mktemp("push"), request.module.PUSH)


@pytest.fixture(scope="module")
def pulled(hub, pushed, run_child, tmp_path_factory, request):
    """What its `PULL` says after that, in another child that has nothing of the first one's."""
    return run_child(hub, tmp_path_factory.mktemp("pull"), request.module.PULL)
