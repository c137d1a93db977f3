# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_nvium.cli` is `vllm-nvium`."""

import sys

from vllm_nvium.cli import main

sys.exit(main())
