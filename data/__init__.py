"""From a folder of images to a batch on the device; knows nothing of models or training."""
