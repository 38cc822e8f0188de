"""Mixture-of-Experts modules for training and for models of one's own.

>>> import torch
>>> from moehive.kernels.nn import build_layer, for_moe
>>> layer = build_layer(for_moe(hidden_size=64, num_experts=8, top_k=2, balance="loss-free"))
>>> optimizer = torch.optim.AdamW(layer.parameters())
>>> hidden, wanted = torch.randn(2, 4, 16, 64)  # [B, S, H] each
>>> output, report = layer(hidden)
>>> loss = torch.nn.functional.mse_loss(hidden + output, wanted) + report.loss
>>> loss.backward()
>>> optimizer.step()
>>> layer.update_bias()  # loss-free layers only
>>> output.shape, int(report.counts.sum()), int(report.dropped)
(torch.Size([4, 16, 64]), 128, 0)
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
