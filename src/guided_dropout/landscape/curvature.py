r"""Second derivatives: Hessian-vector products, the directions of the sharpest curvature, differences of losses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from guided_dropout.errors import DataError, ModelError
from guided_dropout.landscape.directions import Direction, movable_parameters, step_dtype
from guided_dropout.landscape.losses import Evaluation
from guided_dropout.undisturbed import evaluating, same_random_states

# Vectors that Lanczos holds for k eigenpairs: more converge in fewer restarts, and take memory.
_KRYLOV = 12
_RESTARTS = 30
# Equal errors of the five losses make so much more of the second derivative than of its distance from the plain one.
ROUNDING = 4.5
_Array = npt.NDArray[Any]


def hessian_vector_product(evaluation: Evaluation, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r""":math:`H v` of the mean loss at the weights as they are, restricted to the parameters that `vector` names.

    Exact, by differentiating :math:`\nabla L \cdot v` (Pearlmutter, 1994), batch after batch.

    Args:
        evaluation: of the model and text.
        vector: name → v, of the parameter's shape.

    Returns:
        Like `vector`: on its parameter's device, in the parameter's dtype.
    """
    with _differentiable(evaluation.model, vector) as parameters:
        product = _product(evaluation, parameters, vector)
        return {name: product[name].to(p.dtype) for name, p in parameters.items()}


def hessian_directions(
    evaluation: Evaluation, *, count: int = 2, vectors: str = "held", seed: int = 0, tolerance: float = 1e-2
) -> tuple[list[Direction], list[float]]:
    r"""The directions in which the loss curves most: eigenvectors of the Hessian's largest eigenvalues, by Lanczos.

    They have length 1, so that a step along one is a distance in parameter space, and the loss rises by about
    :math:`\lambda \alpha^2 / 2`.

    Args:
        evaluation: of the model and text. Each product is a forward and two backward passes of it.
        count: how many, 1 or 2.
        vectors: parameters of fewer than two dimensions are ``"held"`` (the Hessian is that of the others) or
            ``"moved"``.
        seed: of the vector that Lanczos starts from.
        tolerance: of the eigenvalues, relative.

    Returns:
        The directions, the sharpest first, and their eigenvalues in nats.

    Raises:
        DataError: a count that is neither 1 nor 2.
        ModelError: no parameter to move, or Lanczos did not converge.
    """
    if count not in (1, 2):
        raise DataError(f"{count} directions; expected 1 or 2")
    names = [n for n, p in movable_parameters(evaluation.model).items() if vectors == "moved" or p.dim() > 1]
    if not names:
        raise ModelError(f"{type(evaluation.model).__name__} has no parameter to move; expected some: move the vectors")
    parameters = {n: p for n, p in movable_parameters(evaluation.model).items() if n in names}
    size = sum(p.numel() for p in parameters.values())
    wide = np.float64 if any(step_dtype(p) == torch.float64 for p in parameters.values()) else np.float32
    products = 0
    with _differentiable(evaluation.model, parameters) as open_parameters:

        def product(flat: _Array) -> _Array:
            nonlocal products
            products += 1
            return _flat(_product(evaluation, open_parameters, _unflat(flat.reshape(-1), parameters)), wide)

        operator: Any = LinearOperator((size, size), matvec=product, dtype=wide)  # pyright: ignore[reportCallIssue]
        relative: Any = tolerance
        start = np.random.default_rng(seed).standard_normal(size).astype(wide)
        try:
            values, found = eigsh(
                operator, k=count, which="LA", v0=start, tol=relative, ncv=min(size, _KRYLOV), maxiter=_RESTARTS
            )
        except ArpackNoConvergence as e:
            raise ModelError(
                f"the Hessian's largest eigenvalues did not settle to {tolerance:g} in {products} products; expected "
                "them to: use more samples, or a larger tolerance"
            ) from e
    directions, eigenvalues = [], []
    for i in np.argsort(values)[::-1]:
        vector = found[:, i] * np.sign(found[np.abs(found[:, i]).argmax(), i])  # the sign is the solver's whim
        facts = {"kind": "hessian", "eigenvalue": float(values[i]), "rank": len(directions), "vectors": vectors}
        steps = {
            n: t.to("cpu", step_dtype(parameters[n]), copy=True)
            for n, t in _unflat(vector / np.linalg.norm(vector), parameters).items()
        }
        directions.append(Direction(steps, {**facts, "seed": seed, "products": products, "tolerance": tolerance}))
        eigenvalues.append(float(values[i]))
    return directions, eigenvalues


def second_difference(losses: Sequence[float], step: float) -> tuple[float, float]:
    r"""The second derivative in the middle of five losses at equal steps, and how far it can be trusted.

    Of fourth order, :math:`(-L_{-2} + 16 L_{-1} - 30 L_0 + 16 L_1 - L_2) / 12 h^2`. The second figure is its distance
    from the plain :math:`(L_{-1} - 2 L_0 + L_1) / h^2`: more than the error of a step that is small enough, and less
    than a quarter of the losses' rounding (`ROUNDING`).
    """
    a, b, c, d, e = losses
    plain = (b - 2 * c + d) / step**2
    better = (-a + 16 * b - 30 * c + 16 * d - e) / (12 * step**2)
    return better, abs(better - plain)


@contextlib.contextmanager
def _differentiable(model: nn.Module, names: Mapping[str, Any]) -> Iterator[dict[str, nn.Parameter]]:
    """Within, the named parameters require gradients, and attention takes the path that has second derivatives."""
    parameters = {name: p for name, p in movable_parameters(model).items() if name in names}
    with evaluating(model), same_random_states(model), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        for p in parameters.values():
            p.requires_grad_(True)
        yield parameters


def _product(
    evaluation: Evaluation, parameters: Mapping[str, nn.Parameter], vector: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    leaves = list(parameters.values())
    steps = [vector[name].to(p.device, p.dtype) for name, p in parameters.items()]
    # In half precision a sum of many batches stops growing.
    wide = [torch.promote_types(p.dtype, torch.float32) for p in leaves]
    sums = [torch.zeros_like(p, dtype=dtype) for p, dtype in zip(leaves, wide, strict=True)]
    for batch in evaluation.batches:
        gradients = torch.autograd.grad(evaluation.total(batch), leaves, create_graph=True, materialize_grads=True)
        products = [(g * s).sum(dtype=dtype) for g, s, dtype in zip(gradients, steps, wide, strict=True)]
        along = torch.stack([product.to(leaves[0].device) for product in products]).sum()
        for total, part in zip(sums, torch.autograd.grad(along, leaves, materialize_grads=True), strict=True):
            total += part
    return {name: total / evaluation.num_samples for name, total in zip(parameters, sums, strict=True)}


def _flat(tensors: Mapping[str, Tensor], dtype: Any) -> _Array:
    return np.concatenate([t.detach().cpu().to(torch.float64).numpy().ravel().astype(dtype) for t in tensors.values()])


def _unflat(flat: _Array, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts, start = {}, 0
    for name, p in parameters.items():
        parts[name] = torch.from_numpy(flat[start : start + p.numel()].reshape(tuple(p.shape)).copy())
        start += p.numel()
    return parts
