"""The samples: tars, images, and the views that are drawn from them."""
