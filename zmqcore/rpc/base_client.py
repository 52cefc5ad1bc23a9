"""What Client and AsyncClient have in common: their options, their variations, and what they tell about themselves."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, Self

from zmqcore import options
from zmqcore._retention import Lane
from zmqcore.endpoint import in_option
from zmqcore.matchmaker import Member, Membership
from zmqcore.node import Node, default_node
from zmqcore.rpc.accepted import OneMember
from zmqcore.rpc.balancing import Target
from zmqcore.rpc.interception import Interceptor, Operation, chain, through
from zmqcore.rpc.metadata import IDEMPOTENCY_KEY, Metadata, encode
from zmqcore.rpc.results import Fanout
from zmqcore.rpc.retry import Retry, Search
from zmqcore.rpc.route import Routes
from zmqcore.topic import Topic

__all__ = ["BaseClient"]

_UNSET: Any = object()
_DEFAULT_RETRY = Retry()


class BaseClient:
    """The options of a client, and the members of its topic. See :class:`Client` for what the options mean."""

    def __init__(
        self,
        topic: str | Topic,
        *,
        node: Node | None = None,
        timeout: float | None = 5.0,
        delivery: Literal["sent", "accepted"] = "sent",
        connect: str | Sequence[str] | None = None,
        discovery_timeout: float = 1.0,
        retry: Retry | None = _DEFAULT_RETRY,
        idempotent: bool = False,
        hedge_after: float | None = None,
        metadata: Metadata | None = None,
        interceptors: Sequence[Interceptor] = (),
    ) -> None:
        self._node = (
            default_node() if node is None else options.instance("node", node, Node, "a Node, or None")
        )
        self.topic = Topic.of(topic)
        self.timeout = timeout
        self.delivery = delivery
        self.discovery_timeout = discovery_timeout
        self.retry = retry
        self.idempotent = idempotent
        self.hedge_after = hedge_after
        self.metadata = metadata
        self.interceptors = self._chain(interceptors)
        self._check_options()
        self._connect = None if connect is None else in_option("connect", connect)
        self._routes = Routes(self._node, self._connect)
        self._budget = self._routes.budget
        self._route = self._routes.get(self.topic)
        self._wire = self.topic.wire
        self._pool = self._node.pool
        self._codec = self._node.codec
        self._codec_id = self._codec.id
        self._metadata = encode(metadata, self._codec)
        # Bound once: casts are the most frequent thing there is.
        self._encode = self._codec.encode
        self._send_now = self._pool.send_now
        self._lanes = self._lanes_of_delivery()

    def _lanes_of_delivery(self) -> dict[str, Lane] | None:
        """Return where messages are accepted, by endpoint; None if they are only sent."""
        return None if self.delivery == "sent" else self._route.lanes.by_endpoint

    def _check_options(self) -> None:
        """Raise ValueError or TypeError for what no client can do."""
        if self.timeout is not None:
            self.timeout = options.seconds("timeout", self.timeout, above=True, unless="None for no limit")
        self.discovery_timeout = options.seconds("discovery_timeout", self.discovery_timeout)
        if self.retry is not None:
            options.instance("retry", self.retry, Retry, "a Retry, as Retry(attempts=3), or None")
        options.choice("delivery", self.delivery, "sent", "accepted")
        options.flag("idempotent", self.idempotent)
        if self.hedge_after is not None:
            self.hedge_after = options.seconds("hedge_after", self.hedge_after, above=True, unless="None")
            if not self.idempotent:
                raise ValueError("hedge_after needs idempotent=True: a hedged call may be executed twice")

    def _chain(self, interceptors: Sequence[Interceptor]) -> tuple[Interceptor, ...]:
        return chain(interceptors, coroutines=inspect.iscoroutinefunction(getattr(type(self), "call", None)))

    def prepare(
        self,
        *,
        server: str | None = _UNSET,
        timeout: float | None = _UNSET,
        delivery: Literal["sent", "accepted"] = _UNSET,
        discovery_timeout: float = _UNSET,
        retry: Retry | None = _UNSET,
        idempotent: bool = _UNSET,
        hedge_after: float | None = _UNSET,
        metadata: Metadata | None = _UNSET,
        interceptors: Sequence[Interceptor] = _UNSET,
        idempotency_key: str | None = None,
    ) -> Self:
        """Return a client like this one but for what is given: e.g. only the server of that name.

        ``idempotency_key`` names what the calls are about, so that the handler knows when it has done that already.
        It travels with them as metadata, "idempotency-key", and makes them idempotent.

        Cheap. It is the same client under other options, not one of its own: both share what they know of the members
        and count their calls together, and close() of either closes both.
        """
        if idempotency_key is not None:
            if not idempotency_key:
                raise ValueError("idempotency_key is empty")
            idempotent = True
            inherited = self.metadata if metadata is _UNSET else metadata
            metadata = {**(inherited or {}), IDEMPOTENCY_KEY: idempotency_key}
        client = type(self).__new__(type(self))
        client.__dict__.update(self.__dict__)
        given = {
            "timeout": timeout,
            "delivery": delivery,
            "discovery_timeout": discovery_timeout,
            "retry": retry,
            "idempotent": idempotent,
            "hedge_after": hedge_after,
            "metadata": metadata,
            "interceptors": interceptors if interceptors is _UNSET else self._chain(interceptors),
        }
        client.__dict__.update((name, value) for name, value in given.items() if value is not _UNSET)
        client._check_options()
        if metadata is not _UNSET:
            client._metadata = encode(metadata, self._codec)
        if server is not _UNSET:
            client.topic = Topic(self.topic.name, server, self.topic.exchange)
            client._wire = client.topic.wire
            client._route = self._routes.get(client.topic)
        client._lanes = client._lanes_of_delivery()
        return client

    def _intercept(self, kind: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what ``kind`` names, behind the interceptors."""
        operation = Operation(kind, method, args, kwargs, dict(self.metadata or {}))
        return through(self.interceptors, self._operate)(operation)

    def _operate(self, operation: Operation) -> Any:
        client = self.prepare(interceptors=(), metadata=operation.metadata)
        return getattr(client, operation.kind)(operation.method, *operation.args, **operation.kwargs)

    def _search(self, deadline: float | None) -> Search:
        return Search(deadline, self._node.connect_timeout, self.retry, self._budget, self.idempotent)

    def _earn(self) -> None:
        """A call is made. Needed only if the budget is short."""
        if self.retry is not None:
            self._budget.earn(self.retry.budget)

    def _other(self, search: Search) -> Target | None:
        """Return another member than ``search`` is about to hedge a call, if there is one and the budget allows it.

        If nothing is sent to it, the budget is to earn what this has spent.
        """
        other = None if search.target is None else self._route.other(search.target)
        if other is not None and not self._budget.spend():
            self._route.done(other)
            return None
        return other

    def _lanes_for(self, membership: Membership, deadline: float | None) -> dict[str, Lane]:
        """Return a lane of its own for each member's copy of an accepted fanout, by endpoint."""
        owner, redelivery = OneMember(deadline), self._node.redelivery
        endpoints = [target.endpoint for target in self._route.targets(membership)]
        return {endpoint: redelivery.lane(endpoint, owner) for endpoint in endpoints}

    def _accepted_fanout(
        self,
        membership: Membership,
        sent: list[Target],
        failed: dict[Member, Exception],
        lanes: dict[str, Lane],
    ) -> Fanout:
        finished: list[Member] = []
        unknown: list[Member] = []
        for target in sent:
            lane = lanes[target.endpoint]
            (unknown if lane.unfinished or lane.given_up else finished).append(target.member)
        members = tuple(target.member for target in sent)
        return Fanout(membership.epoch, members, failed, tuple(finished), tuple(unknown))

    def members(self) -> tuple[Member, ...]:
        """Return the members that the topic has now, as far as is known; possibly none."""
        return self._route.known().members

    def __repr__(self) -> str:
        where = ", ".join(self._connect) if self._connect else self._node.matchmaker.url
        return f"<{type(self).__name__} {self.topic} by {where}{' closed' if self._routes.closed else ''}>"
