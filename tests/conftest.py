import multiprocessing
import os
import shutil
import tempfile

import pytest


# No test needs the network or touches the user's caches; nor do the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
CACHE = os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="lever-grpo-tests-")


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def planted():
    from planted import Planted

    return Planted()


@pytest.fixture(scope="session")
def planted_files(tmp_path_factory, planted):
    """The planted log as files: our own format, the Lever-LM format with pools beside it, and the embeddings."""
    from planted import write_files

    return write_files(tmp_path_factory.mktemp("planted"), planted)


@pytest.fixture(scope="session")
def processes():
    """Starts processes that have imported everything already: children of a server that has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lever_grpo.pipeline", "planted"])
    return context
