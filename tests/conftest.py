"""Makes the helpers in this folder importable, here and in the rank processes."""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
for folder in (HERE, os.path.join(HERE, "..", "examples")):
    if folder not in sys.path:
        sys.path.insert(0, folder)
os.environ.setdefault("DS_ACCELERATOR", "cpu")
if not os.path.exists("/dev/nvidiactl"):  # read when the Triton kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
