"""Prompts that begin alike go to the replica that has their KV cache (`serve.prefix_routing`).

The HTTP side names what a prompt begins with (`prefix_key`, sent as the handle's session id), and
`PrefixRouter`, which Ray Serve loads by name, picks the replica: by consistent hashing, so that
every HTTP replica picks the same one without asking, and one that comes or goes moves few prompts.
A replica that is clearly busier than another is passed over: the cache saves a prefill, not a
queue. Knows nothing of tokens but their digest. Costs some microseconds a request.
"""

import random
import struct
from collections.abc import Sequence

import xxhash
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

PREFIX_TOKENS = 64
"""How much of a prompt its key is made of: a system prompt, and less than most documents."""
_MOST_AHEAD = 8
"""Requests by which the replica of a prompt may be ahead of the least busy one."""


def prefix_key(prompt: Sequence[int]) -> str:
    """Name of what a prompt begins with: equal where the first tokens are."""
    head = prompt[:PREFIX_TOKENS]
    return xxhash.xxh3_64_hexdigest(struct.pack(f"<{len(head)}i", *head))


class PrefixRouter(ConsistentHashRouter):
    """Ray Serve's consistent hashing over session ids, with an eye on the queues."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks to try in turn: the prompt's own replica, then the less busy of two others.

        A request without a key, or whose own replica is too busy, goes straight to the two.
        """
        if pending_request is not None:
            # Wait between rounds where every replica is full.
            pending_request.routing_context.should_backoff = True
        two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        key = pending_request.metadata.session_id if pending_request is not None else ""
        own = (
            [self._replicas[each] for each in self._lookup_ranked_replicas(key)[:1]] if key else []
        )
        if not own or self._is_busier(own[0], candidate_replicas):
            return [two]
        return [own, two]

    def _is_busier(self, replica: RunningReplica, others: Sequence[RunningReplica]) -> bool:
        """Whether its queue is longer than the shortest by more than a few; unknown ones are 0."""
        queues = [self._replica_queue_len_cache.get(each.replica_id) or 0 for each in others]
        own = self._replica_queue_len_cache.get(replica.replica_id) or 0
        return own > min(queues, default=0) + _MOST_AHEAD
