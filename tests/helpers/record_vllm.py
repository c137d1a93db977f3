# SPDX-License-Identifier: Apache-2.0
"""Writes down that the functions of this environment's vLLM behind the hook table were read:
`make record-vllm`, once somebody has looked at what `vllm-nvium doctor --vllm-changes` shows."""

import json
from pathlib import Path

import vllm

from vllm_nvium.engine import hooks, vllm_functions
from vllm_nvium.version import TESTED_VLLM


def main() -> None:
    version = hooks.minor(hooks.vllm_version())
    if version not in TESTED_VLLM:
        raise SystemExit(f"vLLM {hooks.vllm_version()} is not in TESTED_VLLM of version.py.")
    found = vllm_functions.hashes(Path(vllm.__file__).parent, hooks.all_hooks())
    records = vllm_functions.recorded() if vllm_functions.RECORDS.exists() else {}
    records[".".join(map(str, version))] = found
    names = [".".join(map(str, minor)) for minor in TESTED_VLLM]
    kept = {name: records[name] for name in names if name in records}
    vllm_functions.RECORDS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
