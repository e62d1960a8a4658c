"""Examples that tests use in one process, whose imports take longer than all that it does."""

import json
import subprocess
import sys


def found_by(program, folder, out):
    """What a program in an example's folder found, which it prints as JSON behind FOUND, and what it printed before.

    Args:
        program: its text; ``sys.argv`` has ``out`` and whether the images are installed.
    """
    import images

    words = [sys.executable, "-c", program, str(out), str(images.packaged() is not None)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    printed, _, found = done.stdout.partition("FOUND ")
    return json.loads(found), printed
