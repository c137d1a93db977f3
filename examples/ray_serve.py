# SPDX-License-Identifier: Apache-2.0
"""Ray Serve: replicas of `vllm serve` behind one address. Each replica is vLLM's own app with its
own engine, so all of its routes are there, and its flags but those of the socket, which is Ray's;
Ray starts, restarts and shares out.

    pip install 'ray[serve]==2.60.0'
    python examples/ray_serve.py --replicas 2 --port 8000 MODEL [flags of vllm serve]
"""

import argparse
import os
from typing import Any

import ray
from ray import serve

# Flags of vLLM's own listening socket.
ADDRESS = ("--ssl-", "--enable-ssl-", "--uds")


class VLLM:
    """vLLM's app (ASGI). The engine starts with the first event, in the replica's event loop.

    Args:
        arguments: of `vllm serve`.
    """

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        self.app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.app is None:
            await self.start()
        await self.app(scope, receive, send)

    async def start(self) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs

        # Of another module in vLLM 0.33 than in 0.32; both have them here.
        from vllm.entrypoints.cli.serve import make_arg_parser, validate_parsed_serve_args
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        args = make_arg_parser(FlexibleArgumentParser()).parse_args(self.arguments)
        args.model = args.model_tag or args.model
        validate_parsed_serve_args(args)
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
        tasks = await self.engine.get_supported_tasks()
        app = build_app(args, tasks, self.engine.model_config)
        await init_app_state(self.engine, app.state, args, tasks)
        self.app = app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--gpus", type=float, default=0, help="of each replica")
    parser.add_argument("--host", default="127.0.0.1")
    own, arguments = parser.parse_known_args()
    for argument in arguments:
        if argument.replace("_", "-").startswith(ADDRESS):
            parser.error(f"{argument} would have no effect: Ray Serve listens, not vLLM; remove it")
    if not own.gpus:
        # Every replica would bind its threads to the same cores.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

    @serve.deployment(
        num_replicas=own.replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": own.gpus},
        max_ongoing_requests=1000,
    )
    @serve.ingress(lambda: VLLM(arguments))
    class Replica:
        pass

    ray.init(num_cpus=own.replicas + 1, include_dashboard=False)
    serve.start(http_options={"host": own.host, "port": own.port})
    serve.run(Replica.bind(), blocking=True)


if __name__ == "__main__":
    main()
