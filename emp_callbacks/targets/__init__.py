"""What is pruned together, and how names select it."""

from emp_callbacks.targets.adapters import adapted_weights
from emp_callbacks.targets.attention_check import AttentionCheck, check_attention
from emp_callbacks.targets.attention_edges import EdgeSite, edge_sites
from emp_callbacks.targets.attention_layout import AttentionLayout, register_attention
from emp_callbacks.targets.expert_units import experts
from emp_callbacks.targets.feature_form import FeatureForm
from emp_callbacks.targets.features import FeatureSite, feature_sites
from emp_callbacks.targets.heads import attention_heads
from emp_callbacks.targets.kan import kan_nodes
from emp_callbacks.targets.matrices import NOT_A_WEIGHT
from emp_callbacks.targets.names import canonical_name, few, match_names
from emp_callbacks.targets.neurons import left_out_neurons, neurons
from emp_callbacks.targets.units import MemberTarget, UnitTarget
from emp_callbacks.targets.weights import (
    NO_MULTIPLE,
    SURPRISING,
    LeftOut,
    WeightTarget,
    anything,
    left_out,
    prunable_weights,
)

UNIT_TARGETS = {"heads": attention_heads, "neurons": neurons, "experts": experts, "kan_nodes": kan_nodes}

__all__ = [
    "NOT_A_WEIGHT",
    "NO_MULTIPLE",
    "SURPRISING",
    "UNIT_TARGETS",
    "AttentionCheck",
    "AttentionLayout",
    "EdgeSite",
    "FeatureForm",
    "FeatureSite",
    "LeftOut",
    "MemberTarget",
    "UnitTarget",
    "WeightTarget",
    "adapted_weights",
    "anything",
    "attention_heads",
    "canonical_name",
    "check_attention",
    "edge_sites",
    "feature_sites",
    "few",
    "kan_nodes",
    "left_out",
    "left_out_neurons",
    "match_names",
    "neurons",
    "prunable_weights",
    "register_attention",
]
