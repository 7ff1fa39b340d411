"""Tokens to the devices that hold their experts, and results back: inside `shard_map`.

Three forms, equal in values and gradients, all without drops:

- gather: every device of the group sees all of its tokens, partial sums are scattered back.
- all_to_all: a token goes once to every device that holds one of its experts, in buffers of a
  fixed size. What does not fit goes in further rounds; how many is agreed on at run time.
- ragged: the same without padding on the way, by `ragged_all_to_all`, which CPUs do not have. Here
  the receiver's buffer is what fills up and makes further rounds.

`forward` and `backward` wrap a function of the tokens that have arrived, with experts numbered as
they lie on this device; it knows nothing of the mesh. Backward sends tokens again rather than
keeping what arrived: with rematerialised layers that costs the same traffic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from unimoe_jax.nn.moe.grouped import Routed, sum_choices

ExchangeForm = Literal["gather", "all_to_all", "ragged"]
# A buffer holds what balanced routing needs and this much more, or four standard deviations of a
# random balanced router's load, whichever is more.
SPARE = 0.15


@dataclass(frozen=True)
class Group:
    """Devices that share the experts among them.

    axes: mesh axes of the group. shards: its size. experts: on each device.
    everywhere: all mesh axes over which tokens are cut; their devices agree on rounds.
    capacity: tokens that a buffer for one pair of devices holds.
    """

    axes: tuple[str, ...]
    shards: int
    experts: int
    everywhere: tuple[str, ...]
    capacity: int


def pair_capacity(tokens: int, shards: int, experts: int, top_k: int) -> int:
    """Tokens that a buffer between two devices holds, of `tokens` on the one that sends.

    A balanced router sends a token to a given device with probability 1 − C(E−E_l, k) / C(E, k),
    where E_l of the E experts lie there.
    """
    total = shards * experts
    missed = math.comb(total - experts, top_k) / math.comb(total, top_k)
    mean = tokens * (1 - missed)
    capacity = max(mean * (1 + SPARE), mean + 4 * math.sqrt(mean))
    return min(tokens, 8 * math.ceil(capacity / 8))


def cheapest_form(tokens: int, capacity: int) -> ExchangeForm:
    """all_to_all where it moves at most three quarters of what gathering the tokens would.

    The margin pays for packing the buffers and for a second round now and then.
    """
    return "all_to_all" if capacity <= 0.75 * tokens else "gather"


def forward(
    form: ExchangeForm, group: Group, apply: Callable[[Routed], jax.Array], rows: Routed, width: int
) -> jax.Array:
    """y[x] = Σ_k weight[x,k] · expert[x,k](x), where `apply` does this for the experts here.

    width: of y.
    """
    if form == "gather":
        y = apply(_gathered(group, rows))
        return jax.lax.psum_scatter(y, group.axes, scatter_dimension=0, tiled=True)
    route = _ROUTES[form](group, rows)

    def one_round(index, y_XD):
        arrived = _unpack(*route.send(index, rows.x_XD))
        return y_XD + route.rows_back(index, apply(arrived))

    empty = jnp.zeros((rows.x_XD.shape[0], width), jnp.float32)
    y_XD = jax.lax.fori_loop(0, route.rounds(), one_round, empty)
    return y_XD.astype(rows.x_XD.dtype)


Pull = Callable[[Routed, jax.Array, list], tuple[list, jax.Array, jax.Array]]


def backward(
    form: ExchangeForm, group: Group, pull: Pull, rows: Routed, g_XD: jax.Array, dtrained: list
) -> tuple[list, jax.Array, jax.Array]:
    """`pull(rows, g, dtrained) -> (dtrained, dx, dweight)` for the experts here; the same for all.

    g_XD: gradient of what `forward` returns. dtrained: float32, of the experts here, added to.
    """
    if form == "gather":
        gather = partial(jax.lax.all_gather, axis_name=group.axes, axis=0, tiled=True)
        dtrained, dx, dweight = pull(_gathered(group, rows), gather(g_XD), dtrained)
        scatter = partial(jax.lax.psum_scatter, scatter_dimension=0, tiled=True)
        return dtrained, scatter(dx, group.axes), scatter(dweight, group.axes)
    route, width = _ROUTES[form](group, rows), rows.x_XD.shape[1]

    def one_round(index, carry):
        dtrained, dx_XD, dweight_XK = carry
        both = jnp.concatenate([rows.x_XD, g_XD.astype(rows.x_XD.dtype)], axis=1)
        both, numbers = route.send(index, both)
        arrived = _unpack(both[:, :width], numbers)
        dtrained, dx, dweight = pull(arrived, both[:, width:], dtrained)
        dx, dweight = route.rows_back(index, dx), route.numbers_back(index, dweight)
        return dtrained, dx_XD + dx, dweight_XK + dweight

    empty = jnp.zeros(rows.x_XD.shape, jnp.float32), jnp.zeros(rows.weight_XK.shape, jnp.float32)
    carry = jax.lax.fori_loop(0, route.rounds(), one_round, (dtrained, *empty))
    dtrained, dx_XD, dweight_XK = carry
    return dtrained, dx_XD.astype(rows.x_XD.dtype), dweight_XK


def on_shard(expert: jax.Array, shard: jax.Array, experts: int) -> jax.Array:
    """Global expert numbers as those of a shard that holds `experts`; others become "none"."""
    mine = expert - shard * experts
    return jnp.where((mine >= 0) & (mine < experts), mine, experts)


def _gathered(group: Group, rows: Routed) -> Routed:
    gather = partial(jax.lax.all_gather, axis_name=group.axes, axis=0, tiled=True)
    here = jax.lax.axis_index(group.axes)
    rows = jax.tree.map(gather, rows)
    return rows._replace(expert_XK=on_shard(rows.expert_XK, here, group.experts))


# ------------------------------------------------------------- what goes along with a token


def _choices(group: Group, top_k: int) -> int:
    """Choices of a token that can lie on one device."""
    return 1 if group.experts == 1 else top_k


def _packed(group: Group, rows: Routed) -> jax.Array:
    """Per token and device of the group, int32 [X, P, 2·choices + 1]: experts there, weights, row.

    One array, so that it is one small exchange.
    """
    shard = jnp.arange(group.shards)[None, :, None]
    expert = on_shard(rows.expert_XK[:, None], shard, group.experts)
    weight = jnp.where(expert < group.experts, rows.weight_XK[:, None], 0.0)
    if _choices(group, rows.expert_XK.shape[1]) == 1:
        expert = jnp.min(expert, axis=2, keepdims=True)
        weight = jnp.sum(weight, axis=2, keepdims=True)
    row = jnp.broadcast_to(rows.row_X[:, None, None], (*expert.shape[:2], 1))
    as_int = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.int32)
    return jnp.concatenate([expert, as_int(weight), as_int(row)], axis=2)


def _unpack(x_XD: jax.Array, packed: jax.Array) -> Routed:
    choices = packed.shape[1] // 2
    weight = jax.lax.bitcast_convert_type(packed[:, choices : 2 * choices], jnp.float32)
    row = jax.lax.bitcast_convert_type(packed[:, -1], jnp.uint32)
    return Routed(x_XD, packed[:, :choices], weight, row)


# ----------------------------------------------------------------------------------- routes


class _ExchangePlan(NamedTuple):
    """Who goes where. A token goes to a device at most once.

    token_PX: for every device the tokens that go there, in order; X where there is none.
    count_P: how many. rank_XK: place of a token among those that go where its choice k lies.
    device_XK: that device, P for "no expert". first_XK: no earlier choice lies on it.
    """

    token_PX: jax.Array
    count_P: jax.Array
    rank_XK: jax.Array
    device_XK: jax.Array
    first_XK: jax.Array


def _plan(group: Group, expert_XK: jax.Array) -> _ExchangePlan:
    tokens, top_k = expert_XK.shape
    device_XK = expert_XK // group.experts
    goes_XP = jnp.any(device_XK[..., None] == jnp.arange(group.shards)[None, None], axis=1)
    through_XP = jnp.cumsum(goes_XP.astype(jnp.int32), axis=0)
    # Those that do not go are written past the end, which drops them.
    place_XP = jnp.where(goes_XP, through_XP - 1, tokens)
    token, device = jnp.indices(place_XP.shape, sparse=True)
    empty = jnp.full((group.shards, tokens), tokens, jnp.int32)
    token_PX = empty.at[device, place_XP].set(token.astype(jnp.int32), mode="drop")
    some_device = jnp.minimum(device_XK, group.shards - 1)
    rank_XK = jnp.take_along_axis(through_XP, some_device, axis=1) - 1
    earlier = jnp.tril(jnp.ones((top_k, top_k), bool), -1)
    same_XKK = device_XK[:, :, None] == device_XK[:, None, :]
    first_XK = ~jnp.any(same_XKK & earlier[None], axis=2)
    return _ExchangePlan(token_PX, through_XP[-1], rank_XK, device_XK, first_XK)


class _Bounded:
    """`all_to_all` of one buffer of `capacity` tokens per pair of devices."""

    def __init__(self, group: Group, rows: Routed):
        self.group, self.plan = group, _plan(group, rows.expert_XK)
        self.packed = _packed(group, rows)

    def rounds(self) -> jax.Array:
        """How many rounds all devices need; 0 if no token goes anywhere."""
        needed = -(-jnp.max(self.plan.count_P) // self.group.capacity)
        return jax.lax.pmax(needed, self.group.everywhere)

    def send(self, index: jax.Array, x_XD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The round's tokens [P·C, D] and what goes along with them, as they arrive here."""
        capacity, tokens = self.group.capacity, x_XD.shape[0]
        spare = -tokens % capacity
        token_PX = jnp.pad(self.plan.token_PX, ((0, 0), (0, spare)), constant_values=tokens)
        start = (0, index * capacity)
        token_PC = jax.lax.dynamic_slice(token_PX, start, (self.group.shards, capacity))
        numbers = _numbers(self.group, self.packed, token_PC)
        x_RD = _swap(self.group, x_XD[jnp.minimum(token_PC, tokens - 1)])
        return x_RD, _swap(self.group, numbers)

    def rows_back(self, index: jax.Array, y_RD: jax.Array) -> jax.Array:
        """[X,D] float32: for every token the sum of what its devices made of it in this round."""
        at_XK, here_XK = self._places(index)
        return sum_choices(self._back(y_RD), at_XK, here_XK & self.plan.first_XK)

    def numbers_back(self, index: jax.Array, number_RK: jax.Array) -> jax.Array:
        """[X,K]: the number of every choice, 0 if it was not in this round."""
        return _own_number(self._back(number_RK), *self._places(index))

    def _back(self, y_RD: jax.Array) -> jax.Array:
        return _swap(self.group, y_RD.reshape(self.group.shards, self.group.capacity, -1))

    def _places(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where every choice lies in the buffers of this round, and whether it does."""
        plan, capacity = self.plan, self.group.capacity
        place_XK = plan.rank_XK - index * capacity
        here_XK = (place_XK >= 0) & (place_XK < capacity) & (plan.device_XK < self.group.shards)
        return plan.device_XK * capacity + place_XK, here_XK


class _Ragged:
    """`ragged_all_to_all`; a device receives at most P · `capacity` tokens a round.

    All devices know all counts, and hence the place of every token in its receiver's queue; a round
    is a stretch of all queues. Numbers go in buffers for all tokens, which are small: TPUs would
    pad a ragged row of few numbers to 128.
    """

    def __init__(self, group: Group, rows: Routed):
        self.group, self.plan = group, _plan(group, rows.expert_XK)
        self.length = group.shards * group.capacity
        self.tokens, top_k = rows.expert_XK.shape
        self.most = self.tokens * min(group.shards, top_k)  # that one device can send
        self.count_PP = jax.lax.all_gather(self.plan.count_P, group.axes)  # from, to
        self.queue_PP = jnp.cumsum(self.count_PP, axis=0) - self.count_PP
        self.start_PP = jnp.cumsum(self.count_PP, axis=1) - self.count_PP
        self.here = jax.lax.axis_index(group.axes)
        self.empty = _nothing(_packed(group, rows), group)
        self.numbers = _swap(group, _numbers(group, _packed(group, rows), self.plan.token_PX))

    def rounds(self) -> jax.Array:
        """How many rounds all devices need; 0 if no token goes anywhere."""
        needed = -(-jnp.max(jnp.sum(self.count_PP, axis=0)) // self.length)
        return jax.lax.pmax(needed, self.group.everywhere)

    def send(self, index: jax.Array, x_XD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The round's tokens [P·C, D] and what goes along with them, as they arrive here."""
        place_PX = self.start_PP[self.here][:, None] + jnp.arange(self.tokens)[None]
        place_PX = jnp.where(self.plan.token_PX < self.tokens, place_PX, self.most)
        token = jnp.zeros(self.most, jnp.int32).at[place_PX].set(self.plan.token_PX, mode="drop")
        x_RD = self._move(index, x_XD[token], self.length, forth=True)
        nothing = jnp.broadcast_to(self.empty, (self.length, self.empty.shape[1]))
        place_PX = self._arrived(index).reshape(-1)
        return x_RD, nothing.at[place_PX].set(self.numbers, mode="drop")

    def rows_back(self, index: jax.Array, y_RD: jax.Array) -> jax.Array:
        """[X,D] float32: for every token the sum of what its devices made of it in this round."""
        returned = self._move(index, y_RD, self.most, forth=False)
        device_XK, here_XK = self._in_round(index)
        at_XK = self.start_PP[self.here][device_XK] + self.plan.rank_XK
        return sum_choices(returned, at_XK, here_XK & self.plan.first_XK)

    def numbers_back(self, index: jax.Array, number_RK: jax.Array) -> jax.Array:
        """[X,K]: the number of every choice, 0 if it was not in this round."""
        number_PXK = number_RK[jnp.minimum(self._arrived(index), self.length - 1)]
        device_XK, here_XK = self._in_round(index)
        at_XK = device_XK * self.tokens + self.plan.rank_XK
        return _own_number(_swap(self.group, number_PXK), at_XK, here_XK)

    def _stretch(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First and last + 1 of the ranks that go in this round, [from, to]."""
        begin = index * self.length - self.queue_PP
        return tuple(jnp.clip(b, 0, self.count_PP) for b in (begin, begin + self.length))

    def _in_round(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The device of every choice, and whether the choice goes in this round."""
        device_XK = jnp.minimum(self.plan.device_XK, self.group.shards - 1)
        first_XK, last_XK = (a[self.here][device_XK] for a in self._stretch(index))
        inside = (self.plan.rank_XK >= first_XK) & (self.plan.rank_XK < last_XK)
        return device_XK, inside & (self.plan.device_XK < self.group.shards)

    def _arrived(self, index: jax.Array) -> jax.Array:
        """[P,X]: where the tokens of every device, by rank, lie in what arrived; `length` where
        they are not in this round."""
        rank = jnp.arange(self.tokens)[None]
        first, last = (a[:, self.here, None] for a in self._stretch(index))
        place = self.queue_PP[:, self.here, None] - index * self.length + rank
        return jnp.where((rank >= first) & (rank < last), place, self.length)

    def _move(self, index: jax.Array, rows: jax.Array, length: int, forth: bool) -> jax.Array:
        """Rows to where they go in this round, or back; a buffer of `length` rows."""
        first, last = self._stretch(index)
        size, sent = last - first, self.start_PP + first
        queued = self.queue_PP + first - index * self.length
        # A device reads its own line of what concerns senders, and its own column as a receiver.
        line, column = self.here, (slice(None), self.here)
        offsets = (sent[line], size[line], queued[line], size[column])
        if not forth:
            offsets = (queued[column], size[column], sent[column], size[line])
        output = jnp.zeros((length, rows.shape[1]), rows.dtype)
        return jax.lax.ragged_all_to_all(rows, output, *offsets, axis_name=self.group.axes)


_ROUTES = {"all_to_all": _Bounded, "ragged": _Ragged}


def _swap(group: Group, a: jax.Array) -> jax.Array:
    """[P,C,D] by receiver -> [P·C,D] by sender."""
    a = jax.lax.all_to_all(a, group.axes, split_axis=0, concat_axis=0, tiled=True)
    return a.reshape(-1, a.shape[-1])


def _nothing(packed: jax.Array, group: Group) -> jax.Array:
    """What goes along with an empty place, [1, M]: no expert, weight and row 0."""
    choices = packed.shape[-1] // 2
    nothing = jnp.where(jnp.arange(packed.shape[-1]) < choices, group.experts, 0)
    return nothing.astype(jnp.int32)[None]


def _numbers(group: Group, packed: jax.Array, token_PC: jax.Array) -> jax.Array:
    """What goes along with the tokens for every device, [P,C,M]."""
    tokens, device = packed.shape[0], jnp.arange(group.shards)[:, None]
    found = packed[jnp.minimum(token_PC, tokens - 1), device]
    return jnp.where((token_PC < tokens)[..., None], found, _nothing(packed, group)[None])


def _own_number(number_RK: jax.Array, at_XK: jax.Array, wanted_XK: jax.Array) -> jax.Array:
    """[X,K]: of the row of numbers at each choice's place the choice's own; 0 where unwanted."""
    column = jnp.arange(at_XK.shape[1])[None] % number_RK.shape[1]
    return jnp.where(wanted_XK, number_RK[jnp.where(wanted_XK, at_XK, 0), column], 0.0)
