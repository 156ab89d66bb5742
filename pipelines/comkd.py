"""ComKD-CLIP from a store (arXiv 2408.04145): a teacher is adapted to a domain, a student learns the domain's classes.

Command: clip-train adapt DATA, then clip-reinforce run .., then clip-train fit --recipe comkd .. (docs/comkd.md)
Machine: as the models ask for. Published: ViT-L/14 to ViT-B/16 at 224 px.
"""

CLASS_SET = "domain"

ADAPTATION: dict[str, object] = {}  # PromptSRC's settings are the defaults; the teacher is named on the command line
TRAINING = {
    "comkd": {"class_set": CLASS_SET},
    "student": "mamba_small",
    "global_batch_size": 64,
    "lr": 5e-4,
    "warmup": 20,
}
