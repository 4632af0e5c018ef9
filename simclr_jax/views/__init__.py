"""Views of images: the recipe, what of it runs on the devices, and the batches of pretraining."""
