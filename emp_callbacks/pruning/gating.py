"""Gates in the life of a pruner: they begin at the first refresh, learn, and at the last become an ordinary mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from emp_callbacks.backends import Backend
from emp_callbacks.blame import warn_the_user
from emp_callbacks.config import EMPConfig
from emp_callbacks.criteria import Criterion
from emp_callbacks.layer import Layer
from emp_callbacks.layer.head_gates import HeadGates, first_probabilities
from emp_callbacks.layer.mask_mode import MaskMode
from emp_callbacks.pruning.accounting import with_note
from emp_callbacks.pruning.assembly import gated_attentions
from emp_callbacks.pruning.foreseen import Foreseen, foresee
from emp_callbacks.pruning.gate_learning import GateLearning
from emp_callbacks.pruning.groups import KeepRule
from emp_callbacks.pruning.refresh import refresh_masks
from emp_callbacks.targets import few
from emp_callbacks.trajectory import PruneEvent

_LEARNING = "the gates learn: masks of these heads follow at the last refresh, evaluation shows them now"
_HARDENED = "gates hardened"


@final
class GateScores(Criterion):
    """P(open) of a gate, or of "top_k" the sigmoid of its score: what a mask is made of when gates are hardened."""

    targets = ("heads",)

    def __init__(self, gates: HeadGates) -> None:
        self._gates = gates

    def score(self, layer: Any) -> Tensor:
        return self._gates.scores()[self._gates.parts[layer.name]]


@final
class Gating:
    """The gates of one pruner: none (also where the settings ask for none), learning, or hardened into masks.

    Args:
        config: The settings.
        backend: The parallel strategy.

    Attributes:
        gates: The gates; None before they begin, and where there are none.
        learns: Whether they are in the forward pass and learn.

    Raises:
        NotImplementedError: The strategy is one under which gates do not learn.
    """

    def __init__(self, config: EMPConfig, backend: Backend) -> None:
        self._config, self._backend = config, backend
        if config.gates is not None and backend.scales_loss:
            raise NotImplementedError(
                f"gates={config.gates!r} do not learn under DeepSpeed, whose engine scales the loss by itself: use DDP "
                "or FSDP2, or drop gates"
            )
        self.gates: HeadGates | None = None
        self.learns = False
        self._learning: GateLearning | None = None
        self._masks: dict[str, Tensor] = {}  # that hardening would have made at the last refresh
        self._waits = self._warned = False
        self._seed = torch.initial_seed() & 0x7FFF_FFFF  # a checkpoint brings that of its run

    @property
    def criterion(self) -> Criterion | None:
        """What scores heads now; None before the gates begin."""
        return None if self.gates is None else GateScores(self.gates)

    def check_layers(self, layers: Sequence[Layer]) -> None:
        """Raise ValueError, before anything trains, where the heads of these layers can have no such gates."""
        if self._config.gates is None:
            return
        gated_attentions(self._config, self._backend)
        if isinstance(self._config.init, Mapping):
            _check_named(self._config.init, layers)

    # ---- refreshes ------------------------------------------------------------------------------------------------

    def refresh(
        self,
        layers: Sequence[Layer],
        criterion: Criterion,
        rule: KeepRule,
        mode: MaskMode,
        common: dict[str, Any],
        *,
        last: bool,
    ) -> list[PruneEvent]:
        """Begin, say how the gates stand, or harden them, and return the rows. Collective.

        The dense weights are in place.

        Args:
            layers: The attentions.
            criterion: What scores heads before there are gates.
            rule: How many stay.
            mode: What masks mean after they are hardened.
            common: The fields that all rows share.
            last: Whether to harden them, if they have begun before.

        Raises:
            FloatingPointError: A score is NaN or Inf.
            MissingEvidence: The criterion has none for one of the layers.
        """
        gates = self.gates
        if gates is None:
            return self._begin(layers, criterion, rule, mode, common)
        common = {**common, "criterion": gates.kind, "beta": None}
        if self.learns and not last:
            found = self._foresee(layers, GateScores(gates), self._final_rule(gates, rule), mode, common)
            return self._told(found.events, gates, _LEARNING)
        final = self._final_rule(gates, rule, hardened=True)
        events = refresh_masks(layers, GateScores(gates), final, mode, self._backend, common)
        self.learns = False
        gates.detach()
        return self._told(events, gates, _HARDENED)

    def _begin(
        self,
        layers: Sequence[Layer],
        criterion: Criterion,
        rule: KeepRule,
        mode: MaskMode,
        common: dict[str, Any],
    ) -> list[PruneEvent]:
        if not self._backend.optimizers:
            raise ValueError(
                f"gates={self._config.gates!r} learn as the model trains, and no optimizer is known: pass that of the "
                "model, or drop gates to prune a finished model"
            )
        init, events, first = self._config.init, list[PruneEvent](), dict[str, Tensor]()
        if init == "emp" or rule.density is None:
            found = self._foresee(layers, criterion, rule, mode, common)
            keep, events = {d.group: d.keep for d in found.decisions}, found.events
            for decision in found.decisions if init == "emp" else ():
                scores = {found.scored[i].span.name: found.scored[i].scores for i in decision.members}
                size = sum(map(len, scores.values()))
                expected = decision.keep if rule.density is not None else rule.beta * decision.n_eff
                first |= first_probabilities(scores, min(expected, size))
        else:
            keep = _counts(layers, rule, common["scope"])
        if isinstance(init, Mapping):
            first = {name: torch.tensor(value, dtype=torch.float64) for name, value in init.items()}
        # The draws must be alike on all ranks, however each was seeded.
        self._seed = int(self._backend.from_all(torch.tensor(self._seed))[0])
        gates = self._made(layers)
        gates.begin(keep, first or None)
        self._take(gates)
        if not events:
            common = {**common, "criterion": gates.kind}
            events = self._foresee(layers, GateScores(gates), self._final_rule(gates, rule), mode, common).events
        return self._told(events, gates, _LEARNING)

    def _made(self, layers: Sequence[Layer]) -> HeadGates:
        config = self._config
        attentions = {one.name: one for one in gated_attentions(config, self._backend)}
        return HeadGates(
            [attentions[layer.name] for layer in layers],
            "hard_concrete" if config.gates == "hard_concrete" else "top_k",
            least=config.min_units if config.scope == "global" else 0,
            warmup=config.gate_warmup,
            seed=self._seed,
        )

    def _take(self, gates: HeadGates) -> None:
        self.gates, self.learns = gates, True
        self._learning = GateLearning(gates, self._config.gate_lr, self._backend)
        gates.attach()

    def _foresee(
        self, layers: Sequence[Layer], criterion: Criterion, rule: KeepRule, mode: MaskMode, common: dict[str, Any]
    ) -> Foreseen:
        before = [self._masks.get(layer.name) for layer in layers]
        found = foresee(layers, criterion, rule, mode, self._backend, common, before)
        self._masks = {layer.name: mask for layer, mask in zip(layers, found.masks, strict=True)}
        return found

    def _final_rule(self, gates: HeadGates, rule: KeepRule, *, hardened: bool = False) -> KeepRule:
        """Return the rule that keeps as many heads as are to be open now, or in the end."""
        counts = {g.name: g.keep if hardened else gates.count(g) for g in gates.groups}
        sizes = {g.name: g.size for g in gates.groups}
        # Half a head more, so that no rounding loses one.
        shares = {name: min((count + 0.5) / sizes[name], 1.0) for name, count in counts.items()}
        return replace(rule, beta=1.0, density=1.0, densities=shares, min_density=0.0, tolerance=0.0)

    def _told(self, events: Sequence[PruneEvent], gates: HeadGates, note: str) -> list[PruneEvent]:
        """Return rows that say how the gates of their groups stand."""
        if (names := gates.unreached) and not self._warned and not self._backend.rank:
            self._warned = True
            warn_the_user(
                f"nothing has passed the gates of {few(names)}: its attention was not called, or hands its heads "
                "to the output projection in a way that is not known; exclude it"
            )
        stats = {group.name: gates.stats(group) for group in gates.groups}
        return [replace(with_note(event, note), gates=stats[event.group]) for event in events]

    # ---- steps ----------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Take note that the optimizer has made a step that the gates have yet to follow."""
        self._waits = self.learns

    def follow(self) -> None:
        """Let the gates learn of the step that was waited for, if there was one. Collective then."""
        if self._waits and self.learns and self._learning is not None:
            self._learning.step()
        self._waits = False

    def attach(self) -> None:
        """Put the gates in the forward pass, if they learn."""
        if self.gates is not None and self.learns:
            self.gates.attach()

    def detach(self) -> None:
        """Take them out; what they have learned stays."""
        if self.gates is not None:
            self.gates.detach()

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any] | None:
        """Return the gates' state as plain numbers, lists and words; None where the settings ask for none."""
        gates, learning = self.gates, self._learning
        if gates is None or learning is None:
            return {"kind": self._config.gates, "seed": self._seed} if self._config.gates else None
        return {
            "kind": gates.kind,
            "learns": self.learns,
            "seed": gates.seed,
            "steps": gates.steps,
            "warmup": gates.warmup,
            "log_alpha": {name: gates.log_alpha.detach()[part].tolist() for name, part in gates.parts.items()},
            "groups": {g.name: [g.keep, g.first] for g in gates.groups},
            "learning": learning.record(),
        }

    def check(self, record: Any, layers: Sequence[Layer]) -> None:
        """Check what `record` returned against this run; changes nothing.

        Raises:
            ValueError: It is of other gates or attentions, or damaged.
        """
        kind = record.get("kind") if isinstance(record, dict) else record
        if kind != self._config.gates:
            raise ValueError(
                f"the checkpoint was trained with gates={kind!r}, this run has gates={self._config.gates!r}; resume "
                "with the same setting, or load only the model's weights to start anew"
            )
        if record is None:
            return
        try:
            numbers = [record["seed"]]
            sizes = {layer.name: layer.span.size for layer in layers}
            if "log_alpha" in record:  # else they had not begun
                sizes = {name: len(value) for name, value in record["log_alpha"].items()}
                numbers += [*record["groups"].values(), record["steps"], record["learning"]["mean_square"]]
            whole = all(isinstance(number, (int, float, list)) for number in numbers)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the state of its gates cannot be read ({error!r}); the checkpoint is damaged") from error
        if not whole or sizes != {layer.name: layer.span.size for layer in layers}:
            raise ValueError(
                f"its gates are those of other attentions ({', '.join(sizes) or 'none'}): resume with the same model, "
                "include and exclude"
            )

    def restore(self, record: Mapping[str, Any] | None, layers: Sequence[Layer]) -> None:
        """Stand where a run stood whose record was checked. The hooks follow with `attach`."""
        self.detach()
        self.gates, self._learning, self.learns, self._masks, self._waits = None, None, False, {}, False
        if record is None:
            return
        self._seed = int(record["seed"])
        if "log_alpha" not in record:
            return
        gates = self._made(layers)
        gates.warmup = int(record["warmup"])
        flat = torch.cat([torch.tensor(record["log_alpha"][name], dtype=torch.float32) for name in gates.parts])
        gates.resume(flat, record["groups"], int(record["steps"]))
        self.gates, self.learns = gates, bool(record["learns"])
        self._learning = GateLearning(gates, self._config.gate_lr, self._backend)
        self._learning.restore(record["learning"])


def _counts(layers: Sequence[Layer], rule: KeepRule, scope: str) -> dict[str, int]:
    """Return how many heads of each group a density keeps."""
    own = {layer.name: layer.span.size for layer in layers}
    sizes = {"global": sum(own.values())} if scope == "global" else own
    return {
        name: int(rule.of_group(name).counts(torch.tensor([0.0]), size, torch.tensor([float(size)])))
        for name, size in sizes.items()
    }


def _check_named(first: Mapping[str, Sequence[float]], layers: Sequence[Layer]) -> None:
    """Raise ValueError unless there is a number for each head."""
    sizes = {layer.name: layer.span.size for layer in layers}
    given = {name: len(value) for name, value in first.items()}
    if given != sizes:
        differ = sorted(name for name in {*sizes, *given} if sizes.get(name) != given.get(name))
        raise ValueError(
            f"init must give P(open) of each head of each attention; {', '.join(differ[:5])}: given "
            f"{[given.get(name, 0) for name in differ[:5]]}, there are {[sizes.get(name, 0) for name in differ[:5]]}"
        )
