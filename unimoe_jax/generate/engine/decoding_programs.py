"""The programs that decode one model: what each takes, what it returns, and where arrays lie."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from unimoe_jax.generate.engine import state as states
from unimoe_jax.generate.engine.program_cache import ProgramCache
from unimoe_jax.generate.engine.state import MOST_STEPS, State, no_newcomers
from unimoe_jax.models.inference_decoder import InferenceDecoder, Step, Weights
from unimoe_jax.nn.attention.decode import KVCache


class DecodingPrograms:
    """Prefill, insert, grow and advance of one model, compiled for the sizes that are asked for.

    trace: "experts" and "logits" are kept for every sequence.
    """

    def __init__(
        self,
        decoder: InferenceDecoder,
        weights: Weights,
        programs: ProgramCache,
        eos: tuple[int, ...],
        trace: frozenset[str] = frozenset(),
    ):
        self.decoder, self.weights, self.programs = decoder, weights, programs
        self.eos, self.trace = eos, trace
        self.most = decoder.config.max_positions

    def round_rows(self, rows: int) -> int:
        """Rows of a batch: a power of two, times the data shards."""
        shards, size = self.programs.rows, 1
        while size * shards < rows:
            size *= 2
        return size * shards

    def prefill_program(self, rows: int, length: int) -> Any:
        """(weights, token_id_RT, modality_RT, slot_RT, soft_GSD, length_R) -> Step."""
        width = self.decoder.config.hidden_size
        ids = np.empty((rows, length), np.int32)
        soft = np.empty((rows, length, width), self.decoder.dtype)
        specs = self.programs.batch_structs((ids, ids, ids, soft, np.empty(rows, np.int32)))
        layers = len(self.weights.layers)
        outputs = Step(self._by_row(2), (self._cache_sharding(),) * layers, self._replicated())
        return self.programs.get(
            f"prefill {rows} x {length}",
            self.decoder.prefill,
            (self.weights, *specs),
            outputs=outputs,
        )

    def insert_program(self, prompts: tuple[int, int], rows: int, slots: int, greedy: bool) -> Any:
        """See `states.insert`; prompts: rows and length of their program. The state is donated."""
        vocabulary = self.decoder.config.vocab_size
        inputs = (
            self.state_structs(rows, slots),
            self._cache_structs(*prompts),
            self.programs.batch_structs(np.empty((prompts[0], vocabulary), np.float32)),
            *self.programs.structs((no_newcomers(prompts[0]), np.int32(0))),
        )
        return self.programs.get(
            f"insert {prompts[0]} x {prompts[1]} into {rows} x {slots}{_how(greedy)}",
            partial(states.insert, self.eos, greedy),
            inputs,
            donate=(0,),
            outputs=(self._state_shardings(), self._replicated()),
        )

    def grow_program(self, rows: int, slots: int, longer: int) -> Any:
        """See `states.grow`."""
        return self.programs.get(
            f"grow {rows} x {slots} to {longer}",
            partial(states.grow, longer),
            (self.state_structs(rows, slots),),
            outputs=self._state_shardings(),
        )

    def advance_program(self, rows: int, slots: int, greedy: bool) -> Any:
        """See `states.advance`; the state is donated."""
        inputs = (
            self.weights,
            self.state_structs(rows, slots),
            *self.programs.structs((np.int32(0), np.bool_(False))),
        )
        return self.programs.get(
            f"decode {rows} x {slots}{_how(greedy)}",
            partial(states.advance, self.decoder, self.eos, greedy, MOST_STEPS, self.trace),
            inputs,
            donate=(1,),
            outputs=(self._state_shardings(), self._replicated()),
        )

    # -------------------------------------------------------------------------- placement

    def _by_row(self, rank: int) -> Any:
        return self.programs.sharding("batch", *[None] * (rank - 1))

    def _replicated(self) -> Any:
        return self.programs.sharding()

    def _cache_sharding(self) -> Any:
        return self.programs.sharding("batch", "kv_heads", None, None)

    def _state_shardings(self) -> State:
        layers = len(self.weights.layers)
        return State((self._cache_sharding(),) * layers, self._replicated(), self._by_row(1))

    def _cache_structs(self, rows: int, slots: int) -> tuple[KVCache, ...]:
        config, sharding = self.decoder.config, self._cache_sharding()
        lead, size = (rows, config.num_kv_heads), config.head_size
        shapes = KVCache((*lead, size, slots), (*lead, slots, size))
        return tuple(
            KVCache(
                *(jax.ShapeDtypeStruct(s, self.decoder.dtype, sharding=sharding) for s in shapes)
            )
            for _ in self.weights.layers
        )

    def state_structs(self, rows: int, slots: int) -> State:
        """Shapes and shardings of a state."""
        empty = jax.eval_shape(lambda: states.empty_rows(rows))
        cursor = self.programs.structs(np.int32(0))
        return State(self._cache_structs(rows, slots), cursor, self.programs.batch_structs(empty))

    def empty_state(self, rows: int, slots: int) -> State:
        """Rings of zeros, idle rows."""
        structs = self.state_structs(rows, slots)
        return jax.tree.map(
            lambda s: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding), structs
        )


def _how(greedy: bool) -> str:
    return "" if greedy else ", sampling"
