# SPDX-License-Identifier: Apache-2.0
"""Methods of distillation: one file each, on plain tensors."""

from kdlvfm.distillers.attention_transfer import AT, attention_transfer_loss
from kdlvfm.distillers.attnfd import AttnFD, attnfd_loss
from kdlvfm.distillers.baseline import Baseline
from kdlvfm.distillers.cirkd import CIRKD, cirkd_memory_loss, cirkd_pixel_loss
from kdlvfm.distillers.cskd import CSKD, cka_loss
from kdlvfm.distillers.cwd import CWD, cwd_loss
from kdlvfm.distillers.dist import DIST, dist_loss
from kdlvfm.distillers.dkd import DKD, dkd_loss
from kdlvfm.distillers.fitnet import FitNet, fitnet_loss
from kdlvfm.distillers.gram import Gram, gram_loss
from kdlvfm.distillers.i2ckd import I2CKD, i2ckd_loss
from kdlvfm.distillers.ifvd import IFVD, ifvd_loss
from kdlvfm.distillers.kd import KD, kd_loss
from kdlvfm.distillers.mgd import MGD, mgd_loss
from kdlvfm.distillers.ofa import OFA, ofa_loss
from kdlvfm.distillers.pairwise import Pairwise, pairwise_loss
from kdlvfm.distillers.pkd import PKD, pkd_loss
from kdlvfm.distillers.review_kd import ReviewKD, hcl_loss
from kdlvfm.distillers.rkd import RKD, rkd_angle_loss, rkd_distance_loss
from kdlvfm.distillers.rsd import RSD, rsd_loss
from kdlvfm.distillers.similarity_preserving import SP, sp_loss
from kdlvfm.distillers.token_relation import TokenRelation, image_relation_loss, token_relation_loss
from kdlvfm.distillers.vkd import VkD, vkd_loss

__all__ = [
    "AT",
    "CIRKD",
    "CSKD",
    "CWD",
    "DIST",
    "DKD",
    "I2CKD",
    "IFVD",
    "KD",
    "MGD",
    "OFA",
    "PKD",
    "RKD",
    "RSD",
    "SP",
    "AttnFD",
    "Baseline",
    "FitNet",
    "Gram",
    "Pairwise",
    "ReviewKD",
    "TokenRelation",
    "VkD",
    "attention_transfer_loss",
    "attnfd_loss",
    "cirkd_memory_loss",
    "cirkd_pixel_loss",
    "cka_loss",
    "cwd_loss",
    "dist_loss",
    "dkd_loss",
    "fitnet_loss",
    "gram_loss",
    "hcl_loss",
    "i2ckd_loss",
    "ifvd_loss",
    "image_relation_loss",
    "kd_loss",
    "mgd_loss",
    "ofa_loss",
    "pairwise_loss",
    "pkd_loss",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "rsd_loss",
    "sp_loss",
    "token_relation_loss",
    "vkd_loss",
]
