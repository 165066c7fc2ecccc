"""The entry to the fused GPU kernels."""

from ipa_haiku.attention.batching import for_each_protein
from ipa_haiku.attention.options import Options
from ipa_haiku.attention.pallas_triton.config import heuristic
from ipa_haiku.attention.types import IPAInputs, IPAOutput, LogitScales


def attend(inputs: IPAInputs, scales: LogitScales, options: Options) -> IPAOutput:
    """Invariant point attention by fused GPU kernels.

    Args:
      inputs: the array arguments, checked and supported; points near the origin.
      scales: static factors of the logit terms.
      options: `query_block`, how many query rows to process at a time at most, forward and backward
        (None for all), and `kernel_config` (None for that of `heuristic`) count. `precision` does
        not: products are about as accurate as float32's.

    Returns:
      `IPAOutput` without attention weights.

    Raises:
      TypeError: under forward-mode or second-order differentiation.
    """
    # Here, so that importing the library imports no backend that may be gone.
    from ipa_haiku.attention.pallas_triton.common import Static
    from ipa_haiku.attention.pallas_triton.forward import arrays_of, output_of
    from ipa_haiku.attention.pallas_triton.vjp import attention_sums

    z, num_query = inputs.inputs_2d, inputs.num_query
    config = options.kernel_config or heuristic(inputs.num_head, z.shape[-1], z.dtype)
    static = Static(scales, config, rows_of_block(num_query, options.query_block or num_query))
    return for_each_protein(
        lambda x: output_of(*attention_sums(static, arrays_of(x)), x), inputs, "pallas"
    )


def rows_of_block(num_row: int, most: int) -> int:
    """Rows of a block where no more than `most` are wanted: of as many blocks, the shortest."""
    num_block = -(-num_row // most)
    return -(-num_row // num_block)
