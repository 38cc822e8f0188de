"""Mixture-of-Experts modules for training and for models of one's own.

config = for_moe(hidden_size=512, num_experts=16, top_k=2, balance="loss-free")
layer = build_layer(config)
output, report = layer(hidden)                 # [..., 512]; report.loss, report.counts, report.dropped
(loss + report.loss).backward(); optimizer.step(); layer.update_bias()   # the last one: loss-free layers only
"""

from .attention import SparseExpertAttention
from .configuration import Balance, MoEConfig, for_moe
from .experts import RoutedExperts
from .gating import Gating, TopKGate
from .layers import ExpertChoiceLayer, LayerReport, LossFreeMoELayer, MoELayer, build_layer
from .losses import expert_counts, expert_probabilities, load_balancing_loss, router_loss, router_z_loss

__all__ = [
    "Balance",
    "ExpertChoiceLayer",
    "Gating",
    "LayerReport",
    "LossFreeMoELayer",
    "MoEConfig",
    "MoELayer",
    "RoutedExperts",
    "SparseExpertAttention",
    "TopKGate",
    "build_layer",
    "expert_counts",
    "expert_probabilities",
    "for_moe",
    "load_balancing_loss",
    "router_loss",
    "router_z_loss",
]
