"""The loopback Hub, for whatever pushes and downloads."""

import importlib.util
import sys
from pathlib import Path

import pytest

specification = importlib.util.spec_from_file_location("loopback_hub", Path(__file__).parent / "loopback_hub.py")
assert specification and specification.loader
loopback_hub = sys.modules["loopback_hub"] = importlib.util.module_from_spec(specification)
specification.loader.exec_module(loopback_hub)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on 127.0.0.1 that this process's client talks to, logged in, with a cache of its own."""
    from huggingface_hub import constants

    with loopback_hub.serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", loopback_hub.TOKEN)
        hub.token = loopback_hub.TOKEN
        yield hub


@pytest.fixture
def projected(monkeypatch):
    """How many positions each call of TRL's fused head is given, from here on."""
    from trl.trainer import utils

    seen, own = [], utils._ChunkedLogProbFunction

    class Counted:
        @staticmethod
        def apply(hidden, *others):
            seen.append(len(hidden))
            return own.apply(hidden, *others)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Counted)
    return seen
