# SPDX-License-Identifier: Apache-2.0
"""Stream from a running `vllm serve CHECKPOINT` with the `openai` client, with another sampling law
for one request. The client comes with vLLM.

    vllm serve CHECKPOINT --nvium-sampling routed --port 8000
    python examples/serve_and_stream.py [--base-url http://127.0.0.1:8000/v1]
"""

import argparse

from openai import BadRequestError, OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--prompt", default="Name three rivers in Europe.")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key="not-needed")
    model = client.models.list().data[0].id

    print("The server's own sampling law:")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": args.prompt}],
        max_tokens=args.max_tokens,
        temperature=0.7,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)

    print("\n\nFrom the mixture of all heads, at most 4 positions deferred:")
    completions = client.completions.create(
        model=model,
        prompt=args.prompt,
        max_tokens=args.max_tokens,
        temperature=1.0,
        seed=17,
        stream=True,
        extra_body={"vllm_xargs": {"nvium_sampling": "mixture", "nvium_max_deferred": 4}},
    )
    for completion in completions:
        if completion.choices:
            print(completion.choices[0].text, end="", flush=True)

    print("\n\nA law that does not exist is refused, and the server lives on:")
    try:
        client.completions.create(
            model=model, prompt="x", extra_body={"vllm_xargs": {"nvium_sampling": "greedy"}}
        )
    except BadRequestError as error:
        print(f"{error.status_code}: {error.body}")


if __name__ == "__main__":
    main()
