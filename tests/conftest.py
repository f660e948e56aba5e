"""What every test needs: the tests' own modules importable here and in the worker processes that tests start."""

import os
from pathlib import Path

_TESTS = str(Path(__file__).parent)
os.environ["PYTHONPATH"] = os.pathsep.join([_TESTS, *filter(None, [os.environ.get("PYTHONPATH")])])
