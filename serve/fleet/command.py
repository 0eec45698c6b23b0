"""`deltamux fleet`: check the configuration, then serve it on Ray."""

import os
from pathlib import Path
from typing import Annotated

import typer

from deltamux.compression.paths import user_path


def fleet_command(
    config: Annotated[Path, typer.Argument(parser=user_path, metavar="FLEET", help="fleet.yaml")],
    replicas: Annotated[int | None, typer.Option(help="Replicas, instead of the file's.")] = None,
    port: Annotated[int | None, typer.Option(help="Port, instead of the file's.")] = None,
) -> None:
    """Serve with several replicas behind one endpoint; requests go where their expert is."""
    import ray  # noqa: F401 - what is missing is told before anything is read

    from deltamux.serve.compat import API_KEY_VARIABLE
    from deltamux.serve.fleet.ray_app import run
    from deltamux.serve.fleet.settings import WHAT, FleetSettings, load_fleet
    from deltamux.serve.fleet.yaml_files import checked
    from deltamux.serve.launch import check_port, vllm_arguments
    from deltamux.serve.settings import load_settings

    settings = load_fleet(config)
    changes = {"replicas": replicas, "port": port}
    given = {key: value for key, value in changes.items() if value is not None}
    settings = checked(FleetSettings, settings.model_dump() | given, WHAT)
    server = load_settings(settings.server)
    vllm_arguments(server, [])
    check_port({"host": settings.host, "port": settings.port}, [])
    keys = server.engine.get("api_key") or os.environ.get(API_KEY_VARIABLE)
    run(settings, keys[0] if isinstance(keys, list) else keys)
