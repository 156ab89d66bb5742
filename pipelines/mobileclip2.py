"""MobileCLIP2's reinforcement (arXiv 2508.20691): teachers and captioner trained on DFN-2B, 30 views and 5 captions.

Command: make reinforce RECIPE=mobileclip2 SHARDS=.. STORE=..
Before:  hf download apple/mobileclip2_coca_dfn2b_s13b_mscoco38k_s12m_context77, and put its checkpoint where
         `CAPTIONER_FILE` says, or --set captioners.coca.pretrained=FILE. The weights have a research licence.
Machine: planned for a cluster of GPUs. Not run.
"""

from reinforce.config import Captioner, Recipe, Teacher, ViewSet

CAPTIONER_FILE = "checkpoints/mobileclip2_coca_dfn2b_s13b_mscoco38k_s12m_context77.pt"

RECIPE = Recipe(
    name="mobileclip2",
    teachers={
        "dfn2b": Teacher(model="ViT-L-14-quickgelu", pretrained="dfn2b"),
        "dfn2b_s39b": Teacher(model="ViT-L-14", pretrained="dfn2b_s39b"),
    },
    view_sets={"base": ViewSet(num_views=30, view_px=224)},
    captioners={"coca": Captioner(model="coca_ViT-L-14", pretrained=CAPTIONER_FILE, num_captions=5)},
    batch_size=256,
)

# The published 12 M setting, with the scales at which these two teach best by the paper's sweep.
TRAINING = {
    "student": "mobileclip_b",
    "dist_logit_scale": {"dfn2b": 70.0, "dfn2b_s39b": 60.0},
    "global_batch_size": 8192,
    "steps": 30_000,
    "lr": 1e-3,
    "warmup": 1000,
    "grad_checkpointing": True,
    "streams": 32,
}
