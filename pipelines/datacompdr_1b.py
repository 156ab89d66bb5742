"""DataCompDR-1B: as datacompdr_12m, with 10 views per image (MobileCLIP, section 4).

Command: make submit RAY_ADDRESS=http://HEAD:8265 RECIPE=datacompdr_1b SHARDS='s3://..' STORE=s3://..
Machine: planned for a cluster; not run. Estimated from FLOPs at 55 % of an H200's measured peak: 2,993 GPU-hours for
         1.28 B images.
"""

from pipelines.datacompdr_12m import RECIPE as RECIPE_12M
from pipelines.datacompdr_12m import TRAINING as TRAINING_12M
from reinforce.config import ViewSet

RECIPE = RECIPE_12M.but(name="datacompdr_1b", view_sets={"base": ViewSet(num_views=10, view_px=224)})

# MobileCLIP's large setting: the paper's warm-up and average of weights; S0 to S2 take distill=1.
TRAINING = TRAINING_12M | {
    "student": "mobileclip_b",
    "global_batch_size": 65_536,
    "steps": 200_000,
    "distill": 0.75,
    "min_lr": 1e-6,
    "warmup": 2000,
    "ema_decay": 0.9995,
    "streams": 256,
}
