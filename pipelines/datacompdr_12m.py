"""DataCompDR-12M: 30 views and 5 captions per image, two ViT-L/14 teachers (MobileCLIP, section 4).

Command: make reinforce RECIPE=datacompdr_12m SHARDS='s3://bucket/datacomp_12m/{00000000..00001023}.tar' STORE=s3://..
Machine: planned for a few H100-class GPUs; not run. At the 44 images/s that one H100 reached with random weights
         (docs/results/gpu.md): 81 GPU-hours for 12.8 M images.
Store:   about 1.1 TB (36 embeddings of 2 x 768 bfloat16 per sample, 110.6 kB, compressed to about three quarters).
"""

from reinforce.config import Captioner, Recipe, Teacher, ViewSet

TEACHERS = {
    # OpenAI's weights were trained with QuickGELU; under plain ViT-L-14 they would be another teacher.
    "openai": Teacher(model="ViT-L-14-quickgelu", pretrained="openai"),
    "datacomp_xl": Teacher(model="ViT-L-14", pretrained="datacomp_xl_s13b_b90k"),
}
COCA = Captioner(model="coca_ViT-L-14", pretrained="mscoco_finetuned_laion2b_s13b_b90k", num_captions=5)

RECIPE = Recipe(
    name="datacompdr_12m",
    teachers=TEACHERS,
    view_sets={"base": ViewSet(num_views=30, view_px=224)},
    captioners={"coca": COCA},
    batch_size=256,
)

# MobileCLIP's ablation setting: ViT-B/16, lambda = 1, 30 k steps of 8,192.
TRAINING = {
    "student": "vit_b_16",
    "global_batch_size": 8192,
    "steps": 30_000,
    "lr": 1e-3,
    "warmup": 1000,
    "grad_checkpointing": True,
    "streams": 32,
}
