# SPDX-License-Identifier: Apache-2.0
"""Only a refusal; everything else about the build is in pyproject.toml.

Where a source archive was unpacked without symbolic links (pip does so with .zip files),
`vllm_nvium/model_executor` is a file that holds the link's target. setuptools would make a wheel
without those modules and say nothing.
"""

import sys
from pathlib import Path

from setuptools import setup

if not Path(__file__).with_name("vllm_nvium").joinpath("model_executor", "__init__.py").is_file():
    sys.exit(
        "vllm_nvium/model_executor is no link to ../model_executor, because this source was "
        "unpacked without symbolic links; install from a .tar.gz archive, from git, or from a "
        "clone."
    )

setup()
