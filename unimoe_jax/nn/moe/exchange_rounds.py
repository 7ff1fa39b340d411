"""The rounds of an exchange: tokens to the devices of their experts, and their results back.

`BoundedExchange` sends buffers of a fixed size with `all_to_all`. `RaggedExchange` sends buffers of
the size that is needed with `ragged_all_to_all`. Both have the same methods and run inside
`shard_map`, on one device of a group that shares the experts. Every token is accompanied by a few
numbers: its experts on the receiving device, their weights, and the number of its row.

In the examples two devices hold two experts each: device 0 the experts 0 and 1, device 1 the
experts 2 and 3. A device has three tokens with the choices (0, 1), (1, 2) and (3, 4), where 4 means
"no expert".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unimoe_jax.nn.moe.grouped import Routed, sum_choices


@dataclass(frozen=True)
class Group:
    """The devices that share the experts of a layer among them.

    axes: the mesh axes of the group.
    shards: P, the number of its devices.
    experts: the number of experts on each device.
    everywhere: all mesh axes over which tokens are cut; their devices agree on the rounds.
    capacity: C, the tokens that a buffer for one pair of devices holds.
    """

    axes: tuple[str, ...]
    shards: int
    experts: int
    everywhere: tuple[str, ...]
    capacity: int


def on_shard(expert: jax.Array, shard: jax.Array, experts: int) -> jax.Array:
    """Return expert numbers as counted on a shard that holds `experts` of them.

    Experts of other shards become `experts`, which means "no expert" there. Example: on shard 1,
    which holds the experts 2 and 3, the numbers (1, 2, 3, 4) become (2, 0, 1, 2).
    """
    number_here = expert - shard * experts
    return jnp.where((number_here >= 0) & (number_here < experts), number_here, experts)


# ---------------------------------------------------------- the numbers that accompany a token


def _choices_on_a_device(group: Group, top_k: int) -> int:
    """Return how many of a token's choices can be on one device."""
    return 1 if group.experts == 1 else top_k


def _pack_numbers(group: Group, rows: Routed) -> jax.Array:
    """Return the numbers for every token and device, int32 [X, P, 2·choices + 1].

    They are the experts on that device, their weights, and the row. All are in one array, with
    floats reinterpreted as int32, so that they need a single small exchange.

    Example: token 1 with the choices (1, 2) and the weights (0.6, 0.4). For device 0 its experts
    are (1, none) with the weights (0.6, 0), and for device 1 they are (none, 0) with (0, 0.4).
    """
    shard = jnp.arange(group.shards)[None, :, None]
    expert = on_shard(rows.expert_XK[:, None], shard, group.experts)
    weight = jnp.where(expert < group.experts, rows.weight_XK[:, None], 0.0)
    if _choices_on_a_device(group, rows.expert_XK.shape[1]) == 1:
        # At most one choice is real: "none" is the largest number, and its weight is 0.
        expert = jnp.min(expert, axis=2, keepdims=True)
        weight = jnp.sum(weight, axis=2, keepdims=True)
    row = jnp.broadcast_to(rows.row_X[:, None, None], (*expert.shape[:2], 1))
    as_int = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.int32)
    return jnp.concatenate([expert, as_int(weight), as_int(row)], axis=2)


def unpack_tokens(x_RD: jax.Array, numbers_RM: jax.Array) -> Routed:
    """Return tokens that have arrived together with the numbers that accompanied them."""
    choices = numbers_RM.shape[1] // 2
    weight = jax.lax.bitcast_convert_type(numbers_RM[:, choices : 2 * choices], jnp.float32)
    row = jax.lax.bitcast_convert_type(numbers_RM[:, -1], jnp.uint32)
    return Routed(x_RD, numbers_RM[:, :choices], weight, row)


def _empty_numbers(packed_XPM: jax.Array, group: Group) -> jax.Array:
    """Return the numbers for an empty place, [1,M]: no expert, weight 0 and row 0."""
    choices = packed_XPM.shape[-1] // 2
    numbers = jnp.where(jnp.arange(packed_XPM.shape[-1]) < choices, group.experts, 0)
    return numbers.astype(jnp.int32)[None]


def _numbers_for(group: Group, packed_XPM: jax.Array, token_PC: jax.Array) -> jax.Array:
    """Return the numbers for the tokens that go to every device, [P,C,M]."""
    tokens, device = packed_XPM.shape[0], jnp.arange(group.shards)[:, None]
    numbers = packed_XPM[jnp.minimum(token_PC, tokens - 1), device]
    is_token = (token_PC < tokens)[..., None]
    return jnp.where(is_token, numbers, _empty_numbers(packed_XPM, group)[None])


def _number_of_choice(number_RK: jax.Array, place_XK: jax.Array, wanted_XK: jax.Array) -> jax.Array:
    """Return one number per choice, [X,K], and 0 for choices that are not wanted.

    Row `place` of `number_RK` holds the numbers of all choices of a token on one device. If a
    device has a single expert, it holds a single number.
    """
    column = jnp.arange(place_XK.shape[1])[None] % number_RK.shape[1]
    return jnp.where(wanted_XK, number_RK[jnp.where(wanted_XK, place_XK, 0), column], 0.0)


# --------------------------------------------------------------------------------- the plan


class _ExchangePlan(NamedTuple):
    """The destinations of this device's tokens. A token goes to a device at most once.

    In the example tokens 0 and 1 go to device 0, and tokens 1 and 2 to device 1.

    token_PX: the tokens that go to each device, in order, filled up with X:
        ((0, 1, 3), (1, 2, 3)) in the example.
    count_P: the number of these tokens: (2, 2).
    rank_XK: the place of a token among those that go to the device of its choice k:
        ((0, 0), (1, 0), (1, any)).
    device_XK: the device of each choice, P for "no expert": ((0, 0), (0, 1), (1, 2)).
    first_XK: whether no earlier choice of the token is on the same device:
        ((True, False), (True, True), (True, True)).
    """

    token_PX: jax.Array
    count_P: jax.Array
    rank_XK: jax.Array
    device_XK: jax.Array
    first_XK: jax.Array


def _make_plan(group: Group, expert_XK: jax.Array) -> _ExchangePlan:
    tokens, top_k = expert_XK.shape
    device_XK = expert_XK // group.experts
    goes_XP = jnp.any(device_XK[..., None] == jnp.arange(group.shards)[None, None], axis=1)
    # through_XP: how many tokens up to this one go to the device.
    through_XP = jnp.cumsum(goes_XP.astype(jnp.int32), axis=0)
    # List the tokens by device. Tokens that do not go are written behind the end, which drops them.
    place_XP = jnp.where(goes_XP, through_XP - 1, tokens)
    token, device = jnp.indices(place_XP.shape, sparse=True)
    empty = jnp.full((group.shards, tokens), tokens, jnp.int32)
    token_PX = empty.at[device, place_XP].set(token.astype(jnp.int32), mode="drop")
    # "No expert" has no device; clip its number, so that it can be looked up.
    some_device = jnp.minimum(device_XK, group.shards - 1)
    rank_XK = jnp.take_along_axis(through_XP, some_device, axis=1) - 1
    # Compare every choice with the earlier choices of the same token.
    earlier = jnp.tril(jnp.ones((top_k, top_k), bool), -1)
    same_XKK = device_XK[:, :, None] == device_XK[:, None, :]
    first_XK = ~jnp.any(same_XKK & earlier[None], axis=2)
    return _ExchangePlan(token_PX, through_XP[-1], rank_XK, device_XK, first_XK)


def _swap(group: Group, a: jax.Array) -> jax.Array:
    """Exchange a [P,C,D], ordered by receiver, and return [P·C,D], ordered by sender."""
    a = jax.lax.all_to_all(a, group.axes, split_axis=0, concat_axis=0, tiled=True)
    return a.reshape(-1, a.shape[-1])


# ---------------------------------------------------------------------- buffers of fixed size


class BoundedExchange:
    """An exchange by `all_to_all`, with one buffer of `capacity` tokens per pair of devices.

    Example: with a capacity of 1, round 0 sends token 0 to device 0 and token 1 to device 1, and
    round 1 sends token 1 to device 0 and token 2 to device 1.
    """

    def __init__(self, group: Group, rows: Routed):
        self.group, self.plan = group, _make_plan(group, rows.expert_XK)
        self.packed = _pack_numbers(group, rows)

    def rounds(self) -> jax.Array:
        """Return how many rounds the devices need together; 0 if no token goes anywhere."""
        needed = -(-jnp.max(self.plan.count_P) // self.group.capacity)
        return jax.lax.pmax(needed, self.group.everywhere)

    def send(self, index: jax.Array, x_XD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Send the tokens of round `index`; return those that arrive [P·C,D] and their numbers."""
        capacity, tokens = self.group.capacity, x_XD.shape[0]
        # Pad the lists of tokens to whole rounds, and take the part of this round.
        padding = -tokens % capacity
        token_PX = jnp.pad(self.plan.token_PX, ((0, 0), (0, padding)), constant_values=tokens)
        start = (0, index * capacity)
        token_PC = jax.lax.dynamic_slice(token_PX, start, (self.group.shards, capacity))
        numbers = _numbers_for(self.group, self.packed, token_PC)
        x_RD = _swap(self.group, x_XD[jnp.minimum(token_PC, tokens - 1)])
        return x_RD, _swap(self.group, numbers)

    def rows_back(self, index: jax.Array, y_RD: jax.Array) -> jax.Array:
        """Return the results of round `index` to the tokens' devices, and sum them per token.

        Returns:
            float32 [X,D].
        """
        place_XK, in_round_XK = self._places(index)
        return sum_choices(self._send_back(y_RD), place_XK, in_round_XK & self.plan.first_XK)

    def numbers_back(self, index: jax.Array, number_RK: jax.Array) -> jax.Array:
        """Return one number per choice to the tokens' devices, [X,K]; 0 if not in this round."""
        returned = self._send_back(number_RK)
        place_XK, in_round_XK = self._places(index)
        return _number_of_choice(returned, place_XK, in_round_XK)

    def _send_back(self, y_RD: jax.Array) -> jax.Array:
        return _swap(self.group, y_RD.reshape(self.group.shards, self.group.capacity, -1))

    def _places(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the place of every choice in the buffers of a round, and whether it is in them."""
        plan, capacity = self.plan, self.group.capacity
        place_XK = plan.rank_XK - index * capacity
        in_round_XK = (place_XK >= 0) & (place_XK < capacity)
        # "No expert" has the device number P and is in no round.
        in_round_XK &= plan.device_XK < self.group.shards
        return plan.device_XK * capacity + place_XK, in_round_XK


# --------------------------------------------------------------------- buffers of needed size


class RaggedExchange:
    """An exchange by `ragged_all_to_all`; a device receives at most P · `capacity` tokens a round.

    The tokens for a receiver form a queue: those of sender 0 first, then those of sender 1, and so
    on. Every device knows the counts of all pairs, so it knows the place of each of its tokens in
    the queue of the receiver. A round is the same stretch of all queues. Numbers go in buffers for
    all tokens, which are small anyway: TPUs would pad a ragged row of few numbers to 128.

    Example: count_PP ((2, 1), (1, 3)) means that sender 0 has 2 tokens for receiver 0 and 1 for
    receiver 1, and sender 1 has 1 and 3. In the queues the senders begin at the places
    queue_PP ((0, 0), (2, 1)), and in the senders' buffers the receivers begin at
    start_PP ((0, 2), (0, 1)). If a receiver takes 3 tokens a round, round 0 sends the counts
    ((2, 1), (1, 2)), and round 1 sends the last token of sender 1 for receiver 1.
    """

    def __init__(self, group: Group, rows: Routed):
        self.group, self.plan = group, _make_plan(group, rows.expert_XK)
        self.length = group.shards * group.capacity
        self.tokens, top_k = rows.expert_XK.shape
        # The largest number of tokens that one device can send.
        self.max_sent = self.tokens * min(group.shards, top_k)
        # These tables are [sender, receiver].
        self.count_PP = jax.lax.all_gather(self.plan.count_P, group.axes)
        self.queue_PP = jnp.cumsum(self.count_PP, axis=0) - self.count_PP
        self.start_PP = jnp.cumsum(self.count_PP, axis=1) - self.count_PP
        self.here = jax.lax.axis_index(group.axes)
        # Only the width of these packed numbers is used; the compiler removes the rest.
        self.empty = _empty_numbers(_pack_numbers(group, rows), group)
        packed = _pack_numbers(group, rows)
        self.numbers = _swap(group, _numbers_for(group, packed, self.plan.token_PX))

    def rounds(self) -> jax.Array:
        """Return how many rounds the devices need together; 0 if no token goes anywhere."""
        needed = -(-jnp.max(jnp.sum(self.count_PP, axis=0)) // self.length)
        return jax.lax.pmax(needed, self.group.everywhere)

    def send(self, index: jax.Array, x_XD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Send the tokens of round `index`; return those that arrive [P·C,D] and their numbers."""
        # Order this device's tokens by receiver. Empty places of the lists go behind the end.
        place_PX = self.start_PP[self.here][:, None] + jnp.arange(self.tokens)[None]
        place_PX = jnp.where(self.plan.token_PX < self.tokens, place_PX, self.max_sent)
        empty = jnp.zeros(self.max_sent, jnp.int32)
        token = empty.at[place_PX].set(self.plan.token_PX, mode="drop")
        x_RD = self._move(index, x_XD[token], self.length, forth=True)
        # All numbers have arrived before the first round: put those of this round to its tokens.
        numbers = jnp.broadcast_to(self.empty, (self.length, self.empty.shape[1]))
        place_PX = self._places_of_arrived(index).reshape(-1)
        return x_RD, numbers.at[place_PX].set(self.numbers, mode="drop")

    def rows_back(self, index: jax.Array, y_RD: jax.Array) -> jax.Array:
        """Return the results of round `index` to the tokens' devices, and sum them per token.

        Returns:
            float32 [X,D].
        """
        returned = self._move(index, y_RD, self.max_sent, forth=False)
        device_XK, in_round_XK = self._in_round(index)
        place_XK = self.start_PP[self.here][device_XK] + self.plan.rank_XK
        return sum_choices(returned, place_XK, in_round_XK & self.plan.first_XK)

    def numbers_back(self, index: jax.Array, number_RK: jax.Array) -> jax.Array:
        """Return one number per choice to the tokens' devices, [X,K]; 0 if not in this round."""
        number_PXK = number_RK[jnp.minimum(self._places_of_arrived(index), self.length - 1)]
        device_XK, in_round_XK = self._in_round(index)
        place_XK = device_XK * self.tokens + self.plan.rank_XK
        return _number_of_choice(_swap(self.group, number_PXK), place_XK, in_round_XK)

    def _stretch(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the ranks (first, behind the last) that go in round `index`, each [P,P]."""
        begin = index * self.length - self.queue_PP
        end = begin + self.length
        return jnp.clip(begin, 0, self.count_PP), jnp.clip(end, 0, self.count_PP)

    def _in_round(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the device of every choice, and whether the choice goes in round `index`."""
        device_XK = jnp.minimum(self.plan.device_XK, self.group.shards - 1)
        first_XK, stop_XK = (a[self.here][device_XK] for a in self._stretch(index))
        inside = (self.plan.rank_XK >= first_XK) & (self.plan.rank_XK < stop_XK)
        return device_XK, inside & (self.plan.device_XK < self.group.shards)

    def _places_of_arrived(self, index: jax.Array) -> jax.Array:
        """Return the places of every sender's tokens, by rank, in the buffer of a round, [P,X].

        The place is `length`, which is behind the end, for tokens that are not in this round.
        """
        rank = jnp.arange(self.tokens)[None]
        first, stop = (a[:, self.here, None] for a in self._stretch(index))
        place = self.queue_PP[:, self.here, None] - index * self.length + rank
        return jnp.where((rank >= first) & (rank < stop), place, self.length)

    def _move(self, index: jax.Array, rows: jax.Array, length: int, forth: bool) -> jax.Array:
        """Send rows to their receivers in round `index`, or results back, into `length` rows."""
        first, stop = self._stretch(index)
        size, sent = stop - first, self.start_PP + first
        queued = self.queue_PP + first - index * self.length
        # Row `here` of a table is what this device sends, column `here` is what it receives.
        row, column = self.here, (slice(None), self.here)
        input_offsets, send_sizes = sent[row], size[row]
        output_offsets, recv_sizes = queued[row], size[column]
        if not forth:
            # On the way back, the receivers of tokens are the senders of results.
            input_offsets, send_sizes = queued[column], size[column]
            output_offsets, recv_sizes = sent[column], size[row]
        output = jnp.zeros((length, rows.shape[1]), rows.dtype)
        return jax.lax.ragged_all_to_all(
            rows,
            output,
            input_offsets,
            send_sizes,
            output_offsets,
            recv_sizes,
            axis_name=self.group.axes,
        )
