"""The bundled samples, in a checkout of this project: emoji, two small teachers, a small captioner; to try things out.

Command: make reinforce (the store), make train (a student, and what it is compared with)
Machine: 2 CPU cores, no GPU.
"""

from reinforce.config import Captioner, Recipe, Teacher, ViewSet

RECIPE = Recipe(
    name="sample",
    teachers={
        "vit": Teacher(model="local-dir:samples/models/teacher_vit"),
        "conv": Teacher(model="local-dir:samples/models/teacher_conv"),
    },
    view_sets={"base": ViewSet(num_views=4, view_px=64)},
    # A small captioner is less certain: at temperature 1, the default, too many of its captions are wrong.
    captioners={"coca": Captioner(model="local-dir:samples/models/coca", num_captions=3, temperature=0.5)},
)

TRAINING = {
    "student": "mamba_tiny",
    "global_batch_size": 128,
    "epochs": 20,
    "warmup": 20,
    "precision": "fp32",
    "workers": 1,
}
