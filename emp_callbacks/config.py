"""All settings of a pruner in one place, checked before anything runs."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from emp_callbacks.core.effective_number import check_beta
from emp_callbacks.count_checks import check_counts, check_rewiring
from emp_callbacks.criteria import DEFAULT_CRITERIA, ScoreFunction, criterion_name, make_criterion
from emp_callbacks.forward_checks import DYNAMIC_CRITERIA, check_forward
from emp_callbacks.gate_checks import GATES_ALONE, check_gates
from emp_callbacks.layer.mask_mode import MASK_MODES
from emp_callbacks.schedule import Ramp, Schedule, check_count
from emp_callbacks.setting_checks import OTHER_WORDS, check_choice, check_patterns, ends
from emp_callbacks.targets.feature_form import FeatureForm
from emp_callbacks.targets.positions import PositionsSource, function_for

TARGETS = tuple(DEFAULT_CRITERIA)
SCOPES = ("global", "tensor", "row")
# Norms and activations of different layers are no common currency: narrow layers would be emptied.
_DEFAULT_SCOPES = {"neurons": "tensor", "experts": "tensor", "kan_nodes": "tensor", "features": "tensor"}


@dataclass(frozen=True, kw_only=True)
class EMPConfig:
    """What EMP prunes, how and when; shared by the callback, the pruner and every recipe.

    Args:
        every_n_epochs: Refresh the masks after every n-th epoch, >= 1. Exclusive with `every_n_steps`.
        every_n_steps: Refresh the masks after every n-th optimizer step, >= 1.
        start: First epoch (or step) that ends in a refresh, counted from 1; default: `every_n_...`.
        stop: Last epoch (or step) that may end in a refresh; default: none. The last mask then stays.
        target: What is pruned together: "weights", "heads" (of attention), "neurons" (rows of Linear layers, channels
            of convolutions), "experts" (of mixtures), "kan_nodes"; or in the forward pass "features" (of activations),
            "attention_edges".
        criterion: How components are scored; default: the target's first. Weights: "magnitude", "taylor", "saliency",
            "wanda". Heads: "weight_norm", "taylor", "saliency", "activation", "output_norm" (dynamic heads: that one
            alone). Neurons: "weight_norm", "taylor", "saliency", "activation", "bn_scale". Experts: "reap",
            "weight_norm", "taylor", "saliency". KAN nodes: "spline", "weight_norm", "taylor", "saliency". Features:
            "activation", "taylor", "saliency". Attention edges: "attention_weight", "attention_logit". All but edges:
            "random" (fixed random scores, a control). Or a function of your own, in a recipe as "module.function":
            see `Criterion.score`.
        evidence_steps: Criteria that read gradients, inputs or activations gather them in this many optimizer steps
            before each refresh, >= 1; in the epoch before it if `every_n_epochs` counts.
        scope: Where scores compete: "global" (all layers together), "tensor" (within a layer), or "row" (within an
            output unit; weights only). Default: "global" for weights and heads, "tensor" for neurons, experts,
            nodes and features. Attention edges and dynamic features compete within a query row or a sample.
        beta: Factor on N_eff, > 0, or a Ramp from one value to another. 1 keeps N_eff components.
        mode: What a mask means between refreshes: "feedback" (dense weights keep training behind it),
            "project" (zeroed at the refresh, may grow back), "freeze" (zero for good), "rewire" (zero; at each refresh
            some of the kept are dropped and as many others grown, at a given density or pattern).
        include: Glob patterns that replace the default choice: on parameter names for weights, else on module names.
        exclude: Glob patterns of the same kind to leave out.
        min_density: Keep at least this fraction of each group, 0 to 1: a guard for the compounding modes.
        min_units: Where layers compete, keep at least this many heads, neurons, nodes or features of each, >= 0; one
            that competes alone always keeps one unit.
        tolerance: Keep floor(beta * N_eff + tolerance) units, in [0, 1): N_eff = 3.998 of 4 alike heads then keeps 4.
            Not for weights, of which there are enough.
        density: Keep this fraction of each group, in (0, 1], instead of N_eff: for baselines. Or a Ramp: gradual
            pruning goes from 1 to the density along a cubic curve (Zhu and Gupta, arXiv:1710.01878). Or "found", with
            mode="freeze": what is not 0 when the pruner is made, so that a sparse model trains on and stays sparse.
        shares: How layers that do not compete share `density`: "uniform" (each the same), "erk" (more for small layers,
            Erdos-Renyi-Kernel, arXiv:1911.11134), or relative densities by layer name. All together keep `density`.
        pattern: "N:M" keeps the N highest of every M neighbours along a weight's inputs, such as "2:4", which GPUs
            multiply faster, instead of N_eff; its rows say N_eff of each layer beside it. Weights whose inputs are no
            multiple of M are left out. Convolutions: along their input channels.
        grow: What "rewire" grows: the pruned weights of the largest mean |gradient| over the evidence window
            ("gradient": RigL, arXiv:1911.11134), or any ("random": SET, arXiv:1707.04780). They start at 0.
        drop_fraction: Fraction of the kept that "rewire" replaces at a refresh, in [0, 1), or a Ramp.
        observe_only: Measure and log, prune nothing.
        certify: Say in every row what pruning can have changed at most: the error of each layer's outputs for "wanda",
            the change of the loss to first order for "taylor". For "wanda" every layer's input features are also
            multiplied with each other in the evidence window: memory for inputs^2 numbers, and per step about as many
            operations as a forward pass of a layer with as many outputs as inputs.
        axis: What a feature is: "channel", "token" or "patch" (see `FeatureForm`).
        dynamic: Whether each sample keeps its own N_eff features, or each token its own heads of every attention,
            chosen anew in every forward pass.
        per: Who chooses them: each "sample", the default of features, or as causal models need each "token" its own
            channels or heads, the default of heads.
        center: What a pruned feature becomes: "zero" or "mean".
        patch_size: Pixels per side of a patch.
        apply: When the masks of features reach the forward pass: "always", or as dropout in "training" mode only, so
            that every evaluation is dense; rows then tell what training sees.
        choose: Which floor(beta * N_eff) features a sample keeps if `dynamic`: the "top" scores; or "gumbel": in
            training mode drawn without replacement, in proportion to their scores, from torch's default generator (see
            `FeatureForm`); in evaluation the top.
        gradient: What reaches the model through a pruned feature: "masked", nothing; "straight_through", the
            gradient of the output as if it were kept.
        rescale: Whether the kept features of a sample are multiplied by sum s / sum of the kept s if `dynamic`.
        gates: Heads: learned gates on what they hand to the output projection, in place of masks while they learn:
            "hard_concrete" (drawn, with a Lagrangian to the number that is to stay; Louizos et al., arXiv:1712.01312)
            or "top_k" (the highest, straight through). They begin at the first refresh, move with every optimizer
            step, and become an ordinary mask at the last one, by `stop` or where training ends. See `HeadGates`.
        init: How gates begin: "emp", P(open) in proportion to the criterion's scores, so that N_eff (times beta, or
            the density) are expected to be open; "open"; or attention -> P(open) of each of its heads, in (0, 1).
        gate_lr: Learning rate of the gates, > 0, in units of log alpha per step of Adam.
        gate_warmup: Optimizer steps over which the number of open gates moves to what is to stay, >= 0.
        positions: Where a batch says which of its positions count as evidence, so that padding does not: a key, looked
            up where the batch is a mapping that has it; or a function of the batch, in a recipe "module.function". It
            gives a mask of shape (B, T), nonzero where a position counts. None: all count.

    Raises:
        ValueError: A value or a combination is invalid; the message names it and the remedy.
    """

    every_n_epochs: int | None = None
    every_n_steps: int | None = None
    start: int | None = None
    stop: int | None = None
    target: str = "weights"
    criterion: str | ScoreFunction | None = None
    evidence_steps: int = 32
    scope: str | None = None
    beta: float | Ramp = 1.0
    mode: str = "feedback"
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    min_density: float = 0.0
    min_units: int = 1
    tolerance: float = 0.01
    density: float | Ramp | Literal["found"] | None = None
    shares: str | Mapping[str, float] = "uniform"
    pattern: str | None = None
    grow: str = "gradient"
    drop_fraction: float | Ramp = 0.3
    observe_only: bool = False
    certify: bool = False
    axis: str = "channel"
    dynamic: bool = False
    per: str | None = None
    center: str = "zero"
    patch_size: int = 4
    apply: str = "always"
    choose: str = "top"
    gradient: str = "masked"
    rescale: bool = False
    gates: str | None = None
    init: str | Mapping[str, Sequence[float]] = "emp"
    gate_lr: float = 0.1
    gate_warmup: int = 100
    positions: PositionsSource | None = "attention_mask"

    def __post_init__(self) -> None:
        check_choice("target", self.target, TARGETS)
        for name in ("observe_only", "certify", "dynamic", "rescale"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.target == "heads" and self.dynamic and self.criterion is None:
            object.__setattr__(self, "criterion", DYNAMIC_CRITERIA["heads"])
        make_criterion(self.criterion, self.target)
        if self.scope is None:
            default = "global" if self.pattern is None else "tensor"
            object.__setattr__(self, "scope", _DEFAULT_SCOPES.get(self.target, default))
        check_choice("scope", self.scope, SCOPES)
        check_choice("mode", self.mode, tuple(MASK_MODES))
        for name in ("include", "exclude"):
            check_patterns(name, getattr(self, name))
        for beta in ends(self.beta):
            check_beta(beta)
        check_counts(self)
        check_rewiring(self)
        self._check_schedule()
        check_count("evidence_steps", self.evidence_steps, least=1)
        check_count("min_units", self.min_units, least=0)
        if not (isinstance(self.tolerance, (int, float)) and 0 <= self.tolerance < 1):
            raise ValueError(f"tolerance must be a number of units in [0, 1), got {self.tolerance!r}")
        _check_positions(self.positions)
        check_forward(self)
        self._check_combination()
        check_gates(self)

    def _check_combination(self) -> None:
        """Raise where a setting means nothing for the target."""
        if self.scope == "row" and self.target != "weights":
            raise ValueError(
                f"scope='row' lets the weights of an output unit compete; target={self.target!r} has no such rows: use "
                "'global' or 'tensor'"
            )
        if self.is_dynamic and self.mode != "feedback":
            raise ValueError(f"mode={self.mode!r} keeps a mask, but here each sample has its own; use 'feedback'")
        if self.certify and not self.can_certify:
            raise ValueError(
                f"certify=True: no certificate is known for criterion {self.criterion_name!r} and target "
                f"{self.target!r}; use criterion 'wanda' (weights) or 'taylor' (weights, heads, neurons, kan_nodes). "
                "Without certify every row bounds the preserved mass, and emp inspect --data bounds the loss"
            )
        if self.target == "features" and self.mode == "project":
            raise ValueError("mode='project' zeroes weights, and features have none; use 'feedback' or 'freeze'")

    def _check_schedule(self) -> None:
        if self.every_n_epochs is not None and self.every_n_steps is not None:
            raise ValueError(
                f"every_n_epochs={self.every_n_epochs} and every_n_steps={self.every_n_steps} are both given; keep one"
            )
        if self.schedule.unit is None and (self.start is not None or self.stop is not None):
            raise ValueError(
                f"start={self.start}, stop={self.stop} need every_n_epochs or every_n_steps to count in; give one"
            )
        if self.ramps and self.schedule.unit is None:
            raise ValueError(
                f"the Ramp of {min(self.ramps)} needs every_n_epochs or every_n_steps to count in; give one"
            )

    @property
    def ramps(self) -> dict[str, Ramp]:
        """Setting -> how it moves, of those that move."""
        settings = {name: getattr(self, name) for name in ("beta", "density", "drop_fraction")}
        return {name: value for name, value in settings.items() if isinstance(value, Ramp)}

    def ramps_left(self, position: int) -> list[str]:
        """Return a line for beta and density where a Ramp has not come to its end at a position of the schedule."""
        kept = [(name, ramp) for name, ramp in self.ramps.items() if name != "drop_fraction"]
        lines = [ramp.left_at(position, name, self.schedule.unit) for name, ramp in kept]
        return [line for line in lines if line]

    @property
    def criterion_name(self) -> str:
        """Name of the criterion, as in the trajectory and in checkpoints."""
        return criterion_name(self.criterion, self.target)

    @property
    def feature_form(self) -> FeatureForm:
        """What a feature is and how it is masked."""
        settings = {field.name: getattr(self, field.name) for field in fields(FeatureForm)}
        usual = "token" if self.target == "heads" and self.dynamic else "sample"
        return FeatureForm(**{**settings, "per": self.per or usual})

    @property
    def is_dynamic(self) -> bool:
        """Whether masks are made in every forward pass, for each sample, token or query row by itself."""
        return self.target == "attention_edges" or (self.target in DYNAMIC_CRITERIA and self.dynamic)

    @property
    def masks_in_forward(self) -> bool:
        """Whether what modules hand on is masked, in the forward pass, and no weight."""
        return self.target == "features" or self.is_dynamic

    @property
    def masks_evaluation(self) -> bool:
        """Whether masks hold in evaluation mode, too; otherwise the density there is 1."""
        return not self.observe_only and self.apply == "always"

    @property
    def can_certify(self) -> bool:
        """Whether a certificate is known for the criterion and the target."""
        return self.target != "features" and make_criterion(self.criterion, self.target).certificate is not None

    @property
    def schedule(self) -> Schedule:
        """When to refresh."""
        if self.every_n_epochs is not None:
            return Schedule(unit="epoch", every=self.every_n_epochs, start=self.start, stop=self.stop)
        if self.every_n_steps is not None:
            return Schedule(unit="step", every=self.every_n_steps, start=self.start, stop=self.stop)
        return Schedule()

    def once(self, **settings: Any) -> EMPConfig:
        """Return the settings for one refresh, by hand, of a finished model: no schedule, and a moving beta at its end.

        Args:
            settings: Fields to replace. Another target brings its own criterion, scope and choice of modules; naming
                `beta` drops `density`, and the other way round.

        Raises:
            ValueError: A value or a combination is invalid.
        """
        target, criterion = settings.get("target", self.target), settings.get("criterion", self.criterion)
        dynamic = settings.get("dynamic", self.dynamic and target == self.target)
        in_forward = target in ("features", "attention_edges") or dynamic
        plain: dict[str, Any] = {
            **dict.fromkeys(("every_n_epochs", "every_n_steps", "start", "stop")),
            "beta": self.beta_at(sys.maxsize),
            "density": self.density_at(sys.maxsize),  # what "found" kept is all that is left to score
            "grow": "gradient",
            "drop_fraction": 0.3,
            "mode": "feedback" if in_forward else "project",
            "observe_only": False,
            "apply": "always",  # a finished model trains no more
            **GATES_ALONE,
        }
        if target != self.target:
            plain |= {**dict.fromkeys(("criterion", "scope", "include", "exclude", "per")), "dynamic": False}
        if (target, criterion) != (self.target, self.criterion):
            plain["certify"] = False  # what the new scores bound must be asked for anew
        counts: dict[str, Any] = {"density": None, "shares": "uniform"}
        counted = "beta" in settings or settings.get("density") is not None
        plain |= counts if "beta" in settings else {}
        plain |= {"beta": 1.0} if settings.get("density") is not None else {}
        if settings.get("pattern") is not None:
            plain |= {**counts, "beta": 1.0, "min_density": 0.0, "scope": None}
        elif self.pattern is not None and (counted or target != "weights"):
            plain |= {"pattern": None, "scope": None}
        return replace(self, **{**plain, **settings})

    def beta_at(self, position: int) -> float:
        """Return beta at a position of the schedule."""
        return self.beta.at(position) if isinstance(self.beta, Ramp) else float(self.beta)

    def density_at(self, position: int) -> float | None:
        """Return the density at a position of the schedule; None where N_eff decides, or the zeros that are there."""
        if isinstance(self.density, str):
            return None
        return self.density.at(position) if isinstance(self.density, Ramp) else self.density

    def drop_fraction_at(self, position: int) -> float:
        """Return the fraction of the kept that a refresh at a position of the schedule replaces."""
        dropped = self.drop_fraction
        return dropped.at(position) if isinstance(dropped, Ramp) else float(dropped)


def settled(config: Any, settings: Mapping[str, Any]) -> EMPConfig:
    """Return a configuration with some settings put over it, or over the defaults.

    Raises:
        ValueError: A value or a combination is invalid.
        TypeError: A setting has an unknown name, or `config` is something else.
    """
    check_names(settings)
    if config is not None and not isinstance(config, EMPConfig):
        remedy = "pass its entries by name: **settings" if isinstance(config, Mapping) else "pass settings by name"
        raise TypeError(f"config must be an EMPConfig, got {type(config).__name__}; {remedy}, as in every_n_steps=100")
    return EMPConfig(**settings) if config is None else replace(config, **settings)


def check_names(settings: Iterable[str]) -> None:
    """Raise TypeError, with the nearest valid name, unless every name is a field of EMPConfig."""
    known = [field.name for field in fields(EMPConfig)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(f"unknown setting {name!r}; {OTHER_WORDS.get(name, hint)}Settings: {', '.join(known)}")


def _check_positions(source: Any) -> None:
    if source is None:
        return
    if not (callable(source) or isinstance(source, str)) or source == "":
        raise ValueError(
            f"positions must be a key of the batch, a function of it ('module.function') or None, got {source!r}"
        )
    function_for(source)
