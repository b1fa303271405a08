"""`expertshare serve`: a model behind OpenAI's API."""

from __future__ import annotations

import math
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from expertshare.cli.option_groups import DecodingFlags, KnobFlags, StoreFlags, with_option_groups
from expertshare.cli.ray_flags import RayAddressFlag, RayFlag, scale_out
from expertshare.cli.threads import ThreadsFlag, set_threads
from expertshare.errors import InputError

EXAMPLE = "Example: expertshare serve path/to/model --policy des-vote --budget 16 --port 8000"
_http = partial(typer.Option, rich_help_panel="Server")
_limit = partial(typer.Option, rich_help_panel="Limits")


@with_option_groups
def serve(
    model: Annotated[str, typer.Argument(help="Directory of a model in Hugging Face layout, or a hub id.")],
    host: Annotated[str, _http(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, _http(help="Port to listen on; 0: any free one, which the log names.")] = 8000,
    model_name: Annotated[str | None, _http(help="What clients call the model; default: its directory's name.")] = None,
    api_key: Annotated[
        str | None, _http(help="Key that clients must send.", envvar="EXPERTSHARE_API_KEY", show_envvar=True)
    ] = None,
    page: Annotated[
        bool | None, _http("--page/--no-page", help="Show the live page at /. Default: unless there is an API key.")
    ] = None,
    log_level: Annotated[str, _http(help="Least level of log lines: debug, info, warning or error.")] = "info",
    log_prompts: Annotated[bool, _http("--log-prompts", help="Put prompts and answers into the log.")] = False,
    drain_timeout: Annotated[float, _http(help="Seconds to finish what runs after SIGTERM.")] = 30.0,
    max_batch: Annotated[int, _limit(help="Answers decoded at once.")] = 16,
    max_queue: Annotated[int, _limit(help="Answers that may wait; more are refused with 429.")] = 64,
    timeout: Annotated[float, _limit(help="Seconds that a request may take, waiting included.")] = 300.0,
    max_context: Annotated[int | None, _limit(help="Tokens of prompt and answer; default: as the model has.")] = None,
    max_prompt: Annotated[int | None, _limit(help="Tokens of a prompt; default: what the context leaves.")] = None,
    max_body: Annotated[int, _limit(help="Bytes of a request's body.")] = 1 << 20,
    max_choices: Annotated[int, _limit(help="Answers of one request (n times prompts).")] = 8,
    policy: Annotated[
        str | None, typer.Option(help="Policy of requests that name none. Default: what the model was trained with.")
    ] = None,
    policy_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Policy file of `expertshare tune`, for this very model.")
    ] = None,
    policies: Annotated[
        str | None,
        typer.Option(help="Policies that requests may name: names (any knobs) or settings, with commas. Default: all."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: the checkpoint's.")] = None,
    backend: Annotated[str, typer.Option(help="Expert computation: auto, cpu, grouped or reference.")] = "auto",
    threads: ThreadsFlag = None,
    replicas: Annotated[int, scale_out(help="Processes with the model; more than one needs the extra `ray`.")] = 1,
    max_replicas: Annotated[
        int | None, scale_out(help="Start up to so many while there is more to do. Default: as --replicas.")
    ] = None,
    ray: RayFlag = False,
    ray_address: RayAddressFlag = None,
    *,
    decoding: DecodingFlags,
    knobs: KnobFlags,
    storage: StoreFlags,
) -> None:
    """Serve a model over HTTP, as OpenAI's API does, batching requests continuously. Decoding flags are the defaults of
    requests."""
    # not above: every other verb works without the extra
    from expertshare.api.serving import opened_engine, opened_entrance
    from expertshare.serving import EngineLimits, ServerSettings, create_app, page_routes
    from expertshare.serving import serve as serve_app
    from expertshare.serving.live import page_paths
    from expertshare.serving.logs import checked_level
    from expertshare.serving.replicas import ReplicaScale

    scale = ReplicaScale(replicas=replicas, max_replicas=max_replicas, wanted=ray, address=ray_address)
    level = checked_level(log_level)
    if not 0 <= drain_timeout < math.inf:
        raise InputError(f"drain-timeout must be a finite number of seconds, 0 or more, got {drain_timeout}")
    limits = EngineLimits(max_batch=max_batch, max_queue=max_queue, timeout_s=timeout, max_context=max_context)
    settings = ServerSettings(
        model_name=model_name,
        api_key=api_key,
        max_body_bytes=max_body,
        max_prompt_tokens=max_prompt,
        max_choices=max_choices,
        log_prompts=log_prompts,
    )
    shown = api_key is None if page is None else page
    engine: dict[str, Any] = {
        "policy": knobs.policy(policy, policy_file),
        "policies": None if policies is None else [policies],
        "backend": backend,
        "dtype": dtype,
        "store": storage.options(),
        "limits": limits,
        **decoding.options(),
    }
    listen = partial(serve_app, host=host, port=port, drain_timeout_s=drain_timeout, log_level=level)
    if scale.on_ray:
        engine |= {"drain_timeout_s": drain_timeout, "log_level": level}
        with opened_entrance(model, scale, settings, page=shown, threads=threads, **engine) as (app, door):
            ended_by = listen(app, door)
    else:
        set_threads(threads)
        with opened_engine(model, **engine) as one:
            routers = [page_routes(one, model_name)] if shown else []
            app = create_app(one, settings, extra_routers=routers, open_paths=page_paths() if shown else ())
            ended_by = listen(app, one)
    if ended_by == signal.SIGINT:
        sys.exit(130)
