import subprocess
import sys


def test_evaluating_needs_no_med3d():
    code = "import sys; sys.modules['monai'] = None; import diffusers_byoc.commands.evaluate_run"
    subprocess.run([sys.executable, "-c", code], check=True)
