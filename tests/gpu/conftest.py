"""Workers of `pytest -n` share one GPU: none of them may take its memory in advance."""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
