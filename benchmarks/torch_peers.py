"""Implementations in PyTorch, with this project's weights and inputs.

They run eagerly, as their packages run them, on the device that JAX uses, with as many threads.
"""

import dataclasses
import functools
import importlib
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import torch

from benchmarks import layouts
from benchmarks.candidates import Candidate, Groups, Prepared
from benchmarks.cases import Model
from benchmarks.problems import Problem
from ipa_haiku.quat_affine import QUAT_TO_ROT
from ipa_haiku.weights import Layout, to_openfold

# Of module, inputs_1d [N, C_s], inputs_2d [N, N, C_z], rotation [N, 3, 3], translation [N, 3] and
# mask [N].
Call = Callable[..., torch.Tensor]


_INPUTS = ("inputs_1d", "inputs_2d", "affine")


@dataclasses.dataclass(frozen=True)
class TorchCandidate(Candidate):
    """A PyTorch module; `layout` makes its state."""

    model: Model  # sizes
    module: torch.nn.Module  # with any weights
    call: Call  # runs it

    def prepare(self, copies: Sequence[Problem], mode: str) -> Prepared:
        """Loads weights and inputs; see `Candidate.prepare`."""
        first = copies[0]
        if first.differentiable["inputs_2d"].dtype != np.float32:
            raise NotImplementedError("measured in float32 only")
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        on_gpu = jax.default_backend() == "gpu"
        if on_gpu and not torch.cuda.is_available():
            raise NotImplementedError("this PyTorch cannot use the GPU")
        device = torch.device("cuda" if on_gpu else "cpu")

        module = self.module.to(device)
        if self.is_exact:
            state = self.layout(first.differentiable["parameters"])
            module.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
        arguments = [_to_torch(problem, device) for problem in copies]
        run = {"forward": self._forward, "grad": self._gradient}[mode]
        n = len(first.constant["mask"])
        return Prepared(
            start=lambda i: run(module, arguments[i]),
            wait=lambda result: torch.cuda.synchronize() if on_gpu else None,
            groups=lambda result: jax.tree.map(lambda x: x.cpu().numpy(), result),
            compile_seconds=None,
            temp_bytes=None,
            required_bytes=_required_bytes(self.model, n, mode),
        )

    def _output(self, module: torch.nn.Module, x: dict[str, torch.Tensor]) -> torch.Tensor:
        quaternion, translation = x["affine"][:, :4], x["affine"][:, 4:]
        rotation = torch.einsum("ijab,ni,nj->nab", x["quat_to_rot"], quaternion, quaternion)
        return self.call(
            module, x["inputs_1d"], x["inputs_2d"], rotation, translation, x["mask"][:, 0]
        )

    def _forward(self, module: torch.nn.Module, x: dict[str, torch.Tensor]) -> Groups:
        with torch.no_grad():
            return {"output": self._output(module, x)}

    def _gradient(self, module: torch.nn.Module, x: dict[str, torch.Tensor]) -> Groups:
        module.zero_grad()
        inputs = {name: x[name].detach().requires_grad_() for name in _INPUTS}
        loss = torch.sum((self._output(module, x | inputs) - x["target"]) ** 2)
        loss.backward()
        parameters = {name: parameter.grad for name, parameter in module.named_parameters()}
        gradients = {name: array.grad for name, array in inputs.items()}
        return {"value": loss.detach(), "parameters": parameters, **gradients}


def _to_torch(problem: Problem, device: torch.device) -> dict[str, torch.Tensor]:
    arrays = {
        **{name: problem.differentiable[name] for name in _INPUTS},
        "mask": problem.constant["mask"],
        "target": problem.target,
        "quat_to_rot": QUAT_TO_ROT,
    }
    return {name: torch.tensor(np.asarray(x), device=device) for name, x in arrays.items()}


def _required_bytes(model: Model, n: int, mode: str) -> int:
    """Rough peak of an eager run: [N, N, H, P, 3] of distances (twice) and of point values."""
    ipa = model.ipa
    floats_per_pair = ipa.num_head * (6 * ipa.num_point_qk + 3 * ipa.num_point_v + 6)
    kept_for_backward = 3 if mode == "grad" else 1  # autograd keeps what the forward pass makes
    return 4 * floats_per_pair * n * n * kept_for_backward


def lucidrains(model: Model) -> TorchCandidate:
    """The package `invariant-point-attention`."""
    from invariant_point_attention import InvariantPointAttention

    # A deprecated spelling in each call, which nobody here can change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="invariant_point_attention")
    ipa = model.ipa
    if ipa.num_channel != model.single_channel:
        raise NotImplementedError("its output has as many channels as inputs_1d")
    module = InvariantPointAttention(
        dim=model.single_channel,
        heads=ipa.num_head,
        scalar_key_dim=ipa.num_scalar_qk,
        scalar_value_dim=ipa.num_scalar_v,
        point_key_dim=ipa.num_point_qk,
        point_value_dim=ipa.num_point_v,
        pairwise_repr_dim=model.pair_channel,
    )

    def call(module, inputs_1d, inputs_2d, rotation, translation, mask):  # type: ignore[no-untyped-def]
        output = module(
            inputs_1d[None],
            inputs_2d[None],
            rotations=rotation.mT[None],  # it multiplies row vectors from the left
            translations=translation[None],
            mask=mask[None] > 0,
        )
        return output[0]

    layout = functools.partial(layouts.to_lucidrains, model=model)
    return TorchCandidate("lucidrains", "lucidrains", model, module, call, layout=layout)


def openfold(model: Model, checkout: str) -> TorchCandidate:
    """OpenFold's monomer module from a checkout of its repository."""
    with _packages_of_openfold(Path(checkout) / "openfold"):
        structure_module = importlib.import_module("openfold.model.structure_module")
        rigid_utils = importlib.import_module("openfold.utils.rigid_utils")
    module = structure_module.InvariantPointAttention(**_openfold_sizes(model))
    layout: Layout = "openfold" if hasattr(structure_module, "PointProjection") else "esmfold"
    return TorchCandidate(
        "openfold",
        "OpenFold",
        model,
        module,
        _call_openfold(rigid_utils),
        layout=functools.partial(to_openfold, layout=layout),
    )


def esmfold(model: Model) -> TorchCandidate:
    """ESMFold's module in `transformers`."""
    from transformers.models.esm import modeling_esmfold, openfold_utils
    from transformers.models.esm.configuration_esm import StructureModuleConfig

    sizes = _openfold_sizes(model)
    config = StructureModuleConfig(
        sequence_dim=sizes["c_s"],
        pairwise_dim=sizes["c_z"],
        ipa_dim=sizes["c_hidden"],
        num_heads_ipa=sizes["no_heads"],
        num_qk_points=sizes["no_qk_points"],
        num_v_points=sizes["no_v_points"],
    )
    return TorchCandidate(
        "esmfold",
        "ESMFold (transformers)",
        model,
        modeling_esmfold.EsmFoldInvariantPointAttention(config),
        _call_openfold(openfold_utils),
        layout=functools.partial(to_openfold, layout="esmfold"),
    )


def flash_ipa(model: Model, checkout: str) -> TorchCandidate:
    """FlashIPA, which takes a factorised pair representation and rounds to bfloat16: GPU only.

    It computes another function of other inputs, so there is nothing to compare its results with.
    """
    if jax.default_backend() != "gpu":
        raise NotImplementedError("it needs a GPU")
    sys.path.insert(0, str(Path(checkout) / "src"))
    flash = importlib.import_module("flash_ipa.ipa")
    create_rigid = importlib.import_module("flash_ipa.rigid").create_rigid

    rank = 2  # of FlashIPA's own examples
    config = flash.IPAConfig(**_openfold_sizes(model), z_factor_rank=rank)

    def call(module, inputs_1d, inputs_2d, rotation, translation, mask):  # type: ignore[no-untyped-def]
        # Stand-ins for factors; they keep inputs_2d in the graph, so that a gradient exists.
        rows, columns = inputs_2d[:, :rank], inputs_2d[:rank].transpose(0, 1)  # [N, rank, C_z]
        frames = create_rigid(rotation[None], translation[None])
        return module(inputs_1d[None], None, rows[None], columns[None], frames, mask[None])[0]

    module = flash.InvariantPointAttention(config)
    torch.nn.init.normal_(module.linear_out.weight, std=module.linear_out.in_features**-0.5)
    label = f"FlashIPA (rank {rank})"
    return TorchCandidate(
        "flash_ipa", label, model, module, call, layout=lambda _: {}, is_exact=False
    )


def _openfold_sizes(model: Model) -> dict[str, int]:
    """Arguments of OpenFold's module and its descendants."""
    ipa = model.ipa
    if ipa.num_scalar_qk != ipa.num_scalar_v:
        raise NotImplementedError("its scalar queries and values have the same size")
    if ipa.num_channel != model.single_channel:
        raise NotImplementedError("its output has as many channels as inputs_1d")
    return {
        "c_s": model.single_channel,
        "c_z": model.pair_channel,
        "c_hidden": ipa.num_scalar_qk,
        "no_heads": ipa.num_head,
        "no_qk_points": ipa.num_point_qk,
        "no_v_points": ipa.num_point_v,
    }


def _call_openfold(rigid_utils: types.ModuleType) -> Call:
    def call(module, inputs_1d, inputs_2d, rotation, translation, mask):  # type: ignore[no-untyped-def]
        frames = rigid_utils.Rigid(rigid_utils.Rotation(rot_mats=rotation), translation)
        return module(inputs_1d, inputs_2d, frames, mask)

    return call


@contextmanager
def _packages_of_openfold(root: Path) -> Iterator[None]:
    """Lets modules of OpenFold be imported without what they do not need.

    Its packages import all of OpenFold, which needs many more packages: bare packages of the same
    names import what is asked for only. Its CUDA extension is imported even where the in-place
    path that uses it is off, as here: an empty module stands in where it has not been built.
    """
    names = ["openfold", *(f"openfold.{name}" for name in ("model", "np", "utils"))]
    packages = {name: types.ModuleType(name) for name in names}
    for name, package in packages.items():
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    extension = "attn_core_inplace_cuda"
    if importlib.util.find_spec(extension) is None:
        packages[extension] = types.ModuleType(extension)
    sys.modules.update(packages)
    try:
        yield
    finally:
        sys.modules.pop(extension, None)
