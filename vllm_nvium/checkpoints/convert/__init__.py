# SPDX-License-Identifier: Apache-2.0
"""Makes N-vium checkpoints: out of dense models (`dense.py`) and out of the layout that the N-vium
authors released (`authors.py`). `command.py` is `vllm-nvium convert`, and its `convert()` does the
same from Python. Importing this package imports neither torch nor transformers.
"""
