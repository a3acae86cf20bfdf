"""What most tests of serving answer with."""

import pytest


@pytest.fixture(scope="module")
def model(tiny_model, open_policy):
    """A tiny model whose rows leave at several layers; one for each file."""
    model = tiny_model()
    model.set_exit_policy(open_policy(model, "confidence"))
    return model
