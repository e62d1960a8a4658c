"""Makes the helpers in this folder importable, and sets the environment, here and in the rank processes."""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
for folder in (HERE, os.path.join(HERE, "..", "examples")):
    if folder not in sys.path:
        sys.path.insert(0, folder)
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# in PyTorch's own folder, checkouts and environments would build over each other's extensions
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(os.path.dirname(HERE), "build", "torch_extensions",
                                                           sys.implementation.cache_tag))
if not os.path.exists("/dev/nvidiactl"):  # read when the Triton kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
