"""How many replicas a load asks for: a policy that Ray Serve's controller calls, by what replicas say of themselves.

Requests do not come through Ray, so Serve has nothing to count; `Replica.record_autoscaling_stats` tells it. Serve
keeps the bounds, and waits as long as it was told before it acts. It copies this module by value: it imports nothing.
"""

from typing import Any

NUM_REQUESTS = "num_requests"  # that are computed or wait for it


def by_requests(context: Any) -> tuple[float, dict[str, Any]]:
    """The number of replicas at which each would have as many requests as is aimed at. context: AutoscalingContext."""
    found = (context.aggregated_metrics or {}).get(NUM_REQUESTS, {})
    if not found:  # nobody has said anything yet
        return context.target_num_replicas, {}
    return sum(found.values()) / context.config.target_ongoing_requests, {}
