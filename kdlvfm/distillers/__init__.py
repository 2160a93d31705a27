# SPDX-License-Identifier: Apache-2.0
"""Methods of distillation: one file each, on plain tensors."""

from kdlvfm.core.align import align_scale
from kdlvfm.core.weight import Weight
from kdlvfm.distillers.afdcd import AfDCD, afdcd_loss
from kdlvfm.distillers.agglomerate import Agglomerate, PHISTransform, cosine_smooth_l1_loss
from kdlvfm.distillers.attention_transfer import AT, attention_transfer_loss
from kdlvfm.distillers.attnfd import AttnFD, attnfd_loss
from kdlvfm.distillers.baseline import Baseline
from kdlvfm.distillers.cirkd import CIRKD, cirkd_memory_loss, cirkd_pixel_loss
from kdlvfm.distillers.compose import Compose
from kdlvfm.distillers.crosskd import (
    CrossKD,
    crosskd_cls_loss,
    crosskd_giou_loss,
    crosskd_kl_loss,
)
from kdlvfm.distillers.cskd import CSKD, channel_attention, cka, cka_loss, position_attention
from kdlvfm.distillers.customkd import CustomKD
from kdlvfm.distillers.cwd import CWD, cwd_loss
from kdlvfm.distillers.data_free import DataFree
from kdlvfm.distillers.deit import DeiT, deit_loss
from kdlvfm.distillers.dist import DIST, dist_loss
from kdlvfm.distillers.dkd import DKD, dkd_loss
from kdlvfm.distillers.dkdm import DKDM, StatePool, dkdm_loss, dkdm_variance_loss
from kdlvfm.distillers.fgd import FGD, fgd_loss, fgd_masks
from kdlvfm.distillers.fitnet import FitNet, fitnet_loss
from kdlvfm.distillers.freekd import FreeKD, freekd_loss, haar_bands, haar_inverse
from kdlvfm.distillers.gram import Gram, gram_loss
from kdlvfm.distillers.i2ckd import I2CKD, class_prototypes, i2ckd_loss
from kdlvfm.distillers.idd import IDD, idd_loss
from kdlvfm.distillers.ifvd import IFVD, ifvd_loss
from kdlvfm.distillers.kd import KD, kd_loss
from kdlvfm.distillers.localization import LD, localization_loss, localization_regions
from kdlvfm.distillers.maskd import MasKD, maskd_loss
from kdlvfm.distillers.mgd import MGD, mgd_loss
from kdlvfm.distillers.ofa import OFA, ofa_loss
from kdlvfm.distillers.pairwise import Pairwise, pairwise_loss
from kdlvfm.distillers.pkd import PKD, pkd_loss
from kdlvfm.distillers.review_kd import ReviewKD, hcl_loss
from kdlvfm.distillers.rkd import RKD, rkd_angle_loss, rkd_distance_loss
from kdlvfm.distillers.rsd import RSD, rsd_loss
from kdlvfm.distillers.scale_kd import ScaleKD, scale_kd_loss
from kdlvfm.distillers.sckd import SCKD, gradient_gate
from kdlvfm.distillers.score_kd import ScoreKD, score_kd_loss
from kdlvfm.distillers.similarity_preserving import SP, sp_loss
from kdlvfm.distillers.synthetic_set import SyntheticSet
from kdlvfm.distillers.token_relation import TokenRelation, image_relation_loss, token_relation_loss
from kdlvfm.distillers.vkd import VkD, vkd_loss

__all__ = [
    "AT",
    "CIRKD",
    "CSKD",
    "CWD",
    "DIST",
    "DKD",
    "DKDM",
    "FGD",
    "I2CKD",
    "IDD",
    "IFVD",
    "KD",
    "LD",
    "MGD",
    "OFA",
    "PKD",
    "RKD",
    "RSD",
    "SCKD",
    "SP",
    "AfDCD",
    "Agglomerate",
    "AttnFD",
    "Baseline",
    "Compose",
    "CrossKD",
    "CustomKD",
    "DataFree",
    "DeiT",
    "FitNet",
    "FreeKD",
    "Gram",
    "MasKD",
    "PHISTransform",
    "Pairwise",
    "ReviewKD",
    "ScaleKD",
    "ScoreKD",
    "StatePool",
    "SyntheticSet",
    "TokenRelation",
    "VkD",
    "Weight",
    "afdcd_loss",
    "align_scale",
    "attention_transfer_loss",
    "attnfd_loss",
    "channel_attention",
    "cirkd_memory_loss",
    "cirkd_pixel_loss",
    "cka",
    "cka_loss",
    "class_prototypes",
    "cosine_smooth_l1_loss",
    "crosskd_cls_loss",
    "crosskd_giou_loss",
    "crosskd_kl_loss",
    "cwd_loss",
    "deit_loss",
    "dist_loss",
    "dkd_loss",
    "dkdm_loss",
    "dkdm_variance_loss",
    "fgd_loss",
    "fgd_masks",
    "fitnet_loss",
    "freekd_loss",
    "gradient_gate",
    "gram_loss",
    "haar_bands",
    "haar_inverse",
    "hcl_loss",
    "i2ckd_loss",
    "idd_loss",
    "ifvd_loss",
    "image_relation_loss",
    "kd_loss",
    "localization_loss",
    "localization_regions",
    "maskd_loss",
    "mgd_loss",
    "ofa_loss",
    "pairwise_loss",
    "pkd_loss",
    "position_attention",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "rsd_loss",
    "scale_kd_loss",
    "score_kd_loss",
    "sp_loss",
    "token_relation_loss",
    "vkd_loss",
]
