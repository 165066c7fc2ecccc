"""What the monomer and the multimer module share: all but projections, scales and the norm."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from ipa_haiku import rigid
from ipa_haiku.attention import centering
from ipa_haiku.attention.api import attention_core
from ipa_haiku.attention.options import Options
from ipa_haiku.attention.pair import StructuredPair, is_dense
from ipa_haiku.attention.types import (
    AttentionTerms,
    IPAInputs,
    LogitScales,
    as_mask,
    check_pair,
    wide_dtype,
)
from ipa_haiku.checks import assert_floating, assert_integer, assert_shape
from ipa_haiku.common_modules import Linear
from ipa_haiku.config import as_config
from ipa_haiku.quat_affine import QuatAffine

NUM_LOGIT_TERMS = 3  # scalar, point and pair, each given a third of the logits' variance


class BaseInvariantPointAttention(hk.Module):
    """Invariant Point Attention but for projections, scales and the norm (Suppl. Alg. 22)."""

    def __init__(
        self,
        config: Any,
        global_config: Any = None,
        dist_epsilon: float = 1e-8,
        name: str = "invariant_point_attention",
        *,
        zero_init: bool | None = None,
        **options: Any,
    ):
        """Sets up the module; the first four arguments are AF2's.

        Args:
          config: sizes, an `IPAConfig` or anything with its attributes, such as AF2's own config.
          global_config: anything with `zero_init` (whether the output starts as zero); None means
            AF2's default, True.
          dist_epsilon: keeps the gradient of the norm of output points finite at zero. The
            monomer adds it to squared norms (squared units of translation), the multimer takes
            it as the smallest norm (units of translation).
          name: Haiku module name.
          zero_init: whether the output starts as zero; None for what `global_config` says.
          **options: how to compute, keyword arguments of `invariant_point_attention`:
            `implementation`, `precision` (also of the module's own matrix products, but those that
            make points), `query_block`, `memory_budget`, `sharding`, `kernel_config`.

        Raises:
          ValueError: if a size in `config` is missing or not a positive integer, or an option is
            of no use.
          TypeError: if there is no such option.
        """
        super().__init__(name=name)
        self.config = as_config(config)
        self.global_config = global_config
        if zero_init is None:
            zero_init = True if global_config is None else global_config.zero_init
        self._zero_init = zero_init
        self._dist_epsilon = dist_epsilon
        self._options = Options(**options)

    @abc.abstractmethod
    def _core_inputs(
        self,
        inputs_1d: jax.Array,
        inputs_2d: jax.Array | StructuredPair | None,
        mask: jax.Array,
        frames: QuatAffine,
    ) -> IPAInputs:
        """Projects to the arrays of the attention core (lines 1 to 4); mask [..., N].

        Creates its parameters in AF2's order, so that a key gives AF2's initial parameters, and
        as `hk.transparent`, so that they are children of the module itself.
        """

    @abc.abstractmethod
    def _logit_scales(self) -> LogitScales:
        """The factors of the logit terms (line 7)."""

    @abc.abstractmethod
    def _norm(self, point: Sequence[jax.Array]) -> jax.Array:
        """Norms [...] of points, three of [...] (line 11), with a finite gradient at zero."""

    @hk.transparent
    def _attend(
        self,
        inputs_1d: jax.Array,
        inputs_2d: jax.Array | StructuredPair | None,
        mask: jax.Array,
        frames: Any,
        frames_name: str,
        segment_ids: jax.Array | None,
        return_attention: bool,
    ) -> jax.Array | tuple[jax.Array, AttentionTerms]:
        rotation, translation = rigid.to_rotation_translation(frames, frames_name)
        mask = as_mask("mask", mask)
        _check_inputs(inputs_1d, inputs_2d, mask, rotation, frames_name, segment_ids)
        mask = mask[..., 0]
        options = dataclasses.replace(self._options, return_attention=return_attention)
        if not options.is_reference:
            rotation, translation = self._at_center(rotation, translation, mask, segment_ids)
        frames = rigid.to_quat_affine(rotation, translation)
        inputs = self._core_inputs(inputs_1d, inputs_2d, mask, frames)
        inputs = inputs._replace(q_segment_ids=segment_ids, k_segment_ids=segment_ids)
        is_centered = not options.is_reference
        result = attention_core(inputs, self._logit_scales(), options, is_centered=is_centered)
        # By indexing: the gradient of a split moves more memory on GPUs.
        point_local = frames.invert_point([result.point[..., d] for d in range(3)], extra_dims=2)
        features = [result.scalar, *point_local, self._norm(point_local)]
        if result.pair is not None:
            features.append(result.pair)
        output = self._project([x.reshape(*x.shape[:-2], -1) for x in features], inputs_1d.dtype)
        return output if result.attention is None else (output, result.attention)

    @hk.transparent
    def _project(self, features: Sequence[jax.Array], dtype: jnp.dtype) -> jax.Array:
        """The output projection [..., N, num_channel] (line 11).

        Args:
          features: [..., N, channels] each, in AF2's order: scalar, local x, local y, local z,
            norm, pair (if any); side by side they have H*(Cv + 4*Pv + C_z) channels.
          dtype: of new parameters. Where given ones are wider, so is what they multiply.
        """
        projection = Linear(
            self.config.num_channel,
            initializer="zeros" if self._zero_init else "linear",
            precision=self._options.precision,
            name="output_projection",
        )
        shape = (*features[0].shape[:-1], sum(x.shape[-1] for x in features))
        weights, _ = projection.weights_and_bias(jax.ShapeDtypeStruct(shape, dtype))
        dtype = jnp.promote_types(dtype, weights.dtype)
        return projection(jnp.concatenate([x.astype(dtype) for x in features], axis=-1))

    def _at_center(
        self,
        rotation: jax.Array,
        translation: jax.Array,
        mask: jax.Array,
        segment_ids: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """The frames, each segment's moved to the origin, where coordinates have the most digits.

        Nothing but rounding depends on it, as all frames that see each other move alike.
        """
        # Differences of float16 coordinates may be infinite.
        rotation, translation = (x.astype(wide_dtype(x)) for x in (rotation, translation))
        points, sharding = jax.lax.stop_gradient(translation), self._options.sharding
        if sharding is not None:
            points = sharding.on_every_device(points, "... N 3")
            mask = sharding.on_every_device(mask, "... N")
            if segment_ids is not None:
                segment_ids = sharding.on_every_device(segment_ids, "... N")
        return rotation, translation - centering.center(points, mask, segment_ids)

    def _global_points(
        self, frames: QuatAffine, local: Sequence[Sequence[jax.Array]]
    ) -> list[jax.Array]:
        """Queries, keys and values [..., N, H, points, 3] in the global frame (lines 2 and 3).

        Args:
          frames: of the residues.
          local: x, y, z [..., N, H, points] in them, of queries, keys and values in this order, in
            any number of parts: all points move at once.
        """
        components = [jnp.concatenate(parts, axis=-1) for parts in zip(*local)]
        dtype = wide_dtype(*components, *frames.translation)
        components = [x.astype(dtype) for x in components]
        points = jnp.stack(frames.apply_to_point(components, extra_dims=2), axis=-1)
        num_qk = self.config.num_point_qk
        return jnp.split(points, [num_qk, 2 * num_qk], axis=-2)

    @hk.transparent
    def _pair_weights_and_bias(
        self, inputs_2d: jax.Array | StructuredPair | None
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """Weights [C_z, H] and bias [H] of the pair term; None and None without one."""
        if inputs_2d is None:
            return None, None
        linear = Linear(self.config.num_head, name="attention_2d")
        return linear.weights_and_bias(jax.ShapeDtypeStruct(inputs_2d.shape, inputs_2d.dtype))

    def _point_weights(self, logit_terms: int) -> jax.Array:
        """Weights [H] of squared distances (gamma of line 7), 1 / `logit_terms` of the variance.

        For unit normal queries and keys each point contributes variance 9/2 to the logit.
        """
        trainable = hk.get_parameter(
            "trainable_point_weights",
            shape=[self.config.num_head],
            init=hk.initializers.Constant(np.log(np.e - 1.0)),  # softplus of this is 1
        )
        scale = np.sqrt(1.0 / (logit_terms * self.config.num_point_qk * 9.0 / 2.0))
        return float(scale) * jax.nn.softplus(trainable)


def _check_inputs(
    inputs_1d: jax.Array,
    inputs_2d: jax.Array | StructuredPair | None,
    mask: jax.Array,
    rotation: jax.Array,
    frames_name: str,
    segment_ids: jax.Array | None,
) -> None:
    """Asserts that the arguments of a module fit each other.

    Raises:
      TypeError: if one is not an array.
      AssertionError: naming the first that does not fit, its axes and both shapes.
    """
    assert_floating("inputs_1d", inputs_1d)
    if is_dense(inputs_2d):
        assert_floating("inputs_2d", cast(jax.Array, inputs_2d))
    assert_floating("mask", mask)
    if inputs_1d.ndim < 2 or 0 in inputs_1d.shape:
        raise AssertionError(
            f"inputs_1d must have shape [..., N, C_s], none of them zero, got {inputs_1d.shape}."
        )
    batch = inputs_1d.shape[:-1]
    if isinstance(inputs_2d, StructuredPair):
        check_pair(inputs_2d, batch[:-1], batch[-1], batch[-1])
    elif inputs_2d is not None:
        assert_shape("inputs_2d", inputs_2d, "... N N C_z", (*batch, batch[-1], None))
    assert_shape("mask", mask, "... N 1", (*batch, 1))
    assert_shape(f"{frames_name}'s rotation", rotation, "... N 3 3", (*batch, 3, 3))
    if segment_ids is not None:
        assert_integer("segment_ids", segment_ids)
        assert_shape("segment_ids", segment_ids, "... N", batch)
