"""AlphaFold 2's `Linear`: the twin of `common_modules.py`."""

import math
from collections.abc import Sequence

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from ipa_haiku.checks import assert_floating

# Standard deviation of a unit normal cut off at two standard deviations. The initialiser samples
# such a normal, so dividing by this restores the variance asked for. Rounded to float32 as AF2
# does: the bits of the initial weights depend on it.
TRUNCATED_NORMAL_STDDEV_FACTOR = float(np.float32(0.87962566103423978))

# Gain on the fan-in variance: 2 makes up for the half that a relu discards.
_VARIANCE_GAIN = {"linear": 1.0, "relu": 2.0}


class Linear(hk.Module):
    """Affine map of the last `num_input_dims` axes, with AF2's parameters and initialisers.

    Parameters: `weights` [*input sizes, *num_output] and, with `use_bias`, `bias` [*num_output],
    created in the dtype of the inputs. Initialisers are 'linear' and 'relu' (truncated normal,
    fan-in scaling, AF2's `get_initializer_scale`) and 'zeros'.
    """

    def __init__(
        self,
        num_output: int | Sequence[int],
        initializer: str = "linear",
        num_input_dims: int = 1,
        use_bias: bool = True,
        bias_init: float = 0.0,
        precision: jax.lax.PrecisionLike = None,
        name: str = "linear",
    ):
        """Sets up the map; parameters appear when it is called.

        Args:
          num_output: output channels; a sequence gives several output axes.
          initializer: 'linear', 'relu' or 'zeros'.
          num_input_dims: how many trailing axes of the inputs to contract.
          use_bias: whether to add a trainable bias.
          bias_init: initial value of the bias.
          precision: of the matrix product, as in `jax.lax.dot`.
          name: Haiku module name.

        Raises:
          ValueError: if there is no such initialiser.
        """
        super().__init__(name=name)
        if initializer not in (*_VARIANCE_GAIN, "zeros"):
            raise ValueError(
                f"initializer must be 'linear', 'relu' or 'zeros', got {initializer!r}."
            )
        self.output_shape = (
            tuple(num_output) if isinstance(num_output, Sequence) else (int(num_output),)
        )
        self.initializer = initializer
        self.num_input_dims = num_input_dims
        self.use_bias = use_bias
        self.bias_init = bias_init
        self.precision = precision

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps [..., *input sizes] to [..., *num_output].

        Raises:
          AssertionError: if the inputs are not floating-point.
        """
        assert_floating("inputs", inputs)
        weights, bias = self.weights_and_bias(inputs)
        output = jnp.tensordot(inputs, weights, axes=self.num_input_dims, precision=self.precision)
        if bias is None:
            return output
        return output + jnp.expand_dims(bias, range(output.ndim - bias.ndim))

    def weights_and_bias(
        self, inputs: jax.Array | jax.ShapeDtypeStruct
    ) -> tuple[jax.Array, jax.Array | None]:
        """The parameters for such inputs, for callers that fuse several maps into one product."""
        in_shape = inputs.shape[inputs.ndim - self.num_input_dims :]
        weights = hk.get_parameter(
            "weights", in_shape + self.output_shape, inputs.dtype, self._weight_init(in_shape)
        )
        bias = None
        if self.use_bias:
            bias_init = hk.initializers.Constant(self.bias_init)
            bias = hk.get_parameter("bias", self.output_shape, inputs.dtype, bias_init)
        return weights, bias

    def _weight_init(self, in_shape: tuple[int, ...]) -> hk.initializers.Initializer:
        if self.initializer == "zeros":
            return hk.initializers.Constant(0.0)
        stddev = math.sqrt(_VARIANCE_GAIN[self.initializer] / math.prod(in_shape))
        return hk.initializers.TruncatedNormal(stddev=stddev / TRUNCATED_NORMAL_STDDEV_FACTOR)
