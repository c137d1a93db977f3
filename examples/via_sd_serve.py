# SPDX-License-Identifier: Apache-2.0
"""Ask a running server with VIA-SD, with and without the slim verifier, through the `openai`
client, which comes with vLLM; and read from /metrics what the tiers did meanwhile.

    vllm serve MODEL --via-sd --spec-method ngram --spec-tokens 4 --port 8000
    python examples/via_sd_serve.py [--base-url http://127.0.0.1:8000/v1]
"""

import argparse
import urllib.request

from openai import BadRequestError, OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--prompt", default="Count from one to twenty in words: one, two, three,")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key="not-needed")
    model = client.models.list().data[0].id

    for title, options in (("With the tier", {}), ("Without it", {"via_sd": "off"})):
        completion = client.completions.create(
            model=model,
            prompt=args.prompt,
            max_tokens=args.max_tokens,
            temperature=0.0,  # lossless: both say the same
            extra_body={"vllm_xargs": options},
        )
        print(f"{title}: {completion.choices[0].text!r}")

    try:
        client.completions.create(
            model=model, prompt="x", extra_body={"vllm_xargs": {"via_sd_mode": "paper"}}
        )
    except BadRequestError as error:
        print(f"A lossless server refuses the paper's rule: {error.status_code}: {error.body}")

    with urllib.request.urlopen(args.base_url.removesuffix("/v1") + "/metrics") as page:
        for line in page.read().decode().splitlines():
            if line.startswith("vllm:via_sd_") and "_total" in line:
                print(line)


if __name__ == "__main__":
    main()
