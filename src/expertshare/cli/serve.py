"""`expertshare serve`: a model behind OpenAI's API."""

from __future__ import annotations

import math
import signal
import sys
from functools import partial
from typing import Any

from expertshare.cli import flags
from expertshare.cli.options import OptionGroup, option
from expertshare.errors import ConfigError, InputError


class ListenOptions(OptionGroup):
    """Where to listen, and how to end."""

    panel = "Server"
    host: str = option("Address to listen on.", "127.0.0.1")
    port: int = option("Port to listen on; 0: any free one, which the log names.", 8000)
    page: bool | None = option(
        "Show the live page at /. Default: unless there is an API key.", None, "--page/--no-page"
    )
    log_level: str = option("Least level of log lines: debug, info, warning or error.", "info")
    drain_timeout: float = option("Seconds to finish what runs after SIGTERM.", 30.0)


class ServerOptions(OptionGroup):
    """What clients meet; `arguments` are fields of ServerSettings."""

    panel = "Server"
    model_name: str | None = option("What clients call the model; default: its directory's name.", None)
    api_key: str | None = option("Key that clients must send.", None, envvar="EXPERTSHARE_API_KEY", show_envvar=True)
    log_prompts: bool = option("Put prompts and answers into the log.", False, "--log-prompts")


class RequestLimitOptions(OptionGroup):
    """What a request may be; `arguments` are fields of ServerSettings."""

    panel = "Limits"
    max_prompt: int | None = option(
        "Tokens of a prompt; default: what the context leaves.", None, argument="max_prompt_tokens"
    )
    max_body: int = option("Bytes of a request's body.", 1 << 20, argument="max_body_bytes")
    max_choices: int = option("Answers of one request (n times prompts).", 8)


class EngineLimitOptions(OptionGroup):
    """What one engine may take on; `arguments` are fields of EngineLimits."""

    panel = "Limits"
    max_batch: int = option("Answers decoded at once.", 16)
    max_queue: int = option("Answers that may wait; more are refused with 429.", 64)
    timeout: float = option("Seconds that a request may take, waiting included.", 300.0, argument="timeout_s")
    max_context: int | None = option("Tokens of prompt and answer; default: as the model has.", None)


class ReplicaOptions(flags.Ray):
    """How many processes; `arguments` are fields of ReplicaScale."""

    replicas: int = option("Processes with the model; more than one needs the extra `ray`.", 1)
    max_replicas: int | None = option("Start up to so many while there is more to do. Default: as --replicas.", None)


def serve(
    model: flags.Model,
    listening: ListenOptions,
    server: ServerOptions,
    engine_limits: EngineLimitOptions,
    request_limits: RequestLimitOptions,
    policy: str | None = option("Policy of requests that name none. Default: what the model was trained with.", None),
    policy_file: flags.PolicyFromFile = None,
    policies: str | None = option(
        "Policies that requests may name: names (any knobs) or settings, with commas. Default: all.", None
    ),
    *,
    compute: flags.Device,
    threads: flags.Threads = None,
    replicas: ReplicaOptions,
    decoding: flags.Decoding,
    knobs: flags.Knobs,
    storage: flags.Storage,
) -> None:
    """Serve a model over HTTP, as OpenAI's API does, batching requests continuously.

    Decoding flags are the defaults of requests.

    Example: expertshare serve path/to/model --policy des-vote --budget 16 --port 8000
    """
    # not above: help works without the extra
    from expertshare.api.serving import opened_engine, opened_proxy
    from expertshare.serving import EngineLimits, ServerSettings, create_app, page_routes
    from expertshare.serving import serve as serve_app
    from expertshare.serving.live import page_paths
    from expertshare.serving.settings import ReplicaScale
    from expertshare.serving.telemetry import checked_level

    scale = ReplicaScale(**replicas.arguments())
    if scale.on_ray and compute.device != "cpu":
        raise ConfigError(
            f"expected --device cpu with replicas on Ray, got {compute.device}: serve one GPU by one process."
        )
    level, drain_timeout = checked_level(listening.log_level), listening.drain_timeout
    if not 0 <= drain_timeout < math.inf:
        raise InputError(f"drain-timeout must be a finite number of seconds, 0 or more, got {drain_timeout}")
    settings = ServerSettings(**server.arguments(), **request_limits.arguments())
    shown = settings.api_key is None if listening.page is None else listening.page
    engine: dict[str, Any] = {
        "policy": knobs.policy(policy, policy_file),
        "policies": None if policies is None else [policies],
        "store": storage.store(),
        "limits": EngineLimits(**engine_limits.arguments()),
        **compute.arguments(),
        **decoding.arguments(),
    }
    listen = partial(
        serve_app, host=listening.host, port=listening.port, drain_timeout_s=drain_timeout, log_level=level
    )
    if scale.on_ray:
        engine |= {"drain_timeout_s": drain_timeout, "log_level": level}
        with opened_proxy(model, scale, settings, page=shown, threads=threads, **engine) as (app, admission):
            ended_by = listen(app, admission)
    else:
        flags.set_threads(threads)
        with opened_engine(model, **engine) as one:
            routers = [page_routes(one, settings.model_name)] if shown else []
            app = create_app(one, settings, extra_routers=routers, open_paths=page_paths() if shown else ())
            ended_by = listen(app, one)
    if ended_by == signal.SIGINT:
        sys.exit(130)
