# SPDX-License-Identifier: Apache-2.0
"""The `vllm-nvium` command."""


def main() -> int:
    return 0
