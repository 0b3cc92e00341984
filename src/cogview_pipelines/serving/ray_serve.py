"""
The server's application under Ray Serve, which shares requests out among replicas, on one machine or many.

    serve run cogview_pipelines.serving.ray_serve:build num_replicas=2

Each replica holds a pipeline of its own behind the application of `cogview2 serve`: the same requests, checks and
limits, and requests that wait together in a replica are computed together. Ray holds the socket, passes each request
on to one of the replicas that have the least to do, and replaces replicas that die.
"""

from fastapi import FastAPI
from ray import serve

from .app import create_app
from .replica import ReplicaArguments, ReplicaGate

NAME = "cogview2"


def build(args: ReplicaArguments) -> serve.Application:
    """
    The application, for `serve run`, `serve deploy` and `serve.run`.

    Args:
        args ([`ReplicaArguments`]): The model, the replicas and their limits.

    Returns:
        `ray.serve.Application`: Bound, not running yet.

    Raises:
        ValueError: If the model is of a kind that cannot be served.
        OSError: If there is no such model.
    """
    args, settings = args.located(), args.settings()
    args.pipeline_class()  # told at once; Ray would start replicas again and again

    def make_app() -> FastAPI:  # in the replica: pipelines do not travel
        app = create_app(args.load(), settings, args.name, args.identity)
        app.add_middleware(ReplicaGate, replica=serve.get_replica_context().replica_tag, settings=settings)
        return app

    @serve.ingress(make_app)
    class Replica:
        """A server without a socket."""

        app: FastAPI  # given by the decorator

        def check_health(self) -> None:
            """Ray asks this again and again, and replaces replicas that raise."""
            if not self.app.state.worker.is_alive:
                raise RuntimeError("The thread that computes has ended.")

    return serve.deployment(
        name=NAME,
        num_replicas=args.num_replicas,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        # more than the application has places for: it is the application that says when to come back
        max_ongoing_requests=settings.max_connections,
        max_queued_requests=settings.max_connections,
        graceful_shutdown_timeout_s=settings.shutdown_timeout,
    )(Replica).bind()
