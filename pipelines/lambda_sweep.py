"""How much should a Mamba student listen to its teachers? The settings of that experiment's students.

Command: python -m pipelines lambda_sweep --data PREFIX (pipelines/experiments/lambda_sweep.py), or one training of it:
         clip-train fit --recipe lambda_sweep --shards .. --store .. --set distill=0.75
Machine: 2 CPU cores.
"""

from reinforce.config import ViewSet

VIEWS = ViewSet(num_views=10, view_px=64, scale=(0.35, 1.0), num_ops=1)
TRAINING = {
    "student": "mamba_tiny",
    "fresh_views": VIEWS,
    "global_batch_size": 32,  # there are only ten captions: in a large batch many are equal, and learning begins late
    # Chosen on validation, clothing, 400 steps, lambda 0 and 0.75 (docs/results/lambda.md); the warm-up is a quarter.
    "steps": 400,
    "lr": 7e-4,
    "warmup": 100,
    "eval_every_n_steps": 50,
    "precision": "fp32",
    "workers": 0,
    "report_to": [],
}
