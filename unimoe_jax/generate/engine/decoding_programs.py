"""The four programs that decode one model: sizes, inputs, and where their arrays are placed."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from unimoe_jax.generate.engine import state as states
from unimoe_jax.generate.engine.program_cache import ProgramCache
from unimoe_jax.generate.engine.state import MAX_STEPS, State, empty_new_rows
from unimoe_jax.models.inference_decoder import InferenceDecoder, Step, Weights
from unimoe_jax.nn.attention.decode import KVCache


class DecodingPrograms:
    """Prefill, insert, grow and advance of one model. Each is compiled when a size is asked for.

    weights: on the devices, or shape structs if nothing is to run. program_cache: holds the
    compiled programs and the mesh. eos: ids of the end tokens. trace: "experts" and "logits" are
    kept for every sequence.

    Attributes:
        max_length: positions of the longest sequence, prompt and answer together.
    """

    def __init__(
        self,
        decoder: InferenceDecoder,
        weights: Weights,
        program_cache: ProgramCache,
        eos: tuple[int, ...],
        trace: frozenset[str] = frozenset(),
    ):
        self.decoder, self.weights, self.program_cache = decoder, weights, program_cache
        self.eos, self.trace = eos, trace
        self.max_length = decoder.config.max_positions

    def round_rows(self, rows: int) -> int:
        """Rows of a batch, rounded up to a power of two for every data shard.

        Examples: 5 -> 8 on one data shard; 5 -> 6 on three, two rows on each.
        """
        shards, per_shard = self.program_cache.data_shards, 1
        while per_shard * shards < rows:
            per_shard *= 2
        return per_shard * shards

    def prefill_program(self, rows: int, length: int) -> Any:
        """`InferenceDecoder.prefill` of R rows of T = `length` positions.

        (weights, token_id_RT, modality_RT, slot_RT, soft_RTD, length_R) -> Step. A prompt of T
        positions has at most T soft tokens.
        """
        width = self.decoder.config.hidden_size
        # Only the shapes and dtypes of these arrays are used.
        ids = np.empty((rows, length), np.int32)
        soft = np.empty((rows, length, width), self.decoder.dtype)
        specs = self.program_cache.batch_structs((ids, ids, ids, soft, np.empty(rows, np.int32)))
        layers = len(self.weights.layers)
        outputs = Step(self._by_row(2), (self._cache_sharding(),) * layers, self._replicated())
        return self.program_cache.get(
            f"prefill {rows} x {length}",
            self.decoder.prefill,
            (self.weights, *specs),
            outputs=outputs,
        )

    def insert_program(self, prompts: tuple[int, int], rows: int, slots: int, greedy: bool) -> Any:
        """`state.insert` into a batch of `rows` with rings of `slots`; the state is donated.

        prompts: rows and length of the prefill program that made the caches.
        (state, caches, logits_RV, new rows, count) -> (state, token_R).
        """
        vocabulary = self.decoder.config.vocab_size
        inputs = (
            self.state_structs(rows, slots),
            self._cache_structs(*prompts),
            self.program_cache.batch_structs(np.empty((prompts[0], vocabulary), np.float32)),
            *self.program_cache.structs((empty_new_rows(prompts[0]), np.int32(0))),
        )
        return self.program_cache.get(
            f"insert {prompts[0]} x {prompts[1]} into {rows} x {slots}{_name_suffix(greedy)}",
            partial(states.insert, eos=self.eos, greedy_only=greedy),
            inputs,
            # The rings are changed in place, so that a batch needs memory for one state only.
            donate=(0,),
            outputs=(self._state_shardings(), self._replicated()),
        )

    def grow_program(self, rows: int, slots: int, longer: int) -> Any:
        """`state.grow` from rings of `slots` to rings of `longer`: (state) -> state."""
        # The state is not donated: longer rings cannot reuse the memory of shorter ones.
        return self.program_cache.get(
            f"grow {rows} x {slots} to {longer}",
            partial(states.grow, slots=longer),
            (self.state_structs(rows, slots),),
            outputs=self._state_shardings(),
        )

    def advance_program(self, rows: int, slots: int, greedy: bool) -> Any:
        """`state.advance`; the state is donated.

        (weights, state, steps, stop_early) -> (state, Produced of MAX_STEPS steps).
        """
        inputs = (
            self.weights,
            self.state_structs(rows, slots),
            *self.program_cache.structs((np.int32(0), np.bool_(False))),
        )
        advance = partial(
            states.advance,
            decoder=self.decoder,
            eos=self.eos,
            greedy_only=greedy,
            max_steps=MAX_STEPS,
            trace=self.trace,
        )
        return self.program_cache.get(
            f"decode {rows} x {slots}{_name_suffix(greedy)}",
            advance,
            inputs,
            donate=(1,),
            outputs=(self._state_shardings(), self._replicated()),
        )

    # -------------------------------------------------------------------------- placement

    def _by_row(self, rank: int) -> Any:
        return self.program_cache.sharding("batch", *[None] * (rank - 1))

    def _replicated(self) -> Any:
        return self.program_cache.sharding()

    def _cache_sharding(self) -> Any:
        return self.program_cache.sharding("batch", "kv_heads", None, None)

    def _state_shardings(self) -> Any:
        """A `State` with a sharding in place of every array, or of every tree of arrays."""
        layers = len(self.weights.layers)
        return State((self._cache_sharding(),) * layers, self._replicated(), self._by_row(1))

    def _cache_structs(self, rows: int, slots: int) -> tuple[KVCache, ...]:
        """Shapes and shardings of the caches of all layers: keys [B,K,H,S], values [B,K,S,H]."""
        config, sharding = self.decoder.config, self._cache_sharding()
        heads, size = config.num_kv_heads, config.head_size

        def struct(*shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, self.decoder.dtype, sharding=sharding)

        cache = KVCache(struct(rows, heads, size, slots), struct(rows, heads, slots, size))
        return (cache,) * len(self.weights.layers)

    def state_structs(self, rows: int, slots: int) -> State:
        """Shapes and shardings of the state of a batch."""
        empty = jax.eval_shape(lambda: states.empty_rows(rows))
        cursor = self.program_cache.structs(np.int32(0))
        caches = self._cache_structs(rows, slots)
        return State(caches, cursor, self.program_cache.batch_structs(empty))

    def empty_state(self, rows: int, slots: int) -> State:
        """The state of a batch without sequences: rings of zeros, no active row."""
        structs = self.state_structs(rows, slots)
        return jax.tree.map(
            lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding), structs
        )


def _name_suffix(greedy: bool) -> str:
    return "" if greedy else ", sampling"
