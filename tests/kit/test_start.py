"""What a command need not wait for."""

import subprocess
import sys


def test_commands_of_speech_import_no_package_for_images():
    code = """
import importlib, sys
sys.modules["torchmetrics"] = None  # which Lightning imports where it is there, and images with it
from remanence.cli import COMMANDS
from remanence.jobs.options import check_options
for path, (job, _) in COMMANDS.items():
    if path[0] == "speech":
        importlib.import_module(job.partition(":")[0])
check_options({"lr": 1e-3, "optimizer": None})
sys.exit(" ".join({"timm", "torchvision", "cv2"} & set(sys.modules)) or 0)
"""
    found = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
