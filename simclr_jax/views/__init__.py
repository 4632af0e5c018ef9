"""Views of images: their recipe, the part that runs on the devices, and the batches of pretraining."""
