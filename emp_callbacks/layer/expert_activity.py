"""What passes the experts of a mixture: looked up where tokens go in, computed again expert by expert."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emp_callbacks.layer.observers import Observer
from emp_callbacks.targets.experts import StackedExperts
from emp_callbacks.targets.forward_site import in_backward
from emp_callbacks.targets.positions import counted_rows

Shown = Literal["inputs", "hidden_squares", "hidden", "outputs"]
_ARGUMENTS = 3


def can_be_watched(stacked: StackedExperts) -> bool:
    """Return whether what experts compute is known here: transformers' modules, called with tokens, choice and weights.

    They say how a gate is applied, and `forward(hidden_states (T, H), top_k_index (T, K), top_k_weights (T, K))`.
    """
    module = stacked.module
    known = hasattr(module, "_apply_gate") if stacked.gated else hasattr(module, "act_fn")
    return known and len(inspect.signature(inspect.unwrap(type(module).forward)).parameters) == _ARGUMENTS + 1


@final
class ExpertActivity(Observer):
    """Sums over the tokens that are sent to each expert.

    Of expert e with hidden neurons h = gate(up(x)) and output f = down(h), for each of its tokens x:
    "inputs": x^2, (E, H); "hidden_squares": h^2, (E, I); "hidden": |h|, (E, I); "outputs": g ||f||_2, (E,), g the
    weight by which the router multiplies f. The first three are counted over all tokens, the last one over those of
    each expert.

    Args:
        name: Name of the module.
        stacked: The experts.
        shown: What is summed.
    """

    def __init__(self, name: str, stacked: StackedExperts, shown: Shown) -> None:
        wide = {"inputs": stacked.width, "outputs": 1}.get(shown, stacked.hidden)
        super().__init__(name, stacked.module, stacked.number * wide)
        self._stacked, self._looked_at = stacked, shown

    def statistics(self) -> dict[str, Tensor]:
        sums = super().statistics()
        if self._looked_at == "outputs" and not sums["count"].dim():
            sums["count"] = torch.zeros(self.size, dtype=torch.float64)
        return sums

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_uncompiled"}

    def _register(self) -> list[RemovableHandle]:
        # Here and not as a decorator: it imports the compiler. Compiled code calls what chooses experts one by one as
        # it is.
        self._uncompiled = torch.compiler.disable(self._look)  # type: ignore[no-untyped-call]
        return [self.module.register_forward_pre_hook(self._hook, with_kwargs=True)]

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        if self._gathers:
            self._refuse_recording(steady=False)
            look = self.__dict__.get("_uncompiled", self._look)
            look([*args, *kwargs.values()][:_ARGUMENTS])

    @torch.no_grad()
    def _look(self, given: list[Any]) -> None:
        if not in_backward():
            tokens, chosen, weights = (value.detach() for value in given)
            with torch.autocast(tokens.device.type, enabled=False):
                self._see_tokens(tokens.flatten(0, -2), chosen.flatten(0, -2), weights.flatten(0, -2))

    def _see_tokens(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> None:
        counts = counted_rows(self.positions, tokens.shape)
        if counts is not None:
            chosen = chosen.masked_fill(~counts.to(chosen.device)[:, None], self._stacked.number)
        total = torch.zeros(self._stacked.number, self.size // self._stacked.number, dtype=torch.float64)
        routed = torch.zeros(self._stacked.number, dtype=torch.float64)
        for expert, at, factors in self._sent(chosen, weights):
            total[expert] = self._sum_of(expert, tokens[at], factors).cpu()
            routed[expert] = len(at)
        whole = torch.tensor(float(len(tokens) if counts is None else counts.sum()), dtype=torch.float64)
        self._add({"total": total.flatten(), "count": routed if self._looked_at == "outputs" else whole})

    def _sent(self, chosen: Tensor, weights: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield every expert that tokens are sent to, which these are, and the weight of each."""
        for expert in torch.unique(chosen).tolist():
            if expert < self._stacked.number:  # beyond are experts of other ranks, and padding
                at, place = (chosen == expert).nonzero(as_tuple=True)
                yield expert, at, weights[at, place]

    def _sum_of(self, expert: int, tokens: Tensor, factors: Tensor) -> Tensor:
        if self._looked_at == "inputs":
            return tokens.float().square().sum(0, dtype=torch.float64)
        module: Any = self.module
        before = self._through(0, expert, tokens)
        hidden: Tensor = module._apply_gate(before) if self._stacked.gated else module.act_fn(before)
        if self._looked_at == "hidden_squares":
            return hidden.float().square().sum(0, dtype=torch.float64)
        if self._looked_at == "hidden":
            return hidden.float().abs().sum(0, dtype=torch.float64)
        outputs = self._through(1, expert, hidden)
        if getattr(module, "has_post_expert_norm", False):
            outputs = module.post_expert_norm(outputs)
        weighted: Tensor = outputs.float().norm(dim=1) * factors.float()
        return weighted.sum(dtype=torch.float64)

    def _through(self, which: int, expert: int, values: Tensor) -> Tensor:
        # Looked up by name: sharded models put whole parameters in the place of their shards for the forward pass.
        name, own = self._stacked.names[which], self.module
        matrix: Tensor = getattr(own, name)[expert]
        product = values.to(matrix.dtype) @ (matrix if self._stacked.transposed else matrix.mT)
        if self._stacked.biases[which] is None:
            return product
        bias: Tensor = getattr(own, f"{name}_bias")[expert]
        return product + bias

    def _total(self, values: Tensor) -> Tensor:
        raise NotImplementedError("experts are looked at as a whole")
