"""A run on a cluster: what is sent, how, and the images and scripts that start one."""
